"""A judge (any OpenAI-compatible endpoint) compares two answers to the same query.

A verdict that cannot be read is asked for again, three times in all, and then left out.
"""

import re

import numpy as np

from experiments.answers import ask_model
from experiments.asking import server_answers
from experiments.common import run_records
from experiments.statistics import mean_interval
from plumbing.files import UserError

# the names in --tasks that need one
JUDGED = ["pairwise"]
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

Explain in a few sentences, then end with exactly one verdict: [[A]], [[B]] or [[tie]]."""

# a verdict -> what A gets for it
VERDICTS = {
    "A": 1.0,
    "tie": 0.5,
    "B": 0.0,
}


def pairwise(label, model, settings, args, opponents):
    """The run's held-out queries: its answers against those of the bare base and of all runs before
    it -> rows of a table. `opponents` (name -> answers) gets this run's answers too.
    """
    queries = [record["query"] for record in run_records(settings)[1]][:args.limit]
    ours = ask_model(model, queries, args, args.max_new_tokens)
    if not opponents:
        bare = type(args)(**vars(args) | {"route": "none"})
        opponents["bare base"] = ask_model(model, queries, bare, args.max_new_tokens)
    rows = []
    for name, theirs in opponents.items():
        wins, unusable = compare_pairs(args, queries, ours, theirs)
        rows.append({
            "name": f"pairwise, wins over {name}",
            "n": len(wins),
            "chance": 50.0,
            "score": mean_interval(100 * wins) if len(wins) else None,
            "unusable": unusable,
        })
    opponents[label] = ours
    return rows


def compare_pairs(args, queries, ours, theirs):
    """Queries and two answers to each -> how often ours wins, from 0 to 1, by question that has a
    verdict, and the number of unusable ones.
    """
    # in both orders, as a judge likes the first (or the last) better
    wins = ask_judge(args, queries, ours, theirs)
    losses = ask_judge(args, queries, theirs, ours)
    both = np.stack([wins, 1 - losses], axis=1)                 # (n, 2)
    judged = both[~np.isnan(both).all(axis=1)]
    return np.nanmean(judged, axis=1), int(np.isnan(both).sum())


def ask_judge(args, queries, answers_a, answers_b):
    """Queries, answers A, answers B -> what A gets for each (n,), nan where no verdict was read."""
    prompts = []
    for query, a, b in zip(queries, answers_a, answers_b):
        texts = {"query": query, "a": a, "b": b}
        # one pass: a text that holds "{a}" itself says just that
        prompts.append(re.sub(r"\{(\w+)\}", lambda place: texts[place[1]], PAIR))
    found = np.full(len(prompts), np.nan)
    for attempt in range(TRIES):
        todo = np.isnan(found).nonzero()[0]
        # the first answer is the likeliest one: asked for again, it must be drawn
        answers = server_answers(
            args.judge, args.judge_model,
            [prompts[i] for i in todo],
            temperature=0.7 if attempt else 0.0,
            seed=args.seed + attempt,
        )
        for k, answer in answers:
            if isinstance(answer, (OSError, UserError)):
                raise UserError(f"the judge at {args.judge} gives no answer: {answer}")
            # a ValueError: the texts are longer than the judge's context
            text = "" if isinstance(answer, ValueError) else answer.text
            said = set(re.findall(r"\[\[(A|B|tie)\]\]", text))
            if len(said) == 1:
                found[todo[k]] = VERDICTS[said.pop()]
    return found
