"""What the encoder learned (Table 6 of the paper): a linear classifier reads labels off h, for the
trained encoder and for the one that it started from.

    python -m experiments.evaluate --run out/tiny --probe data_full.json

A labelled file is CLINC150's data_full.json, or a CSV with columns text and label, of which the
texts that `held_out` picks are the test.

n texts, d the encoder's width.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from data import held_out
from experiments.common import fit_logistic
from experiments.sources import read_file
from experiments.statistics import mean_interval
from personafuse import build, load_run
from plumbing.files import UserError, read_json


def labelled(path):
    """A labelled file -> its (text, label) pairs for training, and those for the test."""
    try:
        if path.suffix == ".json":
            return read_clinc(path)
        train = []
        test = []
        for row in read_file(path):
            if row["text"]:
                side = test if held_out(row["text"]) else train
                side.append((row["text"], row["label"]))
        return train, test
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: neither CLINC150's data_full.json nor a CSV with columns text "
                        f"and label ({error})")


def read_clinc(path):
    """CLINC150 comes with its split. domains.json beside it makes ten domains and out-of-scope of
    its 150 intents: the paper's 11 classes.
    """
    records = read_json(path, f"there is no {path}")
    domains = path.with_name("domains.json")
    domain_of = {}
    if domains.exists():
        for domain, intents in read_json(domains, "").items():
            domain_of |= dict.fromkeys(intents, domain)
    sides = []
    for side in ("train", "test"):
        pairs = records[side] + records[f"oos_{side}"]
        sides.append([(text, domain_of.get(intent, intent)) for text, intent in pairs])
    return sides


def classify(h, y, h_test, decay=1e-4):
    """Fit a logistic regression for each class to h (n, d) and y (n,) -> classes of h_test."""
    std, mean = torch.std_mean(h, dim=0)
    h, h_test = ((one - mean) / (std + 1e-6) for one in (h, h_test))
    W, b = fit_logistic(h, F.one_hot(y).float(), decay * len(h))
    return (h_test @ W + b).argmax(dim=1)


PROBE = """
Accuracy of a linear classifier on h, in %, before and after training, and the paired difference. In
brackets 95% intervals, by bootstrap over the test texts."""


def probe(args):
    """--probe: every run, beside the encoder that it started from -> accuracies in %."""
    train, test = labelled(Path(args.probe))
    names = sorted({label for _, label in train})
    if len(names) < 2 or not test:
        raise UserError(f"{args.probe} has fewer than two labels, or no test texts")
    # -1 for a label that training does not have
    y, y_test = (torch.tensor([names.index(label) if label in names else -1 for _, label in pairs])
                 for pairs in (train, test))

    def right(model):
        """Which of the test texts a classifier on this model's h gets right -> (n,)."""
        h, h_test = (model.embed(model.encode_queries([text for text, _ in pairs])).cpu()
                     for pairs in (train, test))
        return (classify(h, y, h_test) == y_test).double().numpy()

    rows = []
    for run in args.run:
        model, settings = load_run(run, args.device, args.dtype)
        if model.router is None:
            raise UserError(f"{run} has no trained router to probe")
        trained = right(model)
        # its encoder's own weights, before training
        untrained = right(build(settings, args.device, args.dtype))
        rows.append({
            "name": Path(run).name,
            "untrained": mean_interval(100 * untrained),
            "trained": mean_interval(100 * trained),
            "difference": mean_interval(100 * (trained - untrained)),
        })
    commonest = (y_test == y.bincount().argmax()).double().mean().item()
    texts = {"training": len(train), "test": len(test), "classes": len(names)}
    return {"probe": rows, "texts": [texts | {"always the commonest, %": 100 * commonest}]}
