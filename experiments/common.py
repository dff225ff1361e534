"""What every experiment starts from: a run, its records as they were in training, the ways to mix
its experts, and the one logistic regression.

n records or texts, E experts, V features, P poles.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import TRAITS, by_hash, load_records, split
from plumbing.chat import ChatTokenizer
from personafuse import OVERFLOW, Config, like_lengths, load_run, response_batch
from plumbing.files import HERE, UserError, file_sha256

# the poles in the heads of columns, in the order of TRAITS
SHORT = ["O+", "O-", "C+", "C-", "E+", "E-", "A+", "A-", "N+", "N-"]
# the row of the bare base behind the Persona-CoT prompt
COT = "Persona-CoT prompting"


# -------------------------------------------------------------------------------- runs and records

def run_records(settings, answers=("response",), data=None, limit=None):
    """The data of a run, by its settings -> (training records, held-out records).

    Found wherever it lies now, and never other data than the run was trained on without a word.
    `data` names another file; of the held-out records the first `limit`, in a fixed order, or all.
    """
    path = data or find_data(settings)
    if file_sha256(path) != settings["data_sha256"]:
        print(f"note: {path} is not what the run was trained on", file=sys.stderr)
    training, held = split(load_records(path, answers))
    if not training or not held:
        raise UserError(f"{path} has too few records for a training and a held-out split")
    if limit:
        held = sorted(held, key=by_hash)[:limit]
    return training, held


def find_data(settings):
    """The file that a run was trained on, told by its contents: at its place, or ours."""
    path = settings["data"]
    for candidate in (path, HERE / "persona_cot.jsonl"):
        if Path(candidate).is_file() and file_sha256(candidate) == settings["data_sha256"]:
            return candidate
    what = "has other contents now" if Path(path).exists() else "is not there any more"
    raise UserError(f"{path}, the data of the run, {what}: name a copy of it with --data FILE")


def load_experts_run(run, args):
    """A run with its ten experts -> (PersonaFuse, settings); UserError for a baseline's."""
    model, settings = load_run(run, args.device, args.dtype)
    if model.experts != len(TRAITS):
        raise UserError(f"{run} has {model.experts} expert, not one for each of the "
                        f"{len(TRAITS)} poles: give a run of --variant personafuse")
    return model, settings


def fitting(records, settings):
    """The records whose prompt leaves room for an answer in the run's --max-length."""
    tokenizer = ChatTokenizer(settings["base_folder"])
    config = Config.from_folder(settings["base_folder"])
    room = min(settings["max_length"], config.max_position_embeddings)
    return [record for record in records
            if len(tokenizer.encode_prompt(record["query"])) < room]


def held_out_examples(model, settings, args):
    """The held-out records of a run that fit into its --max-length, and the same as Examples."""
    _, held = run_records(settings, data=args.data, limit=args.limit)
    records = fitting(held, settings)
    return records, model.examples(records, settings["max_length"])


def activations(records):
    """p of each record -> (n, E), numpy."""
    return np.array([record["p"] for record in records])


@torch.no_grad()
def response_nll(model, examples, w=None, rows=16):
    """Eq. 8 example by example, w (n, E), or None for the bare base -> summed negative
    log-likelihoods (n,) and numbers of response tokens (n,), numpy.
    """
    nll = torch.zeros(len(examples), device=model.device)
    for part in like_lengths([example.length for example in examples], rows):
        tokens, targets = response_batch([examples[i] for i in part], model.device)
        hidden = model.base(tokens, None if w is None else w[part])             # (B, T, d)
        response = targets >= 0                                                 # (B, T)
        targets = targets[response]                                             # (N,)
        # the example that each of the N response tokens belongs to
        owner = torch.tensor(part, device=model.device)[response.nonzero()[:, 0]]
        for some, logits in model.base.logits_in_parts(hidden[response]):       # (n, V)
            losses = F.cross_entropy(logits.float(), targets[some], reduction="none")
            nll.index_add_(0, owner[some], losses)
    if not nll.isfinite().all():
        raise UserError(OVERFLOW)
    counts = np.array([len(example.answer) for example in examples])
    return nll.double().cpu().numpy(), counts


# ------------------------------------------------------------------------------------------ mixing

def oracle_weights(p, device):
    """w = p/|p|: what a router would give that knew the traits. p (n, E), numpy -> (n, E)."""
    w = torch.tensor(p, dtype=torch.float32, device=device)
    return w / w.sum(dim=1, keepdim=True)


def measure_rows(args, held, routes, measure):
    """The rows of a table of all runs -> {name: measure(model, settings, w, name)}.

    The bare base, also behind the Persona-CoT prompt (the row COT), then each run as it was
    trained, and, if it has experts to mix, by `routes` and by the oracle p/|p|.
    """
    rows = {}
    for run in args.run:
        # in a function of its own, so that two large models need not fit at once
        rows |= measure_run(run, args, held, routes, measure, with_base=not rows)
    return rows


def measure_run(run, args, held, routes, measure, with_base):
    model, settings = load_run(run, args.device, args.dtype)
    queries = [record["query"] for record in held]
    name = Path(run).name
    weights = {"bare base": None, COT: None} if with_base else {}
    if model.router or model.experts == 1:
        weights[name] = model.mixing_weights(queries)
    if model.experts > 1:
        for route in routes:
            w = model.mixing_weights(queries, route, seed=args.seed)
            weights[f"{name}, {route}"] = w
        weights[f"{name}, oracle"] = oracle_weights(activations(held), model.device)
    return {row: measure(model, settings, w, row) for row, w in weights.items()}


def break_ties(w, seed=0):
    """Weights (n, E) -> scores (n, E) in the same order, where equal ones stand in random order.

    [[0.5, 0.0, 0.5]] -> [[1, 0, 2]] or [[2, 0, 1]]
    """
    at_random = np.random.default_rng(seed).random(w.shape)
    # by weight, and among equal weights by the random number
    order = np.lexsort((at_random, w), axis=1)
    return order.argsort(axis=1)


def fit_logistic(x, p, penalty):
    """Minimise Σ binary cross-entropy of p | x W + b, plus penalty · |W|², for each pole.

    x (n, V), p (n, P) -> W (V, P), b (P,).
    """
    W = torch.zeros(x.shape[1], p.shape[1], device=x.device, requires_grad=True)
    b = torch.zeros(p.shape[1], device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([W, b], max_iter=300, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        entropy = F.binary_cross_entropy_with_logits(x @ W + b, p, reduction="sum")
        value = entropy + penalty * W.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return W.detach(), b.detach()
