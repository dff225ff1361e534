"""Make Persona-CoT records (section 4.2 of the paper), and look at them.

    python -m experiments.generate show "I feel anxious about tomorrow" --model falcon3-10b
    python -m experiments.generate queries --source sharegpt,personahub,wildchat,infinity \\
        --n 100000 --out queries.jsonl
    python -m experiments.generate generate --queries queries.jsonl --out records.jsonl \\
        --server http://localhost:8000 --model NAME
    python -m experiments.generate check records.jsonl
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

from data import PERSONA_COT, PROMPTS, TRAITS, check_record, parse_answer
from experiments.asking import Answer, model_answers, server_answers
from experiments.sources import SOURCES, sample_queries
from plumbing import UserError, atomic_write, read_lines, run_program


# ------------------------------------------------------------------------------- queries to records

def generate_records(args):
    """Put every query through Persona-CoT.

    Records are appended to OUT, queries that are dropped to OUT.dropped.jsonl with the reason; a
    query in neither is still to do. OUT.settings.json says what they are made with.
    """
    keys = answer_keys(args)
    queries = read_queries(args.queries)
    settings = output_settings(args, queries, keys)
    begun = check_output(args.out, settings)
    queries = queries[:args.n]

    # what an earlier run has done stays done
    outcomes = read_outcomes(args.out)
    todo = [query for query in queries if query not in outcomes]
    counts = Counter(outcomes[query] for query in queries if query in outcomes)
    progress = Progress(len(queries), counts)

    failures = 0
    failures_in_a_row = 0
    for query, answers in answer_queries(args, todo, keys):
        try:
            outcome, record = conclude(query, answers)
        except OSError as error:
            # the server's trouble, not the query's: the query stays to do
            problem = error
            failures += 1
            failures_in_a_row += 1
            # one query may break a server; three in a row, and it is down
            if failures_in_a_row == 3:
                break
            continue

        # only now: a run that fails at once leaves no trace
        if not begun:
            append_line(settings_path(args.out), settings)
            begun = True
        append_line(args.out if outcome == "kept" else dropped_path(args.out), record)
        failures_in_a_row = 0
        counts[outcome] += 1
        progress.show()

    if failures:
        raise UserError(f"{failures} queries got no answer ({problem}). Of {len(queries)}, "
                        f"{tally(counts)} are on disk: see to the server, then repeat the same "
                        "command to go on")
    print(f"{args.out}: {tally(counts)} of {len(queries)} queries")


def answer_keys(args):
    """Which answers a record holds: keys of PROMPTS."""
    keys = ["response"]
    if args.naive:
        keys.append("naive_response")
    if args.human_like:
        keys.append("human_like_response")
    return keys


def output_settings(args, queries, keys):
    """All that decides what is written: records made with other settings are not mixed."""
    return {
        "queries": digest(queries),
        "model": args.model,
        "answers": keys,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "seed": args.seed,
        "prompts": digest(PROMPTS[key] for key in keys),
    }


def answer_queries(args, queries, keys):
    """Yield (query, {key: its answer or an exception}) once all answers of a query are there."""
    jobs = [(query, key) for query in queries for key in keys]
    if not jobs:
        return
    # replace, not format: a query may hold braces of its own
    prompts = [PROMPTS[key].replace("{query}", query) for query, key in jobs]
    # answers come in the order in which they end: a query's may be far apart
    collected = {}
    for i, answer in answer_prompts(args, prompts):
        query, key = jobs[i]
        answers = collected.setdefault(query, {})
        answers[key] = answer
        if len(answers) == len(keys):
            yield query, collected.pop(query)


def answer_prompts(args, prompts):
    return server_answers(args, prompts) if args.server else model_answers(args, prompts)


def conclude(query, answers):
    """A query and {key: Answer or an exception} -> its outcome and the line to write for it.

    The outcome is "kept", or the reason to drop the query. OSError: a server did not answer.
    """
    try:
        return "kept", make_record(query, answers)
    except ValueError as error:
        outcome = str(error).split(":")[0]      # the reason alone: they are counted
        # the answers stay beside the reason, to see what a prompt or a parser has to learn
        texts = [answer.text for answer in answers.values() if isinstance(answer, Answer)]
        return outcome, {"query": query, "reason": outcome, "answers": texts}


def make_record(query, answers):
    """A query and {key: Answer or an exception} -> its record, or ValueError with the reason."""
    for answer in answers.values():
        if isinstance(answer, Exception):
            raise answer
        if answer.cut:
            raise ValueError("cut off by the token limit")
    record = {"query": query, **parse_answer(answers["response"].text)}
    for key, answer in answers.items():
        if key != "response":
            record[key] = answer.text.strip()
    del record["p"]         # it follows from the traits
    check_record(record, tuple(answers))
    return record


class Progress:
    """Says on standard error, every 5 seconds and at the end, how many queries are done."""

    def __init__(self, total, counts):
        self.total = total
        self.counts = counts
        self.done_before = counts.total()
        self.start = time.time()
        self.shown = 0.0

    def show(self):
        now = time.time()
        done = self.counts.total()
        if now - self.shown <= 5 and done < self.total:
            return
        self.shown = now
        rate = (done - self.done_before) / (now - self.start)
        print(f"{done} of {self.total} queries, {rate:.2f} a second: {tally(self.counts)}",
              file=sys.stderr)


def tally(counts):
    """{"kept": n, reason to drop: n, ...} -> "9 kept, 2 dropped (1 no response, 1 no trait)"."""
    reasons = [f"{n} {reason}" for reason, n in counts.most_common() if reason != "kept"]
    listed = f" ({', '.join(reasons)})" if reasons else ""
    return f"{counts['kept']} kept, {counts.total() - counts['kept']} dropped{listed}"


# -------------------------------------------------------------------------------------------- files

def dropped_path(out):
    return f"{out}.dropped.jsonl"


def settings_path(out):
    return f"{out}.settings.json"


def digest(texts):
    """Whether texts are the same is told by their hash: settings are for people to read."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def read_queries(path):
    """The distinct queries of a file, in order: one a line in a .txt, else JSONL with a `query`."""
    queries = {}                    # a dict keeps the order, a set would not
    for number, line in read_lines(path):
        try:
            query = line if str(path).endswith(".txt") else json.loads(line)["query"]
            # half an emoji could not be written again
            query = query.strip().encode(errors="replace").decode()
        except (ValueError, LookupError, TypeError, AttributeError):
            raise UserError(f'{path}, line {number}: no JSON object with a text as "query" '
                            "(plain lines: call the file .txt)")
        if query:
            queries[query] = True
    if not queries:
        raise UserError(f"{path} holds no queries")
    return list(queries)


