"""Make Persona-CoT records (section 4.2 of the paper), and look at them.

    python -m experiments.generate show "I feel anxious about tomorrow" --model falcon3-10b
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

from data import TRAITS, check_record, load_records
from experiments.asking import server_answers
from experiments.persona_cot import PERSONA_COT, PROMPTS, parse_answer
from personafuse import generate, load_llama, pick_device
from plumbing.chat import ChatTokenizer
from plumbing.files import UserError, number, read_json, read_lines, run_program, write_json
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
    # what an earlier run has done stays done
    outcomes = read_outcomes(args.out, settings)
    todo = [query for query in queries if query not in outcomes]
    # replace, not format: a query may hold braces of its own
    jobs = [[PROMPTS[key].replace("{query}", query) for key in keys] for query in todo]
    answered = server_answers(args.server, args.model, jobs, args.max_new_tokens, args.workers)

    problem = None
    failures_in_a_row = 0
    # delayed, so that a server that is down is said in one line
    for i, answers in tqdm(answered, total=len(jobs), delay=1):
        if isinstance(answers, OSError):
            # the server's trouble, not the query's: the query stays to do
            problem = answers
            failures_in_a_row += 1
            # one query may break a server; three in a row, and it is down
            if failures_in_a_row == 3:
                break
            continue
        failures_in_a_row = 0
        line = conclude(todo[i], keys, answers)
        line.pop("p", None)             # it follows from the traits
        # only now: a run that fails at once leaves no trace
        if not outcomes:
            write_json(args.out + SETTINGS, settings)
        append_line(args.out + DROPPED if "reason" in line else args.out, line)
        outcomes[todo[i]] = line.get("reason", "kept")

    counts = Counter(outcomes.values()).most_common()
    done = ", ".join(f"{n} {outcome}" for outcome, n in counts)
    if problem:
        raise UserError(f"not all of {len(queries)} queries got an answer ({problem}); on disk: "
                        f"{done or 'nothing'}; see to the server, then repeat the same command to "
                        "go on")
    print(f"{args.out}: {done}")


def conclude(query, keys, answers):
    """A query and its answers, or a ValueError in their place -> a record, or, where none can be
    made of them, {"query": ..., "reason": ..., "answers": ...}.
    """
    try:
        if isinstance(answers, ValueError):
            raise answers
        record = {"query": query} | dict(zip(keys, answers)) | parse_answer(answers[0])
        return check_record(record, keys)
    except ValueError as error:
        # without details: reasons are counted
        reason = str(error).split(":")[0]
        # the answers stay beside it, to see what a prompt or a parser has to learn
        texts = [] if error is answers else answers
        return {"query": query, "reason": reason, "answers": texts}


# -------------------------------------------------------------------------------------------- files

def read_queries(path):
    """The distinct queries of a file, in order: one a line in a .txt, else JSONL with a `query`."""
    queries = []
    for n, line in read_lines(path):
        try:
            query = line if str(path).endswith(".txt") else json.loads(line)["query"]
            # half an emoji could not be written again
            queries.append(query.strip().encode(errors="replace").decode())
        except Exception:               # no JSON, no object, no such key, no text
            raise UserError(f'{path}, line {n}: no JSON object with a text as "query" '
                            "(plain lines: call the file .txt)")
    queries = list(filter(None, dict.fromkeys(queries)))
    if not queries:
        raise UserError(f"{path} holds no queries")
    return queries


def read_outcomes(out, settings):
    """What became of the queries that are done -> {query: "kept" or the reason to drop it}.

    UserError unless OUT is new, or was begun with these settings.
    """
    saved = read_json(out + SETTINGS)
    if saved != settings and (saved or Path(out).exists()):
        raise UserError(f"{out} was made with {saved or 'another program'}, not {settings}: give "
                        "another --out, or repeat what made it")
    outcomes = {}
    for path in (out, out + DROPPED):
        if Path(path).exists():
            # half a line, of a run that was interrupted: the next must not stick to it
            os.truncate(path, Path(path).read_bytes().rfind(b"\n") + 1)
            for _, line in read_lines(path):
                done = json.loads(line)
                outcomes[done["query"]] = done.get("reason", "kept")
    return outcomes


def append_line(path, line):
    """Add a line to a JSONL file; on return it is on disk."""
    try:
        with open(path, "a", encoding="utf-8", errors="replace") as file:
            print(json.dumps(line, ensure_ascii=False), file=file, flush=True)
            os.fsync(file.fileno())     # an answer may have cost money: not even a crash loses it
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; make room, then repeat the "
                        "command to go on")


# ------------------------------------------------------------------------------- the other commands

def show_query(args):
    """One query's way through the five steps, by a model in this process: the prompt, the likeliest
    answer, and what is read in it.
    """
    prompt = PERSONA_COT.replace("{query}", args.query)
    print(f"{' the prompt ':-^100}\n{prompt}", flush=True)
    folder = find_model(args.model, "--model")
    llama = load_llama(folder, pick_device(base=args.model), "auto")
    tokenizer = ChatTokenizer(folder, llama.embed_tokens.weight)
    ids = generate(llama, tokenizer.encode_prompt(prompt), args.max_new_tokens, tokenizer.stop)
    answer = tokenizer.decode(list(ids))
    print(f"{' the answer ':-^100}\n{answer}\n{' what is read in it ':-^100}")
    record = conclude(args.query, ["response"], [answer])
    for key, value in record.items():
        print(f"{key}: {value}")


def check_file(args):
    """Read records as training does; then show how poles and lengths fall."""
    records = load_records(args.file)
    queries = {record["query"] for record in records}
    activations = [record["p"] for record in records]
    print(f"{args.file}: {len(records)} records with {len(queries)} queries and "
          f"{len(set(activations))} sets of traits")
    for trait, active in zip(TRAITS, zip(*activations)):
        print(f"  {trait:22}{sum(active):7} {sum(active) / len(records):6.1%}")
    for key in ("query", *PROMPTS):
        lengths = [len(record[key].split()) for record in records if key in record]
        if lengths:
            print(f"{key}: {min(lengths)} to {max(lengths)} words")


# ------------------------------------------------------------------------------------------ options

def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="one query's way through the five steps")
    generate = commands.add_parser("generate", help="queries to records; repeat it to go on")
    check = commands.add_parser("check", help="validate a data file and show its balance")

    show.add_argument("query")
    for add in (show.add_argument, generate.add_argument):
        add("--model", required=True,
            help="of generate its name on the server; of show tiny, falcon3-10b, ..., owner/model "
                 "on the hub, or a folder")
        add("--max-new-tokens", type=number(int, 1), default=1024,
            help="an answer that needs more is dropped")
    add = generate.add_argument
    add("--server", required=True, help="URL, OpenAI-compatible; its key in OPENAI_API_KEY")
    add("--queries", required=True, help="JSONL with a `query` in each line, or .txt, one a line")
    add("--out", required=True, help="JSONL")
    add("--naive", action="store_true", help="add naive_response, for the Direct baseline")
    add("--human-like", action="store_true",
        help="add human_like_response, for the Human-Like baseline")
    add("--workers", type=number(int, 1), default=16, help="requests at a time")

    check.add_argument("file")
    return parser.parse_args()


def main():
    args = parse_arguments()
    commands = {"generate": generate_records, "show": show_query, "check": check_file}
    commands[args.command](args)


if __name__ == "__main__":
    run_program(main)
