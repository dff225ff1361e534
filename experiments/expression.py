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

from experiments.answers import sampling, write_answers
from experiments.common import COT, activations, fit_logistic, measure_rows, run_records
from experiments.statistics import mean_interval
from personafuse import read_settings
from router import average_precision

# a word (with what an apostrophe joins to it), a punctuation mark, or the end of a line
WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]|\n")
# rarer words than this, counted in training texts, tell more of their text than of its traits
MIN_TEXTS = 5
# strength of the penalty on the coefficients: in threefold cross-validation inside our training
# split 0.003 and 0.01 have a mean average precision of 0.887, 0.03 0.885 and 0.1 0.877
PENALTY = 0.003
ANSWERS = ("response", "naive_response")
ROUTES = ("uniform", "random1", "random2")
# a list of English words, one a line, where there is one; the records' own words count besides
DICTIONARY = Path("/usr/share/dict/words")


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


@dataclass
class Reader:
    """A trained reader: its words, and what each speaks for."""
    vocabulary: dict
    W: torch.Tensor             # (V, 10)
    b: torch.Tensor             # (10,)

    def scores(self, texts):
        """Texts -> how much each shows each trait (n, 10), numpy: log-odds."""
        log_odds = features(texts, self.vocabulary) @ self.W + self.b
        return log_odds.double().numpy()


def train_reader(texts, p):
    """Texts and their p (n, 10), numpy -> Reader."""
    vocabulary = make_vocabulary(texts)
    p = torch.tensor(p, dtype=torch.float32)
    W, b = fit_logistic(features(texts, vocabulary), p, PENALTY)
    return Reader(vocabulary, W, b)


def make_reader(training):
    """The training records -> a Reader of their responses."""
    return train_reader([record["response"] for record in training], activations(training))


# ------------------------------------------------------------------------------- how answers read

def loops(text, length=4, times=3):
    """Whether some phrase of `length` words stands `times` times in the text."""
    words = WORD.findall(text.lower())
    phrases = Counter(zip(*(words[start:] for start in range(length))))
    return max(phrases.values(), default=0) >= times


def known_words(records):
    """The words of the records' answers, and of the dictionary of this computer if it has one."""
    texts = [record[key] for record in records for key in ANSWERS]
    if DICTIONARY.exists():
        texts.append(DICTIONARY.read_text(encoding="utf-8"))
    return set(WORD.findall("\n".join(texts).lower()))


def how_they_read(answers, known):
    """Answers -> the share of them without loops, and that of their words that are known, in %."""
    if not answers:
        return {}
    words = [word for answer in answers for word in WORD.findall(answer.lower())]
    return {
        "loop-free, %": float(100 * np.mean([not loops(answer) for answer in answers])),
        "words, %": float(100 * np.mean([word in known for word in words])),
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
    written = {
        "the records' responses": [record["response"] for record in held],
        "the records' plain answers": [record["naive_response"] for record in held],
    }
    queries = [record["query"] for record in held]

    def write(model, settings, w, name):
        return write_answers(model, queries, w, args.max_new_tokens, name == COT, **options)

    written |= measure_rows(args, held, ROUTES, write)
    one_lora = None
    for run in args.run:
        if read_settings(run)["variant"] == "cot-finetuned":
            one_lora = Path(run).name

    precisions = {name: average_precision(reader.scores(answers), p)
                  for name, answers in written.items()}
    # what knows nothing of the answer
    commonest = np.tile(activations(training).mean(axis=0), (len(p), 1))
    precisions["always the commonest traits"] = average_precision(commonest, p)
    rows = []
    for name, of in precisions.items():
        row = {"name": name, "mean average precision": mean_interval(of)}
        if one_lora and name != one_lora:
            # on the same records for both: a paired interval
            row["difference"] = mean_interval(of - precisions[one_lora])
        rows.append(row | how_they_read(written.get(name, []), known))
    tables = {"expression": rows, "how it was drawn": [{"records": len(held), **options}]}
    if args.json:
        tables["answers"] = written
    return tables
