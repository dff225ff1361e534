"""What routing is worth: how sharp the weights are, and how well they rank the experts.

    python -m experiments.evaluate --run out/tiny --routing

Eq. 1 at the run's temperature τ, at half and at twice that, on the held-out queries. At each: what
a reader finds in the answers (experiments/expression.py), and the response loss. Then the same with
each query's weights dealt out anew, the largest to the right experts: a perfect ranking that is no
sharper. The bare base and the oracle p/|p| are the borders. `--taus` names other temperatures.

n queries, E = 10 experts.
"""

import numpy as np
import torch

from experiments.answers import write_answers
from experiments.common import (activations, held_out_examples, oracle_weights, response_nll,
                                run_records)
from experiments.expression import make_reader
from experiments.statistics import mean_interval
from losses import cosine
from plumbing.files import UserError
from router import average_precision
from sample import sampling


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


def curve_weights(similarity, p, taus):
    """Cosines of Eq. 4, tensor (n, E), and p (n, E), numpy -> {name: w (n, E), numpy}."""
    weights = {"uniform": np.full(p.shape, 1 / p.shape[1])}
    for tau in taus:
        w = torch.softmax(similarity / tau, dim=1).numpy()              # Eq. 1
        weights[f"tau {tau:g}"] = w
        weights[f"tau {tau:g}, ranked"] = perfect_ranking(w, p)
    return weights


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
    h = model.embed(model.encode_queries(queries))
    # in double precision, since the sharpest weights are far apart
    similarity = cosine(h, model.router.e).double().cpu()
    tau = settings["tau"]
    weights = {"bare base": None, "oracle": oracle_weights(p, "cpu").numpy()}
    weights |= curve_weights(similarity, p, args.taus or [tau / 2, tau, 2 * tau])

    measured = {}
    for name, w in weights.items():
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
            row["largest weight"] = float(weights[name].max(axis=1).mean())
        for key, values in of.items():
            bare, oracle = measured["bare base"][key], measured["oracle"][key]
            row[key] = mean_interval(values)
            row[f"share of {key}"] = 100 * (values - bare).mean() / (oracle - bare).mean()
        rows.append(row)
    return {"routing": rows}
