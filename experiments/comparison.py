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
    length = settings["max_length"]

    def losses(model, _, w, name):
        """-> (losses, tokens) of the Persona-CoT responses, the same of the plain answers, w."""
        if name == COT:
            asked = [cot_prompt(record["query"]) for record in records]
            prompts = model.encode_prompts(asked, length)
        both = []
        for key in ANSWERS:
            examples = model.examples(records, length, key)
            if name == COT:
                examples = [replace(example, prompt=prompt)
                            for example, prompt in zip(examples, prompts)]
            both.append(response_nll(model, examples, w))
        return *both, w

    measured = measure_rows(args, records, ROUTES, losses)
    # the first run, or the bare base where that run has no router yet
    first = Path(args.run[0]).name
    reference = first if first in measured else "bare base"
    nll_of_reference = measured[reference][0][0]
    p = activations(records)
    rows = []
    for name, ((nll, counts), (plain_nll, plain_counts), w) in measured.items():
        row = {"name": name, "loss per token": bootstrap(per_token(nll, counts), len(p))}
        if name != reference:
            # on the same tokens for both: a paired interval
            difference = per_token(nll - nll_of_reference, counts)
            row["difference"] = bootstrap(difference, len(p))
        prefers = nll / counts < plain_nll / plain_counts
        row["% prefers Persona-CoT"] = mean_interval(100 * prefers)
        if w is not None and w.shape[1] > 1:
            scores = break_ties(w.cpu().numpy())
            row["router mAP"] = mean_interval(average_precision(scores, p))
        rows.append(row)
    return {f"{len(p)} held-out records": rows}
