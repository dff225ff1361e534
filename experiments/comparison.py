"""The held-out records: what runs of one base lose on them, and how well their routers rank.

A row of the table is a model and a way to mix its experts; n records, E experts.
"""

import json
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from data import TRAITS, load_records, make_examples, split
from experiments.answers import cot_prompt
from experiments.statistics import bootstrap, print_table, shown, shown_difference
from personafuse import load_run, read_settings
from router import average_precision, keep_top, pole_auc

ANSWERS = ("response", "naive_response")


@dataclass
class HeldOut:
    """The held-out records as the token ids of one model."""
    queries: list           # n strings
    good: list              # n Examples with the Persona-CoT response
    naive: list             # n Examples with the plain answer
    p: np.ndarray           # (n, E)


@dataclass
class Row:
    """A model's losses, record by record, and the figures that are made of them."""
    name: str
    nll: np.ndarray         # (n,), summed over each response
    counts: np.ndarray      # (n,), response tokens
    figures: dict = field(default_factory=dict)     # name -> [value, low, high]

    def loss(self, records):
        """The loss per token of some records, given their indices."""
        return self.nll[records].sum() / self.counts[records].sum()


def compare(args, device, dtype):
    """Runs of one base on its held-out records, beside the bare base, Persona-CoT prompting, Random
    Route, uniform weights and an oracle that mixes by p/|p|.
    """
    settings = read_settings(args.run[0])
    _, records = split(load_records(settings["data"], ANSWERS))
    rows = []
    for run in args.run:
        model = None                            # two large ones need not fit at once
        model, _ = load_run(run, device, dtype)
        held_out = tokenize(model, records, settings["max_length"])
        if not rows:
            rows += rows_of_base(model, held_out)
        rows += rows_of_run(Path(run).name, model, held_out, args)

    n = len(held_out.queries)
    # the first run, or the bare base where that run has no router yet
    own = [row for row in rows if row.name == Path(args.run[0]).name]
    reference = own[0] if own else rows[0]
    for row in rows:
        if row is not reference:
            row.figures["difference"] = paired_difference(row, reference)
    if args.json:
        table = [{"name": row.name, **row.figures} for row in rows]
        print(json.dumps({"records": n, "reference": reference.name, "rows": table}, indent=1))
    else:
        print_comparison(rows, n, reference.name)


def tokenize(model, records, max_length):
    """Records -> HeldOut, less those whose prompt leaves no room for an answer."""
    fitting = []
    for record in records:
        if len(model.tokenizer.encode_prompt(record["query"])) < max_length:
            fitting.append(record)
    good, naive = (make_examples(fitting, model.tokenizer, model.encoder_tokenizer, max_length, key)
                   for key in ANSWERS)
    queries = [record["query"] for record in fitting]
    return HeldOut(queries, good, naive, np.array([record["p"] for record in fitting]))


# ---------------------------------------------------------------------------- the rows of the table

def rows_of_base(model, held_out):
    """What needs no run: the bare base, and what prompting makes of it."""
    rows = [measure("bare base", model, held_out, None)]
    prompted = persona_cot_prompting(model, held_out)
    if prompted:
        rows.append(prompted)
    return rows


def persona_cot_prompting(model, held_out):
    """The bare base behind the Persona-CoT prompt; None where that does not fit the context."""
    prompts = []
    for query in held_out.queries:
        prompts.append(model.tokenizer.encode_prompt(cot_prompt(query)))

    def behind_prompts(examples):
        return [replace(example, prompt=ids) for example, ids in zip(examples, prompts)]

    asked = replace(held_out, good=behind_prompts(held_out.good),
                    naive=behind_prompts(held_out.naive))
    context = model.base.config.max_position_embeddings
    longest = max(example.length for example in asked.good + asked.naive)
    if longest > context:
        print(f"left out: Persona-CoT prompting, longer than the base's {context} tokens",
              file=sys.stderr)
        return None
    return measure("Persona-CoT prompting", model, asked, None)


def rows_of_run(name, model, held_out, args):
    """A run as it was trained and, if it has experts to mix, mixed otherwise."""
    if model.experts == 1:
        w = model.mixing_weights(held_out.queries)
        return [measure(name, model, held_out, w)]
    rows = []
    if model.router:
        rows.append(routed(name, model, held_out, args.top_k))
    for k in (1, 2, 5):
        rows.append(random_route(name, model, held_out, k, args.seed))
    rows.append(uniform(name, model, held_out))
    rows.append(oracle(name, model, held_out))
    return rows


