"""Make Persona-CoT records (section 4.2 of the paper), and look at them.

    python -m experiments.generate show "I feel anxious about tomorrow" --model falcon3-10b
    python -m experiments.generate queries --source sharegpt,personahub,wildchat,infinity \\
        --n 100000 --out queries.jsonl
    python -m experiments.generate generate --queries queries.jsonl --out records.jsonl \\
        --server http://localhost:8000 --model NAME
    python -m experiments.generate check records.jsonl

`generate` appends records to OUT, and queries that are dropped to OUT.dropped.jsonl with the
reason; a query in neither is still to do. OUT.settings.json says what they are made with.
"""

import argparse
import json
import os
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from data import TRAITS, check_record
from experiments.asking import ask, server_answers
from experiments.persona_cot import PERSONA_COT, PROMPTS, parse_answer
from experiments.sources import SOURCES, sample_queries
from personafuse import generate, load_llama, pick_device
from plumbing.chat import ChatTokenizer
from plumbing.files import (UserError, atomic_write, number, read_json, read_lines, run_program,
                            write_json)
from plumbing.models import find_model

# what lies beside OUT
DROPPED = ".dropped.jsonl"
SETTINGS = ".settings.json"


# ------------------------------------------------------------------------------- queries to records

def generate_records(args):
    """Put every query through Persona-CoT."""
    queries = read_queries(args.queries)
    # the keys of a record that hold answers, each made by one of PROMPTS
    keys = ["response"] + ["naive_response"] * args.naive
    keys += ["human_like_response"] * args.human_like
    settings = {"model": args.model, "max_new_tokens": args.max_new_tokens, "answers": keys}
    check_output(args.out, settings)
    # what an earlier run has done stays done
    done = read_outcomes(args.out)
    counts = Counter(done[query] for query in queries if query in done)
    todo = [query for query in queries if query not in done]
    # replace, not format: a query may hold braces of its own
    jobs = [[PROMPTS[key].replace("{query}", query) for key in keys] for query in todo]
    answered = server_answers(args.server, args.model, jobs, args.max_new_tokens, args.workers)

    failures = 0
    failures_in_a_row = 0
    # delayed, so that a server that is down is said in one line
    for i, answers in tqdm(answered, total=len(jobs), delay=1):
        if isinstance(answers, OSError):
            # the server's trouble, not the query's: the query stays to do
            problem = answers
            failures += 1
            failures_in_a_row += 1
            # one query may break a server; three in a row, and it is down
            if failures_in_a_row == 3:
                break
            continue
        failures_in_a_row = 0
        outcome, record = conclude(todo[i], keys, answers)
        # only now: a run that fails at once leaves no trace
        if not Path(args.out + SETTINGS).exists():
            write_json(args.out + SETTINGS, settings)
        record.pop("p", None)           # it follows from the traits
        append_line(args.out if outcome == "kept" else args.out + DROPPED, record)
        counts[outcome] += 1

    if failures:
        raise UserError(f"{failures} queries got no answer ({problem}). Of {len(queries)}, "
                        f"{tally(counts)} are on disk: see to the server, then repeat the same "
                        "command to go on")
    print(f"{args.out}: {tally(counts)} of {len(queries)} queries")


def conclude(query, keys, answers):
    """A query and its answers, or an exception in their place -> its outcome and the line to write.

    The outcome is "kept", or the reason to drop the query.
    """
    try:
        if isinstance(answers, Exception):
            raise answers
        others = dict(zip(keys[1:], answers[1:]))
        return "kept", check_record({"query": query} | parse_answer(answers[0]) | others, keys)
    except ValueError as error:
        outcome = str(error).split(":")[0]      # the reason alone: they are counted
        if isinstance(error, UnicodeError):
            outcome = "half a character"
        # the answers stay beside the reason, to see what a prompt or a parser has to learn
        texts = [] if error is answers else answers
        return outcome, {"query": query, "reason": outcome, "answers": texts}


def tally(counts):
    """{"kept": n, reason to drop: n, ...} -> "9 kept, 2 dropped (1 no response, 1 no trait)"."""
    reasons = [f"{n} {reason}" for reason, n in counts.most_common() if reason != "kept"]
    listed = f" ({', '.join(reasons)})" if reasons else ""
    return f"{counts['kept']} kept, {counts.total() - counts['kept']} dropped{listed}"


# -------------------------------------------------------------------------------------------- files

def read_queries(path):
    """The distinct queries of a file, in order: one a line in a .txt, else JSONL with a `query`."""
    queries = {}                    # a dict keeps the order, a set would not
    for n, line in read_lines(path):
        try:
            query = line if str(path).endswith(".txt") else json.loads(line)["query"]
            # half an emoji could not be written again
            query = query.strip().encode(errors="replace").decode()
        except (ValueError, LookupError, TypeError, AttributeError):
            raise UserError(f'{path}, line {n}: no JSON object with a text as "query" '
                            "(plain lines: call the file .txt)")
        if query:
            queries[query] = True
    if not queries:
        raise UserError(f"{path} holds no queries")
    return list(queries)


def check_output(out, settings):
    """UserError unless OUT is new, or was begun with these settings."""
    if Path(out + SETTINGS).exists():
        saved = read_json(out + SETTINGS)
        if saved != settings:
            raise UserError(f"{out} was made with {saved}, not {settings}: give another --out, or "
                            "repeat what made it")
    elif Path(out).exists():
        raise UserError(f"{out} is there already and was not made by this program: "
                        "give another --out")
    elif not os.access(Path(out).resolve().parent, os.W_OK):
        raise UserError(f"the folder of {out} is not there, or cannot be written to")


