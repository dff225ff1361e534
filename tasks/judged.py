"""Answers in free text: a judge (any OpenAI-compatible endpoint) rates or compares them; Shop MMLU has references.

A rating that cannot be read is asked for again, three times in all, and then counted as unusable and left out of the mean.
"""

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import data
from data import UserError
from tasks.utils import find, guarded, read

JUDGED = {"mentalchat": "mentalchat.jsonl", "arena_hard": "question.jsonl", "shop_mmlu": "shop_mmlu.json", "pairwise": None}
DIMENSIONS = ["active listening", "empathy and validation", "safety and trustworthiness", "open-mindedness",
              "clarity and encouragement", "boundaries and ethics", "holistic approach"]        # of MentalChat16K
RATE = """You are an experienced counsellor and read how another answered somebody who asked for help.

They wrote:
{query}

The answer:
{answer}

Rate the answer from 1 (useless or harmful) to 10 (could not be better) in each respect below, and as a whole. Write one line
for each, its name as it stands here, a colon and a whole number, and nothing else:
""" + "".join(f"{d}: <1-10>\n" for d in [*DIMENSIONS, "overall"])
PAIR = """Two assistants answered the same message. Judge whose answer is better: right, helpful, fitting the person and the
situation. Neither length nor the order in which they stand counts.

The message:
{query}

The answer of assistant A:
{a}

The answer of assistant B:
{b}

Explain in a few sentences, then end with exactly one verdict: [[A>>B]] (A is much better), [[A>B]], [[A=B]], [[B>A]] or
[[B>>A]]."""
VERDICTS = {"A>>B": [1, 1, 1], "A>B": [1], "A=B": [0.5], "B>A": [0], "B>>A": [0, 0, 0]}     # "much" thrice, as Arena-Hard


def questions(name, folder, limit):
    """The records of a judged benchmark -> [(query, the answer to compare with, or None), ...]."""
    def query(r):
        turn = r["turns"][0] if "turns" in r else next(r[k] for k in ("query", "question", "input_field", "input") if k in r)
        return turn["content"] if isinstance(turn, dict) else turn

    records = read(find(name, JUDGED[name], folder))[:limit]
    if name == "shop_mmlu":
        return guarded(lambda: [(query(r), r["target_field"]) for r in records])
    if name == "mentalchat":
        return guarded(lambda: [(query(r), None) for r in records])
    baseline = read(find(name, "gpt-4-0314.jsonl", folder))
    theirs = guarded(lambda: {r["question_id"]: query(r["choices"][0]) for r in baseline})
    return guarded(lambda: [(query(r), theirs[r["question_id"]]) for r in records])


def ratings(text):
    """A judge's lines -> {dimension: 1 to 10}, or None unless each is there."""
    found = {d: re.search(re.escape(d) + r"\W*?(\d+)", text, re.I) for d in [*DIMENSIONS, "overall"]}
    return {d: int(m[1]) for d, m in found.items()} if all(m and 1 <= int(m[1]) <= 10 for m in found.values()) else None


def verdict(text):
    """The one verdict in a judge's text, or None."""
    found = set(re.findall(r"\[\[(A>>B|A>B|A=B|B>A|B>>A)\]\]", text))
    return found.pop() if len(found) == 1 else None


def ask_judge(s, prompts, parse):
    """What `parse` makes of the judge's answers; None where it made nothing of three of them."""
    def one(prompt):
        for k in range(3):
            try:
                text, _ = data.ask(s.judge, s.judge_model, prompt, temperature=0.7 if k else 0.0, seed=s.seed + k)
            except ConnectionError as e:
                raise UserError(f"the judge at {s.judge} gives no answer: {e}")
            except ValueError:                                          # longer than the judge's context
                return None
            if (found := parse(text)) is not None:
                return found

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(one, prompts))


def compare_pairs(s, queries, ours, theirs):
    """Each pair judged in both orders -> (our points, points in all) by question, and the number of unusable verdicts."""
    prompts = [PAIR.replace("{query}", q).replace("{a}", a).replace("{b}", b)
               for q, x, y in zip(queries, ours, theirs) for a, b in ((x, y), (y, x))]
    found = ask_judge(s, prompts, verdict)
    points, weights = np.zeros(len(queries)), np.zeros(len(queries))
    for k, v in enumerate(found):
        if v is not None:
            points[k // 2] += sum(VERDICTS[v] if k % 2 == 0 else [1 - x for x in VERDICTS[v]])
            weights[k // 2] += len(VERDICTS[v])
    return points, weights, found.count(None)


def judge(name, asked, answers, s):
    """Answers of one run -> {row: (points, weights, what chance scores, unusable)}, as run_benchmark's rows."""
    queries, theirs = zip(*asked)
    if name == "shop_mmlu":
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise UserError("shop_mmlu compares embeddings: pip install sentence-transformers")
        encoder = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
        a, b = (encoder.encode(list(texts), normalize_embeddings=True) for texts in (answers, theirs))
        return {"shop_mmlu (cosine)": (100 * (a * b).sum(axis=1), np.ones(len(a)), None, 0)}
    if name == "mentalchat":
        found = ask_judge(s, [RATE.replace("{query}", q).replace("{answer}", a) for q, a in zip(queries, answers)], ratings)
        usable = [f for f in found if f]
        return {f"mentalchat: {d} (1 to 10)": (np.array([f[d] for f in usable], dtype=float), np.ones(len(usable)), None,
                                               found.count(None)) for d in [*DIMENSIONS, "overall"]}
    points, weights, unusable = compare_pairs(s, queries, answers, theirs)
    return {f"{name} (% of verdicts won)": (100 * points, weights, 50, unusable)}
