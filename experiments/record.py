"""A record that anyone can beat on a laptop: how well the router ranks the experts of queries that
it has not seen, beside a bag of words. Everything stays inside the training split.

    python -m experiments.record                        5 folds, three seeds, under two minutes
    python -m experiments.record --folds 10 --seeds 1
    python -m experiments.record --pooling mean --steps2 300 --lr2 2e-4
    python -m experiments.record --base smollm2         its encoder reads the queries once

Stage 2 as train.py runs it. Where the preset leaves the encoder as it is, only map and embeddings
are trained, on what the encoder made of each query.

n queries, E experts, d the encoder's width, V distinct words.
"""

import argparse
import hashlib
import re
import time
from dataclasses import replace

import numpy as np
import torch

from data import TRAITS, load_records, split
from experiments.common import activations, fit_logistic
from experiments.statistics import mean_interval, print_rows
from losses import cosine
from personafuse import build
from plumbing.files import HERE, number, run_program
from plumbing.models import default_encoder, find_model
from router import Router, average_precision
from train import PRESETS, run_stage

CPU = torch.device("cpu")
OPTIONS = ("pooling", "query_format", "encoder_layers", "start",
           "steps2", "batch2", "group", "lr2", "lr_e", "margin", "beta")


def fold_of(record, folds):
    """The fold that a record is tested in; its query decides, as it does for the held-out split."""
    digest = hashlib.sha256(("fold " + record["query"]).encode()).hexdigest()
    return int(digest, 16) % folds


# -------------------------------------------------------------------------------------- the router

class Unsaved:
    """A run that leaves nothing behind."""
    stop_requested = False

    def log(self, line):
        pass

    def save_due(self, step):
        return False

    def save_state(self, stage, step, tensors, done):
        pass


class CachedRouter(Router):
    """A router whose encoder has read all queries before: a query is its place among them."""
    features = None             # (n, d)

    def pool(self, tokens, lengths, checkpointing=False):
        return self.features[tokens[:, 0]]


def read_once(model, examples):
    """Examples -> the same, each with its place as its query, and the encoder's features (n, d)."""
    with torch.no_grad():
        # no map yet: it is trained on what the encoder says
        features = model.embed([example.query for example in examples], read=model.router.pool)
    return [replace(example, query=[i]) for i, example in enumerate(examples)], features


def router_scores(settings, features, examples, inside, args):
    """Cosines (n, E) of all examples, by a fresh router trained on those `inside`."""
    model = build(settings, CPU, "auto")
    if features is not None:
        model.router = CachedRouter(model.router.encoder, len(TRAITS), args.tau, args.pooling,
                                    args.start, frozen_encoder=True)
        model.router.features = features
    run_stage(model, 2, 0, [examples[i] for i in inside], args, Unsaved())
    with torch.no_grad():
        h = model.embed([example.query for example in examples])
        return cosine(h, model.router.e).numpy()


# --------------------------------------------------------------------------------- the bag of words

def bag_of_words(records, inside, C=0.2):
    """The yardstick: logistic regression on which words a query holds, one for each pole, with the
    penalty |W|²/2C, fitted to the records `inside` -> log-odds (n, E) of all of them.

    C = 0.2 is the best of 0.1, 0.2, 0.3 and 0.5 in these folds.
    """
    words = [set(re.findall(r"\w\w+", record["query"].lower())) for record in records]
    known = sorted(set().union(*(words[i] for i in inside)))
    x = torch.tensor([[word in own for word in known] for own in words]).float()        # (n, V)
    p = torch.tensor(activations(records)).float()
    W, b = fit_logistic(x[inside], p[inside], 1 / (2 * C))
    return (x @ W + b).numpy()


# -------------------------------------------------------------------------------------------- main

def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", default="tiny")
    add("--encoder")
    add("--data", default=str(HERE / "persona_cot.jsonl"))
    add("--folds", type=number(int, 2), default=5)
    add("--seeds", type=number(int, 1), default=3)
    for name in OPTIONS:
        option = "router-start" if name == "start" else name.replace("_", "-")
        add(f"--{option}", dest=name, type=type(PRESETS["tiny"][name]), help="as in train.py")
    preset = "tiny" if parser.parse_known_args()[0].base == "tiny" else "quick"
    parser.set_defaults(**PRESETS[preset], clip=1.0, loss_alpha=1.0, checkpointing=False)
    return parser.parse_args()


def main():
    args = parse_arguments()
    began = time.time()
    records, _ = split(load_records(args.data))
    settings = vars(args) | {
        "base_folder": find_model(args.base),
        "encoder_folder": find_model(args.encoder or default_encoder(args.base), "--encoder"),
        "names": TRAITS, "rank": 1, "lora_alpha": 1, "seed": 0,
    }
    model = build(settings, CPU, "auto")
    examples = model.examples(records, args.max_length)
    features = None
    if not args.train_encoder:
        examples, features = read_once(model, examples)
    p = activations(records)                                                # (n, E)
    fold = np.array([fold_of(record, args.folds) for record in records])

    # every query is scored once by each, in the fold in which it was not trained on
    words = np.zeros(p.shape)
    routers = np.zeros((args.seeds, *p.shape))
    for k in range(args.folds):
        inside = np.flatnonzero(fold != k)
        outside = fold == k
        words[outside] = bag_of_words(records, inside)[outside]
        for seed in range(args.seeds):
            args.seed = seed
            scores = router_scores(settings, features, examples, inside, args)
            routers[seed, outside] = scores[outside]
    of_words = average_precision(words, p)                                  # (n,)
    of_routers = [average_precision(scores, p) for scores in routers]
    rows = [{"name": "bag of words", "mean average precision": mean_interval(of_words)}]
    for seed, precision in enumerate(of_routers):
        row = {"name": f"router, seed {seed}", "mean average precision": mean_interval(precision)}
        rows.append(row | {"difference": mean_interval(precision - of_words)})
    print(f"{len(records)} training queries, {args.folds} folds; {time.time() - began:.0f} s")
    print_rows(rows)


if __name__ == "__main__":
    run_program(main)
