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
    python -m experiments.evaluate --run out/tiny --tasks emobench,gsm8k --data DIR --limit 20
                                        the paper's benchmarks, by lm-eval
    python -m experiments.evaluate --run out/tiny --tasks mentalchat --data DIR \\
        --judge URL --judge-model NAME  a judge's opinion
    python -m experiments.evaluate --run out/tiny --probe data_full.json
                                        what the encoder learned (Table 6)
"""

import argparse

from data import TRAITS
from experiments.benchmarks import TASKS, run_benchmarks
from experiments.comparison import compare
from experiments.control import control, steering
from experiments.expression import expression
from experiments.judges import JUDGED
from experiments.probe import probe
from experiments.questionnaire import questionnaire
from experiments.routing import routing
from personafuse import pick_device, read_settings
from plumbing import run_program

ROUTES = ["learned", "uniform", "random1", "random2", "random5", "none", "cot"]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", action="append", required=True, metavar="DIR",
        help="a folder that train.py wrote; may be given again")

    # what to measure: one of these, or the comparison
    measure = parser.add_mutually_exclusive_group().add_argument
    measure("--control", action="store_true",
            help="do the experts differ as their names say?")
    measure("--steering", action="store_true",
            help="the weight of one expert from 0 to 1")
    measure("--expression", action="store_true",
            help="do the answers show the traits that their queries call for?")
    measure("--routing", action="store_true",
            help="what sharper weights, and better ones, are worth")
    measure("--questionnaire", action="store_true",
            help="the 50 items of the IPIP, asked of each expert")
    measure("--tasks",
            help=f"benchmarks, with commas between them: {', '.join([*TASKS, *JUDGED])}")
    measure("--probe", metavar="FILE",
            help="a labelled file: CLINC150's data_full.json, or CSV with columns text and label")

    add("--data", metavar="DIR",
        help="where the benchmarks' files are (default: the hub, for those that are there)")
    add("--limit", type=int,
        help="only the first so many questions of each task")
    add("--route", choices=ROUTES, default="learned",
        help="for --tasks, how the experts are mixed; none is the bare base, cot the bare base "
             "answering through the Persona-CoT prompt (default: learned)")
    add("--top-k", type=int,
        help="keep only the k largest of the router's weights, scaled to sum to 1")
    add("--no-chat", action="store_true",
        help="give the base the harness's text as it stands, without the chat format")
    add("--max-new-tokens", type=int, default=400,
        help="of answers in free text (default: 400)")
    add("--judge", metavar="URL",
        help="an OpenAI-compatible endpoint (its key: OPENAI_API_KEY)")
    add("--judge-model", metavar="NAME")
    add("--temperature", type=float, default=0.7,
        help="of the answers of --expression and --routing (default: 0.7)")
    add("--top-p", type=float, default=0.9,
        help="of these answers too (default: 0.9)")
    add("--json", action="store_true",
        help="print JSON in place of tables")
    add("--seed", type=int, default=0)
    add("--device", default="auto")
    add("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    args = parser.parse_args()
    if args.top_k is not None and not 1 <= args.top_k <= len(TRAITS):
        parser.error(f"--top-k is 1 to {len(TRAITS)}")
    if args.limit is not None and args.limit < 1:
        parser.error("--limit is at least 1")
    if args.temperature < 0 or not 0 < args.top_p <= 1 or args.max_new_tokens < 1:
        parser.error("--temperature is at least 0, --top-p is in (0, 1], "
                     "--max-new-tokens is at least 1")
    return args


def main():
    args = parse_arguments()
    # all runs, before anything is loaded
    base = read_settings(args.run[0])["base"]
    for run in args.run[1:]:
        read_settings(run, base)
    device = pick_device(args.device, base)
    if args.control:
        control(args, device, args.dtype)
    elif args.steering:
        steering(args, device, args.dtype)
    elif args.expression:
        expression(args, device, args.dtype)
    elif args.routing:
        routing(args, device, args.dtype)
    elif args.questionnaire:
        questionnaire(args, device, args.dtype)
    elif args.tasks:
        run_benchmarks(args, device, args.dtype)
    elif args.probe:
        probe(args, device, args.dtype)
    else:
        compare(args, device, args.dtype)


if __name__ == "__main__":
    run_program(main)
