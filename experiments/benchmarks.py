"""The paper's benchmarks: those of lm-eval, EleutherAI's evaluation harness, and those of a judge,
in one table with a row for each score and a column for each run.
"""

import json
import logging
import sys
from argparse import Namespace
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import load_records, split
from experiments.answers import ask_model
from experiments.judges import JUDGED, judge, questions, win_rate
from experiments.statistics import Scores, print_table, shown
from experiments.tasks.utils import SOURCES, TRIES, vote_by_question
from personafuse import load_run
from plumbing import UserError, find_model


class Benchmark(NamedTuple):
    tasks: list             # the harness's names
    metric: str             # what it calls the score
    scale: float            # makes that 0 to 100
    chance: float | None    # what guessing scores, from 0 to 1; None: as the records say


TASKS = {
    "emobench": Benchmark(["emobench_ea", "emobench_eu"], "acc", 100, None),
    # its scale is made so that random answers score 0
    "eq_bench": Benchmark(["eq_bench"], "eqbench", 1, 0),
    "tombench": Benchmark(["tombench"], "acc", 100, None),
    "gpqa": Benchmark(["gpqa_main_zeroshot", "gpqa_diamond_zeroshot", "gpqa_extended_zeroshot"],
                      "acc", 100, 0.25),
    "gsm8k": Benchmark(["gsm8k"], "exact_match", 100, 0),
    "safetybench": Benchmark(["safetybench"], "acc", 100, None),
}

# the means that the paper shows: (benchmark, what the mean is over, how its rows begin)
MEANS = [
    ("emobench", "EA and EU", "emobench_"),
    ("gpqa", "the three", "gpqa_"),
    ("tombench", "tasks", "tombench: task:"),
    ("tombench", "abilities", "tombench: ability:"),
]


# ------------------------------------------------------------------------------- runs on benchmarks

def run_benchmarks(args, device, dtype):
    """Every run of --run on every benchmark of --tasks."""
    names = args.tasks.split(",")
    check_names(names, args)
    # read all files before any model: what is missing is said at once
    tasks = load_tasks([name for name in names if name in TASKS], args.data)
    asked = {}
    for name in names:
        if JUDGED.get(name):
            asked[name] = questions(name, args.data, args.limit)

    columns = {}
    opponents = {}
    for run in args.run:
        model = None                            # two large ones need not fit at once
        model, settings = load_run(run, device, dtype)
        label = Path(run).name
        if args.route != "learned":
            label += f", {args.route}"
        rows = columns[label] = {}
        for name in names:
            if name in tasks:
                folder = find_model(settings["base"])
                rows |= run_benchmark(name, tasks[name], model, args, folder)
            elif name in asked:
                queries = [query for query, _ in asked[name]]
                answers = ask_model(model, queries, args, args.max_new_tokens)
                rows |= judge(name, asked[name], answers, args)
            else:
                rows |= run_pairwise(label, model, settings, args, opponents)

    table = join_columns(columns)
    if args.json:
        print(json.dumps(table, indent=1))
    else:
        print_scores(table, list(columns))


def check_names(names, args):
    for name in names:
        if name not in TASKS and name not in JUDGED:
            known = ", ".join([*TASKS, *JUDGED])
            raise UserError(f"unknown task {name!r}; there are {known}")
        needs_judge = name in JUDGED and name != "shop_mmlu"
        if needs_judge and not (args.judge and args.judge_model):
            raise UserError(f"{name} needs a judge: --judge URL of an OpenAI-compatible endpoint, "
                            "and --judge-model NAME")


def run_pairwise(label, model, settings, args, opponents):
    """The held-out queries: this run against the bare base and all runs before it.

    `opponents` (name -> answers) gets this run's answers too.
    """
    _, records = split(load_records(settings["data"]))
    queries = [record["query"] for record in records][:args.limit]
    if not opponents:
        bare = Namespace(**vars(args) | {"route": "none"})
        opponents["bare base"] = ask_model(model, queries, bare, args.max_new_tokens)
    ours = ask_model(model, queries, args, args.max_new_tokens)
    rows = {}
    for name, theirs in opponents.items():
        rows[f"pairwise, wins over {name}"] = win_rate(args, queries, ours, theirs)
    opponents[label] = ours
    return rows


def join_columns(columns):
    """{run: {row: Scores}} -> {row: {run: its figures}}."""
    table = {}
    for label, rows in columns.items():
        for row, scores in rows.items():
            cells = table.setdefault(row, {})
            cells[label] = {
                "score": scores.mean(),
                "n": len(scores.points),
                "chance": scores.chance,
                "unusable": scores.unusable,
            }
    return table


