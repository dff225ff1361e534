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

from data import TRAITS, held_out, load_records, split
from experiments.common import SHORT, activations, held_out_examples, response_nll
from experiments.statistics import bootstrap, per_token
from plumbing.files import HERE, run_program, write_text

# high and low stand side by side: [1, 0, 3, 2, ...]
OPPOSITE = [i ^ 1 for i in range(len(TRAITS))]
# weights of one expert, from left out to alone
DIAL = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]


def losses_at(model, examples, w):
    """Mixing weights w (E,), the same for all -> each example's loss per token (n,), numpy."""
    w = w.to(model.device).expand(len(examples), -1)
    nll, counts = response_nll(model, examples, w)
    return nll / counts


def mean_where(values, p):
    """values, p (n, ...) -> the mean of some records' values where p is 1, by their indices."""
    return per_token(values * p, p)


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
        cells = zip(SHORT, row.round(1))
        matrix.append({"name": pole} | dict(cells))
    return {"control": measure_control(losses, p), "matrix": matrix}


def expert_losses(model, examples):
    """The loss per token of each example under each expert alone, w one-hot -> (n, E), numpy."""
    columns = []
    for one_hot in torch.eye(model.experts):
        columns.append(losses_at(model, examples, one_hot))
    return np.stack(columns, axis=1)


def pole_wins(losses):
    """Whether each expert has a lower loss than its opposite's, record by record.

    losses (n, E) -> (n, E) of 1, or 1/2 where they are equal, or 0.
    """
    return np.heaviside(losses[:, OPPOSITE] - losses, 0.5)


def expert_ranks(losses):
    """losses (n, E) -> the rank of each expert (n, E), 1 for the lowest loss; equal ones share."""
    above = losses[:, :, None] - losses[:, None, :]             # (n, E, E), each above each other
    # each expert counts itself as a half
    return 0.5 + np.heaviside(above, 0.5).sum(axis=2)


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
    rows = []
    for i, name in enumerate(["all poles", *TRAITS]):
        own = [i - 1] if i else slice(None)
        active = p[:, own]
        accuracy = mean_where(wins[:, own], active)
        rank = mean_where(ranks[:, own], active)
        rows.append({
            "name": name,
            "pairs": np.count_nonzero(active),
            "pole accuracy, %": bootstrap(accuracy, len(p)),
            "rank": bootstrap(rank, len(p)),
        })
    return rows


# ----------------------------------------------------------------------------------------- steering

STEERING = """
Loss per token of a pole's own records, as the weight of its expert grows and the other nine share
what is left. Gain: how much more the whole turn lowers it than that of the opposite's records.
Rising: in how many of the five steps that lead grows."""


def steering(model, settings, args):
    """--steering: how losses change as each expert's weight goes from 0 to 1."""
    records, examples = held_out_examples(model, settings, args)
    p = activations(records)
    rows = []
    for i, pole in enumerate(TRAITS):
        own = p[:, i]
        opposite = p[:, OPPOSITE[i]]
        # the records of neither would cost time and tell nothing
        either = np.flatnonzero(own + opposite)
        chosen = [examples[k] for k in either]
        losses = np.zeros((len(DIAL), len(p)))
        for step, value in enumerate(DIAL):
            w = dial_weights(i, value, model.experts)
            losses[step, either] = losses_at(model, chosen, w)
        curve, gain, rising = measure_dial(losses, own, opposite)
        row = {"name": pole}
        for value, loss in zip(DIAL, curve):
            row[f"w = {value}"] = loss
        rows.append(row | {"gain (difference)": gain, "rising": rising})
    return {"steering": rows}


def dial_weights(i, value, experts):
    """w (E,): `value` for expert i, what is left shared out equally among the others."""
    w = torch.full((experts,), (1 - value) / (experts - 1))
    w[i] = value
    return w


def measure_dial(losses, own, opposite):
    """Losses (len(DIAL), n) as an expert's weight grows -> the mean loss of its pole's records at
    each step, gain and rising.

    own, opposite (n,): p of the pole and of its opposite. `gain` is how much the turn from 0 to 1
    lowers the loss of the pole's records more than that of the opposite's; `rising` in how many
    steps that lead grows.
    """
    with np.errstate(invalid="ignore"):         # NaN where no record has the pole
        curve = losses @ own / own.sum()
        lead = losses @ opposite / opposite.sum() - curve
    fall = losses[0] - losses[-1]                               # (n,)
    fall_of_own = mean_where(fall, own)
    fall_of_opposite = mean_where(fall, opposite)
    gain = bootstrap(lambda i: fall_of_own(i) - fall_of_opposite(i), len(own))
    rising = np.count_nonzero(np.diff(lead) > 0)
    return curve.round(4).tolist(), gain, rising


# ---------------------------------------------------------------------------------------- the floor

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="FILE", help="where the shuffled records go")
    parser.add_argument("--data", default=HERE / "persona_cot.jsonl",
                        help="records (default: ours)")
    args = parser.parse_args()
    records = load_records(args.data)
    training, _ = split(records)
    order = iter(np.random.default_rng(0).permutation(len(training)))
    lines = []
    for record in records:
        other = record if held_out(record["query"]) else training[next(order)]
        traits = {key: other[key] for key in ("social_traits", "task_traits", "p")}
        lines.append(json.dumps(record | traits, ensure_ascii=False) + "\n")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    write_text(args.out, "".join(lines))
    print(f"{args.out}: {len(lines)} records")


if __name__ == "__main__":
    run_program(main)
