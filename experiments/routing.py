"""What routing is worth: how sharp the weights are, and how well they rank the experts.

    python -m experiments.evaluate --routing --run out/tiny

Eq. 1 at other temperatures τ, and cut to the top k, on the held-out queries of a trained run. At
each: what a reader finds in the answers (experiments/expression.py), the response loss, and how
well the weights rank the experts; then the same with the weights of each query handed to the right
experts, largest first: a perfect ranking that is no sharper. The bare base and the oracle p/|p|
are the borders.
"""

import json

import numpy as np
import torch

from data import TRAITS
from experiments.control import activations, held_out_examples, load_experts_run
from experiments.expression import answer_queries, oracle_weights, reader_of, split_data
from experiments.statistics import bootstrap, print_table, shown
from losses import cosine
from plumbing import UserError
from router import average_precision, keep_top

TAUS = [0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
TOP = [1, 2, 3]


def perfect_ranking(w, p):
    """Each query's weights, dealt out anew: the largest to the experts with p = 1.

    w, p (n, E) numpy -> (n, E). As sharp as before, with nothing left to know.
    """
    largest_first = -np.sort(-w, axis=1)
    # the active experts first; which of them comes first is as in w
    order = np.lexsort((-w, -p), axis=1)
    dealt = np.empty_like(w)
    np.put_along_axis(dealt, order, largest_first, axis=1)
    return dealt


def ranking_precision(w, p, seed=0):
    """Average precision of weights (n, E) against p (n, E); equal weights in random order."""
    columns = np.random.default_rng(seed).permuted(np.tile(np.arange(w.shape[1]), (len(w), 1)),
                                                   axis=1)
    shuffled = (np.take_along_axis(values, columns, axis=1) for values in (w, p))
    return average_precision(*shuffled)


def covered(values, bare, oracle):
    """Which share of the way from the bare base to the oracle, in %, with its interval.

    values, bare, oracle (n,): average precisions, or losses, of the same records.
    """
    def way(i):
        whole = oracle[i].mean() - bare[i].mean()
        return 100 * (values[i].mean() - bare[i].mean()) / whole if whole else np.nan

    return bootstrap(way, len(values))


class Meter:
    """What is measured of every setting: a reader, and a run's held-out queries."""

    def __init__(self, model, settings, args):
        self.model = model
        self.args = args
        training, _ = split_data(settings)
        self.reader, _ = reader_of(training)
        records, self.examples = held_out_examples(model, settings)
        self.queries = [record["query"] for record in records]
        self.p = activations(records)

    def measure(self, w):
        """w (n, E) numpy, or None for the bare base -> expression and loss, each (n,)."""
        if w is not None:
            w = torch.tensor(w, dtype=torch.float32, device=self.model.device)
        answers = answer_queries(self.model, self.queries, w, self.args)
        nll, counts, _ = self.model.response_nll(self.examples, w)
        return {"expression": average_precision(self.reader.scores(answers), self.p),
                "loss": (nll / counts).double().cpu().numpy()}


def routing(args, device, dtype):
    """--routing: expression, loss and ranking over τ and top k, between their borders."""
    results = {}
    for run in args.run:
        model, settings = load_experts_run(run, device, dtype)
        if model.router is None:
            raise UserError(f"{run} has no router yet: run `python train.py --stage 2`")
        results[run] = measure_routing(Meter(model, settings, args), settings["tau"], args.seed)
    if args.json:
        print(json.dumps(results, indent=1))
        return
    print("Expression: mean average precision of a reader's scores of the answers; loss: per token\n"
          "of the records' responses; share: of the way from the bare base to the oracle, in %.\n"
          "`ranked`: the same weights dealt to the right experts. In brackets 95% intervals, by\n"
          "bootstrap over the held-out records.")
    for run, rows in results.items():
        print(f"\n{run}")
        print_table(["", "largest weight", "router mAP", "expression", "share", "loss", "share",
                     "ranked: expression", "share", "loss"],
                    [routing_line(row) for row in rows])


def measure_routing(meter, trained_tau, seed):
    """Every setting of the curve, and its borders -> rows of the table."""
    model = meter.model
    n, E = meter.p.shape
    bare = meter.measure(None)
    oracle = meter.measure(oracle_weights(meter.p, "cpu").numpy())
    rows = []

    def add(name, w, measured, dealt=None):
        row = {"name": name}
        if w is not None:
            row["largest"] = round(float(w.max(axis=1).mean()), 3)
            precision = ranking_precision(w, meter.p, seed)
            row["map"] = bootstrap(lambda i: precision[i].mean(), n)
        row |= summarise(measured, bare, oracle)
        if dealt is not None:
            row["ranked"] = summarise(meter.measure(dealt), bare, oracle)
        rows.append(row)

    add("bare base", None, bare)
    for route in ("uniform", "random1", "random2"):
        w = model.mixing_weights(meter.queries, route, seed=seed).cpu().numpy()
        add(route, w, meter.measure(w))
    h = model.embed([model.encoder_tokenizer.encode_query(query) for query in meter.queries])
    similarity = cosine(h, model.router.e).double()                     # Eq. 4, (n, E)
    for tau in TAUS:
        w = torch.softmax(similarity / tau, dim=-1).cpu().numpy()       # Eq. 1
        add(f"tau {tau}", w, meter.measure(w), perfect_ranking(w, meter.p))
    w = torch.softmax(similarity / trained_tau, dim=-1)
    for k in TOP:
        top = keep_top(w, k).cpu().numpy()
        add(f"tau {trained_tau}, top {k}", top, meter.measure(top))
    add("oracle", oracle_weights(meter.p, "cpu").numpy(), oracle)
    return rows


def summarise(measured, bare, oracle):
    """What `Meter.measure` found -> means with intervals, and shares of the way."""
    n = len(measured["loss"])
    row = {}
    for key in ("expression", "loss"):
        values = measured[key]
        row[key] = bootstrap(lambda i: values[i].mean(), n)
        row[f"{key}_share"] = covered(values, bare[key], oracle[key])
    return row


def routing_line(row):
    cells = [row["name"], row.get("largest", ""), shown(row.get("map")),
             shown(row["expression"]), shown(row["expression_share"], 0),
             shown(row["loss"], 3), shown(row["loss_share"], 0)]
    ranked = row.get("ranked")
    if not ranked:
        return cells + ["", "", ""]
    return cells + [shown(ranked["expression"]), shown(ranked["expression_share"], 0),
                    shown(ranked["loss"], 3)]
