"""People compare two models' answers, blind (section 7 of the paper).

    python -m experiments.people sheet docs/pairs/one-lora --run out/a --run out/b
    python -m experiments.people sheet docs/pairs/bare-base --run out/a --route none
    python -m experiments.people sheet docs/pairs/opposite --run out/a --route opposite
    python -m experiments.people tally docs/pairs/bare-base bare-base-Ada.json bare-base-Bo.json
    python -m experiments.people judge docs/pairs/bare-base --server URL --model NAME

`sheet` writes NAME.jsonl, a pair of answers {id, query, a, b} a line; NAME.html, a page to rate
them in; and NAME.key.json, which says who wrote which: not for whoever rates.
`tally` reads ratings, {id: "a", "b" or "tie"}, as the page lets its raters download them. `judge`
has a model on an OpenAI-compatible server write such a file.
"""

import argparse
import hashlib
import json
import random
import re
import sys
from itertools import combinations
from pathlib import Path

import numpy as np

from experiments.answers import add_sampling, sampling, write_answers
from experiments.asking import server_answers
from experiments.common import run_records
from experiments.control import OPPOSITE
from experiments.statistics import mean_interval, print_rows, shown
from personafuse import load_run, pick_device, read_settings
from plumbing.files import (UserError, atomic_write, file_sha256, number, read_json, read_lines,
                            run_program, write_json)

TEMPLATE = Path(__file__).with_suffix(".html")
# a choice -> what it gives whoever wrote answer a: with a tie as half, no difference is 0.5
POINTS = {"a": 1.0, "tie": 0.5, "b": 0.0}
JUDGE = """\
Two assistants answered the same message. Judge whose answer is better: right, helpful, fitting
the person and the situation. Neither length nor the order in which they stand counts.

The message:
{}

Answer a:
{}

Answer b:
{}

Explain in a few sentences, then end with exactly one verdict: [[a]], [[b]] or [[tie]]."""


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sheet = commands.add_parser("sheet", help="write the pairs, their page and their key")
    tally = commands.add_parser("tally", help="win rates, and how far the raters agree")
    judge = commands.add_parser("judge", help="have a model on a server rate the pairs")
    for command in (sheet, tally, judge):
        command.add_argument("name", metavar="NAME", help="of the files, without .jsonl")

    add = sheet.add_argument
    add("--run", action="append", required=True, metavar="DIR",
        help="a folder that train.py wrote; given twice, the two are compared")
    add("--route", choices=["none", "cot", "uniform", "random1", "random2", "random5", "opposite"],
        help="compare the one run with itself under another route: none is its bare base, cot the "
             "base with the Persona-CoT prompt, opposite the router's weights with the poles of "
             "each trait swapped")
    add("--n", type=number(int, 1), default=50, help="pairs, at most, of held-out queries")
    add("--max-new-tokens", type=number(int, 1), default=200)
    add("--answers", metavar="FILE",
        help="take what it has from what `experiments.evaluate --expression --json` wrote; the "
             "rest is written by the options here, which should be the same")
    add_sampling(sheet)

    tally.add_argument("ratings", nargs="+", metavar="RATINGS.json")
    judge.add_argument("--server", required=True, help="its key: OPENAI_API_KEY")
    judge.add_argument("--model", required=True)
    return parser.parse_args()


# -------------------------------------------------------------------------------------------- sheet

def write_sheet(args):
    contestants = [(run, "learned") for run in args.run]
    if args.route:
        contestants.append((args.run[0], args.route))
    if len(contestants) != 2:
        raise UserError("two are compared: give --run twice, or --run once and --route")
    key_file = f"{args.name}.key.json"
    # before the models run, as they may run for long
    for path in (key_file, f"{args.name}.jsonl", f"{args.name}.html"):
        if Path(path).exists():
            raise UserError(f"{path} is there already, and somebody's ratings may need it: "
                            "give another NAME, or remove it")
    try:
        Path(key_file).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {key_file}: {error.strerror}")
    _, records = run_records(read_settings(args.run[0]), limit=args.n)
    queries = [record["query"] for record in records]
    answers = []
    for run, route in contestants:
        found = saved_answers(args.answers, run, route, records) if args.answers else None
        answers.append(found or generate_answers(run, route, queries, args))
    pairs, who_is_a = make_pairs(queries, *answers)

    described = [describe(run, route) for run, route in contestants]
    write_json(key_file, {"arguments": sys.argv[1:], "contestants": described, "a": who_is_a})
    lines = [json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs]
    write_text(f"{args.name}.jsonl", "".join(lines))
    write_text(f"{args.name}.html", render_page(Path(args.name).name, pairs))
    print(f"{args.name}.html: {len(pairs)} pairs; open it in a browser, or pass it on\n"
          f"{key_file}: who wrote which answer; not for raters")


