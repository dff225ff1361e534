"""What routing is worth: how sharp the weights are, and how well they rank the experts.

    python -m experiments.evaluate --run out/tiny --routing

Eq. 1 at other temperatures τ, and cut to the top k, on the held-out queries of a trained run. At
each: what a reader finds in the answers (experiments/expression.py), the response loss, and how
well the weights rank the experts. Then the same with each query's weights dealt out anew, the
largest to the right experts: a perfect ranking that is no sharper. The bare base and the oracle
p/|p| are the borders.

n queries, E = 10 experts.
"""

import json

import numpy as np
import torch

from experiments.control import activations, held_out_examples, load_experts_run
from experiments.expression import answer_queries, oracle_weights, reader_of, split_data
from experiments.statistics import bootstrap, mean_interval, print_table, shown
from losses import cosine
from plumbing import UserError
from router import average_precision, keep_top

TAUS = [0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
TOP = [1, 2, 3]


# ------------------------------------------------------------------------------------------ weights

def perfect_ranking(w, p):
    """Each query's weights, dealt out anew: the largest to the experts with p = 1.

    w, p (n, E) numpy -> (n, E): as sharp as before, with nothing left to know.
    """
    largest_first = -np.sort(-w, axis=1)
    # active experts first, and among them those that w prefers
    order = np.lexsort((-w, -p), axis=1)
    dealt = np.empty_like(w)
    np.put_along_axis(dealt, order, largest_first, axis=1)
    return dealt


def ranking_precision(w, p, seed=0):
    """Average precision (n,) of weights (n, E) against p (n, E); equal weights in random order."""
    # what sorts the weights keeps the order of equal ones, so the columns are shuffled before it
    rng = np.random.default_rng(seed)
    experts = w.shape[1]
    columns = np.array([rng.permutation(experts) for _ in w])                   # (n, E)
    shuffled_w = np.take_along_axis(w, columns, axis=1)
    shuffled_p = np.take_along_axis(p, columns, axis=1)
    return average_precision(shuffled_w, shuffled_p)


def curve_weights(model, queries, trained_tau, seed):
    """{name: w (n, E), numpy}: the borders that know nothing of the query, then the curve."""
    weights = {}
    for route in ("uniform", "random1", "random2"):
        weights[route] = model.mixing_weights(queries, route, seed=seed)
    ids = [model.encoder_tokenizer.encode_query(query) for query in queries]
    # in double precision, since the sharpest weights are far apart
    h = model.embed(ids)
    similarity = cosine(h, model.router.e).double()                             # Eq. 4, (n, E)
    for tau in TAUS:
        weights[f"tau {tau}"] = torch.softmax(similarity / tau, dim=-1)         # Eq. 1
    trained = torch.softmax(similarity / trained_tau, dim=-1)
    for k in TOP:
        weights[f"tau {trained_tau}, top {k}"] = keep_top(trained, k)
    return {name: w.cpu().numpy() for name, w in weights.items()}


# ------------------------------------------------------------------------------------------ figures

def measure_weights(model, reader, records, examples, w, args):
    """Weights w (n, E) numpy, or None for the bare base -> expression and loss, each (n,)."""
    if w is not None:
        w = torch.tensor(w, dtype=torch.float32, device=model.device)
    queries = [record["query"] for record in records]
    answers = answer_queries(model, queries, w, args)
    scores = reader.scores(answers)
    precision = average_precision(scores, activations(records))
    nll, counts, _ = model.response_nll(examples, w)
    losses = nll / counts
    return {"expression": precision, "loss": losses.double().cpu().numpy()}


def covered(values, bare, oracle):
    """Which share of the way from the bare base to the oracle, in %, with its interval.

    values, bare, oracle (n,): average precisions, or losses, of the same records.
    """
    def share(records):
        start = bare[records].mean()
        whole_way = oracle[records].mean() - start
        if whole_way == 0:
            return np.nan
        way = values[records].mean() - start
        return 100 * way / whole_way

    return bootstrap(share, len(values))


def summarise(measured, bare, oracle):
    """What `measure_weights` found -> means with intervals, and shares of the way."""
    row = {}
    for key, values in measured.items():
        row[key] = mean_interval(values)
        row[f"{key}_share"] = covered(values, bare[key], oracle[key])
    return row


def measure_routing(model, settings, args):
    """Every setting of the curve, between its borders -> rows of the table."""
    training, _ = split_data(settings)
    reader, _ = reader_of(training)
    records, examples = held_out_examples(model, settings)
    queries = [record["query"] for record in records]
    p = activations(records)
    best = oracle_weights(p, "cpu").numpy()

    def measure(w):
        return measure_weights(model, reader, records, examples, w, args)

    bare = measure(None)
    oracle = measure(best)
    rows = [{"name": "bare base", **summarise(bare, bare, oracle)}]
    for name, w in curve_weights(model, queries, settings["tau"], args.seed).items():
        row = describe_weights(name, w, p, args.seed)
        row |= summarise(measure(w), bare, oracle)
        on_curve = name.startswith("tau") and "top" not in name
        if on_curve:
            ranked = measure(perfect_ranking(w, p))
            row["ranked"] = summarise(ranked, bare, oracle)
        rows.append(row)
    row = describe_weights("oracle", best, p, args.seed)
    row |= summarise(oracle, bare, oracle)
    return [*rows, row]


def describe_weights(name, w, p, seed):
    """How sharp weights (n, E) are, and how well they rank."""
    largest = w.max(axis=1).mean()
    return {
        "name": name,
        "largest": round(float(largest), 3),
        "map": mean_interval(ranking_precision(w, p, seed)),
    }


# -------------------------------------------------------------------------------------------- table

def routing(args, device, dtype):
    """--routing: expression, loss and ranking over τ and top k, between their borders."""
    results = {}
    for run in args.run:
        model, settings = load_experts_run(run, device, dtype)
        if model.router is None:
            raise UserError(f"{run} has no router yet: run `python train.py --stage 2`")
        results[run] = measure_routing(model, settings, args)
    if args.json:
        print(json.dumps(results, indent=1))
        return
    print_routing(results)


def print_routing(results):
    print("Expression: mean average precision of a reader's scores of the answers. Loss: per\n"
          "token of the records' responses. Share: of the way from the bare base to the oracle,\n"
          "in %. Ranked: the same weights, dealt to the right experts. In brackets 95% intervals,\n"
          "by bootstrap over the held-out records.")
    for run, rows in results.items():
        print(f"\n{run}")
        lines = []
        ranked = []
        for row in rows:
            name = row["name"]
            largest = row.get("largest", "")
            precision = shown(row.get("map"))
            lines.append([name, largest, precision, *gain_cells(row)])
            if "ranked" in row:
                ranked.append([name, *gain_cells(row["ranked"])])
        columns = ["expression", "share", "loss", "share"]
        print_table(["", "largest weight", "router mAP", *columns], lines)
        print()
        print_table(["ranked", *columns], ranked)


def gain_cells(row):
    return [
        shown(row["expression"]),
        shown(row["expression_share"], 0),
        shown(row["loss"], 3),
        shown(row["loss_share"], 0),
    ]
