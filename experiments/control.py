"""Control: do the ten experts differ as their names say, and does a weight steer?

    python -m experiments.evaluate --run out/tiny --control
    python -m experiments.evaluate --run out/tiny --steering

Both look at losses of the held-out responses, per token, record by record. The records of a pole
are those with p_i = 1; the opposite of a pole is the other pole of the same trait.

The floor of both is a run on the same records with the traits of other records. They change places
in the training split; the held-out records keep theirs, so that both runs are measured alike:

    python -m experiments.control out/shuffled.jsonl
    python train.py --stage all --data out/shuffled.jsonl --out out/tiny-shuffled

n records, E = 10 experts.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from data import TRAITS, held_out, load_records
from experiments.common import SHORT, activations, held_out_examples, response_nll
from experiments.statistics import bootstrap
from plumbing.files import HERE, atomic_write, run_program

# high and low stand side by side, so that the opposite of each pole is its neighbour
OPPOSITE = [1, 0, 3, 2, 5, 4, 7, 6, 9, 8]
# weights of one expert, from left out to alone
DIAL = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]


def losses_at(model, examples, w):
    """Mixing weights w (E,), the same for all -> each example's loss per token (n,), numpy."""
    w = w.to(model.device).expand(len(examples), -1)
    nll, counts = response_nll(model, examples, w)
    return nll / counts


def mean_where(values, p, records):
    """The mean of some records' values where their p is 1; NaN where none is.

    values, p: (n, E), or (n,) for one pole; records: indices.
    """
    chosen = values[records][p[records] == 1]
    return chosen.mean() if len(chosen) else np.nan


# ------------------------------------------------------------------------------------------ control

CONTROL = """
Pole accuracy: how often the expert of an active pole has the lower loss of the two of its trait
(chance 50%). Rank: its place among the ten (chance 5.5). Matrix: how much lower than the mean
expert's the loss of each expert (row) is on the records of each pole (column), in hundredths of a
nat a token. In brackets 95% intervals, by bootstrap over the held-out records."""


def control(model, settings, args):
    """--control: pole accuracy, rank and matrix of the experts of a run."""
    records, examples = held_out_examples(model, settings, args)
    losses = expert_losses(model, examples)
    p = activations(records)
    matrix = []
    for pole, row in zip(TRAITS, 100 * control_matrix(losses, p)):
        matrix.append({"name": pole, **dict(zip(SHORT, row.round(1).tolist()))})
    return {"control": measure_control(losses, p), "matrix": matrix}


def expert_losses(model, examples):
    """The loss per token of each example under each expert alone, w one-hot -> (n, E), numpy."""
    columns = [losses_at(model, examples, one_hot) for one_hot in torch.eye(model.experts)]
    return np.stack(columns, axis=1)


def pole_wins(losses):
    """Whether each expert has a lower loss than its opposite's, record by record.

    losses (n, E) -> (n, E) of 1, or 1/2 where they are equal, or 0.
    """
    opposite = losses[:, OPPOSITE]
    return (losses < opposite) + 0.5 * (losses == opposite)


def expert_ranks(losses):
    """losses (n, E) -> the rank of each expert (n, E), 1 for the lowest loss; equal ones share."""
    mine = losses[:, :, None]                                   # (n, E, 1)
    others = losses[:, None, :]                                 # (n, 1, E)
    lower = (others < mine).sum(axis=2)
    # each expert equals itself
    equal = (others == mine).sum(axis=2) - 1
    return 1 + lower + equal / 2


def control_matrix(losses, p):
    """How much better than the mean expert is expert i on the records of pole j?

    losses (n, E), p (n, E) -> (E, E), in nats a token; NaN where no record has the pole.
    """
    better = losses.mean(axis=1, keepdims=True) - losses        # (n, E)
    with np.errstate(invalid="ignore"):
        return better.T @ p / p.sum(axis=0)


