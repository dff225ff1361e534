"""Control: do the ten experts differ as their names say, and does a weight steer?

    python -m experiments.evaluate --run out/tiny --control
    python -m experiments.evaluate --run out/tiny --steering

Both look at losses of the held-out responses, per token, record by record. The records of a pole
are those with p_i = 1; the opposite of a pole is the other pole of the same trait.

n records, E = 10 experts.
"""

import json

import numpy as np
import torch

from data import TRAITS, load_records, make_examples, split
from experiments.statistics import bootstrap, print_table, shown
from personafuse import load_run
from plumbing import UserError

# the poles in the heads of columns, in the order of TRAITS
SHORT = ["O+", "O-", "C+", "C-", "E+", "E-", "A+", "A-", "N+", "N-"]
# high and low stand side by side, so that the opposite of each pole is its neighbour
OPPOSITE = [1, 0, 3, 2, 5, 4, 7, 6, 9, 8]
# weights of one expert, from left out to alone
DIAL = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]


# ------------------------------------------------------------------------------------------- losses

def load_experts_run(run, device, dtype):
    """A run with its ten experts -> (PersonaFuse, settings); UserError for a baseline's."""
    model, settings = load_run(run, device, dtype)
    if model.experts != len(TRAITS):
        raise UserError(f"{run} has {model.experts} expert, not one for each of the "
                        f"{len(TRAITS)} poles: give a run of --variant personafuse")
    return model, settings


def held_out_examples(model, settings):
    """The held-out records of a run that fit into its --max-length, and the same as Examples."""
    max_length = settings["max_length"]
    _, records = split(load_records(settings["data"]))
    fitting = []
    for record in records:
        prompt = model.tokenizer.encode_prompt(record["query"])
        if len(prompt) < max_length:
            fitting.append(record)
    if not fitting:
        raise UserError(f"{settings['data']} has no held-out record to measure with")
    tokenizers = model.tokenizer, model.encoder_tokenizer
    return fitting, make_examples(fitting, *tokenizers, max_length)


def activations(records):
    """p of each record -> (n, E), numpy."""
    return np.array([record["p"] for record in records])


def losses_at(model, examples, w):
    """Mixing weights w (E,), the same for all -> each example's loss per token (n,), numpy."""
    same_for_all = w.expand(len(examples), -1)                  # (n, E)
    nll, counts, _ = model.response_nll(examples, same_for_all)
    losses = nll / counts
    return losses.double().cpu().numpy()


def expert_losses(model, examples):
    """The loss per token of each example under each expert alone, w one-hot -> (n, E), numpy."""
    columns = []
    one_hots = torch.eye(model.experts, device=model.device)
    for one_hot in one_hots:
        columns.append(losses_at(model, examples, one_hot))
    return np.stack(columns, axis=1)


# ------------------------------------------------------------------------------------------ control

def pole_wins(losses):
    """Whether each expert has a lower loss than its opposite's, record by record.

    losses (n, E) -> (n, E) of 1, or 1/2 where they are equal, or 0.
    """
    opposite = losses[:, OPPOSITE]
    lower = losses < opposite
    equal = losses == opposite
    return lower + 0.5 * equal


def expert_ranks(losses):
    """losses (n, E) -> the rank of each expert (n, E), 1 for the lowest loss; equal ones share."""
    mine = losses[:, :, None]                                   # (n, E, 1)
    others = losses[:, None, :]                                 # (n, 1, E)
    lower = (others < mine).sum(axis=2)
    equal = (others == mine).sum(axis=2)
    equal = equal - 1                                           # each expert equals itself
    return 1 + lower + equal / 2


def control_matrix(losses, p):
    """How much better than the mean expert is expert i on the records of pole j?

    losses (n, E), p (n, E) -> (E, E), in nats a token; NaN where no record has the pole.
    """
    mean_expert = losses.mean(axis=1, keepdims=True)            # (n, 1)
    better = mean_expert - losses                               # (n, E)
    matrix = np.full((len(TRAITS), len(TRAITS)), np.nan)
    for j in range(len(TRAITS)):
        active = p[:, j] == 1
        if active.any():
            matrix[:, j] = better[active].mean(axis=0)
    return matrix


def mean_where(values, p, records):
    """The mean of some records' values where their p is 1; NaN where none is.

    values, p: (n, E), or (n,) for one pole; records: indices.
    """
    chosen = values[records][p[records] == 1]
    return chosen.mean() if len(chosen) else np.nan


def measure_control(losses, p):
    """The figures of --control: accuracy in % and rank, over all poles and by pole, the matrix."""
    wins = 100 * pole_wins(losses)
    ranks = expert_ranks(losses)
    result = accuracy_and_rank(wins, ranks, p)
    result["by_pole"] = {}
    for i, pole in enumerate(TRAITS):
        one_pole = accuracy_and_rank(wins[:, i], ranks[:, i], p[:, i])
        result["by_pole"][pole] = one_pole
    result["matrix"] = control_matrix(losses, p).round(4).tolist()
    return result


def accuracy_and_rank(wins, ranks, p):
    """Over the (record, active pole) pairs, their number too. All (n, E), or (n,) for one pole."""
    n = len(p)
    accuracy = bootstrap(lambda records: mean_where(wins, p, records), n)
    rank = bootstrap(lambda records: mean_where(ranks, p, records), n)
    return {"pairs": int(p.sum()), "accuracy": accuracy, "rank": rank}


