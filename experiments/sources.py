"""Queries from public data sets, or from files: each distinct one as likely as any other."""

import csv
import hashlib
import heapq
import itertools
import json
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


def sample_queries(sources, n, seed, field=None, max_rows=None):
    """n records {"query": ..., "source": ...}, in equal parts from `sources`, shuffled together.

    A source is a name of SOURCES, NAME=FILE, or a FILE with its `field`. Taken are the queries with
    the least hashes: each distinct one is as likely as any other wherever it stands, and no more
    than are wanted are held at a time.
    """
    known = set()               # over all sources: a query that two of them hold is taken once
    chosen = []
    for k, source in enumerate(sources):
        # "sharegpt" has a name alone, "FILE" a path alone
        name, _, path = (source, "", "") if source in SOURCES else source.rpartition("=")
        if name not in SOURCES and (name or not field):
            raise UserError(f"--source {source}: none of {', '.join(SOURCES)}, "
                            "and a file of your own needs --field")
        rows = itertools.islice(read_rows(name, path, seed), max_rows)
        row_field = SOURCES[name].field if name else field
        wanted = (n + k) // len(sources)        # these sum to n, even where n has a remainder
        best = heapq.nsmallest(wanted, hashed_queries(rows, row_field, seed, known))
        shortage = f", which is all; {wanted} were wanted" if len(best) < wanted else ""
        print(f"{source}: {len(best)} queries{shortage}")
        chosen += [(key, {"query": query, "source": name or path}) for key, query in best]
    chosen.sort(key=lambda pair: pair[0])
    return [record for _, record in chosen]


def read_rows(name, path, seed):
    """Yield the rows, as dicts, of a file, or where there is no path of one of SOURCES."""
    if path:
        yield from read_file(path)
        return
    source = SOURCES[name]
    try:
        from datasets import load_dataset       # optional: only whoever asks the hub needs it
        # streamed: the first rows come at once, and --rows spares the download of the rest
        rows = load_dataset(source.hub, split="train", streaming=True, **source.part)
        yield from rows.shuffle(seed=seed, buffer_size=1000)
    except ImportError:
        raise UserError(f"{name} needs another library: pip install datasets")
    except Exception as error:      # the hub, the network and Arrow have dozens of their own
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"cannot read {source.hub}: {message}; if it is gated, ask for access "
                        f"there, then `hf auth login`; or give a copy: --source {name}=FILE")


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


def hashed_queries(rows, field, seed, known):
    """Yield (hash of seed and query, query) for each row with a usable query.

    Usable are 3 to 1,000 words, in English where the row tells the language, that are not in
    `known`, a set of hashes, already: capitals and spaces apart, each query comes once.
    """
    for row in rows:
        query = first_query(row, field)
        language = row.get("language") or row.get("langdetect") or "en"
        if query is None or str(language).lower() not in ("en", "english"):
            continue
        words = query.lower().split()
        key = hashlib.sha256(f"{seed} {' '.join(words)}".encode(errors="replace")).digest()
        if 3 <= len(words) <= 1000 and key not in known:
            known.add(key)
            yield key, query.strip()


def first_query(row, field):
    """What the user says first in a row, or None where that is no text of theirs.

    A row holds a text, or the turns of a conversation: {"from": ..., "value": ...} or
    {"role": ..., "content": ...}.
    """
    if not isinstance(row, dict) or field not in row:
        has = ", ".join(map(str, row)) if isinstance(row, dict) else f"a {type(row).__name__}"
        raise UserError(f"a row without {field!r}; it has {has}: give another --field")
    value = row[field]
    if isinstance(value, list):
        turns = [turn for turn in value if isinstance(turn, dict)]
        spoken = [turn for turn in turns if turn.get("from", turn.get("role")) != "system"]
        first = spoken[0] if spoken else {}
        # a conversation that the assistant opens goes on from a page that is not here
        asked = first.get("from", first.get("role")) in ("human", "user")
        value = first.get("value", first.get("content")) if asked else None
    return value if isinstance(value, str) else None
