"""Are the answers worth reading, and how long is the wait for the first word?

    python tests/bench_answers.py --run out/tiny                     all of it: two minutes
    python tests/bench_answers.py --run out/tiny --temperature 0     with other options of sample.py
    python tests/bench_answers.py --run out/tiny --route none        answers of the bare base
    python tests/bench_answers.py --run out/tiny --only loss         or answers, or wait

Answers come from sample.py with its own defaults, as a user gets them. A word counts as English if
it is in the word list (default: /usr/share/dict/words, Debian's package wamerican) or in an answer
of persona_cot.jsonl; without a word list the answers are all there is, and the share is too low.
"""

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import load_records, make_examples, sample_indices, split  # noqa: E402
from plumbing import read_lines, run_program  # noqa: E402

RECORDS = ROOT / "persona_cot.jsonl"
ANSWERS = ("response", "naive_response", "human_like_response")
WORDS = Path("/usr/share/dict/words")
WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")


# ------------------------------------------------------------------------------------------ answers

def words_of(text):
    """The words of a text in lower case; figures are none, "don't" is one."""
    return WORD.findall(text.lower().replace("’", "'"))


def english_words(path=WORDS):
    """The words of the list, one a line, and of every answer in our records."""
    known = set()
    for record in load_records(RECORDS, answers=ANSWERS):
        for key in ANSWERS:
            known.update(words_of(record[key]))
    if Path(path).exists():
        for _, line in read_lines(path):
            known.update(words_of(line))
    return known


def is_english(word, known):
    """Whether a word is known, or what stands before its apostrophe is ("neighbour's")."""
    return word in known or word.partition("'")[0] in known


def loops(text, length=4, times=3):
    """Whether some phrase of `length` words stands `times` times in the text."""
    words = words_of(text)
    phrases = Counter()
    for start in range(len(words) - length + 1):
        phrase = words[start:start + length]
        phrases[tuple(phrase)] += 1
    return max(phrases.values(), default=0) >= times


def ask(run, queries, options=()):
    """Queries -> answers, from sample.py with its defaults and these options."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "queries.txt"
        # a line is a query, so a query of several lines becomes one
        lines = [" ".join(query.split()) for query in queries]
        path.write_text("\n".join(lines) + "\n")
        command = [sys.executable, ROOT / "sample.py", "--run", run, "--file", path, "--json"]
        command += options
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    answered = [json.loads(line) for line in result.stdout.splitlines()]
    return [answer["response"] for answer in answered]


def answers(run, n=100, options=(), word_list=WORDS):
    """Ask n held-out queries and print how many answers loop, and how much of them is English.

    -> (share of answers without a loop, share of English words, the answers)
    """
    _, held = split(load_records(RECORDS))
    chosen = sample_indices(len(held), min(n, len(held)), 0, 0)
    queries = [held[i]["query"] for i in chosen]
    responses = ask(run, queries, options)
    known = english_words(word_list)
    words = [word for response in responses for word in words_of(response)]
    strange = Counter(word for word in words if not is_english(word, known))

    fluent = sum(not loops(response) for response in responses) / len(responses)
    english = 1 - strange.total() / max(len(words), 1)
    source = "our answers alone (no word list)"
    if Path(word_list).exists():
        source = f"{word_list} and our answers"
    print(f"{len(responses)} answers, {len(words) / len(responses):.0f} words each: "
          f"{fluent:.0%} without a phrase of four words that stands three times")
    print(f"English words: {english:.1%} ({source}); most frequent others: "
          f"{', '.join(word for word, _ in strange.most_common(8))}")
    return fluent, english, responses


# --------------------------------------------------------------------------------------------- loss

def loss(run, dtype="fp32"):
    """Print the loss on held-out answers, in nats a token and in bits a byte.

    An answer's end token counts among the tokens and the bits, not among the bytes.
    """
    from personafuse import load_run, pick_device
    device = pick_device("cpu")
    model, _ = load_run(run, device, dtype)
    _, held = split(load_records(RECORDS, answers=ANSWERS))
    w = model.mixing_weights([record["query"] for record in held])
    context = model.base.config.max_position_embeddings
    rows = [("bare base on plain answers", "naive_response", None),
            ("bare base on persona answers", "response", None),
            ("PersonaFuse on persona answers", "response", w)]
    for name, key, weights in rows:
        examples = make_examples(held, model.tokenizer, None, context, key)
        nll, counts, _ = model.response_nll(examples, weights)
        total = nll.sum().item()
        size = sum(len(record[key].strip().encode()) for record in held)
        print(f"{name:31} {total / counts.sum().item():.3f} a token, "
              f"{total / math.log(2) / size:.3f} bits a byte ({len(held)} held-out records)")


# ------------------------------------------------------------------------------------ the first word

PHASES = """
import sys, time
marks = [("Python starts", float(sys.argv.pop()))]
sys.path.insert(0, sys.argv.pop())
begin = time.time()
import torch
marks.append(("import torch", begin))
begin = time.time()
import sample, personafuse, lora
marks.append(("import the rest", begin))
begin = time.time()
args = sample.parse_arguments()
model, _ = sample.load_model(args)
marks.append(("load the run", begin))
begin = time.time()
w = sample.weights_for(model, args.query, args.setting, args.seed)
marks.append(("route", begin))
begin = time.time()
lora.merge(model.base, w[0])
lora.join(model.base)
marks.append(("merge", begin))
begin = time.time()
prompt = model.tokenizer.encode_prompt(args.query)
next(personafuse.generate(model.base, prompt, 8, model.tokenizer.stop), None)
marks.append(("first token", begin))
ends = [begin for _, begin in marks[1:]] + [time.time()]
for (name, begin), end in zip(marks, ends):
    print(end - begin, name, sep="\\t")
