"""Expression: can a reader tell from an answer which traits its query called for?

    python -m experiments.evaluate --expression --run out/tiny --run out/tiny-cot-finetuned

The reader is automatic: a logistic regression for each pole on words, word pairs and punctuation,
trained on the responses of the training split. It reads answers to the held-out queries, and its
ten scores for an answer are ranked against p, as a router's weights are.

n texts, V words and pairs that the reader knows, ten poles.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import load_records, split
from experiments.answers import cot_prompt, cot_response
from experiments.batched import generate_batch
from experiments.control import activations
from experiments.statistics import (bootstrap, mean_interval, print_table, shown,
                                    shown_difference)
from personafuse import load_run, read_settings
from plumbing import UserError
from router import average_precision, pole_auc

# a word (with what an apostrophe joins to it), a punctuation mark, or the end of a line
WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]|\n")
# rarer words than this, counted in training texts, tell more of their text than of its traits
MIN_TEXTS = 5
# strengths of the penalty on the coefficients, from which cross-validation chooses
PENALTIES = [0.003, 0.01, 0.03, 0.1]
# the tokens that the five steps of Persona-CoT may take before the answer begins
STEPS = 300


# -------------------------------------------------------------------------------------- the reader

def words_and_pairs(text):
    """"No! No." -> ["no", "!", "no", ".", "no !", "! no", "no ."]."""
    words = WORD.findall(text.lower())
    pairs = [f"{first} {second}" for first, second in zip(words, words[1:])]
    return words + pairs


def make_vocabulary(texts):
    """Texts -> {word or pair: its column}, of those in at least MIN_TEXTS texts."""
    count = Counter()
    for text in texts:
        count.update(set(words_and_pairs(text)))
    common = sorted(word for word, texts_with in count.items() if texts_with >= MIN_TEXTS)
    return {word: column for column, word in enumerate(common)}


def features(texts, vocabulary):
    """Texts -> x (n, V): log(1 + count) of each word and pair, each row scaled to length 1."""
    x = torch.zeros(len(texts), len(vocabulary))
    for row, text in zip(x, texts):
        for word, count in Counter(words_and_pairs(text)).items():
            if word in vocabulary:
                row[vocabulary[word]] = count
    # long and short answers are read alike
    return F.normalize(x.log1p(), dim=1)


def fit_logistic(x, p, penalty):
    """Minimise Σ binary cross-entropy of p | x W + b, plus penalty · |W|², for the ten poles.

    x (n, V), p (n, 10) -> W (V, 10), b (10,).
    """
    words = x.shape[1]
    poles = p.shape[1]
    W = torch.zeros(words, poles, requires_grad=True)
    b = torch.zeros(poles, requires_grad=True)
    optimizer = torch.optim.LBFGS([W, b], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        entropy = F.binary_cross_entropy_with_logits(x @ W + b, p, reduction="sum")
        value = entropy + penalty * W.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return W.detach(), b.detach()


@dataclass
class Reader:
    """A trained reader: its words, and what each speaks for."""
    vocabulary: dict
    W: torch.Tensor             # (V, 10)
    b: torch.Tensor             # (10,)

    def scores(self, texts):
        """Texts -> how much each shows each trait (n, 10), numpy: log-odds."""
        x = features(texts, self.vocabulary)
        log_odds = x @ self.W + self.b
        return log_odds.double().numpy()


def train_reader(texts, p, penalty):
    """Texts and their p (n, 10), numpy -> Reader."""
    vocabulary = make_vocabulary(texts)
    x = features(texts, vocabulary)
    p = torch.tensor(p, dtype=torch.float32)
    W, b = fit_logistic(x, p, penalty)
    return Reader(vocabulary, W, b)


def choose_penalty(texts, p, folds=3):
    """The best of PENALTIES by mean average precision in cross-validation -> it, and all figures.

    The texts are the training split's: what is chosen here has seen no held-out record.
    """
    fold = np.random.default_rng(0).permutation(len(texts)) % folds
    precision = {}
    for penalty in PENALTIES:
        scores = np.zeros(p.shape)
        for k in range(folds):
            inside = np.flatnonzero(fold != k)
            outside = np.flatnonzero(fold == k)
            inside_texts = [texts[i] for i in inside]
            outside_texts = [texts[i] for i in outside]
            reader = train_reader(inside_texts, p[inside], penalty)
            scores[outside] = reader.scores(outside_texts)
        mean = average_precision(scores, p).mean()
        precision[penalty] = round(float(mean), 4)
    return max(precision, key=precision.get), precision


def split_data(settings):
    """A run's data -> the records of the training split and the held-out ones."""
    training, held = split(load_records(settings["data"], ("response", "naive_response")))
    if not training or not held:
        raise UserError(f"{settings['data']} has too few records for a training and a held-out "
                        "split")
    return training, held


def reader_of(training):
    """The training records -> a Reader of their responses, and its cross-validation."""
    texts = [record["response"] for record in training]
    p = activations(training)
    penalty, precision = choose_penalty(texts, p)
    return train_reader(texts, p, penalty), precision


# ------------------------------------------------------------------------------------------ answers

def write_answers(model, prompts, w, args, max_new_tokens):
    """Prompts (token ids) and w (n, E), or None for the bare base -> an answer to each.

    Every row of the table draws with the same seed, temperature and top_p.
    """
    # like lengths side by side: the rows of a batch then end at about the same time
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    if w is not None:
        w = w[order]
    room = model.base.config.max_position_embeddings - max_new_tokens
    in_order = [prompts[i][-room:] for i in order]
    ids = [[] for _ in prompts]
    tokens = generate_batch(model.base, in_order, max_new_tokens, model.tokenizer.stop, w,
                            args.temperature, args.top_p, args.seed, rows=32)
    for k, token in tokens:
        if token is not None:
            ids[order[k]].append(token)
    return [model.tokenizer.decode(one) for one in ids]


