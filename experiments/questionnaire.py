"""A personality questionnaire: the 50-item IPIP Big-Five factor markers (ipip.ori.org, in the
public domain), asked of the bare base and of each expert alone.

    python -m experiments.evaluate --questionnaire --run out/tiny

Each item is put as a statement about the model, and each of five answers, from "very inaccurate"
to "very accurate", gets the probability that the model writes it. Nothing is generated.
"""

import json

import numpy as np
import torch

from data import TRAITS, Example
from experiments.control import load_experts_run
from experiments.statistics import mean_interval, print_table, shown_difference
from plumbing import HERE, read_lines

ITEMS = HERE / "experiments" / "ipip50.tsv"         # trait, key (+ or -), item
BIG_FIVE = [pole.split()[1] for pole in TRAITS[::2]]
QUESTION = """\
How accurately does this statement describe you? Answer with one of: {answers}.
"{statement}\""""
# as the IPIP prints them; the first scores 1, the last 5
ANSWERS = ["very inaccurate", "moderately inaccurate", "neither accurate nor inaccurate",
           "moderately accurate", "very accurate"]


def read_items(path=ITEMS):
    """The questionnaire -> a list of (trait, key, statement)."""
    items = []
    # the first line names the columns
    for _, line in read_lines(path)[1:]:
        trait, key, item = line.strip().split("\t")
        items.append((trait, key, statement(item)))
    return items


def statement(item):
    """"Don't talk a lot." -> "I don't talk a lot."."""
    return f"I {item[0].lower()}{item[1:]}"


def score(log_probabilities, key):
    """Log-probabilities of the five answers (n, 5) -> scores (n,) between 1 and 5.

    The mean of 1 to 5 under the probabilities, made to sum to 1 over the five; a key of - turns it
    round, since agreement then speaks against the trait.
    """
    top = log_probabilities.max(axis=1, keepdims=True)
    probabilities = np.exp(log_probabilities - top)
    probabilities = probabilities / probabilities.sum(axis=1, keepdims=True)
    value = probabilities @ [1, 2, 3, 4, 5]
    reversed_key = np.array(key) == "-"
    return np.where(reversed_key, 6 - value, value)


def ask(model, items, w=None):
    """The items to the model with mixing weights w (E,), or to the bare base -> scores (50,)."""
    answers = ", ".join(ANSWERS)
    examples = []
    for _, _, text in items:
        prompt = model.tokenizer.encode_prompt(QUESTION.format(answers=answers, statement=text))
        for answer in ANSWERS:
            # to its end token, so that no answer is the beginning of another
            examples.append(Example(prompt, model.tokenizer.encode_answer(answer), [], ()))
    if w is not None:
        w = w.expand(len(examples), -1)                         # (n, E), the same for all
    nll, _, _ = model.response_nll(examples, w)
    log_probabilities = -nll.double().cpu().numpy()
    keys = [key for _, key, _ in items]
    return score(log_probabilities.reshape(len(items), len(ANSWERS)), keys)


def ask_everyone(model, items):
    """-> {"bare base": scores (50,), "high openness": ..., ...}, each expert alone at weight 1."""
    scores = {"bare base": ask(model, items)}
    one_hots = torch.eye(model.experts, device=model.device)
    for pole, one_hot in zip(TRAITS, one_hots):
        scores[pole] = ask(model, items, one_hot)
    return scores


def summarise(scores, items):
    """Scores by item -> means by trait for each who was asked, and high minus low for each trait.

    The intervals of the differences are over the ten items of the trait.
    """
    traits = np.array([trait for trait, _, _ in items])
    means = {}
    for name, values in scores.items():
        means[name] = {}
        for trait in BIG_FIVE:
            mean = values[traits == trait].mean()
            means[name][trait] = round(float(mean), 4)
    differences = {}
    for trait in BIG_FIVE:
        change = scores[f"high {trait}"] - scores[f"low {trait}"]
        differences[trait] = mean_interval(change[traits == trait])
    return {"scores": means, "high_minus_low": differences}


def questionnaire(args, device, dtype):
    """--questionnaire: each run's trait scores, expert by expert."""
    items = read_items()
    results = {}
    for run in args.run:
        model, _ = load_experts_run(run, device, dtype)
        results[run] = summarise(ask_everyone(model, items), items)
    if args.json:
        print(json.dumps(results, indent=1))
        return
    print("The 50 items of the IPIP Big-Five factor markers, ten a trait, scored from 1 to 5 by\n"
          "the probabilities of five answers. In brackets 95% intervals, by bootstrap over a\n"
          "trait's items; = marks a difference smaller than its interval.")
    for run, result in results.items():
        print(f"\n{run}")
        lines = []
        for name, means in result["scores"].items():
            lines.append([name, *(f"{mean:.2f}" for mean in means.values())])
        print_table(["", *BIG_FIVE], lines)
        print()
        lines = []
        for trait, difference in result["high_minus_low"].items():
            lines.append([trait, shown_difference(difference)])
        print_table(["", "its high expert minus its low one"], lines)
