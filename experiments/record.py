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
from personafuse import build
from plumbing.files import atomic_write, number, run_program
from plumbing.models import cached, default_encoder, find_model, model_sha256
from plumbing.runs import Run
from router import average_precision
from train import parse_with_preset, run_stage

CPU = torch.device("cpu")
# strength of the penalty of the bag of words, the best of 5, 2.5, 1.7 and 1 in these folds
PENALTY = 2.5


@torch.no_grad()
def read_features(model, folder, queries):
    """What the router's frozen encoder, from `folder`, makes of queries (token ids) -> (n, d).

    Computed once and kept in a file, whose name holds a digest of all that decides it.
    """
    router = model.router
    encoder = router.encoder
    what = [model_sha256(folder), len(encoder.layers), encoder.dtype, router.pooling, queries]
    digest = hashlib.sha256(str(what).encode()).hexdigest()
    path = cached(f"features-{digest[:16]}.safetensors")
    if not path.exists():
        # no map yet: it is trained on what the encoder says
        features = model.embed(queries, read=router.pool)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as tmp:
            save_file({"features": features}, tmp)
    return load_file(path)["features"]


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


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folds", type=number(int, 2), default=5)
    parser.add_argument("--seeds", type=number(int, 1), default=3)
    return parse_with_preset(parser)


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
        # from here on a query is a single word, and its embedding what the encoder has made of it
        features = read_features(model, folder, queries)
        model.router.encoder.embed_tokens = torch.nn.Embedding.from_pretrained(features)
        model.router.pooling = "words"
        queries = [[i] for i in range(len(queries))]
    # stage 2 reads no answers
    examples = [Example([], [], query, record["p"]) for query, record in zip(queries, records)]
    p = activations(records)                                                # (n, E)
    # its query decides the fold of a record, as it does for the held-out split
    fold = np.array([by_hash({"query": "fold " + record["query"]}) % args.folds
                     for record in records])

    # every query is scored once by each, in the fold in which it was not trained on
    of_words = np.zeros(len(p))
    of_routers = np.zeros((args.seeds, len(p)))
    for k in range(args.folds):
        inside = np.flatnonzero(fold != k)
        outside = fold == k
        of_words[outside] = average_precision(bag_of_words(records, inside), p)[outside]
        for args.seed in range(args.seeds):
            if args.train_encoder:
                model = build(settings, CPU, args.dtype)
            # not the main process, so that nothing is written
            run = Run(".", settings, is_main=False)
            run_stage(model, 2, 0, [examples[i] for i in inside], args, run)
            w = model.route(queries).numpy()                                # (n, E)
            of_routers[args.seed, outside] = average_precision(w, p)[outside]
    ours = of_routers.mean(axis=0)
    by_seed = "  ".join(f"{precision:.3f}" for precision in of_routers.mean(axis=1))
    print(f"{len(records)} training queries, {args.folds} folds; {time.time() - began:.0f} s")
    print_rows([
        {"name": "bag of words", "mean average precision": mean_interval(of_words)},
        {
            "name": "ours",
            "mean average precision": mean_interval(ours),
            "difference": mean_interval(ours - of_words),
            "by seed": by_seed,
        },
    ])


if __name__ == "__main__":
    run_program(main)