def control(args, device, dtype):
    """--control: each run's control matrix, pole accuracy and rank."""
    results = {}
    for run in args.run:
        model, settings = load_experts_run(run, device, dtype)
        records, examples = held_out_examples(model, settings)
        losses = expert_losses(model, examples)
        results[run] = measure_control(losses, activations(records))
        results[run]["records"] = len(records)
    if args.json:
        print(json.dumps(results, indent=1))
    else:
        print_control(results)


def print_control(results):
    print("Pole accuracy: how often the expert of an active pole has the lower loss of the two\n"
          "of its trait (chance 50%). Rank: its place among the ten (chance 5.5). In brackets 95%\n"
          "intervals, by bootstrap over the held-out records.\n")
    lines = []
    for run, result in results.items():
        cells = control_cells(result)
        lines.append([run, result["records"], *cells])
    print_table(["", "records", "pairs", "pole accuracy, %", "rank"], lines)

    for run, result in results.items():
        print(f"\n{run}, by pole")
        lines = []
        for pole, row in result["by_pole"].items():
            cells = control_cells(row)
            lines.append([pole, *cells])
        print_table(["", "records", "pole accuracy, %", "rank"], lines)

        print(f"\n{run}: how much lower than the mean expert's is the loss of each expert (row)\n"
              "on the records of each pole (column), in hundredths of a nat a token")
        lines = []
        for pole, row in zip(TRAITS, result["matrix"]):
            hundredths = [100 * value for value in row]
            cells = [f"{value:+.0f}" for value in hundredths]
            lines.append([pole, *cells])
        print_table(["", *SHORT], lines)


def control_cells(result):
    accuracy = shown(result["accuracy"], 1)
    rank = shown(result["rank"])
    return result["pairs"], accuracy, rank


# ----------------------------------------------------------------------------------------- steering

def dial_weights(i, value, experts, device=None):
    """w (E,): `value` for expert i, what is left shared out equally among the others."""
    others = (1 - value) / (experts - 1)
    w = torch.full((experts,), others, device=device)
    w[i] = value
    return w


def turn_dial(model, examples, i, p):
    """Losses (len(DIAL), n) as expert i's weight grows, of the records of its pole and of its
    opposite's; NaN for the others.
    """
    both = np.flatnonzero(p[:, i] + p[:, OPPOSITE[i]])
    chosen = [examples[k] for k in both]
    losses = np.full((len(DIAL), len(p)), np.nan)
    for step, value in enumerate(DIAL):
        w = dial_weights(i, value, model.experts, model.device)
        losses[step, both] = losses_at(model, chosen, w)
    return losses


def measure_dial(losses, own, opposite):
    """What `turn_dial` found -> the mean losses of both groups at each step, and what it comes to.

    own, opposite (n,): p of the pole and of its opposite. `gain` is how much the turn from 0 to 1
    lowers the loss of the pole's records more than that of the opposite's; `rising` in how many
    steps that lead grows.
    """
    own_curve = losses[:, own == 1].mean(axis=1)
    opposite_curve = losses[:, opposite == 1].mean(axis=1)
    lead = opposite_curve - own_curve
    fall = losses[0] - losses[-1]                               # (n,)

    def gain(records):
        return mean_where(fall, own, records) - mean_where(fall, opposite, records)

    rising = np.diff(lead) > 0
    return {
        "own": own_curve.round(4).tolist(),
        "opposite": opposite_curve.round(4).tolist(),
        "gain": bootstrap(gain, len(own)),
        "rising": int(rising.sum()),
    }


def measure_steering(model, examples, p):
    """{pole: what `measure_dial` finds of its dial}; p (n, E)."""
    dials = {}
    for i, pole in enumerate(TRAITS):
        own = p[:, i]
        opposite = p[:, OPPOSITE[i]]
        losses = turn_dial(model, examples, i, p)
        dials[pole] = measure_dial(losses, own, opposite)
    return dials


def steering(args, device, dtype):
    """--steering: the weight of one expert from 0 to 1, the others sharing what is left."""
    results = {}
    for run in args.run:
        model, settings = load_experts_run(run, device, dtype)
        records, examples = held_out_examples(model, settings)
        results[run] = measure_steering(model, examples, activations(records))
    if args.json:
        print(json.dumps({"dial": DIAL, "runs": results}, indent=1))
    else:
        print_steering(results)


def print_steering(results):
    print("Loss per token of a pole's own records and of its opposite's, as the weight of the\n"
          "pole's expert grows and the other nine share what is left. Gain: how much the whole\n"
          "turn lowers the first more than the second. Rising: in how many steps that lead grows.")
    steps = [f"w = {value}" for value in DIAL]
    for run, dials in results.items():
        print(f"\n{run}")
        lines = []
        for pole, dial in dials.items():
            own = [f"{loss:.2f}" for loss in dial["own"]]
            opposite = [f"{loss:.2f}" for loss in dial["opposite"]]
            rising = f"{dial['rising']} of {len(DIAL) - 1}"
            lines.append([pole, "own", *own, shown(dial["gain"]), rising])
            lines.append(["", "opposite's", *opposite, "", ""])
        print_table(["", "records", *steps, "gain", "rising"], lines)
