"""The floor of every measure of control: the same records, with the traits of other records.

    python -m experiments.shuffle --out out/shuffled.jsonl
    python train.py --stage all --data out/shuffled.jsonl --out out/tiny-shuffled
    python -m experiments.evaluate --control --run out/tiny --run out/tiny-shuffled

The traits change places among the records of the training split; the held-out records keep theirs,
so that both runs are measured alike.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from data import held_out, load_records
from plumbing import HERE, atomic_write, run_program

LABELS = ("social_cue", "social_traits", "task_cue", "task_traits")


def shuffle_labels(records, seed):
    """Records -> the same records, those of the training split with each other's labels."""
    training = []
    for i, record in enumerate(records):
        if not held_out(record["query"]):
            training.append(i)
    order = np.random.default_rng(seed).permutation(training)
    shuffled = list(records)
    for i, other in zip(training, order):
        shuffled[i] = dict(records[i])
        for key in LABELS:
            if key in records[other]:
                shuffled[i][key] = records[other][key]
    return shuffled


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default=str(HERE / "persona_cot.jsonl"), help="records (default: ours)")
    add("--out", required=True, metavar="FILE")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    records = shuffle_labels(load_records(args.data), args.seed)
    lines = []
    for record in records:
        # p follows from the traits: who reads the file makes it anew
        del record["p"]
        lines.append(json.dumps(record, ensure_ascii=False))
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.out) as tmp:
        tmp.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{args.out}: {len(records)} records")


if __name__ == "__main__":
    run_program(main)
