"""Four of the paper's benchmarks: a table for each run, a row for each score.

A benchmark's own files are read from DIR/NAME, where --data gives DIR. Prompts are worded by us, in
the authors' form; answers are read and scored by their rules, unusable ones included.
"""

import json
import math
import random
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import trange

from experiments.answers import ask_model
from experiments.statistics import mean_interval
from personafuse import load_run, sample_token
from plumbing.files import UserError, read_json, read_lines

LETTERS = "ABCDEFGHIJ"
# each question of ToMBench is put five times, its options in another order, and the majority counts
TRIES = 5
BENCHMARKS = """
Scores from 0 to 100; in brackets 95% intervals, by bootstrap over the questions. Unusable answers
count as wrong.
"""


class Question(NamedTuple):
    prompts: list           # the ways in which it is asked
    right: object           # what the benchmark's scoring needs to know
    row: str                # the row of the table that it counts for
    form: str = ""          # how an answer must look, with all letters where one is to be chosen


class Benchmark(NamedTuple):
    read: object            # folder of the files -> Questions
    score: object           # what is right, and the answers -> points from 0 to 1, or None
    max_new_tokens: int
    source: str             # where the files come from


# -------------------------------------------------------------------------------------------- files

def read_questions(name, data):
    """All questions of a benchmark, in an order that lets --limit take some of each row."""
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}; there are {', '.join(TASKS)}")
    task = TASKS[name]
    try:
        questions = task.read(Path(data, name)) if data else []
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{data}: a record is not in the own format of {name}: "
                        f"{type(error).__name__} {error}")
    if not questions:
        raise UserError(f"no questions: get the files from {task.source}, put them into a folder "
                        f"DIR/{name}, then give --data DIR")
    random.Random(0).shuffle(questions)
    return questions


def read_rows(path):
    """The JSON of each line of a file."""
    try:
        return [json.loads(line) for _, line in read_lines(path)]
    except ValueError as error:
        raise UserError(f"cannot read {path}: {error}")


def lettered(choices):
    """Choices -> lines "A) ...", "B) ..."."""
    return "\n".join(f"{letter}) {choice}" for letter, choice in zip(LETTERS, choices))


# ---------------------------------------------------------------------------------------- EmoBench

def read_emobench(folder):
    """EA, emotional application: what would be most effective? EU, understanding: what does
    somebody feel, and why?
    """
    questions = []
    for part, question in (("EA", application), ("EU", understanding)):
        for row in read_rows(folder / f"{part}.jsonl"):
            if row["language"] == "en":
                questions.append(question(row))
    return questions


def application(row):
    choices = row["choices"]
    text = (f"{row['scenario']}\n\n"
            f"Which {row['question type'].lower()} would be most effective for {row['subject']} "
            f"here?\n{lettered(choices)}\n\n"
            "Give one answer and nothing else, by its letter, as JSON: "
            '{"answer": "<letter>"}')
    right = {"answer": LETTERS[choices.index(row["label"])]}
    form = f'{{"answer": "{LETTERS[:len(choices)]}"}}'
    return Question([text], right, "EmoBench EA", form)


def understanding(row):
    emotions = row["emotion_choices"]
    causes = row["cause_choices"]
    text = (f"{row['scenario']}\n\n"
            f"Question 1: what does {row['subject']} feel in the end?\n{lettered(emotions)}\n\n"
            f"Question 2: why does {row['subject']} feel so?\n{lettered(causes)}\n\n"
            "Give one answer to each and nothing else, by its letter, as JSON: "
            '{"answer_q1": "<letter>", "answer_q2": "<letter>"}')
    right = {"answer_q1": LETTERS[emotions.index(row["emotion_label"])],
             "answer_q2": LETTERS[causes.index(row["cause_label"])]}
    form = (f'{{"answer_q1": "{LETTERS[:len(emotions)]}", '
            f'"answer_q2": "{LETTERS[:len(causes)]}"}}')
    return Question([text], right, "EmoBench EU", form)


def score_emobench(right, answers):
    """Right where every letter in the JSON is (EU has two); what is no JSON object is unusable."""
    block = re.search(r"```json\s*(.*?)```", answers[0], re.S)
    try:
        said = json.loads(block[1] if block else answers[0])
        return float({key: said[key] for key in right} == right)
    except (ValueError, KeyError, TypeError):
        return None


# ---------------------------------------------------------------------------------------- ToMBench

def read_tombench(folder):
    """The English side of every .jsonl file of the folder, a file a task."""
    questions = []
    for path in sorted(folder.glob("*.jsonl")):
        for number, row in enumerate(read_rows(path)):
            questions.append(tombench_question(f"{path.stem} {number}", row))
    return questions


def tombench_question(name, row):
    options = {}
    for letter in "ABCD":
        option = row.get(f"OPTION-{letter}")
        # NaN where there is none
        if isinstance(option, str):
            options[letter] = option.removeprefix(f"{letter}. ")
    prompts = []
    orders = []
    for attempt in range(TRIES):
        order = list(options)
        random.Random(f"{name} {attempt}").shuffle(order)
        orders.append(dict(zip(LETTERS, order)))
        prompts.append(f"{row['STORY']}\n\n{row['QUESTION']}\n"
                       f"{lettered(options[letter] for letter in order)}\n\n"
                       "Choose the likeliest answer, even where the story leaves it open, and "
                       "write nothing but its letter in double square brackets, as in [[A]].")
    right = (orders, row["答案\nANSWER"].strip()[0])
    return Question(prompts, right, "ToMBench", f"[[{LETTERS[:len(options)]}]]")


