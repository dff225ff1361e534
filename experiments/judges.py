"""Answers in free text: a judge (any OpenAI-compatible endpoint) rates or compares them, and Shop
MMLU has references.

A rating that cannot be read is asked for again, three times in all, and then counted as unusable
and left out of the mean.
"""

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from experiments.asking import ask
from experiments.statistics import Scores
from experiments.tasks.utils import find, guarded, read
from plumbing import UserError

# a benchmark's name -> its file; pairwise asks the held-out queries
JUDGED = {
    "mentalchat": "mentalchat.jsonl",
    "arena_hard": "question.jsonl",
    "shop_mmlu": "shop_mmlu.json",
    "pairwise": None,
}
TRIES = 3

# of MentalChat16K
DIMENSIONS = [
    "active listening",
    "empathy and validation",
    "safety and trustworthiness",
    "open-mindedness",
    "clarity and encouragement",
    "boundaries and ethics",
    "holistic approach",
]
RATED = [*DIMENSIONS, "overall"]
RATE = """\
You are an experienced counsellor and read how another answered somebody who asked for help.

They wrote:
{query}

The answer:
{answer}

Rate the answer from 1 (useless or harmful) to 10 (could not be better) in each respect below, and \
as a whole. Write one line
for each, its name as it stands here, a colon and a whole number, and nothing else:
""" + "".join(f"{dimension}: <1-10>\n" for dimension in RATED)
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


# ---------------------------------------------------------------------------------------- questions

def questions(name, folder, limit):
    """The records of a judged benchmark -> (query, the answer to compare with or None) of each."""
    records = read(find(name, JUDGED[name], folder))[:limit]
    if name == "shop_mmlu":
        return guarded(lambda: [(turn(record), record["target_field"]) for record in records])
    if name == "mentalchat":
        return guarded(lambda: [(turn(record), None) for record in records])
    baseline = read(find(name, "gpt-4-0314.jsonl", folder))
    theirs = guarded(lambda: {record["question_id"]: turn(record["choices"][0])
                              for record in baseline})
    return guarded(lambda: [(turn(record), theirs[record["question_id"]]) for record in records])


def turn(record):
    """The text of a record, under any of the keys that these benchmarks have for it."""
    if "turns" in record:
        text = record["turns"][0]
    else:
        keys = ("query", "question", "input_field", "input")
        text = next(record[key] for key in keys if key in record)
    return text["content"] if isinstance(text, dict) else text


# ---------------------------------------------------------------------------------------- the judge

def ask_judge(args, prompts, parse):
    """What `parse` makes of the judge's answer to each prompt; None where it could not be read."""
    def judged(prompt):
        for attempt in range(TRIES):
            # the first answer is the likeliest one: asked for again, it must be drawn
            temperature = 0.7 if attempt else 0.0
            try:
                answer = ask(args.judge, args.judge_model, prompt, temperature=temperature,
                             seed=args.seed + attempt)
            except ConnectionError as error:
                raise UserError(f"the judge at {args.judge} gives no answer: {error}")
            except ValueError:
                return None                             # longer than the judge's context
            found = parse(answer.text)
            if found is not None:
                return found
        return None

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(judged, prompts))


def ratings(text):
    """A judge's lines -> {dimension: 1 to 10}, or None unless each is there."""
    found = {}
    for dimension in RATED:
        match = re.search(re.escape(dimension) + r"\W*?(\d+)", text, re.I)
        if not match or not 1 <= int(match[1]) <= 10:
            return None
        found[dimension] = int(match[1])
    return found


def verdict(text):
    """The one verdict in a judge's text, or None."""
    found = set(re.findall(r"\[\[(A>>B|A>B|A=B|B>A|B>>A)\]\]", text))
    return found.pop() if len(found) == 1 else None


def compare_pairs(args, queries, ours, theirs):
    """Each pair of answers judged in both orders, as a judge likes the first (or the last) better
    -> (our points, points in all) by question, and the number of unusable verdicts.
    """
    prompts = []
    for query, own, other in zip(queries, ours, theirs):
        prompts.append(pair_prompt(query, own, other))
        prompts.append(pair_prompt(query, other, own))
    found = ask_judge(args, prompts, verdict)
    points = np.zeros(len(queries))
    weights = np.zeros(len(queries))
    for k, said in enumerate(found):
        if said is None:
            continue
        question, swapped = divmod(k, 2)
        for point in VERDICTS[said]:
            points[question] += 1 - point if swapped else point
            weights[question] += 1
    return points, weights, found.count(None)


def pair_prompt(query, a, b):
    return PAIR.replace("{query}", query).replace("{a}", a).replace("{b}", b)


# ------------------------------------------------------------------------------- rows of the table

def judge(name, asked, answers, args):
    """Answers of one run to the `questions` of a benchmark -> {row of the table: Scores}."""
    queries = [query for query, _ in asked]
    theirs = [reference for _, reference in asked]
    if name == "shop_mmlu":
        return {"shop_mmlu (cosine)": likeness(answers, theirs)}
    if name == "mentalchat":
        return rate_counselling(queries, answers, args)
    return {f"{name} (% of verdicts won)": win_rate(args, queries, answers, theirs)}


def win_rate(args, queries, ours, theirs):
    """How much of what the verdicts give is ours, in %."""
    points, weights, unusable = compare_pairs(args, queries, ours, theirs)
    return Scores(100 * points, weights, 50, unusable)


def rate_counselling(queries, answers, args):
    prompts = []
    for query, answer in zip(queries, answers):
        prompts.append(RATE.replace("{query}", query).replace("{answer}", answer))
    found = ask_judge(args, prompts, ratings)
    usable = [rated for rated in found if rated]
    rows = {}
    for dimension in RATED:
        points = np.array([rated[dimension] for rated in usable], dtype=float)
        scores = Scores(points, np.ones(len(usable)), None, found.count(None))
        rows[f"mentalchat: {dimension} (1 to 10)"] = scores
    return rows


def likeness(answers, references):
    """Cosine of the answers' and the references' sentence embeddings, in %."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise UserError("shop_mmlu compares embeddings: pip install sentence-transformers")
    encoder = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
    ours = encoder.encode(list(answers), normalize_embeddings=True)
    theirs = encoder.encode(list(references), normalize_embeddings=True)
    return Scores(100 * (ours * theirs).sum(axis=1), np.ones(len(ours)), None)
