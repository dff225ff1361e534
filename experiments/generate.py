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
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import TRAITS, check_record
from experiments.asking import Answer, model_answers, server_answers
from experiments.persona_cot import PERSONA_COT, PROMPTS, parse_answer
from experiments.sources import SOURCES, sample_queries
from plumbing.files import (UserError, atomic_write, number, read_json, read_lines, run_program,
                            write_json)


# what lies beside OUT
DROPPED = ".dropped.jsonl"
SETTINGS = ".settings.json"


# ------------------------------------------------------------------------------- queries to records

def generate_records(args):
    """Put every query through Persona-CoT.

    Records are appended to OUT, queries that are dropped to OUT.dropped.jsonl with the reason; a
    query in neither is still to do. OUT.settings.json says what they are made with.
    """
    queries = read_queries(args.queries)
    # the keys of a record that hold answers, each made by one of PROMPTS
    keys = ["response"] + ["naive_response"] * args.naive
    keys += ["human_like_response"] * args.human_like
    settings = {"queries": digest(queries), "model": args.model, "answers": keys,
                "max_new_tokens": args.max_new_tokens,
                "prompts": digest(PROMPTS[key] for key in keys)}
    check_output(args.out, settings)
    # what an earlier run has done stays done
    done = read_outcomes(args.out)
    counts = Counter(done.values())
    todo = [query for query in queries if query not in done]

    failures = 0
    failures_in_a_row = 0
    # delayed, so that a server that is down is said in one line
    progress = tqdm(total=len(queries), initial=len(done), delay=1)
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
        failures_in_a_row = 0
        # only now: a run that fails at once leaves no trace
        if not os.path.exists(args.out + SETTINGS):
            write_json(args.out + SETTINGS, settings)
        append_line(args.out if outcome == "kept" else args.out + DROPPED, record)
        counts[outcome] += 1
        progress.update()
    progress.close()

    if failures:
        raise UserError(f"{failures} queries got no answer ({problem}). Of {len(queries)}, "
                        f"{tally(counts)} are on disk: see to the server, then repeat the same "
                        "command to go on")
    print(f"{args.out}: {tally(counts)} of {len(queries)} queries")


def answer_queries(args, queries, keys):
    """Yield (query, {key: its answer or an exception}) once all answers of a query are there."""
    jobs = [(query, key) for query in queries for key in keys]
    # replace, not format: a query may hold braces of its own
    prompts = [PROMPTS[key].replace("{query}", query) for query, key in jobs]
    # answers come in the order in which they end: a query's may be far apart
    collected = {query: {} for query in queries}
    for i, answer in answer_prompts(args, prompts):
        query, key = jobs[i]
        collected[query][key] = answer
        if len(collected[query]) == len(keys):
            yield query, collected.pop(query)


def answer_prompts(args, prompts):
    if args.server:
        return server_answers(args.server, args.model, prompts, args.max_new_tokens, args.workers)
    return model_answers(args.model, prompts, args.max_new_tokens, args.workers)


def conclude(query, answers):
    """A query and {key: Answer or an exception} -> its outcome and the line to write for it.

    The outcome is "kept", or the reason to drop the query. OSError: a server did not answer.
    """
    try:
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
        return "kept", record
    except ValueError as error:
        outcome = str(error).split(":")[0]      # the reason alone: they are counted
        if isinstance(error, UnicodeError):
            outcome = "half a character"
        # the answers stay beside the reason, to see what a prompt or a parser has to learn
        texts = [answer.text for answer in answers.values() if isinstance(answer, Answer)]
        return outcome, {"query": query, "reason": outcome, "answers": texts}


def tally(counts):
    """{"kept": n, reason to drop: n, ...} -> "9 kept, 2 dropped (1 no response, 1 no trait)"."""
    reasons = [f"{n} {reason}" for reason, n in counts.most_common() if reason != "kept"]
    listed = f" ({', '.join(reasons)})" if reasons else ""
    return f"{counts['kept']} kept, {counts.total() - counts['kept']} dropped{listed}"


# -------------------------------------------------------------------------------------------- files

