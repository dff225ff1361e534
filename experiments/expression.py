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
from experiments.statistics import bootstrap, print_table, shown, shown_difference
from personafuse import like_lengths, load_run, read_settings
from plumbing import UserError
from router import average_precision, pole_auc

# a word (with what an apostrophe joins to it), a punctuation mark, or the end of a line
WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]|\n")
# rarer words than this, counted in training texts, tell more of their text than of its traits
MIN_TEXTS = 5
# strengths of the penalty on the coefficients, from which cross-validation chooses
PENALTIES = [0.01, 0.03, 0.1, 0.3]
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
    W = torch.zeros(x.shape[1], p.shape[1], requires_grad=True)
    b = torch.zeros(p.shape[1], requires_grad=True)
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
        return (features(texts, self.vocabulary) @ self.W + self.b).double().numpy()


def train_reader(texts, p, penalty):
    """Texts and their p (n, 10), numpy -> Reader."""
    vocabulary = make_vocabulary(texts)
    x = features(texts, vocabulary)
    W, b = fit_logistic(x, torch.tensor(p, dtype=torch.float32), penalty)
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
            reader = train_reader([texts[i] for i in inside], p[inside], penalty)
            scores[outside] = reader.scores([texts[i] for i in outside])
        precision[penalty] = round(float(average_precision(scores, p).mean()), 4)
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
    order = like_lengths([len(prompt) for prompt in prompts], len(prompts))[0]
    room = model.base.config.max_position_embeddings - max_new_tokens
    mixing = None if w is None else w[order]
    ids = [[] for _ in prompts]
    tokens = generate_batch(model.base, [prompts[i][-room:] for i in order], max_new_tokens,
                            model.tokenizer.stop, mixing, args.temperature, args.top_p, args.seed,
                            rows=32)
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
    prompts = []
    for query in queries:
        prompts.append(model.tokenizer.encode_prompt(cot_prompt(query)))
    context = model.base.config.max_position_embeddings
    room = context - max(len(prompt) for prompt in prompts)
    max_new_tokens = min(args.max_new_tokens + STEPS, max(room, context // 4))
    answers = write_answers(model, prompts, None, args, max_new_tokens)
    return [cot_response(answer) for answer in answers]


def oracle_weights(p, device):
    """w = p/|p|: what a router would give that knew the traits. p (n, E), numpy -> (n, E)."""
    w = torch.tensor(p, dtype=torch.float32, device=device)
    return w / w.sum(dim=1, keepdim=True)


def run_answers(run, queries, p, args, device, dtype, with_base):
    """Yield (row's name, answers) for a run, after those of its bare base if asked for."""
    model, _ = load_run(run, device, dtype)
    name = Path(run).name
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
        w = oracle_weights(p, device)
        yield f"{name}, oracle", answer_queries(model, queries, w, args)


# -------------------------------------------------------------------------------------------- table

def measure_expression(name, scores, p):
    """Scores (n, 10) that a reader gave n answers -> a row of the table."""
    precision = average_precision(scores, p)
    n = len(p)
    return {
        "name": name,
        "precision": precision,
        "map": bootstrap(lambda i: precision[i].mean(), n),
        "auc": bootstrap(lambda i: np.nanmean(pole_auc(scores[i], p[i])), n, draws=300),
    }


def yardsticks(reader, training, held, p):
    """What needs no model: the records' own answers, and what knows nothing of the answer."""
    rows = []
    for name, key in (("the records' responses", "response"),
                      ("the records' plain answers", "naive_response")):
        scores = reader.scores([record[key] for record in held])
        rows.append(measure_expression(name, scores, p))
    prior = activations(training).mean(axis=0)
    rows.append(measure_expression("always the commonest traits", np.tile(prior, (len(p), 1)), p))
    return rows


def expression(args, device, dtype):
    """--expression: how well the answers of runs, and of what they stand beside, show their traits.

    The differences are to the single LoRA trained on the same answers, if it is among the runs.
    """
    training, held = split_data(read_settings(args.run[0]))
    reader, cross_validation = reader_of(training)
    queries = [record["query"] for record in held]
    p = activations(held)
    rows = yardsticks(reader, training, held, p)

    reference = None
    samples = {}
    for run in args.run:
        for name, answers in run_answers(run, queries, p, args, device, dtype, run == args.run[0]):
            rows.append(measure_expression(name, reader.scores(answers), p))
            samples[name] = answers
        if read_settings(run)["variant"] == "cot-finetuned":
            reference = rows[-1]
    for row in rows:
        if reference and row is not reference:
            # the same records for both, so that the interval is a paired one
            change = row["precision"] - reference["precision"]
            row["difference"] = bootstrap(lambda i: change[i].mean(), len(change))
    for row in rows:
        del row["precision"]

    if args.json:
        print(json.dumps({"records": len(p), "cross_validation": cross_validation, "rows": rows,
                          "answers": samples}, indent=1, ensure_ascii=False))
        return
    best = max(cross_validation.values())
    print(f"{len(p)} held-out queries. A reader that knows {len(reader.vocabulary):,} words and "
          f"pairs (mean average precision\n{best:.3f} in cross-validation over the training "
          "responses) reads the answers; in brackets 95% intervals,\nby bootstrap over the "
          f"records. Answers: {args.max_new_tokens} tokens at most, temperature "
          f"{args.temperature}, top-p {args.top_p}, seed {args.seed}.\n")
    header = ["answers of", "mean average precision", "mean AUC"]
    lines = [[row["name"], shown(row["map"], 3), shown(row["auc"], 3)] for row in rows]
    if reference:
        header.append(f"difference to {reference['name']}")
        for line, row in zip(lines, rows):
            line.append(shown_difference(row.get("difference"), 3))
    print_table(header, lines)
