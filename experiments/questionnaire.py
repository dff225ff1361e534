"""A personality questionnaire: the 50-item IPIP Big-Five factor markers (ipip.ori.org, in the
public domain), asked of the bare base and of each expert alone.

    python -m experiments.evaluate --questionnaire --run out/tiny

Each item is put as a statement about the model, and each of five answers, from "very inaccurate"
to "very accurate", gets the probability that the model writes it. Nothing is generated.
"""

import numpy as np
import torch

from data import TRAITS, Example
from experiments.common import response_nll
from experiments.statistics import mean_interval
from plumbing.files import HERE, read_lines

ITEMS = HERE / "experiments" / "ipip50.tsv"         # trait, key (+ or -), item
BIG_FIVE = [pole.split()[1] for pole in TRAITS[::2]]
QUESTION = """\
How accurately does this statement describe you? Answer with one of: {answers}.
"{statement}\""""
# as the IPIP prints them; the first scores 1, the last 5
ANSWERS = ["very inaccurate", "moderately inaccurate", "neither accurate nor inaccurate",
           "moderately accurate", "very accurate"]


def read_items():
    """The questionnaire -> a list of (trait, key, statement)."""
    items = []
    # the first line names the columns
    for _, line in read_lines(ITEMS)[1:]:
        trait, key, item = line.strip().split("\t")
        # "Don't talk a lot." -> "I don't talk a lot."
        items.append((trait, key, f"I {item[0].lower()}{item[1:]}"))
    return items


def score(log_probabilities, key):
    """Log-probabilities of the five answers (n, 5) -> scores (n,) between 1 and 5.

    The mean of 1 to 5 under the probabilities, made to sum to 1 over the five; a key of - turns it
    round, since agreement then speaks against the trait.
    """
    probabilities = torch.softmax(torch.as_tensor(log_probabilities), dim=1).numpy()
    value = probabilities @ [1, 2, 3, 4, 5]
    return np.where(np.array(key) == "-", 6 - value, value)


def ask(model, items, w=None):
    """The items to the model with mixing weights w (E,), or to the bare base -> scores (50,)."""
    examples = []
    for _, _, text in items:
        question = QUESTION.format(answers=", ".join(ANSWERS), statement=text)
        prompt = model.tokenizer.encode_prompt(question)
        for answer in ANSWERS:
            # to its end token, so that no answer is the beginning of another
            examples.append(Example(prompt, model.tokenizer.encode_answer(answer), [], ()))
    if w is not None:
        w = w.expand(len(examples), -1)                         # (n, E), the same for all
    nll, _ = response_nll(model, examples, w)
    keys = [key for _, key, _ in items]
    return score(-nll.reshape(len(items), len(ANSWERS)), keys)


QUESTIONNAIRE = """
The 50 items of the IPIP Big-Five factor markers, ten a trait, scored from 1 to 5 by the
probabilities of five answers. Last, each high expert minus the low one, in brackets 95% intervals,
by bootstrap over a trait's items."""


def questionnaire(model, settings, args):
    """--questionnaire: trait scores of the bare base, and of each expert alone at weight 1."""
    items = read_items()
    scores = {"bare base": ask(model, items)}
    one_hots = torch.eye(model.experts, device=model.device)
    for pole, one_hot in zip(TRAITS, one_hots):
        scores[pole] = ask(model, items, one_hot)
    return summarise(scores, items)


def summarise(scores, items):
    """{who was asked: scores by item} -> rows of means by trait, and high minus low.

    The intervals of the differences are over the ten items of the trait.
    """
    traits = np.array([trait for trait, _, _ in items])
    rows = {name: {"name": name} for name in (*scores, "high - low")}
    for trait in BIG_FIVE:
        own = traits == trait
        for name, values in scores.items():
            rows[name][trait] = round(float(values[own].mean()), 4)
        change = scores[f"high {trait}"] - scores[f"low {trait}"]
        rows["high - low"][trait] = mean_interval(change[own])
    return {"questionnaire": list(rows.values())}