def print_scores(table, labels):
    print("Scores from 0 to 100 where no other scale is named; in brackets 95% intervals, by "
          "bootstrap over the questions;\n"
          "behind / the answers that could not be used (wrong, or guessed for, as the benchmark's "
          "authors do).\n")
    lines = []
    for row, cells in table.items():
        any_cell = next(iter(cells.values()))
        chance = any_cell["chance"]
        line = [row, any_cell["n"], "" if chance is None else f"{chance:.1f}"]
        for label in labels:
            cell = cells.get(label)
            line.append(f"{shown(cell['score'], 1)} / {cell['unusable']}" if cell else "")
        lines.append(line)
    print_table(["", "n", "chance", *labels], lines)


# -------------------------------------------------------------------------------------- the harness

def load_tasks(names, folder):
    """Benchmarks' names -> {name: {task name: lm_eval task}}, their files read from the folder of
    --data, or the hub.
    """
    if not names:
        return {}
    try:
        import lm_eval.tasks
    except ImportError:
        raise UserError("these benchmarks need EleutherAI's harness: pip install lm-eval")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # only the folders that we need: to read all of the harness's takes long
    theirs = Path(lm_eval.tasks.__file__).parent
    folders = [theirs / name for name in ("eq_bench", "gpqa", "gsm8k")]
    folders.append(Path(__file__).parent / "tasks")
    manager = lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False,
                                        metadata={"data": folder})
    loaded = {}
    for name in names:
        wanted = TASKS[name].tasks
        if folder and f"{name}_local" in manager.all_groups:
            wanted = [f"{name}_local"]
        try:
            loaded[name] = manager.load(wanted)["tasks"]
        except UserError:
            raise
        except Exception as error:              # the hub's client and `datasets` raise many types
            raise UserError(f"{name}: the hub was not reached or refused ({type(error).__name__}); "
                            f"get the files from {SOURCES[name]}, and give their folder with "
                            "--data")
    return loaded


def run_benchmark(name, tasks, model, args, folder):
    """{row of the table: Scores}, the groups of a task after their whole."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from experiments.harness import PersonaFuseLM
    limit = args.limit
    if limit and name == "tombench":
        limit *= TRIES
    # some of the harness's scoring prints what it cannot use
    with redirect_stdout(sys.stderr):
        results = simple_evaluate(
            model=PersonaFuseLM(model, args, tasks, folder),
            tasks=list(tasks.values()),
            limit=limit,
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
        )
    rows = {}
    for task, entries in results["samples"].items():
        # a task may read its answers in several ways, each a filter
        for kind in dict.fromkeys(entry["filter"] for entry in entries):
            read_so = [entry for entry in entries if entry["filter"] == kind]
            whole = task if kind == "none" else f"{task} ({kind})"
            rows[whole] = score_entries(name, read_so)
            for group, members in by_group(read_so).items():
                rows[f"{task}: {group}"] = score_entries(name, members)
    return rows | paper_means(name, rows, results["samples"])


def by_group(entries):
    """{group: its entries}, in the order of the groups' names."""
    groups = {}
    for entry in entries:
        for group in entry["doc"].get("groups", []):
            groups.setdefault(group, []).append(entry)
    return dict(sorted(groups.items()))


def score_entries(name, entries):
    """The harness's entries for some questions -> Scores."""
    benchmark = TASKS[name]
    points = [entry[benchmark.metric] for entry in entries]
    if name == "tombench":
        points = list(vote_by_question(points).values())
    chance = benchmark.chance
    if chance is None:
        chance = np.mean([entry["doc"]["chance"] for entry in entries])
    unusable = sum(is_unusable(entry) for entry in entries)
    points = np.array(points, dtype=float) * benchmark.scale
    return Scores(points, np.ones(len(points)), 100 * chance, unusable)


def is_unusable(entry):
    """Whether an answer could not be read, in the words of each of the tasks."""
    return (entry["filtered_resps"] == ["[invalid]"]
            or entry.get("unparsed") == 1
            or entry.get("percent_parseable") == 0)


def paper_means(name, rows, tasks):
    """The means over tasks or groups that the paper shows, each part counting the same."""
    means = {}
    for benchmark, what, beginning in MEANS:
        if benchmark != name:
            continue
        parts = []
        for label, scores in rows.items():
            # of groups the mean is over groups, of tasks over whole tasks only
            if label.startswith(beginning) and (label in tasks or beginning.endswith(":")):
                parts.append(scores)
        means[f"{name}: mean of {what}"] = Scores(
            np.concatenate([part.points / len(part.points) for part in parts]),
            np.concatenate([part.weights / len(part.points) for part in parts]),
            np.mean([part.chance for part in parts]),
            sum(part.unusable for part in parts),
        )
    return means
