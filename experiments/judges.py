"""A judge (any OpenAI-compatible endpoint) compares two answers to the same query.

A verdict that cannot be read is asked for again, three times in all, and then left out.
"""

import re

import numpy as np

from experiments.answers import ask_model
from experiments.asking import server_answers
from experiments.common import run_records
from experiments.statistics import Scores
from plumbing.files import UserError

TRIES = 3
PAIR = """\
Two assistants answered the same message. Judge whose answer is better: right, helpful, fitting \
the person and the
situation. Neither length nor the order in which they stand counts.

The message:
{query}

The answer of assistant A:
{a}

The answer of assistant B:
{b}

Explain in a few sentences, then end with exactly one verdict: [[A>>B]] (A is much better), [[A>B]]\
, [[A=B]], [[B>A]] or
[[B>>A]]."""

# a verdict -> points of A, one for each time it counts: "much" thrice, as Arena-Hard does
VERDICTS = {
    "A>>B": [1, 1, 1],
    "A>B": [1],
    "A=B": [0.5],
    "B>A": [0],
    "B>>A": [0, 0, 0],
}


def pairwise(label, model, settings, args, opponents):
    """The run's held-out queries: its answers against those of the bare base and of all runs before
    it -> {row of the table: Scores}. `opponents` (name -> answers) gets this run's answers too.
    """
    queries = [record["query"] for record in run_records(settings)[1]][:args.limit]
    ours = ask_model(model, queries, args, args.max_new_tokens)
    if not opponents:
        bare = type(args)(**vars(args) | {"route": "none"})
        opponents["bare base"] = ask_model(model, queries, bare, args.max_new_tokens)
    rows = {}
    for name, theirs in opponents.items():
        points, weights, unusable = compare_pairs(args, queries, ours, theirs)
        rows[f"pairwise, wins over {name}"] = Scores(100 * points, weights, 50, unusable)
    opponents[label] = ours
    return rows


def compare_pairs(args, queries, ours, theirs):
    """Each pair of answers judged in both orders, as a judge likes the first (or the last) better
    -> (our points, points in all) by question, and the number of unusable verdicts.
    """
    prompts = []
    for query, own, other in zip(queries, ours, theirs):
        prompts += [pair_prompt(query, own, other), pair_prompt(query, other, own)]
    points = np.zeros(len(queries))
    weights = np.zeros(len(queries))
    found = ask_judge(args, prompts)
    for k, verdict in enumerate(found):
        question, swapped = divmod(k, 2)
        for point in VERDICTS.get(verdict, []):
            points[question] += 1 - point if swapped else point
            weights[question] += 1
    return points, weights, found.count(None)


def pair_prompt(query, a, b):
    places = {"query": query, "a": a, "b": b}
    # one pass: a text that holds "{a}" itself says just that
    return re.sub(r"\{(query|a|b)\}", lambda place: places[place[1]], PAIR)


def ask_judge(args, prompts):
    """The judge's verdict on each prompt; None where none could be read."""
    found = [None] * len(prompts)
    for attempt in range(TRIES):
        todo = [i for i, verdict in enumerate(found) if verdict is None]
        # the first answer is the likeliest one: asked for again, it must be drawn
        answers = server_answers(args.judge, args.judge_model, [prompts[i] for i in todo],
                                 temperature=0.7 if attempt else 0.0, seed=args.seed + attempt)
        for k, answer in answers:
            if isinstance(answer, (OSError, UserError)):
                raise UserError(f"the judge at {args.judge} gives no answer: {answer}")
            # a ValueError: the texts are longer than the judge's context
            said = [] if isinstance(answer, ValueError) else re.findall(
                r"\[\[(A>>B|A>B|A=B|B>A|B>>A)\]\]", answer.text)
            if len(set(said)) == 1:
                found[todo[k]] = said[0]
    return found
