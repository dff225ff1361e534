"""A record that anyone can beat on a laptop: how well the router ranks the experts of queries that
it has not seen, beside a bag of words. Everything stays inside the training split.

    python -m experiments.record                        5 folds, three seeds, under two minutes
    python -m experiments.record --folds 10 --seeds 1
    python -m experiments.record --pooling mean --steps2 300 --lr2 2e-4

n queries, E experts, d the encoder's width, V distinct words.
"""

import argparse
import hashlib
import re
import time

import numpy as np
import torch
import torch.nn.functional as F

from plumbing.chat import ChatTokenizer, load_records, make_examples, router_batch, split, trait_groups
from experiments.statistics import bootstrap, shown
from losses import contrastive_loss, cosine, router_loss, trait_loss
from personafuse import like_lengths, load_llama, pad
from plumbing import HERE, MODELS, UserError, run_program
from router import Router, average_precision
from runs import PRESETS

CPU = torch.device("cpu")
OPTIONS = ("pooling", "steps2", "batch2", "group", "lr2", "lr_e", "margin", "beta")


def fold_of(record, folds):
    """The fold that a record is tested in; its query decides, as it does for the held-out split."""
    digest = hashlib.sha256(("fold " + record["query"]).encode()).hexdigest()
    return int(digest, 16) % folds


# -------------------------------------------------------------------------------------- the router

def embed_all(router, examples):
    """Persona embeddings h (n, d), without gradient."""
    h = torch.empty(len(examples), router.e.shape[1])
    with torch.no_grad():
        for part in like_lengths([len(example.query) for example in examples], rows=64):
            queries, lengths = pad([examples[i].query for i in part], CPU)
            h[part] = router.embed(queries, lengths)
    return h


def train_router(examples, args, seed):
    """Stage 2 alone: the base is not needed."""
    encoder = load_llama(MODELS["tiny"][0], CPU, torch.float32)
    router = Router(encoder, pooling=args.pooling, seed=seed)
    router.requires_grad_(True)
    p = torch.tensor([example.p for example in examples])
    router.init_embeddings(embed_all(router, examples), p)
    others = [t for name, t in router.named_parameters() if name != "e"]
    optimizer = torch.optim.AdamW([{"params": [router.e], "peak": args.lr_e},
                                   {"params": others, "peak": args.lr2}],
                                  weight_decay=0.0, fused=True)
    groups = trait_groups(examples)
    for step in range(args.steps2):
        batch = router_batch(examples, groups, args.batch2, args.group, step, seed).examples
        queries, lengths = pad([example.query for example in batch], CPU)
        p = torch.tensor([example.p for example in batch])                  # (B, E)
        h = router.embed(queries, lengths)                                  # (B, d)
        contrastive = contrastive_loss(cosine(h, router.e), p, args.margin)
        loss = router_loss(contrastive, trait_loss(h, p), beta=args.beta)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(router.parameters(), 1.0)
        # up over the first 5% of the steps, then straight down to 0
        share = min((step + 1) / (0.05 * args.steps2),
                    (args.steps2 - step) / (0.95 * args.steps2), 1)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share
        optimizer.step()
    return router


def router_scores(training, tested, args, seed):
    """Cosines (n, E) of the tested examples, by a router trained on the others."""
    router = train_router(training, args, seed)
    return cosine(embed_all(router, tested), router.e).detach().numpy()


# --------------------------------------------------------------------------------- the bag of words

def bag_of_words(training, tested, C=0.2):
    """The yardstick: logistic regression on which words a query holds, one for each pole, with the
    penalty |W|²/2C. training, tested: records -> log-odds (n, E).

    C = 0.2 is the best of 0.1, 0.2, 0.3 and 0.5 in these folds.
    """
    words = [set(re.findall(r"\w\w+", record["query"].lower())) for record in training + tested]
    known = sorted(set().union(*words[:len(training)]))
    column = {word: i for i, word in enumerate(known)}
    x = torch.zeros(len(words), len(column))                                # (n, V)
    for row, held in zip(x, words):
        row[[column[word] for word in held if word in column]] = 1
    x_training, x_tested = x[:len(training)], x[len(training):]
    p = torch.tensor([record["p"] for record in training], dtype=torch.float)
    W = torch.zeros(len(column), p.shape[1], requires_grad=True)
    b = torch.zeros(p.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([W, b], max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x_training @ W + b, p, reduction="sum")
        loss = loss + W.square().sum() / (2 * C)
        loss.backward()
        return loss

    optimizer.step(closure)
    return (x_tested @ W + b).detach().numpy()


# -------------------------------------------------------------------------------------------- main

def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(HERE / "persona_cot.jsonl"))
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    preset = PRESETS["tiny"]
    for name in OPTIONS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(preset[name]),
                            default=preset[name], help=f"as in train.py ({preset[name]})")
    args = parser.parse_args()
    if args.folds < 2 or args.seeds < 1:
        raise UserError("--folds is at least 2, --seeds at least 1")
    return args


def main():
    args = parse_arguments()
    began = time.time()
    records, _ = split(load_records(args.data))
    tokenizer = ChatTokenizer(MODELS["tiny"][0])
    examples = make_examples(records, tokenizer, tokenizer, max_length=1024)
    p = np.array([record["p"] for record in records])                       # (n, E)
    fold = np.array([fold_of(record, args.folds) for record in records])

    # every query is scored once by each, in the fold in which it was not trained on
    words = np.zeros(p.shape)
    routers = np.zeros((args.seeds, *p.shape))
    for k in range(args.folds):
        inside, outside = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        words[outside] = bag_of_words([records[i] for i in inside], [records[i] for i in outside])
        for seed in range(args.seeds):
            routers[seed, outside] = router_scores([examples[i] for i in inside],
                                                   [examples[i] for i in outside], args, seed)
    of_words = average_precision(words, p)                                  # (n,)
    of_routers = np.array([average_precision(scores, p) for scores in routers])     # (seeds, n)
    difference = of_routers.mean(axis=0) - of_words
    n = len(records)
    print(f"{n} training queries, {args.folds} folds, {args.seeds} seeds: mean average precision")
    print(f"  bag of words  {shown(bootstrap(lambda i: of_words[i].mean(), n), 3)}")
    for seed, precision in enumerate(of_routers):
        figure = bootstrap(lambda i: precision[i].mean(), n)
        print(f"  router        {shown(figure, 3)}  seed {seed}")
    print(f"  difference    {shown(bootstrap(lambda i: difference[i].mean(), n), 3)}, paired, "
          f"mean of the seeds; {time.time() - began:.0f} s")


if __name__ == "__main__":
    run_program(main)
