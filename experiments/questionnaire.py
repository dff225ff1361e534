"""A personality questionnaire: the 50-item IPIP Big-Five factor markers (ipip.ori.org, in the
public domain). Each trait's ten items are asked of the bare base and of its two experts alone.

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
QUESTIONNAIRE = """
The 50 items of the IPIP Big-Five factor markers, ten a trait, scored from 1 to 5 by the
probabilities of five answers. The difference is the high expert minus the low one, in brackets its
95% interval, by bootstrap over the trait's items; = marks one smaller than its interval."""


def read_items(trait):
    """The items of a trait -> a list of (key, statement)."""
    items = []
    for _, line in read_lines(ITEMS):
        whose, key, item = line.strip().split("\t")
        if whose == trait:
            # "Don't talk a lot." -> "I don't talk a lot."
            items.append((key, f"I {item[0].lower()}{item[1:]}"))
    return items


def score(nll, keys):
    """Negative log-likelihoods of the five answers to n items (n, 5) -> scores (n,), 1 to 5.

    The mean of 1 to 5 under the probabilities, made to sum to 1 over the five; a key of - turns it
    round, since agreement then speaks against the trait.
    """
    probabilities = torch.softmax(-torch.tensor(nll), dim=1).numpy()
    values = probabilities @ [1, 2, 3, 4, 5]
    return np.where(np.array(keys) == "-", 6 - values, values)


def ask(model, items, w=None):
    """n items to the model with mixing weights w (E,), or to the bare base -> scores (n,)."""
    examples = []
    for _, statement in items:
        question = QUESTION.format(answers=", ".join(ANSWERS), statement=statement)
        prompt = model.tokenizer.encode_prompt(question)
        for answer in ANSWERS:
            # to its end token, so that no answer is the beginning of another
            examples.append(Example(prompt, model.tokenizer.encode_answer(answer), [], ()))
    if w is not None:
        w = w.expand(len(examples), -1)                         # (n, E), the same for all
    nll, _ = response_nll(model, examples, w)
    return score(nll.reshape(-1, len(ANSWERS)), [key for key, _ in items])


def questionnaire(model, settings, args):
    """--questionnaire: the bare base, and each expert alone at weight 1, on its trait's items."""
    one_hots = torch.eye(model.experts, device=model.device)
    rows = []
    for k, trait in enumerate(BIG_FIVE):
        items = read_items(trait)
        bare = ask(model, items)
        # high and low stand side by side
        high = ask(model, items, one_hots[2 * k])
        low = ask(model, items, one_hots[2 * k + 1])
        rows.append({
            "name": trait,
            "bare base": bare.mean(),
            "high expert": high.mean(),
            "low expert": low.mean(),
            "difference": mean_interval(high - low),
        })
    return {"questionnaire": rows}
