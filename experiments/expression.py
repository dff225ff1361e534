"""Expression: can a reader tell from an answer which traits its query called for?

    python -m experiments.evaluate --expression --run out/tiny --run out/tiny-cot-finetuned

The reader is automatic: a logistic regression for each pole on words, word pairs and punctuation,
trained on the responses of the training split. It reads answers to the held-out queries, and its
ten scores for an answer are ranked against p, as a router's weights are.

Beside it stands how the answers read: how many hold no phrase of four words three times, and how
many of their words are words.

n texts, V words and pairs that the reader knows, ten poles.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from experiments.answers import write_answers
from experiments.common import COT, activations, fit_logistic, measure_rows, run_records
from experiments.statistics import mean_interval
from personafuse import read_settings
from router import average_precision
from sample import sampling

# a word (with what an apostrophe joins to it), a punctuation mark, or the end of a line
WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]|\n")
# rarer words than this, counted in training texts, tell more of their text than of its traits
MIN_TEXTS = 5
# strength of the penalty on the coefficients: in threefold cross-validation inside our training
# split 0.003 and 0.01 have a mean average precision of 0.887, 0.03 0.885 and 0.1 0.877
PENALTY = 0.003
ANSWERS = ("response", "naive_response")
ROUTES = ("uniform", "random1", "random2")


# -------------------------------------------------------------------------------------- the reader

def words_of(text):
    """"No! No." -> ["no", "!", "no", "."]."""
    return WORD.findall(text.lower())


def words_and_pairs(text):
    """"No! No." -> ["no", "!", "no", ".", "no !", "! no", "no ."]."""
    words = words_of(text)
    pairs = [f"{first} {second}" for first, second in zip(words, words[1:])]
    return words + pairs


def make_vocabulary(texts):
    """Texts -> {word or pair: its column}, of those in at least MIN_TEXTS texts."""
    count = Counter()
    for text in texts:
        count.update(set(words_and_pairs(text)))
    common = sorted(word for word in count if count[word] >= MIN_TEXTS)
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


@dataclass
class Reader:
    """A trained reader: its words, and what each speaks for."""
    vocabulary: dict
    W: torch.Tensor             # (V, 10)
    b: torch.Tensor             # (10,)

    def scores(self, texts):
        """Texts -> how much each shows each trait (n, 10), numpy: log-odds."""
        x = features(texts, self.vocabulary)
        return (x @ self.W + self.b).numpy()


def make_reader(training):
    """The training records -> a Reader of their responses."""
    texts = [record["response"] for record in training]
    vocabulary = make_vocabulary(texts)
    p = torch.tensor(activations(training)).float()
    x = features(texts, vocabulary)
    W, b = fit_logistic(x, p, PENALTY)
    return Reader(vocabulary, W, b)


# ------------------------------------------------------------------------------- how answers read

def loops(text):
    """Whether some phrase of four words stands three times in the text."""
    words = words_of(text)
    phrases = Counter(zip(words, words[1:], words[2:], words[3:]))
    return max(phrases.values(), default=0) >= 3


def known_words(records):
    """The words of the records' answers."""
    known = set()
    for record in records:
        for key in ANSWERS:
            known.update(words_of(record[key]))
    return known


def how_they_read(answers, known):
    """Answers -> the share of them without loops, and that of their words that are known, in %."""
    loop_free = [not loops(answer) for answer in answers]
    are_words = [word in known for answer in answers for word in words_of(answer)]
    return {
        "loop-free, %": 100 * np.mean(loop_free),
        "words, %": 100 * np.mean(are_words),
    }


# -------------------------------------------------------------------------------------------- table

EXPRESSION = """
A reader trained on the responses of the training split reads answers to the held-out queries. In
brackets 95% intervals, by bootstrap over the records. The difference is to the one LoRA trained on
the same answers, if it is among the runs, paired; = marks one smaller than its interval."""


def expression(args):
    """--expression: how well the answers of runs, and of what they stand beside, show their traits,
    and how they read.
    """
    settings = read_settings(args.run[0])
    training, held = run_records(settings, ANSWERS, args.data, args.limit)
    reader = make_reader(training)
    known = known_words(training + held)
    p = activations(held)
    # every row of the table draws alike
    options = sampling(settings, args)
    queries = [record["query"] for record in held]

    def write(model, settings, w, name):
        return write_answers(model, queries, w, args.max_new_tokens, name == COT, **options)

    written = {
        "the records' responses": [record["response"] for record in held],
        "the records' plain answers": [record["naive_response"] for record in held],
        **measure_rows(args, held, ROUTES, write),
    }
    precisions = {name: average_precision(reader.scores(answers), p)
                  for name, answers in written.items()}
    # what knows nothing of the answer
    commonest = np.tile(activations(training).mean(axis=0), (len(p), 1))
    precisions["always the commonest traits"] = average_precision(commonest, p)
    one_lora = None
    for run in args.run:
        if read_settings(run)["variant"] == "cot-finetuned":
            one_lora = Path(run).name
    rows = []
    for name, of in precisions.items():
        row = {"name": name, "mean average precision": mean_interval(of)}
        if one_lora not in (None, name):
            # on the same records for both: a paired interval
            row["difference"] = mean_interval(of - precisions[one_lora])
        if name in written:
            row |= how_they_read(written[name], known)
        rows.append(row)
    tables = {"expression": rows, "how it was drawn": [{"records": len(held), **options}]}
    if args.json:
        tables["answers"] = written
    return tables
