"""Queries from public data sets, or from files."""

import csv
import json
import random
from typing import NamedTuple

from plumbing.files import UserError


class Source(NamedTuple):
    hub: str        # the data set's name on the hub
    part: dict      # which part of it
    field: str      # where a row holds a text or a list of turns


# the four that the paper took its 100,000 queries from
SOURCES = {
    "sharegpt": Source("RyokoAI/ShareGPT52K", {"data_files": "sg_90k_part*.json"}, "conversations"),
    "personahub": Source("proj-persona/PersonaHub", {"name": "instruction"}, "synthesized text"),
    "wildchat": Source("allenai/WildChat-1M", {}, "conversation"),
    "infinity": Source("BAAI/Infinity-Instruct", {"name": "0625"}, "conversations"),
}


def sample_queries(sources, n, seed, field=None):
    """n records {"query": ..., "source": ...}, in equal parts from `sources`, shuffled together.

    A source is a name of SOURCES, or a file with its `field`.
    """
    records = {}            # by words, over all sources: a query of two of them is taken once
    for k, source in enumerate(sources):
        wanted = (n + k) // len(sources)        # these sum to n, even where n has a remainder
        before = len(records)
        if source in SOURCES:
            rows = read_hub(SOURCES[source], seed)
            row_field = SOURCES[source].field
        elif field:
            rows = list(read_file(source))
            random.Random(seed).shuffle(rows)
            row_field = field
        else:
            raise UserError(f"--source {source}: none of {', '.join(SOURCES)}, "
                            "and a file of your own needs --field")
        for row in rows:
            if len(records) - before == wanted:
                break
            query = usable_query(row, row_field)
            if query:
                # capitals and spaces apart, each query comes once
                words = " ".join(query.lower().split())
                records.setdefault(words, {"query": query, "source": source})
        found = len(records) - before
        shortage = f", which is all; {wanted} were wanted" if found < wanted else ""
        print(f"{source}: {found} queries{shortage}")
    shuffled = list(records.values())
    random.Random(seed).shuffle(shuffled)
    return shuffled


def read_hub(source, seed):
    """Yield the rows of a Source, as dicts, shuffled as far as can be done under way."""
    try:
        from datasets import load_dataset       # optional: only whoever asks the hub needs it
        # streamed: the first rows come at once, and the rest is not downloaded
        rows = load_dataset(source.hub, split="train", streaming=True, **source.part)
        yield from rows.shuffle(seed=seed, buffer_size=10_000)
    except ImportError:
        raise UserError(f"{source.hub} needs another library: pip install datasets")
    except Exception as error:      # the hub, the network and Arrow have dozens of their own
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"cannot read {source.hub}: {message}; if it is gated, ask for access "
                        "there, then `hf auth login`")


def read_file(path):
    """Yield the rows of a CSV or JSON file, or of one of any other name with JSON in each line."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if str(path).endswith(".csv"):
                csv.field_size_limit(2**31 - 1)     # conversations are longer than the default
                yield from csv.DictReader(file)
            elif str(path).endswith(".json"):
                yield from json.load(file)
            else:
                for line in filter(str.strip, file):
                    yield json.loads(line)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}")


def usable_query(row, field):
    """What the user says first in a row, or None where that is no text of theirs, has fewer than 3
    words or more than 1,000, or is not in English, if the row tells the language.

    A row holds a text, or the turns of a conversation: {"from": ..., "value": ...} or
    {"role": ..., "content": ...}.
    """
    if not isinstance(row, dict) or field not in row:
        raise UserError(f"a row without {field!r}, so give another --field: {str(row)[:200]}")
    value = row[field]
    if isinstance(value, list):
        turns = [turn for turn in value if isinstance(turn, dict)]
        value = None
        for turn in turns:
            speaker = turn.get("from", turn.get("role"))
            if speaker in ("human", "user"):
                value = turn.get("value", turn.get("content"))
            # a conversation that the assistant opens goes on from a page that is not here
            if speaker != "system":
                break
    language = row.get("language") or row.get("langdetect") or "en"
    if not isinstance(value, str) or str(language).lower() not in ("en", "english"):
        return None
    return value.strip() if 3 <= len(value.split()) <= 1000 else None
