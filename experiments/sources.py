"""Queries from public data sets, or from files."""

import csv
import io
import json
import random

from plumbing.files import UserError, read_lines, read_text

# the four that the paper took its 100,000 queries from: the data set on the hub, which part of it,
# and where a row holds a text or a list of turns
SOURCES = {
    "sharegpt": ("RyokoAI/ShareGPT52K", {"data_files": "sg_90k_part*.json"}, "conversations"),
    "personahub": ("proj-persona/PersonaHub", {"name": "instruction"}, "synthesized text"),
    "wildchat": ("allenai/WildChat-1M", {}, "conversation"),
    "infinity": ("BAAI/Infinity-Instruct", {"name": "0625"}, "conversations"),
}


def sample_queries(sources, n, seed, field=None):
    """n records {"query": ..., "source": ...}, in equal parts from `sources`, shuffled together.

    A source is a name of SOURCES, or a file with its `field`.
    """
    records = {}            # by words, over all sources: a query of two of them is taken once
    for k, source in enumerate(sources):
        wanted = (n + k) // len(sources)        # these sum to n, even where n has a remainder
        before = len(records)
        rows, row_field = open_source(source, field, seed)
        for row in rows:
            if len(records) - before == wanted:
                break
            query = first_words(row, row_field)
            # capitals and spaces apart, each query comes once
            words = tuple(query.lower().split())
            if 3 <= len(words) <= 1000:
                records.setdefault(words, {"query": query, "source": source})
        print(f"{source}: {len(records) - before} of {wanted} queries")
    return random.Random(seed).sample(list(records.values()), len(records))


def open_source(source, field, seed):
    """A source -> its rows in random order, and where in a row its query is."""
    if source in SOURCES:
        name, part, field = SOURCES[source]
        return read_hub(name, part, seed), field
    rows = read_file(source)
    return random.Random(seed).sample(rows, len(rows)), field


def read_hub(name, part, seed):
    """Yield the rows of a data set on the hub, shuffled as far as can be done under way."""
    try:
        from datasets import load_dataset       # optional: only whoever asks the hub needs it
        # streamed: the first rows come at once, and the rest is not downloaded
        rows = load_dataset(name, split="train", streaming=True, **part)
        yield from rows.shuffle(seed=seed, buffer_size=10_000)
    except Exception as error:      # the hub, the network and Arrow have dozens of their own
        raise UserError(f"cannot read {name}: {type(error).__name__}: {error}; it needs "
                        "`pip install datasets`, and if it is gated, ask for access there, then "
                        "`hf auth login`")


def read_file(path):
    """The rows of a CSV or JSON file, or of one of any other name with JSON in each line."""
    try:
        if str(path).endswith(".csv"):
            csv.field_size_limit(2**31 - 1)     # conversations are longer than the default
            return list(csv.DictReader(io.StringIO(read_text(path))))
        if str(path).endswith(".json"):
            return list(json.loads(read_text(path)))
        return [json.loads(line) for _, line in read_lines(path)]
    except (ValueError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}")


def first_words(row, field):
    """What the user says in a row, or first in a conversation; "" where the first to speak is not
    the user, and where the row tells a language that is not English.

    A row holds a text, or turns: {"from": ..., "value": ...} or {"role": ..., "content": ...}.
    """
    try:
        text = row[field]
        if isinstance(text, list):
            turn = text[0] if text else {}
            # what somebody else opens goes on from a page that is not here, or from a system prompt
            by_user = turn.get("from", turn.get("role")) in ("human", "user")
            text = turn.get("value", turn.get("content")) if by_user else ""
        language = row.get("language") or row.get("langdetect") or "en"
        return text.strip() if text and language.lower().startswith("en") else ""
    except (LookupError, TypeError, AttributeError):
        raise UserError(f"a row without a text or turns as {field!r}, so give --field: "
                        f"{str(row)[:200]}")
