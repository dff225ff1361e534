"""Four of the paper's benchmarks: a table for each run, a row for each score.

A benchmark's own files are read from --data DIR, or from DIR/NAME. Prompts are worded by us, in the
authors' form; answers are read and scored by their rules, unusable ones included.
"""

import json
import math
import random
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from experiments.answers import ask_model
from experiments.sources import read_file
from experiments.statistics import mean_interval
from personafuse import load_run
from plumbing.files import UserError, read_json

LETTERS = "ABCDEFGHIJ"
# each question of ToMBench is put five times, its options in another order, and the majority counts
TRIES = 5
BENCHMARKS = """
Scores from 0 to 100; in brackets 95% intervals, by bootstrap over the questions. Unusable answers
count as wrong.
"""
EQ_BENCH_FILE = "eq_bench_v2_questions_171.json"


class Question(NamedTuple):
    prompts: list           # the ways in which it is asked
    right: object           # what the benchmark's scoring needs to know
    chance: float           # what guessing scores, from 0 to 1
    group: str = ""         # a row of the table that it counts for too: "EA"
    query: str = ""         # what the router reads, if not the prompt
    form: str = ""          # how an answer must look, with ? for a letter
    options: tuple = ()     # how many letters there are for each ?


class Benchmark(NamedTuple):
    read: object            # folder of the files -> Questions
    score: object           # a Question and its answers -> points from 0 to 1, or None
    max_new_tokens: int
    source: str             # where the files come from
    files: list             # those without which there is nothing to ask


# -------------------------------------------------------------------------------------------- files

def read_questions(name, folder):
    """All questions of a benchmark, in an order that lets --limit take some of each group."""
    benchmark = TASKS[name]
    if folder is None:
        raise UserError(f"{name} is read from files: get them from {benchmark.source}, then give "
                        "their folder with --data DIR")
    folder = Path(folder)
    if (folder / name).is_dir():
        folder = folder / name
    for file in benchmark.files:
        if not (folder / file).exists():
            raise UserError(f"there is no {folder / file}; it comes from {benchmark.source}")
    try:
        questions = benchmark.read(folder)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{folder}: a record is not in the own format of {name}: "
                        f"{type(error).__name__} {error}")
    random.Random(0).shuffle(questions)
    return questions


def lettered(choices):
    """Choices -> lines "A) ...", "B) ..."."""
    return "\n".join(f"{letter}) {choice}" for letter, choice in zip(LETTERS, choices))


# ---------------------------------------------------------------------------------------- EmoBench

def read_emobench(folder):
    """EA, emotional application: what would be most effective? EU, understanding: what does
    somebody feel, and why?
    """
    questions = []
    for part in ("EA", "EU"):
        for row in read_file(folder / f"{part}.jsonl"):
            if row["language"] == "en":
                questions.append(application(row) if part == "EA" else understanding(row))
    return questions


def application(row):
    choices = row["choices"]
    text = (f"{row['scenario']}\n\n"
            f"Which {row['question type'].lower()} would be most effective for {row['subject']} "
            f"here?\n{lettered(choices)}\n\n"
            "Give one answer and nothing else, by its letter, as JSON: "
            '{"answer": "<letter>"}')
    right = {"answer": LETTERS[choices.index(row["label"])]}
    return Question([text], right, 1 / len(choices), "EA", form='{"answer": "?"}',
                    options=(len(choices),))


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
    return Question([text], right, 1 / len(emotions) / len(causes), "EU",
                    form='{"answer_q1": "?", "answer_q2": "?"}',
                    options=(len(emotions), len(causes)))


def score_emobench(question, answers):
    """Right where every letter in the JSON is (EU has two); what is no JSON object is unusable."""
    block = re.search(r"```json\s*(.*?)```", answers[0], re.S)
    try:
        said = json.loads(block[1] if block else answers[0])
        letters = {key: said[key] for key in question.right}
    except (ValueError, KeyError, TypeError):
        return None
    if not all(isinstance(letter, str) for letter in letters.values()):
        return None
    return float(letters == question.right)


