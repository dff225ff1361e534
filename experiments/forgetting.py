"""Forgetting: what have runs lost of what their base could do before?

    python -m experiments.evaluate --forgetting --run out/smollm2 --text english.txt

n texts of a kind.
"""

import math
from pathlib import Path

from data import Example
from experiments.common import fitting, response_nll, run_records
from experiments.statistics import bootstrap, per_token
from personafuse import load_run, read_settings
from plumbing.files import read_lines

KINDS = {"response": "persona answers", "naive_response": "plain answers"}

FORGETTING = """
Loss per token, and its difference to the bare base's, paired: above 0 is forgotten. Of the held-out
records' plain answers and, with --text, of neutral English, each line read with the router's
weights for it; beside them what was learned. Bits a byte compare bases with other tokenizers. In
brackets 95% intervals, by bootstrap over the texts; = marks a difference smaller than its own."""


def forgetting(args):
    """--forgetting: the bare base and all runs on answers and texts."""
    settings = read_settings(args.run[0])
    _, held = run_records(settings, tuple(KINDS), args.data, args.limit)
    records = fitting(held, settings)
    lines = [line.strip() for _, line in read_lines(args.text)] if args.text else []
    bare = {}                                   # what the bare base loses, by kind
    rows = []
    for run in args.run:
        model = None                            # two large ones need not fit at once
        model, _ = load_run(run, args.device, args.dtype)
        # the bare base once, with the first run
        routes = ["learned"] if bare else ["none", "learned"]
        kinds = read_kinds(model, settings["max_length"], records, lines)
        for kind, queries, texts, examples in kinds:
            size = len("".join(texts).encode())
            for route in routes:
                nll, counts = response_nll(model, examples, model.mixing_weights(queries, route))
                bare.setdefault(kind, nll)
                rows.append({
                    "name": "bare base" if route == "none" else Path(run).name,
                    "texts": kind,
                    "loss per token": bootstrap(per_token(nll, counts), len(nll)),
                    "difference": bootstrap(per_token(nll - bare[kind], counts), len(nll)),
                    "bits a byte": nll.sum() / math.log(2) / size,
                })
    return {"forgetting": sorted(rows, key=lambda row: row["texts"])}


def read_kinds(model, max_length, records, lines):
    """Yield what there is to read: its kind, the router's queries, the texts, and Examples."""
    queries = [record["query"] for record in records]
    for key, kind in KINDS.items():
        texts = [record[key] for record in records]
        yield kind, queries, texts, model.examples(records, max_length, key)
    if lines:
        limit = min(max_length, model.base.config.max_position_embeddings)
        encoded = [model.tokenizer.encode(line)[:limit] for line in lines]
        # nothing stands before a text: its first token is given
        examples = [Example(ids[:1], ids[1:], [], ()) for ids in encoded]
        yield "the text's lines", lines, lines, examples