def answer_queries(model, queries, w, args):
    """Queries (strings) in the base's chat format -> answers."""
    prompts = [model.tokenizer.encode_prompt(query) for query in queries]
    return write_answers(model, prompts, w, args, args.max_new_tokens)


def answer_by_prompting(model, queries, args):
    """Persona-CoT prompting: the bare base goes through the five steps of Table 9 -> answers.

    The response counts; where it does not keep to the format, all that it wrote.
    """
    prompts = [model.tokenizer.encode_prompt(cot_prompt(query)) for query in queries]
    context = model.base.config.max_position_embeddings
    longest = max(len(prompt) for prompt in prompts)
    # a prompt that fills the context is cut on the left, so that some room is left to answer in
    room = max(context - longest, context // 4)
    max_new_tokens = min(args.max_new_tokens + STEPS, room)
    answers = write_answers(model, prompts, None, args, max_new_tokens)
    return [cot_response(answer) for answer in answers]


def oracle_weights(p, device):
    """w = p/|p|: what a router would give that knew the traits. p (n, E), numpy -> (n, E)."""
    w = torch.tensor(p, dtype=torch.float32, device=device)
    return w / w.sum(dim=1, keepdim=True)


def run_answers(run, held, args, device, dtype, with_base):
    """Yield (row's name, answers to the held-out records' queries) for a run, after those of its
    bare base if asked for.
    """
    model, _ = load_run(run, device, dtype)
    name = Path(run).name
    queries = [record["query"] for record in held]
    if with_base:
        yield "bare base", answer_queries(model, queries, None, args)
        yield "Persona-CoT prompting", answer_by_prompting(model, queries, args)
    if model.router or model.experts == 1:
        w = model.mixing_weights(queries, top_k=args.top_k)
        yield name, answer_queries(model, queries, w, args)
    if model.experts > 1:
        for route in ("uniform", "random1", "random2"):
            w = model.mixing_weights(queries, route, seed=args.seed)
            yield f"{name}, {route}", answer_queries(model, queries, w, args)
        w = oracle_weights(activations(held), device)
        yield f"{name}, oracle", answer_queries(model, queries, w, args)


# -------------------------------------------------------------------------------------------- table

def measure_expression(name, scores, p):
    """Scores (n, 10) that a reader gave n answers -> a row of the table."""
    def mean_auc(records):
        return np.nanmean(pole_auc(scores[records], p[records]))

    precision = average_precision(scores, p)
    return {
        "name": name,
        "precision": precision,             # (n,), for the differences
        "map": mean_interval(precision),
        "auc": bootstrap(mean_auc, len(p), draws=300),
    }


def yardsticks(reader, training, held):
    """What needs no model: the records' own answers, and what knows nothing of the answer."""
    p = activations(held)
    rows = []
    for name, key in (("the records' responses", "response"),
                      ("the records' plain answers", "naive_response")):
        scores = reader.scores([record[key] for record in held])
        rows.append(measure_expression(name, scores, p))
    commonest = activations(training).mean(axis=0)
    scores = np.tile(commonest, (len(p), 1))
    rows.append(measure_expression("always the commonest traits", scores, p))
    return rows


def expression(args, device, dtype):
    """--expression: how well the answers of runs, and of what they stand beside, show their traits.

    The differences are to the single LoRA trained on the same answers, if it is among the runs.
    """
    training, held = split_data(read_settings(args.run[0]))
    reader, cross_validation = reader_of(training)
    rows = yardsticks(reader, training, held)
    reference = None
    written = {}
    for run in args.run:
        first = run == args.run[0]
        for name, answers in run_answers(run, held, args, device, dtype, with_base=first):
            rows.append(measure_expression(name, reader.scores(answers), activations(held)))
            written[name] = answers
        if read_settings(run)["variant"] == "cot-finetuned":
            reference = rows[-1]
    add_differences(rows, reference)
    if args.json:
        result = {"records": len(held), "cross_validation": cross_validation, "rows": rows,
                  "answers": written}
        print(json.dumps(result, indent=1, ensure_ascii=False))
        return
    best = max(cross_validation.values())
    print(f"{len(held)} held-out queries. A reader that knows {len(reader.vocabulary):,} words and "
          f"pairs (mean average precision {best:.3f}\nin cross-validation over the training "
          "responses) reads the answers; in brackets 95% intervals, by bootstrap over\nthe "
          f"records. Answers: at most {args.max_new_tokens} tokens, temperature "
          f"{args.temperature}, top-p {args.top_p}, seed {args.seed}.\n")
    print_expression(rows, reference)


def add_differences(rows, reference):
    """Each row's difference to the reference, if there is one, on the same records for both: the
    interval is a paired one.
    """
    for row in rows:
        if reference and row is not reference:
            change = row["precision"] - reference["precision"]
            row["difference"] = mean_interval(change)
    for row in rows:
        del row["precision"]


def print_expression(rows, reference):
    header = ["answers of", "mean average precision", "mean AUC"]
    if reference:
        header.append(f"difference to {reference['name']}")
    lines = []
    for row in rows:
        cells = [row["name"], shown(row["map"], 3), shown(row["auc"], 3)]
        if reference:
            cells.append(shown_difference(row.get("difference"), 3))
        lines.append(cells)
    print_table(header, lines)
