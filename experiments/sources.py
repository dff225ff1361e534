"""Queries from public data sets, or from files: each distinct one as likely as any other."""

import csv
import hashlib
import heapq
import itertools
import json
from typing import NamedTuple

from plumbing import UserError


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
        name, path = split_source(source, field)
        rows = itertools.islice(read_rows(name, path, seed), max_rows)
        row_field = SOURCES[name].field if name else field
        wanted = (n + k) // len(sources)        # these sum to n, even where n has a remainder
        best = heapq.nsmallest(wanted, hashed_queries(rows, row_field, seed, known))

        shortage = f", which is all; {wanted} were wanted" if len(best) < wanted else ""
        print(f"{source}: {len(best)} queries{shortage}")
        for key, query in best:
            chosen.append((key, {"query": query, "source": name or path}))
    chosen.sort(key=lambda pair: pair[0])
    return [record for _, record in chosen]


def split_source(source, field):
    """"sharegpt" -> (name, None); "sharegpt=FILE" -> (name, FILE); "FILE" -> ("", FILE)."""
    if source in SOURCES:
        return source, None
    name, _, path = source.rpartition("=")
    known = name in SOURCES
    own_file = not name and field
    if not known and not own_file:
        raise UserError(f"--source {source}: none of {', '.join(SOURCES)}, "
                        "and a file of your own needs --field")
    return name, path


def read_rows(name, path, seed):
    """Yield the rows, as dicts, of a file, or if `path` is None of one of SOURCES on the hub."""
    try:
        if path:
            yield from read_file(path)
        else:
            yield from read_hub(SOURCES[name], seed)
    except ImportError as error:
        package = error.name.partition(".")[0]
        raise UserError(f"{path or name} needs another library: pip install {package}")
    except Exception as error:      # the hub, the network and Arrow have dozens of their own
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        reason = getattr(error, "strerror", None) or message
        if path:
            raise UserError(f"cannot read {path}: {reason}")
        raise UserError(f"cannot read {SOURCES[name].hub}: {reason}; if it is gated, ask for "
                        "access there, then `hf auth login`; or give a copy of it: "
                        f"--source {name}=FILE")


def read_hub(source, seed):
    from datasets import load_dataset
    # streamed: the first rows come at once, and --rows spares the download of the rest
    rows = load_dataset(source.hub, split="train", streaming=True, **source.part)
    return rows.shuffle(seed=seed, buffer_size=1000)


def read_file(path):
    """Yield the rows of a Parquet, CSV, JSON or (any other name) JSONL file."""
    if path.endswith(".parquet"):
        from pyarrow.parquet import ParquetFile
        for batch in ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
        return
    with open(path, encoding="utf-8", newline="") as file:
        if path.endswith(".csv"):
            csv.field_size_limit(2**31 - 1)     # conversations are longer than the default field
            yield from csv.DictReader(file)
        elif path.endswith(".json"):
            yield from json.load(file)
        else:
            for line in file:
                if line.strip():
                    yield json.loads(line)


def hashed_queries(rows, field, seed, known):
    """Yield (hash of seed and query, query) for each row with a usable query.

    Usable are 3 to 1,000 words, in English where the row tells the language, that are not in
    `known`, a set of hashes, already: capitals and spaces apart, each query comes once.
    """
    for row in rows:
        query = first_query(row, field)
        if query is None or not is_english(row) or not 3 <= len(query.split()) <= 1000:
            continue
        text = f"{seed} {' '.join(query.lower().split())}"
        key = hashlib.sha256(text.encode(errors="replace")).digest()
        if key not in known:
            known.add(key)
            yield key, query.strip()


def is_english(row):
    language = row.get("language") or row.get("langdetect") or "en"
    return str(language).lower() in ("en", "english")


def first_query(row, field):
    """What the user says first in a row, or None where that is no text of theirs."""
    if not isinstance(row, dict):
        raise UserError(f"a row without {field!r}; it has a {type(row).__name__}: "
                        "give another --field")
    if field not in row:
        raise UserError(f"a row without {field!r}; it has {', '.join(map(str, row))}: "
                        "give another --field")
    value = row[field]
    if isinstance(value, list):
        value = first_turn(value)
    return value if isinstance(value, str) else None


def first_turn(turns):
    """What the user says in the first of a conversation's turns, system messages apart, or None.

    A turn is {"from": ..., "value": ...} or {"role": ..., "content": ...}.
    """
    for turn in turns:
        if not isinstance(turn, dict):
            continue
        speaker = turn.get("from", turn.get("role"))
        if speaker == "system":
            continue
        # a conversation that the assistant opens goes on from a page that is not here
        return turn.get("value", turn.get("content")) if speaker in ("human", "user") else None
    return None
