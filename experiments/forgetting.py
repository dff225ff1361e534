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
    base = {}
    rows = []
    for run in args.run:
        model = None                            # two large ones need not fit at once
        model, settings = load_run(run, args.device, args.dtype)
        for kind, queries, texts, examples in read_kinds(model, settings, records, lines):
            if kind not in base:
                base[kind] = response_nll(model, examples)
                rows.append(row("bare base", kind, texts, base[kind], base[kind]))
            nll = response_nll(model, examples, model.mixing_weights(queries))
            rows.append(row(Path(run).name, kind, texts, nll, base[kind]))
    return {"forgetting": sorted(rows, key=lambda row: row["texts"])}


def read_kinds(model, settings, records, lines):
    """Yield what there is to read: its kind, the router's queries, the texts, and Examples."""
    for key, kind in KINDS.items():
        queries = [record["query"] for record in records]
        texts = [record[key] for record in records]
        yield kind, queries, texts, model.examples(records, settings["max_length"], key)
    if lines:
        examples = []
        for line in lines:
            # nothing stands before a text: its first token is given
            ids = model.tokenizer.encode(line)[:settings["max_length"]]
            examples.append(Example(ids[:1], ids[1:], [], ()))
        yield "the text's lines", lines, lines, examples


def row(name, kind, texts, measured, of_base):
    """measured, of_base: (losses (n,), tokens (n,)) of n texts -> a row of the table."""
    nll, counts = measured
    loss, base = per_token(nll, counts), per_token(*of_base)
    size = sum(len(text.encode()) for text in texts)
    return {
        "name": name,
        "texts": kind,
        "loss per token": bootstrap(loss, len(nll)),
        "difference": bootstrap(lambda i: loss(i) - base(i), len(nll)),
        "bits a byte": round(nll.sum() / math.log(2) / size, 4),
    }