def measure_control(losses, p):
    """losses (n, E), p (n, E) -> the rows of the table, over all poles and by pole."""
    wins = 100 * pole_wins(losses)
    ranks = expert_ranks(losses)
    columns = {"all poles": slice(None)} | {pole: i for i, pole in enumerate(TRAITS)}
    rows = []
    for name, poles in columns.items():
        row = {"name": name, "pairs": int(p[:, poles].sum())}
        for figure, values in (("pole accuracy, %", wins), ("rank", ranks)):
            row[figure] = bootstrap(
                lambda records: mean_where(values[:, poles], p[:, poles], records), len(p))
        rows.append(row)
    return rows


# ----------------------------------------------------------------------------------------- steering

STEERING = """
Loss per token of a pole's own records and of its opposite's, as the weight of the pole's expert
grows and the other nine share what is left. Gain: the difference of how much the whole turn lowers
the one and the other. Rising: in how many of the five steps that lead grows."""


def steering(model, settings, args):
    """--steering: how losses change as each expert's weight goes from 0 to 1."""
    records, examples = held_out_examples(model, settings, args)
    p = activations(records)
    rows = []
    for i, pole in enumerate(TRAITS):
        # the records of either pole; those of neither would cost time and tell nothing
        both = np.flatnonzero(p[:, i] + p[:, OPPOSITE[i]])
        chosen = [examples[k] for k in both]
        losses = np.full((len(DIAL), len(p)), np.nan)
        for step, value in enumerate(DIAL):
            losses[step, both] = losses_at(model, chosen, dial_weights(i, value, model.experts))
        own, opposite, gain, rising = measure_dial(losses, p[:, i], p[:, OPPOSITE[i]])
        steps = [f"w = {value}" for value in DIAL]
        rows.append({"name": pole, "records": "own", **dict(zip(steps, own)),
                     "gain (difference)": gain, "rising": rising})
        rows.append({"records": "opposite's", **dict(zip(steps, opposite))})
    return {"steering": rows}


def dial_weights(i, value, experts):
    """w (E,): `value` for expert i, what is left shared out equally among the others."""
    w = torch.full((experts,), (1 - value) / (experts - 1))
    w[i] = value
    return w


def measure_dial(losses, own, opposite):
    """Losses (len(DIAL), n) as an expert's weight grows -> the mean losses of both groups at each
    step, gain and rising.

    own, opposite (n,): p of the pole and of its opposite. `gain` is how much the turn from 0 to 1
    lowers the loss of the pole's records more than that of the opposite's; `rising` in how many
    steps that lead grows.
    """
    own_curve = losses[:, own == 1].mean(axis=1)
    opposite_curve = losses[:, opposite == 1].mean(axis=1)
    fall = losses[0] - losses[-1]                               # (n,)

    def gain(records):
        return mean_where(fall, own, records) - mean_where(fall, opposite, records)

    rising = np.diff(opposite_curve - own_curve) > 0
    curves = own_curve.round(4).tolist(), opposite_curve.round(4).tolist()
    return *curves, bootstrap(gain, len(own)), int(rising.sum())


# ---------------------------------------------------------------------------------------- the floor

def shuffle_labels(records):
    """Records -> the same records, those of the training split with each other's labels."""
    training = [i for i, record in enumerate(records) if not held_out(record["query"])]
    order = np.random.default_rng(0).permutation(training)
    shuffled = list(records)
    for i, other in zip(training, order):
        labels = {}
        for key in ("social_cue", "social_traits", "task_cue", "task_traits"):
            if key in records[other]:
                labels[key] = records[other][key]
        shuffled[i] = records[i] | labels
    return shuffled


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("out", metavar="FILE", help="where the shuffled records go")
    add("--data", default=str(HERE / "persona_cot.jsonl"), help="records (default: ours)")
    args = parser.parse_args()
    lines = []
    for record in shuffle_labels(load_records(args.data)):
        # p follows from the traits: who reads the file makes it anew
        del record["p"]
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.out) as tmp:
        tmp.write_text("".join(lines), encoding="utf-8")
    print(f"{args.out}: {len(lines)} records")


if __name__ == "__main__":
    run_program(main)