def generate_answers(run, route, queries, args):
    """The answers of one contestant; both draw by the first run's settings."""
    model, _ = load_run(run, pick_device(), "auto")
    if route == "opposite" and model.experts == 1:
        raise UserError(f"{run} has a single LoRA: no poles to swap")
    mixed_by = {"opposite": "learned", "cot": "none"}.get(route, route)
    w = model.mixing_weights(queries, mixed_by, seed=args.seed)
    if route == "opposite":
        w = w[:, OPPOSITE]
    options = sampling(read_settings(args.run[0]), args)
    return write_answers(model, queries, w, args.max_new_tokens, route == "cot", **options)


def saved_answers(path, run, route, records):
    """One contestant's answers in what `experiments.evaluate --expression --json` wrote, or None
    where it lacks some.
    """
    rows = read_json(path, f"there is no {path}").get("answers", {})
    name = Path(run).name
    row = {"learned": name, "none": "bare base"}.get(route, f"{name}, {route}")
    # rows are in the order of the records, which one of them holds
    answer_to = dict(zip(rows.get("the records' responses", []), rows.get(row, [])))
    answers = [answer_to.get(record["response"]) for record in records]
    print(f"{row}: {'written anew' if None in answers else f'from {path}'}")
    return None if None in answers else answers


def make_pairs(queries, first, second):
    """n queries and the answers of both contestants -> n pairs {id, query, a, b}, and {id: whether
    a is of the contestant 0 or 1}.

    The sides follow from no seed: only the key has them.
    """
    # each comes first in half of them: who always takes the first gains nothing by it
    sides = [k % 2 for k in range(len(queries))]
    random.SystemRandom().shuffle(sides)
    pairs = []
    who_is_a = {}
    for query, answers, side in zip(queries, zip(first, second), sides):
        texts = {"query": query, "a": answers[side], "b": answers[1 - side]}
        # of just these texts in this order, so that ratings never meet the key of another sheet
        name = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]
        pairs.append({"id": name} | texts)
        who_is_a[name] = side
    return pairs, who_is_a


def describe(run, route):
    """What the key says of a contestant: its settings, and the hashes of its weights."""
    # folders are those of one computer
    folders = {"data", "out", "base_folder", "encoder_folder"}
    settings = {name: value for name, value in read_settings(run).items() if name not in folders}
    weights = {}
    for path in sorted(Path(run).rglob("*.safetensors")):
        weights[path.relative_to(run).as_posix()] = file_sha256(path)
    return {"run": Path(run).name, "route": route, "settings": settings, "weights": weights}


def render_page(name, pairs):
    """The page, complete in itself, as a string."""
    # answers are a model's text, and may hold any tag: without a < none begins
    data = json.dumps({"name": name, "pairs": pairs}).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("SHEET", data)


def write_text(path, text):
    with atomic_write(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------------------ ratings

def print_tally(args):
    key_file = f"{args.name}.key.json"
    key = read_json(key_file, f"there is no {key_file}")
    first, second = [f"{one['run']}, {one['route']}" for one in key["contestants"]]
    points = np.array([read_points(path, key, key_file) for path in args.ratings])
    rows = []
    for path, given in zip(args.ratings, points):
        ties = int((given == 0.5).sum())
        rows.append({"name": Path(path).stem, "win rate": mean_interval(given), "ties": ties})
    if len(points) > 1:
        rows.append({"name": "mean", "win rate": mean_interval(points.mean(axis=0))})
    print(f"{first} against {second}, {len(key['a'])} pairs; a tie counts half\n")
    print_rows(rows)
    if len(points) > 1:
        agree = np.mean([one == other for one, other in combinations(points, 2)], axis=0)
        print(f"\ntwo raters choose the same: {shown(mean_interval(agree))}")


def read_points(path, key, key_file):
    """A rater's file -> what each pair gives the first contestant (n,)."""
    choices = read_json(path, f"there is no {path}")
    if choices.keys() != key["a"].keys() or set(map(str, choices.values())) - POINTS.keys():
        raise UserError(f"{path} does not rate the pairs of {key_file}, all of them and no others, "
                        f"with one of {', '.join(POINTS)}")
    points = []
    for pair, who in key["a"].items():
        given = POINTS[choices[pair]]
        points.append(given if who == 0 else 1 - given)
    return points


def write_judgement(args):
    """A model rates the pairs. Where it gives no verdict, or several, it has no preference."""
    pairs = [json.loads(line) for _, line in read_lines(f"{args.name}.jsonl")]
    jobs = [[JUDGE.format(pair["query"], pair["a"], pair["b"])] for pair in pairs]
    choices = {}
    for i, answers in server_answers(args.server, args.model, jobs):
        if isinstance(answers, (OSError, UserError)):
            raise UserError(f"the judge gives no answer: {answers}")
        # what was too long for it, or for its answer, is an exception without a verdict
        said = set(re.findall(r"\[\[(a|b|tie)\]\]", str(answers)))
        choices[pairs[i]["id"]] = said.pop() if len(said) == 1 else "tie"
    write_json(f"{args.name}-judge.json", choices)
    print(f"{args.name}-judge.json: {len(choices)} pairs")


def main():
    args = parse_arguments()
    commands = {"sheet": write_sheet, "tally": print_tally, "judge": write_judgement}
    commands[args.command](args)


if __name__ == "__main__":
    run_program(main)