"""


def first_character(command):
    """Seconds from the start of sample.py until the first character below its bars."""
    begin = time.time()
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as process:
        shown = b""
        while b"\n\n" not in shown[:-1]:
            character = process.stdout.read(1)
            if not character:
                break
            shown += character
        waited = time.time() - begin
        process.stdout.read()
    return waited


def wait(run, query="I feel anxious", rounds=5):
    """Print how long sample.py takes to its first word, and where the time goes (medians)."""
    options = [query, "--run", str(run)]
    seconds = []
    phases = {}
    # the first round fills the page cache
    for number in range(rounds + 1):
        waited = first_character([sys.executable, str(ROOT / "sample.py"), *options])
        result = subprocess.run(
            [sys.executable, "-c", PHASES, *options, str(ROOT), str(time.time())],
            stdout=subprocess.PIPE, text=True, check=True)
        if number == 0:
            continue
        seconds.append(waited)
        for line in result.stdout.splitlines():
            value, name = line.split("\t")
            phases.setdefault(name, []).append(float(value))
    print(f'first word of `python sample.py "{query}"` after {statistics.median(seconds):.1f} s '
          f"({min(seconds):.1f} to {max(seconds):.1f} in {rounds} rounds), of which")
    for name, values in phases.items():
        print(f"  {name:16} {statistics.median(values):.2f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", required=True, help="a folder that train.py wrote")
    add("-n", type=int, default=100, help="how many held-out queries")
    add("--words", default=WORDS, help="a file with an English word a line")
    add("--only", choices=["answers", "loss", "wait"])
    add("--show", type=int, default=0, metavar="N", help="print the first N answers")
    args, options = parser.parse_known_args()
    if args.only in (None, "answers"):
        _, _, responses = answers(args.run, args.n, options, args.words)
        for response in responses[:args.show]:
            print(f"---\n{response}")
    if args.only in (None, "loss"):
        loss(args.run)
    if args.only in (None, "wait"):
        wait(args.run)


if __name__ == "__main__":
    run_program(main)