def routed(name, model, held_out, top_k):
    w = model.mixing_weights(held_out.queries)
    kept = keep_top(w, top_k) if top_k else w
    return measure(name, model, held_out, kept, ranking=w)


def random_route(name, model, held_out, k, seed):
    w = model.mixing_weights(held_out.queries, f"random{k}", seed=seed)
    return measure(f"{name}, random{k}", model, held_out, w, ranking=w)


def uniform(name, model, held_out):
    w = model.mixing_weights(held_out.queries, "uniform")
    return measure(f"{name}, uniform", model, held_out, w)


def oracle(name, model, held_out):
    p = torch.tensor(held_out.p, dtype=torch.float32, device=model.device)
    w = p / p.sum(dim=1, keepdim=True)
    return measure(f"{name}, oracle", model, held_out, w, ranking=p)


# -------------------------------------------------------------------------------------- the figures

def measure(name, model, held_out, w, ranking=None):
    """A row of the table: losses at weights w (n, E), or of the bare base, and how well `ranking`
    (n, E), if any, ranks the experts.
    """
    nll, counts = response_losses(model, held_out.good, w)
    naive_nll, naive_counts = response_losses(model, held_out.naive, w)
    prefers = nll / counts < naive_nll / naive_counts
    n = len(nll)
    row = Row(name, nll, counts)
    row.figures["loss"] = bootstrap(row.loss, n)
    row.figures["prefers"] = bootstrap(lambda records: 100 * prefers[records].mean(), n)
    if ranking is not None:
        row.figures |= measure_ranking(ranking.double().cpu().numpy(), held_out.p)
    return row


def response_losses(model, examples, w):
    """Summed losses (n,) and numbers of response tokens (n,), as numpy arrays."""
    nll, counts, _ = model.response_nll(examples, w)
    return nll.double().cpu().numpy(), counts.double().cpu().numpy()


def measure_ranking(ranking, p):
    """ranking, p (n, E) -> mean average precision, and AUC by pole and on average."""
    # random routes and the oracle give many experts the same weight: ties in random order
    ranking = ranking + 1e-9 * np.random.default_rng(0).random(p.shape)
    precision = average_precision(ranking, p)

    def mean_auc(records):
        return np.nanmean(pole_auc(ranking[records], p[records]))

    n = len(p)
    return {
        "map": bootstrap(lambda records: precision[records].mean(), n),
        "auc": bootstrap(mean_auc, n, draws=300),
        "auc_by_pole": dict(zip(TRAITS, pole_auc(ranking, p).round(4).tolist())),
    }


def paired_difference(row, reference):
    """By how much the loss is over the reference's, on the same records for both: a paired
    interval.
    """
    return bootstrap(lambda records: row.loss(records) - reference.loss(records), len(row.nll))


# --------------------------------------------------------------------------------------- the tables

def print_comparison(rows, n, reference):
    print(f"{n} held-out records; in brackets 95% intervals, by bootstrap over the records. The "
          "difference is that of the\n"
          f"loss to {reference}, paired; = marks one smaller than its interval: not told from 0 by "
          "these records.\n")
    lines = []
    for row in rows:
        figures = row.figures
        lines.append([
            row.name,
            shown(figures["loss"], 3),
            shown_difference(figures.get("difference"), 3),
            shown(figures["prefers"], 0),
            shown(figures.get("map")),
            shown(figures.get("auc")),
        ])
    print_table(["", "loss per token", "difference", "% prefers Persona-CoT", "router mAP",
                 "mean AUC"], lines)

    # two or five equal weights rank as poorly as one, so the table by pole leaves them out
    ranked = []
    for row in rows:
        if "auc" in row.figures and not re.search("random[25]", row.name):
            ranked.append(row)
    if not ranked:
        return
    print("\nAUC by pole")
    lines = []
    for pole in TRAITS:
        lines.append([pole, *(f"{row.figures['auc_by_pole'][pole]:.2f}" for row in ranked)])
    print_table(["", *(row.name for row in ranked)], lines)
