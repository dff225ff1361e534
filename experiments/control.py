"""Control: do the ten experts differ as their names say, and does a weight steer?

    python -m experiments.evaluate --run out/tiny --control
    python -m experiments.evaluate --run out/tiny --steering

Both look at losses of the held-out responses, each per token and record by record: "pole i" are the
records whose p_i is 1, and the opposite of a pole is the other pole of the same trait.
"""

import json

import numpy as np
import torch

from data import TRAITS, load_records, make_examples, split
from experiments.statistics import bootstrap, print_table, shown
from lora import merge, unmerge
from personafuse import load_run
from plumbing import UserError

# "high openness" -> "O+", for the heads of columns
SHORT = [pole.split()[1][0].upper() + ("+" if pole.startswith("high") else "-") for pole in TRAITS]
# the poles stand in pairs, so that the opposite of each is its neighbour
OPPOSITE = [i + 1 if i % 2 == 0 else i - 1 for i in range(len(TRAITS))]
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
    _, records = split(load_records(settings["data"]))
    fitting = []
    for record in records:
        if len(model.tokenizer.encode_prompt(record["query"])) < settings["max_length"]:
            fitting.append(record)
    if not fitting:
        raise UserError(f"{settings['data']} has no held-out record to measure with")
    examples = make_examples(fitting, model.tokenizer, model.encoder_tokenizer,
                             settings["max_length"])
    return fitting, examples


def activations(records):
    """p of each record -> (n, 10), numpy."""
    return np.array([record["p"] for record in records])


def losses_at(model, examples, w):
    """Mixing weights w (E,), the same for all -> each example's loss per token (n,), numpy.

    With the weights merged, ten experts cost what the plain model costs.
    """
    originals = merge(model.base, w)
    nll, counts, _ = model.response_nll(examples)
    unmerge(model.base, originals)
    return (nll / counts).double().cpu().numpy()


def expert_losses(model, examples):
    """The loss per token of each example under each expert alone, w one-hot -> (n, E), numpy."""
    columns = []
    for one_hot in torch.eye(model.experts, device=model.device):
        columns.append(losses_at(model, examples, one_hot))
    return np.stack(columns, axis=1)


# ------------------------------------------------------------------------------------------ control

def pole_wins(losses, p):
    """Whether the expert of an active pole has a lower loss than the opposite's.

    losses (n, 10), p (n, 10) -> (n, 10): 1 where it has, 1/2 where they are equal, 0 where it has
    not and where the pole is not active.
    """
    opposite = losses[:, OPPOSITE]
    wins = (losses < opposite) + 0.5 * (losses == opposite)
    return wins * p


def expert_ranks(losses):
    """losses (n, E) -> the rank of each expert (n, E), 1 for the lowest loss; equal ones share."""
    lower = (losses[:, None, :] < losses[:, :, None]).sum(axis=2)
    equal = (losses[:, None, :] == losses[:, :, None]).sum(axis=2)      # counts the expert itself
    return 1 + lower + (equal - 1) / 2


def control_matrix(losses, p):
    """How much better than the mean expert is expert i on the records of pole j?

    losses (n, E), p (n, E) -> (E, E), in nats a token; NaN where no record has the pole.
    """
    better = losses.mean(axis=1, keepdims=True) - losses                # (n, E)
    count = p.sum(axis=0).astype(float)
    count[count == 0] = np.nan
    return better.T @ p / count


def share(values, p, records):
    """The mean of values (n, E) over the active poles of some records; NaN where there are none."""
    active = p[records].sum()
    return (values[records] * p[records]).sum() / active if active else np.nan


def measure_control(losses, p):
    """The figures of --control: accuracy in %, rank, both by pole too, and the matrix."""
    n = len(p)
    wins = pole_wins(losses, p)
    ranks = expert_ranks(losses)
    by_pole = {}
    for i, pole in enumerate(TRAITS):
        one = [i]                       # a list, so that the columns stay a matrix
        by_pole[pole] = {
            "records": int(p[:, i].sum()),
            "accuracy": bootstrap(lambda k: 100 * share(wins[:, one], p[:, one], k), n),
            "rank": bootstrap(lambda k: share(ranks[:, one], p[:, one], k), n),
        }
    return {
        "pairs": int(p.sum()),
        "accuracy": bootstrap(lambda k: 100 * share(wins, p, k), n),
        "rank": bootstrap(lambda k: share(ranks, p, k), n),
        "by_pole": by_pole,
        "matrix": control_matrix(losses, p).round(4).tolist(),
    }


