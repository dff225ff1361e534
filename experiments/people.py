"""People compare two models' answers, blind (section 7 of the paper).

    python -m experiments.people sheet --run out/a --run out/b --queries texts.txt --out sheet.html
    python -m experiments.people sheet --run out/a --route none --out sheet.html   against its base
    python -m experiments.people tally sheet-Ada.json sheet-Bo.json --key sheet.key.json

`sheet` writes a page to open in a browser or to pass on, and the key beside it: who wrote which
answer, to be kept from whoever rates. `tally` reads what the page lets its raters download.
"""

import argparse
import base64
import hashlib
import json
import random
import re
import secrets
from pathlib import Path

import numpy as np

from experiments.answers import ask_model
from experiments.common import run_records
from experiments.generate import read_queries
from experiments.statistics import bootstrap, mean_interval, print_table, shown
from personafuse import load_run, pick_device, read_settings
from plumbing.files import UserError, atomic_write, number, read_json, run_program, write_json

TEMPLATE = Path(__file__).with_suffix(".html")
# what became of a pair: the first contestant won, the second won, or neither
FIRST, SECOND, TIE = range(3)
# what each of the three counts for the first: with a tie as half, no difference is 0.5
WIN = np.array([1.0, 0.0, 0.5])


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    sheet = commands.add_parser("sheet", help="write the page for the raters, and its key")
    add = sheet.add_argument
    add("--run", action="append", required=True, metavar="DIR",
        help="a folder that train.py wrote; given twice, the two are compared")
    add("--route", choices=["none", "cot", "uniform", "random1", "random2", "random5"],
        help="compare the one run with itself under another route; none is its bare base, cot the "
             "base with the Persona-CoT prompt")
    add("--queries", metavar="FILE",
        help="one query a line in a .txt, or JSON lines with a `query` (default: the held-out "
             "queries of the run's data)")
    add("--n", type=number(int, 1), default=50, help="pairs, of queries drawn at random")
    add("--out", default="sheet.html", metavar="FILE")
    add("--seed", type=int, default=secrets.randbelow(2**32),
        help="of the drawn queries, their order and the sides (default: another one each time, so "
             "that nobody knows the sides from an earlier sheet; the key keeps it)")
    add("--max-new-tokens", type=number(int, 1), default=200)

    tally = commands.add_parser("tally", help="win rates and agreement, once all have finished")
    add = tally.add_argument
    add("ratings", nargs="+", metavar="RATER.json", help="the files that the raters downloaded")
    add("--key", metavar="FILE", help="the sheet's key (default: by its name, beside the ratings)")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------ answers

def draw_queries(args, rng):
    """n different queries of the file, or of the run's held-out records, in random order."""
    if args.queries:
        queries = read_queries(args.queries)
    else:
        _, held_out = run_records(read_settings(args.run[0]))
        queries = list(dict.fromkeys(record["query"] for record in held_out))
    if args.n > len(queries):
        raise UserError(f"--n {args.n}: there are {len(queries)} different queries to draw from")
    return rng.sample(queries, args.n)


def write_answers(run, route, queries, args):
    """The answers of one contestant to all queries, greedy."""
    model, _ = load_run(run, pick_device(), "auto")
    routing = argparse.Namespace(route=route, top_k=None, seed=args.seed)
    return ask_model(model, queries, routing, args.max_new_tokens)


# -------------------------------------------------------------------------------------------- sheet

def make_pairs(queries, answers, rng):
    """Queries and the answers of either contestant -> pairs as the key keeps them:
    {query, answers, swapped}, where swapped puts the second contestant's answer first on the page.

    Nobody can tell two equal answers apart, so such a pair is left out.
    """
    pairs = []
    for query, *both in zip(queries, *answers):
        if both[0] != both[1]:
            pairs.append({"query": query, "answers": both})
    # each contestant comes first in half of them: who always takes the first gains nothing by it
    sides = [k % 2 == 1 for k in range(len(pairs))]
    rng.shuffle(sides)
    for pair, swapped in zip(pairs, sides):
        pair["swapped"] = swapped
    return pairs


def blind(pairs):
    """What of the pairs a rater may see."""
    visible = []
    for pair in pairs:
        answers = pair["answers"]
        if pair["swapped"]:
            answers = answers[::-1]
        visible.append({"query": pair["query"], "answers": answers})
    return visible