# ---------------------------------------------------------------------------------------- ToMBench

def read_tombench(folder):
    """The English side of every .jsonl file of the folder, a file a task."""
    questions = []
    for path in sorted(folder.glob("*.jsonl")):
        for number, row in enumerate(read_file(path)):
            if "STORY" in row:
                questions.append(tombench_question(f"{path.stem} {number}", path.stem, row))
    return questions


def tombench_question(name, task, row):
    options = {}
    for letter in "ABCD":
        if row.get(f"OPTION-{letter}"):
            options[letter] = str(row[f"OPTION-{letter}"]).removeprefix(f"{letter}. ")
    orders = []
    prompts = []
    for attempt in range(TRIES):
        order = list(options)
        random.Random(f"{name} {attempt}").shuffle(order)
        orders.append(order)
        prompts.append(f"{row['STORY']}\n\n{row['QUESTION']}\n"
                       f"{lettered(options[letter] for letter in order)}\n\n"
                       "Choose the likeliest answer, even where the story leaves it open, and "
                       "write nothing but its letter in double square brackets, as in [[A]].")
    right = (orders, row["答案\nANSWER"].strip()[0])
    return Question(prompts, right, 1 / len(options), task, form="[[?]]",
                    options=(len(options),))


def score_tombench(question, answers):
    """The majority of the votes, the first in a tie. A vote is the bracketed letter, else the last
    capital A to D; the question is unusable where no answer has one.
    """
    orders, right = question.right
    votes = []
    for order, text in zip(orders, answers):
        said = re.findall(r"\[([A-D])\]", text)[:1] or re.findall("[A-D]", text)[-1:]
        if said:
            # the letter that the option had in the file; "" where there is no such option
            votes.append(dict(zip("ABCD", order)).get(said[0], ""))
    return float(max(votes, key=votes.count) == right) if votes else None


# ------------------------------------------------------------------------------- EQ-Bench and GSM8K

def read_eq_bench(folder):
    questions = []
    for row in read_json(folder / EQ_BENCH_FILE, "").values():
        reference = row["reference_answer_fullscale"]
        right = {reference[f"emotion{k}"]: float(reference[f"emotion{k}_score"])
                 for k in range(1, 5)}
        # its scale is made so that random answers score 0
        questions.append(Question([row["prompt"]], right, 0))
    return questions


def score_eq_bench(question, answers):
    """Four emotions rated from 0 to 10: 1 less the distances to the reference, small ones less."""
    said = dict(re.findall(r"(\w+):\s+(\d+)", answers[0]))
    if said.keys() != question.right.keys():
        return None
    total = 0
    for emotion, rating in said.items():
        distance = abs(float(rating) - question.right[emotion])
        if 0 < distance <= 5:
            distance = 6.5 / (1 + math.exp(-1.2 * (distance - 4)))
        total += distance
    return 1 - 0.07477 * total


def read_gsm8k(folder):
    """Each problem of the test, behind five worked examples where their file is there."""
    path = folder / "train.jsonl"
    examples = list(read_file(path))[:5] if path.exists() else []
    if not examples:
        print(f"note: gsm8k is asked without worked examples: there is no {path}", file=sys.stderr)
    shots = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in examples)
    questions = []
    for row in read_file(folder / "test.jsonl"):
        prompt = f"{shots}Question: {row['question']}\nAnswer:"
        right = row["answer"].rpartition("####")[2].strip()
        questions.append(Question([prompt], right, 0, query=row["question"]))
    return questions


def score_gsm8k(question, answers):
    """Right where the last number in the answer is."""
    numbers = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", answers[0].partition("Question:")[0])
    if not numbers:
        return None
    said, right = (re.sub(r"[,$]|\.$", "", text) for text in (numbers[-1], question.right))
    return float(said == right)


