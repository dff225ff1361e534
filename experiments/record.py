"""A record that anyone can beat on a laptop: how well the router ranks the experts of queries that
it has not seen, beside a bag of words. Everything stays inside the training split.

    python -m experiments.record                        5 folds, three seeds, under two minutes
    python -m experiments.record --folds 10 --seeds 1
    python -m experiments.record --pooling mean --steps2 300 --lr2 2e-4
    python -m experiments.record --base smollm2         its encoder reads the queries once for all

Stage 2 as train.py runs it, with its options. Where the preset leaves the encoder as it is, only
map and embeddings are trained, on what the encoder made of each query, which is kept in a file.

n queries, E experts, d the width of what the encoder makes of one, V distinct words.
"""

import argparse
import hashlib
import re
import time

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from data import TRAITS, Example, by_hash, load_records, split
from experiments.common import activations, fit_logistic
from experiments.statistics import mean_interval, print_rows
from losses import cosine
from personafuse import build
from plumbing.files import atomic_write, number, run_program
from plumbing.models import cached, default_encoder, find_model, model_sha256
from router import Router, average_precision
from train import PRESETS, add_method_options, add_run_options, run_stage

CPU = torch.device("cpu")
# strength of the penalty of the bag of words, the best of 5, 2.5, 1.7 and 1 in these folds
PENALTY = 2.5


def fold_of(record, folds):
    """The fold that a record is tested in; its query decides, as it does for the held-out split."""
    return by_hash({"query": "fold " + record["query"]}) % folds


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


def read_features(model, folder, queries):
    """What the router's frozen encoder, from `folder`, makes of queries (token ids) -> (n, d).

    Computed once and kept in a file, whose name holds a digest of all that decides it.
    """
    router = model.router
    what = [model_sha256(folder), len(router.encoder.layers), str(router.encoder.dtype),
            router.pooling, queries]
    digest = hashlib.sha256(str(what).encode()).hexdigest()
    path = cached(f"features-{digest[:16]}.safetensors")
    if not path.exists():
        with torch.no_grad():
            # no map yet: it is trained on what the encoder says
            features = model.embed(queries, read=router.pool)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as tmp:
            save_file({"features": features}, tmp)
    return load_file(path)["features"]


def router_scores(model, examples, inside, args):
    """Cosines (n, E) of all examples, by the router of the model, trained on those `inside`."""
    run_stage(model, 2, 0, [examples[i] for i in inside], args, Unsaved())
    with torch.no_grad():
        h = model.embed([example.query for example in examples])
        return cosine(h, model.router.e).numpy()


# --------------------------------------------------------------------------------- the bag of words

def bag_of_words(records, inside):
    """The yardstick: logistic regression on which words a query holds, one for each pole, fitted to
    the records `inside` -> log-odds (n, E) of all of them.
    """
    words = [set(re.findall(r"\w\w+", record["query"].lower())) for record in records]
    known = sorted(set().union(*(words[i] for i in inside)))
    x = torch.tensor([[word in own for word in known] for own in words]).float()        # (n, V)
    p = torch.tensor(activations(records)).float()
    W, b = fit_logistic(x[inside], p[inside], PENALTY)
    return (x @ W + b).numpy()


# -------------------------------------------------------------------------------------------- main

def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folds", type=number(int, 2), default=5)
    parser.add_argument("--seeds", type=number(int, 1), default=3)
    add_run_options(parser)
    add_method_options(parser)
    args = parser.parse_args()
    parser.set_defaults(**PRESETS[args.preset or ("tiny" if args.base == "tiny" else "quick")])
    return parser.parse_args()


def main():
    args = parse_arguments()
    began = time.time()
    records, _ = split(load_records(args.data))
    folder = find_model(args.encoder or default_encoder(args.base), "--encoder")
    # no answer is written, so any base does
    settings = vars(args) | {"base_folder": folder, "encoder_folder": folder, "names": TRAITS}
    model = build(settings, CPU, args.dtype)
    queries = model.encode_queries([record["query"] for record in records])
    if not args.train_encoder:
        features = read_features(model, folder, queries)
        queries = [[i] for i in range(len(queries))]
    # stage 2 reads no answers
    examples = [Example([], [], query, record["p"]) for query, record in zip(queries, records)]
    p = activations(records)                                                # (n, E)
    fold = np.array([fold_of(record, args.folds) for record in records])

    # every query is scored once by each, in the fold in which it was not trained on
    words = np.zeros(p.shape)
    routers = np.zeros((args.seeds, *p.shape))
    for k in range(args.folds):
        inside = np.flatnonzero(fold != k)
        outside = fold == k
        words[outside] = bag_of_words(records, inside)[outside]
        for args.seed in range(args.seeds):
            if args.train_encoder:
                model = build(settings, CPU, args.dtype)
            else:
                model.router = CachedRouter(model.router.encoder, len(TRAITS), args.tau,
                                            args.pooling, args.start, frozen_encoder=True)
                model.router.features = features
            scores = router_scores(model, examples, inside, args)
            routers[args.seed, outside] = scores[outside]
    of_words = average_precision(words, p)                                  # (n,)
    of_routers = np.array([average_precision(scores, p) for scores in routers])
    mean = of_routers.mean(axis=0)
    rows = [
        {"name": "bag of words", "mean average precision": mean_interval(of_words)},
        {"name": "ours", "mean average precision": mean_interval(mean),
         "difference": mean_interval(mean - of_words),
         "by seed": "  ".join(f"{precision.mean():.3f}" for precision in of_routers)},
    ]
    print(f"{len(records)} training queries, {args.folds} folds; {time.time() - began:.0f} s")
    print_rows(rows)


if __name__ == "__main__":
    run_program(main)
