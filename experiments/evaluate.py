"""Does it work? The paper's comparisons (section 6), for runs of train.py that share a base.

    python -m experiments.evaluate --run out/tiny --run out/tiny-direct
                                        the held-out records: losses and router
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
from experiments.judges import JUDGED
from experiments.probe import probe
from personafuse import pick_device, pick_dtype, read_settings
from plumbing import run_program

ROUTES = ["learned", "uniform", "random1", "random2", "random5", "none", "cot"]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", action="append", required=True, metavar="DIR",
        help="a folder that train.py wrote; may be given again")
    add("--tasks",
        help=f"benchmarks, with commas between them: {', '.join([*TASKS, *JUDGED])}")
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
    add("--probe", metavar="FILE",
        help="a labelled file: CLINC150's data_full.json, or CSV with columns text and label")
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
    return args


def main():
    args = parse_arguments()
    # all runs, before anything is loaded
    base = read_settings(args.run[0])["base"]
    for run in args.run[1:]:
        read_settings(run, base)
    device = pick_device(args.device, base)
    dtype = pick_dtype(args.dtype, device)
    if args.tasks:
        run_benchmarks(args, device, dtype)
    elif args.probe:
        probe(args, device, dtype)
    else:
        compare(args, device, dtype)


if __name__ == "__main__":
    run_program(main)