def sheet_id(visible):
    """A name for exactly these pairs, so that ratings never meet the key of another sheet."""
    return hashlib.sha256(json.dumps(visible).encode()).hexdigest()[:16]


def render_page(name, visible):
    """The page, complete in itself, as a string. Its policy lets the browser run this script and
    use this style, and neither fetch nor send anything.
    """
    page = TEMPLATE.read_text(encoding="utf-8")
    policy = ["default-src 'none'", "base-uri 'none'", "form-action 'none'"]
    for tag in ("script", "style"):
        content = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        policy.append(f"{tag}-src 'sha256-{digest}'")
    page = page.replace("CONTENT_POLICY", "; ".join(policy))

    sheet = {"id": sheet_id(visible), "name": name, "pairs": visible}
    # answers are a model's text, and may hold any tag: without a < none begins
    data = json.dumps(sheet).replace("<", "\\u003c")
    # last, so that nothing in an answer is taken for one of the template's marks
    return page.replace("SHEET_DATA", data)


def write_sheet(args):
    # the two that are compared, as (name, run, route)
    contestants = [(run, run, "learned") for run in args.run]
    if args.route:
        run = args.run[0]
        contestants.append((f"{run} --route {args.route}", run, args.route))
    if len(contestants) != 2:
        raise UserError("two are compared: give --run twice, or --run once and --route")
    out = Path(args.out)
    key_file = out.with_suffix(".key.json")
    # before the models run, as they may run for long
    if not out.parent.is_dir():
        raise UserError(f"cannot write {out}: there is no folder {out.parent}")
    if key_file.exists():
        raise UserError(f"{key_file} is there already, and somebody's ratings may need it: "
                        "give another --out, or remove it")
    rng = random.Random(args.seed)
    queries = draw_queries(args, rng)
    answers = [write_answers(run, route, queries, args) for _, run, route in contestants]
    pairs = make_pairs(queries, answers, rng)
    if not pairs:
        raise UserError("both gave the same answer to every query: there is nothing to compare")

    visible = blind(pairs)
    equal = len(queries) - len(pairs)
    write_json(key_file, {
        "sheet": sheet_id(visible),
        "contestants": [name for name, _, _ in contestants],
        "seed": args.seed,
        "equal": equal,
        "pairs": pairs,
    })
    with atomic_write(out) as tmp:
        tmp.write_text(render_page(out.stem, visible), encoding="utf-8")
    print(f"{out}: {len(pairs)} pairs; open it in a browser, or pass it on\n"
          f"{key_file}: who wrote which answer; not for raters")
    if equal:
        print(f"{equal} more had the same answer on both sides, and are left out")


# -------------------------------------------------------------------------------------------- tally

def read_ratings(path):
    """A file that the page let its rater download, as a dict; `ratings` are (choice, why)."""
    content = read_json(path, f"there is no file {path}")
    try:
        ratings = [(rating["choice"], str(rating["why"])) for rating in content["ratings"]]
        rater = {
            "path": path,
            "rater": str(content["rater"]),
            "name": str(content["name"]),
            "sheet": content["sheet"],
            "ratings": ratings,
        }
    except (KeyError, TypeError):
        ratings = []
    if not ratings:
        raise UserError(f"{path} holds no ratings: give the files that the page lets its raters "
                        "download")
    return rater


def read_key(path):
    key = read_json(path, f"there is no key {path}: name the sheet's with --key")
    if not isinstance(key, dict) or not {"sheet", "contestants", "pairs"} <= key.keys():
        raise UserError(f"{path} is not the key of a sheet")
    return key


def check_complete(raters, key, key_file):
    """UserError for ratings of another sheet, for unfinished ones, and for a rater given twice."""
    paths = {}
    for rater in raters:
        path = rater["path"]
        if rater["sheet"] != key["sheet"]:
            raise UserError(f"{path} holds ratings of another sheet than that of {key_file}")
        rated = [choice in (0, 1, 2) for choice, _ in rater["ratings"]]
        n = len(key["pairs"])
        if len(rated) != n or not all(rated):
            raise UserError(f"{path} rates {sum(rated)} of {n} pairs: the key stays shut until all "
                            "are rated")
        other = paths.setdefault(rater["rater"], path)
        if other is not path:
            raise UserError(f"{other} and {path} are both by {rater['rater']}: give one of them, "
                            "or change a name")