def read_outcomes(out):
    """What became of the queries that are done -> {query: "kept" or the reason to drop it}."""
    outcomes = {}
    for path in (out + DROPPED, out):
        if Path(path).exists():
            cut_half_line(path)
            for _, line in read_lines(path):
                record = json.loads(line)
                outcomes[record["query"]] = record.get("reason", "kept")
    return outcomes


def cut_half_line(path):
    """A writer that was interrupted may have left half a line: the next must not stick to it."""
    os.truncate(path, Path(path).read_bytes().rfind(b"\n") + 1)


def append_line(path, record):
    """Add a line to a JSONL file; on return it is on disk. When the disk is full no part stays."""
    line = json.dumps(record, ensure_ascii=False) + "\n"
    try:
        with open(path, "ab") as file:
            file.write(line.encode(errors="replace"))
            file.flush()
            os.fsync(file.fileno())     # an answer may have cost money: not even a crash loses it
    except OSError as error:
        if Path(path).exists():
            cut_half_line(path)
        raise UserError(f"cannot write {path}: {error.strerror}; its lines are whole; make room, "
                        "then repeat the command")


# ------------------------------------------------------------------------------- the other commands

def show_query(args):
    """One query's way through the five steps: the prompt, the answer, and what is read in it."""
    prompt = PERSONA_COT.replace("{query}", args.query)
    print(f"{' the prompt ':-^100}\n{prompt}", flush=True)
    try:
        if args.server:
            answer = ask(args.server, args.model, prompt, args.max_new_tokens)
        else:
            answer = own_answer(args.model, prompt, args.max_new_tokens)
    except (OSError, ValueError) as error:
        raise UserError(f"no answer: {error}")
    print(f"{' the answer ':-^100}\n{answer}\n{' what is read in it ':-^100}")
    _, record = conclude(args.query, ["response"], [answer])
    for key, value in record.items():
        print(f"{key}: {value}")


def own_answer(name, prompt, max_new_tokens):
    """The likeliest answer of a model by name, in this process."""
    folder = find_model(name, "--model")
    llama = load_llama(folder, pick_device(base=name), "auto")
    tokenizer = ChatTokenizer(folder)
    tokenizer.check_against(llama.embed_tokens.weight)
    ids = generate(llama, tokenizer.encode_prompt(prompt), max_new_tokens, tokenizer.stop)
    return tokenizer.decode(list(ids))


def write_queries(args):
    """Sample queries and write them as JSONL."""
    queries = sample_queries(args.source.split(","), args.n, args.seed, args.field)
    with atomic_write(args.out) as tmp:
        tmp.write_text("".join(json.dumps(record) + "\n" for record in queries), encoding="utf-8")


def check_file(args):
    """Name every line that is no record; then show how poles and lengths fall."""
    records = {}                    # by query
    bad_lines = 0
    for n, line in read_lines(args.file):
        try:
            record = check_record(json.loads(line))
            if record["query"] in records:
                raise ValueError("repeats the query of an earlier line")
            records[record["query"]] = record
        except ValueError as error:
            print(f"line {n}: {error}")
            bad_lines += 1

    activations = [record["p"] for record in records.values()]
    print(f"{args.file}: {len(records)} records with {len(set(activations))} sets of traits")
    for trait, active in zip(TRAITS, zip(*activations)):
        print(f"  {trait:22}{sum(active):7} {sum(active) / len(records):6.1%}")
    for key in ("query", *PROMPTS):
        lengths = [len(record[key].split()) for record in records.values() if key in record]
        if lengths:
            print(f"{key}: {min(lengths)} to {max(lengths)} words")
    if bad_lines:
        raise UserError(f"{args.file}: {bad_lines} bad lines")
    if not records:
        raise UserError(f"{args.file} holds no records")


# ------------------------------------------------------------------------------------------ options

def parse_arguments():
    parser = argparse.ArgumentParser(prog="python -m experiments.generate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="one query's way through the five steps")
    generate = commands.add_parser("generate", help="queries to records; repeat it to go on")
    sample = commands.add_parser("queries", help="sample queries from data sets or files")
    check = commands.add_parser("check", help="validate a data file and show its balance")

    show.add_argument("query")
    show.add_argument("--server", metavar="URL", help="as of generate; without it --model is run")
    generate.add_argument("--server", required=True, metavar="URL",
                          help="OpenAI-compatible; its key in OPENAI_API_KEY")
    for add in (show.add_argument, generate.add_argument):
        add("--model", required=True,
            help="its name on the server; without one tiny, falcon3-10b, ..., owner/model on the "
                 "hub, or a folder")
        add("--max-new-tokens", type=number(int, 1), default=1024,
            help="an answer that needs more is dropped")
    add = generate.add_argument
    add("--queries", required=True, metavar="FILE",
        help="JSONL with a `query` in each line, or .txt, one a line")
    add("--out", required=True, metavar="FILE", help="JSONL")
    add("--naive", action="store_true", help="add naive_response, for the Direct baseline")
    add("--human-like", action="store_true",
        help="add human_like_response, for the Human-Like baseline")
    add("--workers", type=number(int, 1), default=16, help="requests at a time")

    add = sample.add_argument
    add("--source", required=True, help=f"{', '.join(SOURCES)}, or FILE; or several, with commas")
    add("--field", help="where a FILE holds the queries: a text or a list of turns")
    add("--n", type=number(int, 1), required=True,
        help="how many, in equal parts; the paper took 100000 from the four")
    add("--seed", type=int, default=0)
    add("--out", required=True, metavar="FILE", help="JSONL")
    check.add_argument("file")
    return parser.parse_args()


def main():
    args = parse_arguments()
    commands = {"generate": generate_records, "show": show_query, "queries": write_queries,
                "check": check_file}
    commands[args.command](args)


if __name__ == "__main__":
    run_program(main)