TASKS = {
    "emobench": Benchmark(
        read_emobench, score_emobench, 60,
        "https://github.com/Sahandfer/EmoBench, folder data", ["EA.jsonl", "EU.jsonl"]),
    "eq_bench": Benchmark(
        read_eq_bench, score_eq_bench, 80,
        "https://github.com/EQ-bench/EQ-Bench, folder data", [EQ_BENCH_FILE]),
    "tombench": Benchmark(
        read_tombench, score_tombench, 16,
        "https://github.com/zhchen18/ToMBench, folder data", ["False Belief Task.jsonl"]),
    "gsm8k": Benchmark(
        read_gsm8k, score_gsm8k, 256,
        "https://github.com/openai/grade-school-math, folder grade_school_math/data",
        ["test.jsonl"]),
}


# ------------------------------------------------------------------------------------------- scores

def ask_questions(model, questions, args, max_new_tokens):
    """The answers to each question, one to each of its prompts."""
    prompts = []
    queries = []
    for question in questions:
        prompts += question.prompts
        queries += [question.query or prompt for prompt in question.prompts]
    if args.guided and questions[0].form:
        w = model.mixing_weights(queries, args.route, seed=args.seed)
        forms = [question for question in questions for _ in question.prompts]
        prompts = model.encode_prompts(prompts, max_new_tokens)
        answers = [fill_form(model, prompt, question, None if w is None else w[[i]])
                   for i, (prompt, question) in enumerate(zip(tqdm(prompts, leave=False), forms))]
    else:
        answers = ask_model(model, prompts, args, max_new_tokens, queries)
    answers = iter(answers)
    return [[next(answers) for _ in question.prompts] for question in questions]


@torch.no_grad()
def fill_form(model, prompt, question, w):
    """An answer in the question's form to a prompt (token ids), with the likeliest letters."""
    answer, *parts = question.form.split("?")
    for part, n in zip(parts, question.options):
        tokenizer = model.tokenizer
        ids = prompt + tokenizer.fill([tokenizer.answer], answer=answer)
        hidden = model.base(torch.tensor([ids], device=model.device), w)        # (1, T, d)
        logits = model.base.logits(hidden[:, -1])[0]                            # (V,)
        letters = [tokenizer.encode(letter)[-1] for letter in LETTERS[:n]]
        answer += LETTERS[int(logits[letters].argmax())] + part
    return answer


def score_questions(name, questions, answers):
    """Rows of the table: all questions of a benchmark, then each group of them."""
    score = TASKS[name].score
    groups = {name: []}
    for question, texts in zip(questions, answers):
        scored = (score(question, texts), question.chance)
        groups[name].append(scored)
        if question.group:
            groups.setdefault(f"{name}, {question.group}", []).append(scored)
    rows = []
    for row, scored in sorted(groups.items()):
        points, chances = zip(*scored)
        # what cannot be used counts as wrong
        scores = np.array([100 * (point or 0) for point in points])
        rows.append({"name": row, "n": len(points), "chance": 100 * float(np.mean(chances)),
                     "score": mean_interval(scores), "unusable": points.count(None)})
    return rows


# --------------------------------------------------------------------------------- runs in a table

def benchmarks(args):
    """Every run of --run on every benchmark of --tasks -> {run: rows of a table}."""
    names = args.tasks.split(",")
    for name in names:
        if name not in TASKS:
            raise UserError(f"unknown task {name!r}; there are {', '.join(TASKS)}")
    # read all files before any model: what is missing is said at once
    asked = {name: read_questions(name, args.data)[:args.limit] for name in names}
    tables = {}
    for run in args.run:
        model = None                            # two large ones need not fit at once
        model, _ = load_run(run, args.device, args.dtype)
        label = Path(run).name
        if args.route != "learned":
            label += f", {args.route}"
        rows = []
        for name, questions in asked.items():
            answers = ask_questions(model, questions, args, TASKS[name].max_new_tokens)
            rows += score_questions(name, questions, answers)
        tables[label] = rows
    return tables
