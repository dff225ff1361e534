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
import json
import re
import secrets
import sys
from itertools import combinations
from pathlib import Path

import numpy as np

from experiments.answers import write_answers
from experiments.asking import server_answers
from experiments.common import run_records
from experiments.control import OPPOSITE
from experiments.statistics import mean_interval, print_rows
from personafuse import load_run, pick_device, read_settings
from plumbing.files import (UserError, number, read_json, read_lines, run_program, write_json,
                            write_text)
from router import ROUTES
from sample import add_answering, sampling

TEMPLATE = Path(__file__).with_suffix(".html")
# a choice -> what it gives whoever wrote answer a: with a tie as half, no difference is 0.5
POINTS = {"a": 1.0, "tie": 0.5, "b": 0.0}
JUDGE = """\
Two assistants answered the same message. Judge whose answer is better: right, helpful, fitting
the person and the situation. Neither length nor the order in which they stand counts.

The message:
{query}

Answer a:
{a}

Answer b:
{b}

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
    add("--route", choices=[*ROUTES, "opposite"],
        help="compare the one run with itself under another route: none is its bare base, opposite "
             "the router's weights with the poles of each trait swapped")
    add("--n", type=number(int, 1), default=50, help="pairs, at most, of held-out queries")
    add_answering(sheet, max_new_tokens=200)

    tally.add_argument("ratings", nargs="+", metavar="RATINGS.json")
    judge.add_argument("--server", required=True, help="its key: OPENAI_API_KEY")
    judge.add_argument("--model", required=True)
    return parser.parse_args()


# -------------------------------------------------------------------------------------------- sheet

def write_sheet(args):
    contestants = [{"run": run, "route": "learned"} for run in args.run]
    if args.route:
        contestants.append({"run": args.run[0], "route": args.route})
    if len(contestants) != 2:
        raise UserError("two are compared: give --run twice, or --run once and --route")
    # before the models run, as they may run for long
    if not Path(args.name).parent.is_dir():
        raise UserError(f"{args.name}: there is no such folder")
    for path in (f"{args.name}.key.json", f"{args.name}.jsonl", f"{args.name}.html"):
        if Path(path).exists():
            raise UserError(f"{path} is there already, and somebody's ratings may need it: "
                            "give another NAME, or remove it")
    _, records = run_records(read_settings(args.run[0]), limit=args.n)
    queries = [record["query"] for record in records]
    answers = [generate_answers(queries, args, **one) for one in contestants]
    pairs, who_is_a = make_pairs(queries, *answers)

    # the arguments say how the answers were drawn
    key = {"arguments": sys.argv[1:], "contestants": contestants, "a": who_is_a}
    write_json(f"{args.name}.key.json", key)
    lines = [json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs]
    write_text(f"{args.name}.jsonl", "".join(lines))
    write_text(f"{args.name}.html", render_page(Path(args.name).name, pairs))
    print(f"{args.name}.html: {len(pairs)} pairs; open it in a browser, or pass it on\n"
          f"{args.name}.key.json: who wrote which answer; not for raters")


def generate_answers(queries, args, run, route):
    """The answers of one contestant."""
    model, settings = load_run(run, pick_device(args.device), args.dtype)
    if route == "opposite" and model.experts == 1:
        raise UserError(f"{run} has a single LoRA: no poles to swap")
    w = model.mixing_weights(queries, "learned" if route == "opposite" else route, seed=args.seed)
    if route == "opposite":
        w = w[:, OPPOSITE]
    return write_answers(model, queries, w, args.max_new_tokens, **sampling(settings, args))


def make_pairs(queries, first, second):
    """n queries and the answers of both contestants -> n pairs {id, query, a, b}, and {id: whether
    a is of the contestant 0 or 1}.

    Sides and ids follow from no seed: only the key has the sides, and ratings never meet the key
    of another sheet.
    """
    # each comes first in half of them: who always takes the first gains nothing by it
    sides = [k % 2 for k in range(len(queries))]
    secrets.SystemRandom().shuffle(sides)
    pairs = []
    who_is_a = {}
    for query, answers, side in zip(queries, zip(first, second), sides):
        name = secrets.token_hex(6)
        pairs.append({"id": name, "query": query, "a": answers[side], "b": answers[1 - side]})
        who_is_a[name] = side
    return pairs, who_is_a


def render_page(name, pairs):
    """The page, complete in itself, as a string."""
    # answers are a model's text, and may hold any tag: without a < none begins
    data = json.dumps({"name": name, "pairs": pairs}).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("SHEET", data)


# ------------------------------------------------------------------------------------------ ratings

def print_tally(args):
    key = read_json(f"{args.name}.key.json", f"there is no {args.name}.key.json")
    first, second = [f"{one['run']}, {one['route']}" for one in key["contestants"]]
    points = np.array([read_points(path, key["a"]) for path in args.ratings])
    rows = [{"name": Path(path).stem, "win rate": mean_interval(given)}
            for path, given in zip(args.ratings, points)]
    if len(points) > 1:
        same = np.mean([one == other for one, other in combinations(points, 2)], axis=0)
        rows.append({"name": "mean", "win rate": mean_interval(points.mean(axis=0)),
                     "two choose the same": mean_interval(same)})
    print(f"{first} against {second}, {len(key['a'])} pairs; a tie counts half\n")
    print_rows(rows)


def read_points(path, who_is_a):
    """A rater's file -> what each pair gives the first contestant (n,)."""
    choices = read_json(path, f"there is no {path}")
    if choices.keys() != who_is_a.keys() or set(map(str, choices.values())) - POINTS.keys():
        raise UserError(f"{path} does not rate the pairs of this sheet, all of them and no others, "
                        f"with one of {', '.join(POINTS)}")
    # where a is of the second, the first has what a does not get
    return [abs(who - POINTS[choices[pair]]) for pair, who in who_is_a.items()]


def write_judgement(args):
    """A model rates the pairs. Where it gives no verdict, or several, it has no preference."""
    pairs = [json.loads(line) for _, line in read_lines(f"{args.name}.jsonl")]
    jobs = [[JUDGE.format(**pair)] for pair in pairs]
    choices = {}
    for i, answers in server_answers(args.server, args.model, jobs):
        if isinstance(answers, OSError):
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