def check_output(out, settings):
    """Whether OUT was begun already, with these settings; UserError where it is of others."""
    begun = read_whole_lines(settings_path(out))
    if begun:
        saved = begun[0]
        changed = [f"{name} ({saved.get(name)}, now {value})"
                   for name, value in settings.items() if saved.get(name) != value]
        if changed:
            raise UserError(f"{out} was made with other {', '.join(changed)}: give another --out, "
                            "or repeat what made it")
    elif os.path.exists(out):
        raise UserError(f"{out} is there already and was not made by this program: "
                        "give another --out")
    elif not os.access(Path(out).resolve().parent, os.W_OK):
        raise UserError(f"the folder of {out} is not there, or cannot be written to")
    return bool(begun)


def read_outcomes(out):
    """What became of the queries that are done -> {query: "kept" or the reason to drop it}."""
    outcomes = {}
    for path in (dropped_path(out), out):
        for record in read_whole_lines(path):
            outcomes[record["query"]] = record.get("reason", "kept")
    return outcomes


def read_whole_lines(path):
    """The records of a JSONL file whose writer may have been interrupted, [] where there is none.

    A half-written last line is cut off, so that the next one does not stick to it.
    """
    if not os.path.exists(path):
        return []
    try:
        content = Path(path).read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            os.truncate(path, end)
        return [json.loads(line) for line in content[:end].splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot go on with {path}: {error}")


def append_line(path, record):
    """Add a line to a JSONL file; on return it is on disk. When the disk is full no part stays."""
    line = json.dumps(record, ensure_ascii=False) + "\n"
    try:
        with open(path, "ab") as file:
            file.write(line.encode(errors="replace"))
            file.flush()
            os.fsync(file.fileno())     # an answer may have cost money: not even a crash loses it
    except OSError as error:
        read_whole_lines(path)      # cuts off what stands there of the line
        raise UserError(f"cannot write {path}: {error.strerror}; its lines are whole; make room, "
                        "then repeat the command")


# ------------------------------------------------------------------------------- the other commands

def show_query(args):
    """One query's way through the five steps: the prompt, the answer, and what is read in it."""
    prompt = PERSONA_COT.replace("{query}", args.query)
    print(f"{' the prompt ':-^100}\n{prompt}", flush=True)
    _, answer = next(answer_prompts(args, [prompt]))
    if isinstance(answer, Exception):
        raise UserError(f"no answer: {answer}")
    print(f"{' the answer ':-^100}\n{answer.text}")
    print(f"{' what is read in it ':-^100}")
    try:
        record = make_record(args.query, {"response": answer})
    except ValueError as error:
        print(f"dropped: {error}")
        return
    for key, value in record.items():
        print(f"{key}: {value}")
    print(f"p: {list(check_record(record)['p'])}")


def write_queries(args):
    """Sample queries and write them as JSONL."""
    queries = sample_queries(args.source.split(","), args.n, args.seed, args.field, args.rows)
    with atomic_write(args.out) as tmp:
        tmp.write_text("".join(json.dumps(record) + "\n" for record in queries))


def check_file(args):
    """Name every line that is no record; then show how poles, sets of traits and lengths fall."""
    records = {}                    # by query
    bad_lines = 0
    for number, line in read_lines(args.file):
        try:
            record = check_record(json.loads(line))
            if record["query"] in records:
                raise ValueError("repeats the query of an earlier line")
            records[record["query"]] = record
        except ValueError as error:
            print(f"line {number}: {error}")
            bad_lines += 1

    # what generate dropped lies beside its records
    dropped = Counter()
    if os.path.exists(dropped_path(args.file)):
        for _, line in read_lines(dropped_path(args.file)):
            dropped[json.loads(line)["reason"]] += 1
    outcome = f"; {tally(dropped + Counter(kept=len(records)))}" if dropped else ""
    print(f"{args.file}: {len(records)} records{outcome}")
    print_traits([record["p"] for record in records.values()])
    for key in ("query", "response", "naive_response", "human_like_response"):
        print_lengths(key, [record.get(key) for record in records.values()])

    if bad_lines:
        raise UserError(f"{args.file}: {bad_lines} bad lines")
    if not records:
        raise UserError(f"{args.file} holds no records")


def print_traits(activations):
    """How many records activate each pole, and which sets of traits are the commonest."""
    total = max(len(activations), 1)
    for i, trait in enumerate(TRAITS):
        n = sum(p[i] for p in activations)
        bar = "█" * round(60 * n / total)
        print(f"  {trait:22}{n:7} {n / total:6.1%}  {bar}")

    sets = Counter()
    for p in activations:
        sets[", ".join(trait for trait, active in zip(TRAITS, p) if active)] += 1
    print(f"{len(sets)} sets of traits, the commonest:")
    for traits, n in sets.most_common(10):
        print(f"{n:9} {n / total:6.1%}  {traits}")


def print_lengths(key, texts):
    """The range of the texts' lengths in words, and that of the middle half."""
    lengths = sorted(len(text.split()) for text in texts if isinstance(text, str))
    if lengths:
        quarter = lengths[len(lengths) // 4]
        three_quarters = lengths[len(lengths) * 3 // 4]
        print(f"{key}: {lengths[0]} to {lengths[-1]} words, "
              f"half of them {quarter} to {three_quarters}")


# ------------------------------------------------------------------------------------------ options

def add_model_options(command):
    """Who answers, and how: what `generate` and `show` share."""
    add = command.add_argument
    add("--model", required=True,
        help="tiny, falcon3-10b, ..., owner/model on the hub, a folder; or its name on the server")
    add("--server", metavar="URL",
        help="ask this OpenAI-compatible server instead; its key in OPENAI_API_KEY")
    add("--workers", type=int, default=16, metavar="N",
        help="requests at a time, or sequences decoded together (16)")
    add("--max-new-tokens", type=int, default=1024, metavar="N",
        help="an answer that needs more is dropped (1024)")
    add("--temperature", type=float, default=0.0, help="0 always takes the likeliest token (0)")
    add("--seed", type=int, default=0, help="of the drawing of tokens (0)")
    add("--device", default="auto", help="cuda, mps or cpu (the first of these that is here)")
    add("--dtype", default="auto", choices=["auto", "fp32", "bf16", "fp16"])


def make_parser():
    parser = argparse.ArgumentParser(prog="python -m experiments.generate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "generate", help="queries to records; repeat it to go on where it stopped")
    command.set_defaults(run=generate_records)
    add_model_options(command)
    add = command.add_argument
    add("--queries", required=True, metavar="FILE",
        help="JSONL with a `query` in each line, or .txt, one a line")
    add("--out", required=True, metavar="FILE",
        help="JSONL; dropped queries go to FILE.dropped.jsonl")
    add("--n", type=int, help="only the first N queries")
    add("--naive", action="store_true", help="add naive_response, for the Direct baseline")
    add("--human-like", action="store_true",
        help="add human_like_response, for the Human-Like baseline")

    command = commands.add_parser("show", help="one query's way through the five steps")
    command.set_defaults(run=show_query)
    add_model_options(command)
    command.add_argument("query")

    command = commands.add_parser("queries", help="sample queries from public data sets or files")
    command.set_defaults(run=write_queries)
    add = command.add_argument
    add("--source", required=True,
        help=f"{', '.join(SOURCES)}, NAME=FILE (a copy of one of these), or FILE; "
             "or several, with commas between them")
    add("--field", help="where a FILE of your own holds the queries: a text or a list of turns")
    add("--n", type=int, required=True,
        help="how many, in equal parts; the paper took 100000 from the four")
    add("--rows", type=int, metavar="N", help="read no more than N rows of a source (all)")
    add("--seed", type=int, default=0, help="of the sample (0)")
    add("--out", required=True, metavar="FILE", help="JSONL")

    command = commands.add_parser("check", help="validate a data file and show its balance")
    command.set_defaults(run=check_file)
    command.add_argument("file")
    return parser


def main():
    args = make_parser().parse_args()
    # argparse has no type for a number that is at least 1, and its errors are two lines
    for name in ("n", "rows", "workers", "max_new_tokens"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    args.run(args)


if __name__ == "__main__":
    run_program(main)