def outcomes(ratings, pairs):
    """One rater's choices on the page and the key's pairs -> FIRST, SECOND or TIE each (n,)."""
    result = []
    for (choice, _), pair in zip(ratings, pairs):
        if choice == 0:
            result.append(TIE)
        elif (choice == 2) == pair["swapped"]:
            result.append(FIRST)
        else:
            result.append(SECOND)
    return np.array(result)


def count_votes(all_outcomes):
    """Outcomes of all raters (raters, n) -> how many chose each (n, 3)."""
    return np.stack([(all_outcomes == outcome).sum(axis=0) for outcome in (FIRST, SECOND, TIE)], 1)


def majority(votes):
    """Votes (n, 3) -> the outcome that most raters chose (n,), TIE where no single one has most."""
    most = votes.max(axis=1, keepdims=True)
    alone = (votes == most).sum(axis=1) == 1
    return np.where(alone, votes.argmax(axis=1), TIE)


def fleiss_kappa(votes):
    """Agreement beyond chance: 1 is full, 0 what chance gives. Votes (n pairs, k outcomes), with
    the same number of raters for each pair, at least two; nan where all chose one outcome.
    """
    raters = votes[0].sum()
    # the share of pairs of raters who agree, pair by pair
    agreement = ((votes ** 2).sum(axis=1) - raters) / (raters * (raters - 1))
    # and what it would be if everybody drew from the same urn
    chance = ((votes.sum(axis=0) / votes.sum()) ** 2).sum()
    if chance == 1:
        return float("nan")
    return (agreement.mean() - chance) / (1 - chance)


def summary(result):
    """Outcomes (n,) -> the cells of a row: win rate with interval, pairs won, tied and lost."""
    counts = [int((result == outcome).sum()) for outcome in (FIRST, TIE, SECOND)]
    return [shown(mean_interval(WIN[result])), *counts]


def print_tally(args):
    raters = [read_ratings(path) for path in args.ratings]
    # the key's name is taken from the ratings, its folder is not
    beside = Path(raters[0]["path"]).parent / Path(raters[0]["name"] + ".key.json").name
    key_file = args.key or beside
    key = read_key(key_file)
    check_complete(raters, key, key_file)

    # from here on the key may be seen
    pairs = key["pairs"]
    first, second = key["contestants"]
    print(f"{first} against {second}: {len(pairs)} pairs; a tie counts half\n")
    rows = []
    results = [outcomes(rater["ratings"], pairs) for rater in raters]
    for rater, result in zip(raters, results):
        choices = [choice for choice, _ in rater["ratings"]]
        place = f"{choices.count(1)} of {len(choices) - choices.count(0)}"
        rows.append([rater["rater"], *summary(result), place])
    votes = count_votes(np.array(results))
    if len(raters) > 1:
        rows.append(["majority", *summary(majority(votes)), ""])
    print_table(["rater", f"win rate of {first}", "won", "tied", "lost", "chose answer 1"], rows)
    if len(raters) > 1:
        kappa = "undefined, as all ratings are the same"
        if not np.isnan(fleiss_kappa(votes)):
            kappa = shown(bootstrap(lambda some: fleiss_kappa(votes[some]), len(votes)))
        print(f"\nFleiss' kappa of {len(raters)} raters: {kappa}")
    if key.get("equal"):
        print(f"\nnot shown: {key['equal']} more with the same answer on both sides")

    # what the raters wrote, and for whom
    for rater, result in zip(raters, results):
        for (_, why), pair, outcome in zip(rater["ratings"], pairs, result):
            reason = " ".join(why.split())
            if reason:
                winner = [first, second, "neither"][outcome]
                query = " ".join(pair["query"].split())[:40]
                print(f"  {rater['rater']}, for {winner}: {reason} ({query!r}...)")


def main():
    args = parse_arguments()
    if args.command == "sheet":
        write_sheet(args)
    else:
        print_tally(args)


if __name__ == "__main__":
    run_program(main)