def digest(texts):
    """Whether texts are the same is told by their hash: settings are for people to read."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


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
    if os.path.exists(out + SETTINGS):
        saved = read_json(out + SETTINGS, "")
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


def read_outcomes(out):
    """What became of the queries that are done -> {query: "kept" or the reason to drop it}."""
    outcomes = {}
    for path in (out + DROPPED, out):
        if os.path.exists(path):
            cut_half_line(path)
            for _, line in read_lines(path):
                record = json.loads(line)
                outcomes[record["query"]] = record.get("reason", "kept")
    return outcomes


def cut_half_line(path):
    """A writer that was interrupted may have left half a line: the next must not stick to it."""
    content = Path(path).read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        os.truncate(path, end)


def append_line(path, record):
    """Add a line to a JSONL file; on return it is on disk. When the disk is full no part stays."""
    line = json.dumps(record, ensure_ascii=False) + "\n"
    try:
        with open(path, "ab") as file:
            file.write(line.encode(errors="replace"))
            file.flush()
            os.fsync(file.fileno())     # an answer may have cost money: not even a crash loses it
    except OSError as error:
        if os.path.exists(path):
            cut_half_line(path)
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
    print(f"{' the answer ':-^100}\n{answer.text}\n{' what is read in it ':-^100}")
    outcome, record = conclude(args.query, {"response": answer})
    if outcome != "kept":
        print(f"dropped: {outcome}")
        return
    for key, value in check_record(record).items():
        print(f"{key}: {list(value) if key == 'p' else value}")


def write_queries(args):
    """Sample queries and write them as JSONL."""
    queries = sample_queries(args.source.split(","), args.n, args.seed, args.field, args.rows)
    with atomic_write(args.out) as tmp:
        tmp.write_text("".join(json.dumps(record) + "\n" for record in queries), encoding="utf-8")


def check_file(args):
    """Name every line that is no record; then show how poles, sets of traits and lengths fall."""
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

    counts = Counter(kept=len(records))
    # what generate dropped lies beside its records
    if os.path.exists(args.file + DROPPED):
        counts.update(json.loads(line)["reason"] for _, line in read_lines(args.file + DROPPED))
    print(f"{args.file}: {len(records)} records; {tally(counts)}")
    print_traits([record["p"] for record in records.values()])
    for key in ("query", *PROMPTS):
        lengths = [len(record[key].split()) for record in records.values() if key in record]
        if lengths:
            low, first, third, high = np.percentile(lengths, [0, 25, 75, 100]).astype(int)
            print(f"{key}: {low} to {high} words, half of them {first} to {third}")
    if bad_lines:
        raise UserError(f"{args.file}: {bad_lines} bad lines")
    if not records:
        raise UserError(f"{args.file} holds no records")


def print_traits(activations):
    """How many records activate each pole, and which sets of traits are the commonest."""
    total = max(len(activations), 1)
    for i, trait in enumerate(TRAITS):
        n = sum(p[i] for p in activations)
        print(f"  {trait:22}{n:7} {n / total:6.1%}  {'█' * round(60 * n / total)}")
    sets = Counter(activations)
    print(f"{len(sets)} sets of traits, the commonest:")
    for p, n in sets.most_common(10):
        traits = ", ".join(trait for trait, active in zip(TRAITS, p) if active)
        print(f"{n:9} {n / total:6.1%}  {traits}")


# ------------------------------------------------------------------------------------------ options

def make_parser():
    parser = argparse.ArgumentParser(prog="python -m experiments.generate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, help):
        added = commands.add_parser(name, help=help)
        added.set_defaults(run=run)
        return added.add_argument

    generate = command("generate", generate_records,
                       "queries to records; repeat it to go on where it stopped")
    generate("--queries", required=True, metavar="FILE",
             help="JSONL with a `query` in each line, or .txt, one a line")
    generate("--out", required=True, metavar="FILE",
             help="JSONL; dropped queries go to FILE.dropped.jsonl")
    generate("--naive", action="store_true", help="add naive_response, for the Direct baseline")
    generate("--human-like", action="store_true",
             help="add human_like_response, for the Human-Like baseline")

    show = command("show", show_query, "one query's way through the five steps")
    show("query")

    # who answers, and how
    for add in (generate, show):
        add("--model", required=True,
            help="tiny, falcon3-10b, ..., owner/model on the hub, a folder; or its name on the "
                 "server")
        add("--server", metavar="URL",
            help="ask this OpenAI-compatible server instead; its key in OPENAI_API_KEY")
        add("--workers", type=number(int, 1), default=16, metavar="N",
            help="requests at a time, or sequences decoded together (16)")
        add("--max-new-tokens", type=number(int, 1), default=1024, metavar="N",
            help="an answer that needs more is dropped (1024)")

    add = command("queries", write_queries, "sample queries from public data sets or files")
    add("--source", required=True,
        help=f"{', '.join(SOURCES)}, NAME=FILE (a copy of one of these), or FILE; "
             "or several, with commas between them")
    add("--field", help="where a FILE of your own holds the queries: a text or a list of turns")
    add("--n", type=number(int, 1), required=True,
        help="how many, in equal parts; the paper took 100000 from the four")
    add("--rows", type=number(int, 1), help="read no more rows of a source (all)")
    add("--seed", type=int, default=0, help="of the sample (0)")
    add("--out", required=True, metavar="FILE", help="JSONL")

    check = command("check", check_file, "validate a data file and show its balance")
    check("file")
    return parser


def main():
    args = make_parser().parse_args()
    args.run(args)


if __name__ == "__main__":
    run_program(main)
