"""The held-out records: what runs of one base lose on them, and how well their routers rank.

    python -m experiments.evaluate --run out/tiny --run out/tiny-direct

A row of the table is a model and a way to mix its experts; n records, E experts.
"""

from dataclasses import replace
from pathlib import Path

from experiments.answers import cot_prompt
from experiments.common import (COT, activations, break_ties, fitting, measure_rows, response_nll,
                                run_records)
from experiments.statistics import bootstrap, mean_interval, per_token
from personafuse import read_settings
from router import average_precision

ANSWERS = ("response", "naive_response")
ROUTES = ("random1", "random2", "random5", "uniform")
COMPARISON = """
Held-out records; in brackets 95% intervals, by bootstrap over the records. The difference is that
of the loss to the first run's, paired; = marks one smaller than its interval: not told from 0 by
these records."""


def comparison(args):
    """Runs of one base on its held-out records, beside the bare base, Persona-CoT prompting, Random
    Route, uniform weights and an oracle that mixes by p/|p|.
    """
    settings = read_settings(args.run[0])
    _, held = run_records(settings, ANSWERS, args.data, args.limit)
    records = fitting(held, settings)

    def losses(model, settings, w, name):
        """-> (losses, tokens) of the Persona-CoT responses, the same of the plain answers, w."""
        both = []
        for key in ANSWERS:
            examples = model.examples(records, settings["max_length"], key)
            if name == COT:
                examples = ask_by_prompt(model, examples, records)
            both.append(response_nll(model, examples, w))
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
    for name, ((nll, counts), (plain_nll, plain_counts), w) in measured.items():
        loss = per_token(nll, counts)
        row = {"name": name, "loss per token": bootstrap(loss, n)}
        if name != reference:
            # on the same records for both: a paired interval
            row["difference"] = bootstrap(lambda i: loss(i) - loss_of_reference(i), n)
        prefers = nll / counts < plain_nll / plain_counts
        row["% prefers Persona-CoT"] = mean_interval(100 * prefers)
        if w is not None and w.shape[1] > 1:
            scores = break_ties(w.cpu().numpy())
            row["router mAP"] = mean_interval(average_precision(scores, p))
        rows.append(row)
    return {f"{n} held-out records": rows}


def ask_by_prompt(model, examples, records):
    """The Examples behind the Persona-CoT prompt, cut on the left to fit the base's context."""
    context = model.base.config.max_position_embeddings
    asked = []
    for example, record in zip(examples, records):
        prompt = model.tokenizer.encode_prompt(cot_prompt(record["query"]))
        room = context - len(example.answer)
        asked.append(replace(example, prompt=prompt[-room:]))
    return asked
