"""Feedback: how many remarks ("/more kind") until answers show what a reader asks for?

    python -m experiments.evaluate --feedback --run out/smollm2 --limit 12

A simulated reader of each pole puts held-out queries that do not call for it, and after each answer
asks for more of the pole; an answer shows it when the automatic reader of experiments/expression.py
finds it likelier than not.

n queries, E = 10 experts.
"""

import numpy as np

from data import WORDS
from experiments.answers import write_answers
from experiments.common import run_records
from experiments.expression import make_reader
from experiments.statistics import mean_interval
from sample import sampling

REMARKS = range(6)

FEEDBACK = """
Of the answers to queries that do not call for a pole, how many show it after so many remarks that
ask for more of it, in %; until: remarks that half of the readers need; weight: the expert's, at the
last. At most: of the records' own responses that have the pole. In brackets 95% intervals, by
bootstrap over the queries of all poles."""


def feedback(model, settings, args):
    """--feedback: answers after 0 to 5 remarks for each pole, --limit queries each."""
    training, held = run_records(settings, data=args.data)
    reader = make_reader(training)
    options = sampling(settings, args)
    rows = []
    all_shown = []
    for i, word in enumerate(WORDS):
        queries = [record["query"] for record in held if not record["p"][i]][:args.limit]
        own = [record["response"] for record in held if record["p"][i]]
        shown = []
        for count in REMARKS:
            remarks = [0] * len(WORDS)
            remarks[i] = count
            w = model.mixing_weights(queries, remarks=remarks)                  # (n, E)
            answers = write_answers(model, queries, w, args.max_new_tokens, **options)
            shown.append(shows(reader, answers, i))                             # (n,)
        all_shown.append(shown)                                                 # (6, n)
        row = row_of(f"/more {word}", shown, np.mean)
        row["at most"] = shows(reader, own, i).mean()
        row["weight"] = w[:, i].mean().item()
        rows.append(row)
    total = np.concatenate(all_shown, axis=1)                                   # (6, 10 n)
    return {"feedback": [row_of("all poles", total, mean_interval), *rows]}


def shows(reader, answers, i):
    """Answers -> whether each shows pole i (n,), as 100 or 0."""
    return 100 * (reader.scores(answers)[:, i] > 0)


def row_of(name, shown, figure):
    """shown (6, n) -> a row of the table, with a figure of those after each number of remarks."""
    row = {"name": name}
    for count, of in zip(REMARKS, shown):
        row[f"{count} remarks"] = figure(of)
    return row | {"until": until(shown)}


def until(shown):
    """shown (6, n), 100 where an answer shows the pole -> how many remarks it takes until half of
    the n readers have seen it once; None where five do not suffice.
    """
    seen = np.maximum.accumulate(shown, axis=0).mean(axis=1)                    # (6,)
    enough = np.flatnonzero(seen >= 50)
    return int(enough[0]) if len(enough) else None
