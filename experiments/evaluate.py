"""Does it work? The paper's comparisons (section 6), for runs of train.py that share a base.

    python -m experiments.evaluate --run out/tiny --run out/tiny-direct
                                        the held-out records: losses and router
    python -m experiments.evaluate --run out/tiny --control
                                        do the experts differ as their names say?
    python -m experiments.evaluate --run out/tiny --steering
                                        the weight of one expert from 0 to 1
    python -m experiments.evaluate --run out/tiny --expression
                                        do the answers show what they were meant to?
    python -m experiments.evaluate --run out/tiny --routing
                                        what sharper weights, and better ones, are worth
    python -m experiments.evaluate --run out/tiny --questionnaire
                                        50 items of the IPIP, asked of each expert
    python -m experiments.evaluate --run out/tiny --feedback --limit 12
                                        how many remarks until answers show what was asked for
    python -m experiments.evaluate --run out/tiny --forgetting --text english.txt
                                        what was lost of what the base could do
    python -m experiments.evaluate --run out/tiny --tasks emobench,gsm8k --data DIR --limit 20
                                        the paper's benchmarks
"""

import argparse
import json

import numpy as np

from experiments.benchmarks import BENCHMARKS, TASKS, benchmarks
from experiments.common import load_experts_run
from experiments.comparison import COMPARISON, comparison
from experiments.control import CONTROL, STEERING, control, steering
from experiments.expression import EXPRESSION, expression
from experiments.feedback import FEEDBACK, feedback
from experiments.forgetting import FORGETTING, forgetting
from experiments.questionnaire import QUESTIONNAIRE, questionnaire
from experiments.routing import ROUTING, routing
from experiments.statistics import print_rows
from personafuse import pick_device, read_settings
from plumbing.files import UserError, number, run_program
from router import ROUTES
from sample import add_answering

# what measures one run with ten experts, and what its tables say
OF_EACH_RUN = {
    "control": (control, CONTROL),
    "steering": (steering, STEERING),
    "routing": (routing, ROUTING),
    "questionnaire": (questionnaire, QUESTIONNAIRE),
    "feedback": (feedback, FEEDBACK),
}
# what measures all runs side by side
OF_ALL_RUNS = {
    "comparison": (comparison, COMPARISON),
    "expression": (expression, EXPRESSION),
    "forgetting": (forgetting, FORGETTING),
    "tasks": (benchmarks, BENCHMARKS),
}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", action="append", required=True, metavar="DIR",
        help="a folder that train.py wrote; may be given again")
    # what to measure: one of these, or the comparison
    one_of = parser.add_mutually_exclusive_group().add_argument
    for name in (*OF_EACH_RUN, "expression", "forgetting"):
        one_of(f"--{name}", dest="measure", action="store_const", const=name)
    one_of("--tasks", help=", ".join(TASKS))

    add("--data", help="the records, where they are not found; for --tasks the benchmarks' folder")
    add("--limit", type=number(int, 1),
        help="only so many held-out records, or questions of a task")
    add("--route", choices=[*ROUTES, "cot"], default="learned",
        help="for --tasks; cot: the bare base answers through the Persona-CoT prompt")
    add("--taus", nargs="+", type=number(float, 0, above=True), metavar="TAU",
        help="for --routing (default: the run's, its half and its double)")
    add("--guided", action="store_true",
        help="for --tasks with choices: the form of an answer is given, and its likeliest letter")
    add("--text", metavar="FILE", help="English for --forgetting, one text a line")
    add("--json", action="store_true", help="the tables, and with --expression the answers")
    add_answering(parser, max_new_tokens=400)
    return parser.parse_args()


def measure(args):
    """What the options ask for -> {title: rows of a table}, and what the tables say."""
    # all runs, before anything is loaded
    first = read_settings(args.run[0])
    for run in args.run:
        settings = read_settings(run)
        if settings["base_sha256"] != first["base_sha256"]:
            raise UserError(f"{run} was made for the base {settings['base']}, {args.run[0]} for "
                            f"{first['base']}: their figures are not to be compared")
    args.device = pick_device(args.device, first["base"])
    name = args.measure or ("tasks" if args.tasks else "comparison")
    if name in OF_ALL_RUNS:
        function, meaning = OF_ALL_RUNS[name]
        return function(args), meaning
    function, meaning = OF_EACH_RUN[name]
    tables = {}
    for run in args.run:
        for title, rows in function(*load_experts_run(run, args), args).items():
            tables[f"{run}, {title}"] = rows
    return tables, meaning


def main():
    args = parse_arguments()
    tables, meaning = measure(args)
    if args.json:
        # some figures are numbers of numpy's, which json does not know
        print(json.dumps(tables, indent=1, ensure_ascii=False, default=np.generic.item))
        return
    print(meaning.strip())
    for title, rows in tables.items():
        print(f"\n{title}")
        print_rows(rows)


if __name__ == "__main__":
    run_program(main)
