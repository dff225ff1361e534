"""The held-out records: what runs of one base lose on them, how well their routers rank, and what
they have forgotten.

    python -m experiments.evaluate --run out/tiny --run out/tiny-direct
    python -m experiments.evaluate --run out/tiny --forgetting --text english.txt

A row of a table is a model and a way to mix its experts; n records, E experts.
"""

import math
import re
from dataclasses import replace
from pathlib import Path

from data import Example
from experiments.answers import cot_prompt
from experiments.common import (COT, SHORT, activations, auc_interval, break_ties, fitting,
                                measure_rows, pole_auc, response_losses, run_records)
from experiments.statistics import bootstrap, mean_interval, per_token
from personafuse import read_settings
from plumbing.files import read_lines
from router import average_precision

ANSWERS = ("response", "naive_response")
ROUTES = ("cot", "random1", "random2", "random5", "uniform", "oracle")


def held_out_records(args):
    """The held-out records of the first run that fit into its --max-length."""
    settings = read_settings(args.run[0])
    _, held = run_records(settings, ANSWERS, args.data, args.limit)
    return fitting(held, settings)


# --------------------------------------------------------------------------------------- comparison

COMPARISON = """
Held-out records; in brackets 95% intervals, by bootstrap over the records. The difference is that
of the loss to the first run's, paired; = marks one smaller than its interval: not told from 0 by
these records."""


def comparison(args):
    """Runs of one base on its held-out records, beside the bare base, Persona-CoT prompting, Random
    Route, uniform weights and an oracle that mixes by p/|p|.
    """
    records = held_out_records(args)

    def losses(model, settings, w, name):
        """-> (losses, tokens) of the Persona-CoT responses, the same of the plain answers, w."""
        both = []
        for key in ANSWERS:
            examples = model.examples(records, settings["max_length"], key)
            if name == COT:
                examples = ask_by_prompt(model, examples, records)
            both.append(response_losses(model, examples, w))
        return *both, w

    measured = measure_rows(args, records, ROUTES, losses)
    # the first run, or the bare base where that run has no router yet
    reference = Path(args.run[0]).name
    if reference not in measured:
        reference = "bare base"
    loss_of_reference = per_token(*measured[reference][0])
    p = activations(records)
    n = len(p)
    rows = []
    auc = []
    for name, ((nll, counts), (plain_nll, plain_counts), w) in measured.items():
        loss = per_token(nll, counts)
        row = {"name": name, "loss per token": bootstrap(loss, n)}
        if name != reference:
            # on the same records for both: a paired interval
            row["difference"] = bootstrap(lambda i: loss(i) - loss_of_reference(i), n)
        prefers = nll / counts < plain_nll / plain_counts
        row["% prefers Persona-CoT"] = mean_interval(100 * prefers)
        if w is not None and w.shape[1] > 1:
            w = w.double().cpu().numpy()
            row["router mAP"] = mean_interval(average_precision(break_ties(w), p))
            row["mean AUC"] = auc_interval(w, p)
            # what knows nothing of the query ranks by chance: half
            if not re.search(", (random|uniform)", name):
                by_pole = pole_auc(w, p).round(4).tolist()
                auc.append({"name": name, **dict(zip(SHORT, by_pole))})
        rows.append(row)
    return {f"{n} held-out records": rows, "AUC by pole": auc}


def ask_by_prompt(model, examples, records):
    """The Examples behind the Persona-CoT prompt, cut on the left to fit the base's context."""
    context = model.base.config.max_position_embeddings
    asked = []
    for example, record in zip(examples, records):
        prompt = model.tokenizer.encode_prompt(cot_prompt(record["query"]))
        room = context - len(example.answer)
        asked.append(replace(example, prompt=prompt[-room:]))
    return asked


# --------------------------------------------------------------------------------------- forgetting

FORGETTING = """
Loss per token, and its difference to the bare base's, paired: above 0 is forgotten. Plain answers
and, with --text, neutral English, each line read with the router's weights for it; beside them what
was learned. Bits a byte compare bases with other tokenizers. In brackets 95% intervals, by
bootstrap over the texts; = marks a difference smaller than its own."""


def forgetting(args):
    """What runs have lost of what their base could do before."""
    records = held_out_records(args)

    def record_losses(key):
        def losses(model, settings, w, name):
            examples = model.examples(records, settings["max_length"], key)
            return response_losses(model, examples, w)
        return measure_rows(args, records, (), losses)

    rows = []
    for key in ANSWERS:
        rows += forgotten(key, [record[key] for record in records], record_losses(key))
    if args.text:
        texts = [line.strip() for _, line in read_lines(args.text)][:args.limit]

        def text_losses(model, settings, w, name):
            examples = []
            for text in texts:
                # nothing stands before a text: its first token is given
                ids = model.tokenizer.encode(text)[:settings["max_length"]]
                examples.append(Example(ids[:1], ids[1:], [], ()))
            return response_losses(model, examples, w)

        lines = [{"query": text} for text in texts]
        rows += forgotten(args.text, texts, measure_rows(args, lines, (), text_losses))
    return {"forgetting": rows}


def forgotten(kind, texts, measured):
    """{model: (losses (n,), tokens (n,))} of n texts of one kind -> rows of the table."""
    base = per_token(*measured["bare base"])
    size = sum(len(text.encode()) for text in texts)
    rows = []
    for name, (nll, counts) in measured.items():
        loss = per_token(nll, counts)
        rows.append({
            "name": name,
            "texts": kind,
            "loss per token": bootstrap(loss, len(nll)),
            "difference": bootstrap(lambda i: loss(i) - base(i), len(nll)),
            "bits a byte": round(nll.sum() / math.log(2) / size, 4),
        })
    return rows
