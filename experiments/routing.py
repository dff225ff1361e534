"""What routing is worth: how sharp the weights are, and how well they rank the experts.

    python -m experiments.evaluate --run out/tiny --routing

Eq. 1 at the run's temperature τ, at half and at twice that, and cut to the largest weight, on the
held-out queries. At each: what a reader finds in the answers (experiments/expression.py), the
response loss, and how well the weights rank the experts. Then the same with each query's weights
dealt out anew, the largest to the right experts: a perfect ranking that is no sharper. The bare
base and the oracle p/|p| are the borders. `--taus` names other temperatures.

n queries, E = 10 experts.
"""

import numpy as np
import torch

from experiments.answers import sampling, write_answers
from experiments.common import (activations, break_ties, held_out_examples, oracle_weights,
                                response_nll, run_records)
from experiments.expression import make_reader
from experiments.statistics import bootstrap, mean_interval
from losses import cosine
from plumbing.files import UserError
from router import average_precision, keep_top


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


def curve_weights(similarity, p, tau, taus=None):
    """Cosines of Eq. 4 and p, both (n, E), numpy, and the run's τ -> {name: w (n, E), numpy}."""
    similarity = torch.tensor(similarity)
    weights = {"uniform": np.full(p.shape, 1 / p.shape[1])}
    for value in taus or [tau / 2, tau, 2 * tau]:
        weights[f"tau {value:g}"] = torch.softmax(similarity / value, dim=1).numpy()    # Eq. 1
    weights["top 1"] = keep_top(torch.softmax(similarity / tau, dim=1), 1).numpy()
    for value in taus or [tau]:
        weights[f"tau {value:g}, ranked"] = perfect_ranking(weights[f"tau {value:g}"], p)
    return weights


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
    reader = make_reader(training)
    records, examples = held_out_examples(model, settings, args)
    queries = [record["query"] for record in records]
    p = activations(records)
    best = oracle_weights(p, "cpu").numpy()
    h = model.embed(model.encode_queries(queries))
    # in double precision, since the sharpest weights are far apart
    similarity = cosine(h, model.router.e).double().cpu().numpy()
    weights = curve_weights(similarity, p, settings["tau"], args.taus)

    measured = {}
    for name, w in {"bare base": None, "oracle": best, **weights}.items():
        if w is not None:
            w = torch.tensor(w, dtype=torch.float32, device=model.device)
        answers = write_answers(model, queries, w, args.max_new_tokens, **sampling(settings, args))
        nll, counts = response_nll(model, examples, w)
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
