"""What routing is worth: how sharp the weights are, and how well they rank the experts.

    python -m experiments.evaluate --run out/tiny --routing

Eq. 1 at other temperatures τ, and cut to the top k, on the held-out queries of a trained run. At
each: what a reader finds in the answers (experiments/expression.py), the response loss, and how
well the weights rank the experts. Then the same with each query's weights dealt out anew, the
largest to the right experts: a perfect ranking that is no sharper. The bare base and the oracle
p/|p| are the borders.

n queries, E = 10 experts.
"""

import numpy as np
import torch

from experiments.answers import sampling, write_answers
from experiments.common import (activations, break_ties, held_out_examples, oracle_weights,
                                response_losses, run_records)
from experiments.expression import make_reader
from experiments.statistics import bootstrap, mean_interval
from losses import cosine
from plumbing.files import UserError
from router import average_precision, keep_top

TAUS = [0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
TOP = [1, 2, 3]


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


def curve_weights(model, queries, trained_tau, seed):
    """{name: w (n, E), numpy}: the borders that know nothing of the query, then the curve."""
    weights = {}
    for route in ("uniform", "random1", "random2"):
        weights[route] = model.mixing_weights(queries, route, seed=seed)
    h = model.embed(model.encode_queries(queries))
    # in double precision, since the sharpest weights are far apart
    similarity = cosine(h, model.router.e).double()                             # Eq. 4, (n, E)
    for tau in TAUS:
        weights[f"tau {tau}"] = torch.softmax(similarity / tau, dim=-1)         # Eq. 1
    trained = torch.softmax(similarity / trained_tau, dim=-1)
    for k in TOP:
        weights[f"tau {trained_tau}, top {k}"] = keep_top(trained, k)
    return {name: w.cpu().numpy() for name, w in weights.items()}


def covered(values, bare, oracle):
    """Which share of the way from the bare base to the oracle, in %, with its interval.

    values, bare, oracle (n,): average precisions, or losses, of the same records.
    """
    def share(records):
        start = bare[records].mean()
        whole_way = oracle[records].mean() - start
        way = values[records].mean() - start
        return 100 * way / whole_way if whole_way else np.nan

    return bootstrap(share, len(values))


ROUTING = """
Expression: mean average precision of a reader's scores of the answers. Loss: per token of the
records' responses. Share: of the way from the bare base to the oracle, in %. Ranked: the same
weights, dealt to the right experts. In brackets 95% intervals, by bootstrap over the records."""


@torch.no_grad()
def routing(model, settings, args):
    """--routing: every setting of the curve, between its borders."""
    if model.router is None:
        raise UserError("this run has no router yet: run `python train.py --stage 2`")
    training, _ = run_records(settings, data=args.data)
    reader, _ = make_reader(training)
    records, examples = held_out_examples(model, settings, args)
    queries = [record["query"] for record in records]
    p = activations(records)
    best = oracle_weights(p, "cpu").numpy()
    weights = curve_weights(model, queries, settings["tau"], args.seed)
    for tau in TAUS:
        weights[f"tau {tau}, ranked"] = perfect_ranking(weights[f"tau {tau}"], p)

    measured = {}
    for name, w in {"bare base": None, "oracle": best, **weights}.items():
        if w is not None:
            w = torch.tensor(w, dtype=torch.float32, device=model.device)
        answers = write_answers(model, queries, w, args.max_new_tokens, **sampling(settings, args))
        nll, counts = response_losses(model, examples, w)
        precision = average_precision(reader.scores(answers), p)
        measured[name] = {"expression": precision, "loss": nll / counts}

    rows = []
    for name, of in measured.items():
        row = {"name": name}
        if name != "bare base":
            w = weights.get(name, best)
            row["largest weight"] = float(w.max(axis=1).mean())
            row["router mAP"] = mean_interval(average_precision(break_ties(w), p))
        for key, values in of.items():
            row[key] = mean_interval(values)
            share = covered(values, measured["bare base"][key], measured["oracle"][key])
            row[f"share of {key}"] = share
        rows.append(row)
    return {"routing": rows}