def control(args, device, dtype):
    """--control: each run's control matrix, pole accuracy and rank."""
    results = {}
    for run in args.run:
        model, settings = load_experts_run(run, device, dtype)
        records, examples = held_out_examples(model, settings)
        results[run] = measure_control(expert_losses(model, examples), activations(records))
        results[run]["records"] = len(records)
    if args.json:
        print(json.dumps(results, indent=1))
        return
    print("Pole accuracy: how often the expert of an active pole has the lower loss of the two\n"
          "of its trait (chance 50%). Rank: its place among the ten (chance 5.5). In brackets 95%\n"
          "intervals, by bootstrap over the held-out records.\n")
    print_table(["", "records", "pairs", "pole accuracy, %", "rank"],
                [[run, result["records"], result["pairs"], shown(result["accuracy"], 1),
                  shown(result["rank"])] for run, result in results.items()])
    for run, result in results.items():
        print(f"\n{run}, by pole")
        print_table(["", "records", "pole accuracy, %", "rank"],
                    [[pole, row["records"], shown(row["accuracy"], 0), shown(row["rank"], 1)]
                     for pole, row in result["by_pole"].items()])
        print(f"\n{run}: how much lower than the mean expert's is the loss of each expert (row) on\n"
              "the records of each pole (column), in hundredths of a nat a token")
        print_table(["", *SHORT], matrix_lines(result["matrix"]))


def matrix_lines(matrix):
    lines = []
    for pole, row in zip(TRAITS, matrix):
        lines.append([pole, *(f"{100 * value:+.0f}" for value in row)])
    return lines


# ----------------------------------------------------------------------------------------- steering

def dial_weights(i, value, experts, device=None):
    """w (E,): `value` for expert i, what is left shared out equally among the others."""
    w = torch.full((experts,), (1 - value) / (experts - 1), device=device)
    w[i] = value
    return w


def measure_steering(model, examples, p):
    """{pole: {"pole": losses, "opposite": losses}}, a loss for each step of DIAL.

    The losses are means over the records of the pole, and over those of its opposite, at the same
    weights: a dial that steers lowers the first against the second.
    """
    curves = {}
    for i, pole in enumerate(TRAITS):
        of_pole = np.flatnonzero(p[:, i])
        of_opposite = np.flatnonzero(p[:, OPPOSITE[i]])
        both = [examples[k] for k in [*of_pole, *of_opposite]]
        steps = {"pole": [], "opposite": []}
        for value in DIAL:
            w = dial_weights(i, value, model.experts, model.device)
            losses = losses_at(model, both, w)
            steps["pole"].append(losses[:len(of_pole)])
            steps["opposite"].append(losses[len(of_pole):])
        curves[pole] = steps
    return curves


def summarise_steering(steps):
    """One pole's curves of `measure_steering` -> means by step, and what the whole turn does.

    `gain` is how much the turn from 0 to 1 lowers the loss of the pole's records more than that of
    the opposite's, with its interval; `rising` in how many of the five steps the lead grows.
    """
    of_pole = np.array(steps["pole"])                           # (steps, records of the pole)
    of_opposite = np.array(steps["opposite"])
    lead = of_opposite.mean(axis=1) - of_pole.mean(axis=1)
    # the two groups are drawn apart, each from its own records
    own = of_pole[0] - of_pole[-1]
    other = of_opposite[0] - of_opposite[-1]
    change = np.concatenate([own, other])
    n = len(own)

    def gain(records):
        is_own = records < n
        if is_own.all() or not is_own.any():
            return np.nan
        return change[records[is_own]].mean() - change[records[~is_own]].mean()

    return {
        "pole": of_pole.mean(axis=1).round(4).tolist(),
        "opposite": of_opposite.mean(axis=1).round(4).tolist(),
        "gain": bootstrap(gain, len(change)),
        "rising": int((np.diff(lead) > 0).sum()),
    }


def steering(args, device, dtype):
    """--steering: the weight of one expert from 0 to 1, the others sharing what is left."""
    results = {}
    for run in args.run:
        model, settings = load_experts_run(run, device, dtype)
        records, examples = held_out_examples(model, settings)
        curves = measure_steering(model, examples, activations(records))
        results[run] = {pole: summarise_steering(steps) for pole, steps in curves.items()}
    if args.json:
        print(json.dumps({"dial": DIAL, "runs": results}, indent=1))
        return
    print("Loss per token of the pole's records and of its opposite's as the weight of the pole's\n"
          "expert grows and the other nine share what is left. The gain: how much the whole turn\n"
          "lowers the first more than the second. Rising: in how many of the steps that lead grows.")
    for run, poles in results.items():
        print(f"\n{run}")
        lines = []
        for pole, result in poles.items():
            lines.append([pole, "its own", *(f"{loss:.2f}" for loss in result["pole"]),
                          shown(result["gain"]), f"{result['rising']} of {len(DIAL) - 1}"])
            lines.append(["", "opposite's", *(f"{loss:.2f}" for loss in result["opposite"])])
        print_table(["", "records", *(f"w={value}" for value in DIAL), "gain", "rising"],
                    [line + [""] * (len(DIAL) + 4 - len(line)) for line in lines])