def score_tombench(right, answers):
    """The majority of the votes, the first in a tie. A vote is the bracketed letter, else the last
    capital A to D; the question is unusable where no answer has one.
    """
    orders, letter = right
    votes = []
    # order: the letter that was shown -> the option's letter in the file, as two may read alike
    for order, text in zip(orders, answers):
        said = re.findall(r"\[([A-D])\]", text)[:1] or re.findall("[A-D]", text)[-1:]
        votes += [order.get(shown) for shown in said]
    return float(max(votes, key=votes.count) == letter) if votes else None


# ------------------------------------------------------------------------------- EQ-Bench and GSM8K

def read_eq_bench(folder):
    questions = []
    for row in read_json(folder / "eq_bench_v2_questions_171.json").values():
        reference = row["reference_answer_fullscale"]
        right = {reference[f"emotion{k}"]: float(reference[f"emotion{k}_score"])
                 for k in range(1, 5)}
        questions.append(Question([row["prompt"]], right, "EQ-Bench"))
    return questions


def score_eq_bench(right, answers):
    """Four emotions rated from 0 to 10: 1 less the distances to the reference, small ones less.
    Its scale is made so that random answers score 0.
    """
    said = dict(re.findall(r"(\w+):\s+(\d+)", answers[0]))
    if said.keys() != right.keys():
        return None
    total = 0
    for emotion, rating in said.items():
        distance = abs(float(rating) - right[emotion])
        if 0 < distance <= 5:
            distance = 6.5 / (1 + math.exp(-1.2 * (distance - 4)))
        total += distance
    return 1 - 0.07477 * total


def read_gsm8k(folder):
    """The problems of the test, without worked examples."""
    questions = []
    for row in read_rows(folder / "test.jsonl"):
        right = row["answer"].rpartition("####")[2].strip()
        prompt = f"Question: {row['question']}\nAnswer:"
        questions.append(Question([prompt], right, "GSM8K"))
    return questions


def score_gsm8k(right, answers):
    """Right where the last number in the answer is."""
    numbers = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", answers[0].partition("Question:")[0])
    if not numbers:
        return None
    said, right = (re.sub(r"[,$]|\.$", "", text) for text in (numbers[-1], right))
    return float(said == right)


TASKS = {
    "emobench": Benchmark(read_emobench, score_emobench, 60,
                          "https://github.com/Sahandfer/EmoBench, folder data"),
    "eq_bench": Benchmark(read_eq_bench, score_eq_bench, 80,
                          "https://github.com/EQ-bench/EQ-Bench, folder data"),
    "tombench": Benchmark(read_tombench, score_tombench, 16,
                          "https://github.com/zhchen18/ToMBench, folder data"),
    "gsm8k": Benchmark(
        read_gsm8k, score_gsm8k, 256,
        "https://github.com/openai/grade-school-math, folder grade_school_math/data"),
}


# ------------------------------------------------------------------------------------------- scores

def ask_questions(model, questions, args, max_new_tokens):
    """The answers to each question, one to each of its prompts."""
    prompts = [prompt for question in questions for prompt in question.prompts]
    if args.guided and questions[0].form:
        w = model.mixing_weights(prompts, args.route, seed=args.seed)
        forms = [question.form for question in questions for _ in question.prompts]
        ids = model.encode_prompts(prompts, max_new_tokens)
        answers = []
        for i in trange(len(prompts), leave=False):
            answers.append(fill_form(model, ids[i], forms[i], None if w is None else w[[i]]))
    else:
        answers = ask_model(model, prompts, args, max_new_tokens)
    answers = iter(answers)
    return [[next(answers) for _ in question.prompts] for question in questions]


@torch.no_grad()
def fill_form(model, prompt, form, w):
    """An answer in a form to a prompt (token ids), with the likeliest letters."""
    tokenizer = model.tokenizer
    answer = ""
    # its parts: text, letters, text, letters, text
    for k, part in enumerate(re.split("([A-J]+)", form)):
        if k % 2 == 1:
            ids = prompt + tokenizer.fill([tokenizer.answer], answer=answer)
            hidden = model.base(torch.tensor([ids], device=model.device), w)        # (1, T, d)
            letters = [tokenizer.encode(letter)[-1] for letter in part]
            logits = model.base.logits(hidden[:, -1])[:, letters]                   # (1, letters)
            part = part[sample_token(logits, 0, 1, None)]
        answer += part
    return answer


def score_questions(score, questions, answers):
    """Rows of the table, from a benchmark's `score`."""
    scored = defaultdict(list)
    for question, texts in zip(questions, answers):
        letters = re.findall("[A-J]+", question.form)
        chance = 100 / math.prod(map(len, letters)) if letters else 0
        scored[question.row].append((score(question.right, texts), chance))
    rows = []
    for name, of in sorted(scored.items()):
        points, chances = zip(*of)
        # what cannot be used counts as wrong
        scores = np.array([100 * (point or 0) for point in points])
        rows.append({"name": name, "n": len(points), "chance": float(np.mean(chances)),
                     "score": mean_interval(scores), "unusable": points.count(None)})
    return rows


# --------------------------------------------------------------------------------- runs in a table

def benchmarks(args):
    """Every run of --run on every benchmark of --tasks -> {run: rows of a table}."""
    # read all files before any model: what is missing is said at once
    asked = {name: read_questions(name, args.data)[:args.limit] for name in args.tasks.split(",")}
    tables = {}
    for run in args.run:
        model = None                            # two large ones need not fit at once
        model, _ = load_run(run, args.device, args.dtype)
        rows = []
        for name, questions in asked.items():
            answers = ask_questions(model, questions, args, TASKS[name].max_new_tokens)
            rows += score_questions(TASKS[name].score, questions, answers)
        tables[f"{Path(run).name}, {args.route}"] = rows
    return tables
