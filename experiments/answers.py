"""What a model answers to many questions: each in the chat format, with its own mix of experts,
generated many at a time.

    python -m experiments.answers --run out/tiny queries.txt
    python -m experiments.answers --run out/tiny --traits "low agreeableness" > blunt.jsonl

A line of JSON for each query: query, weights, response. Queries are read from FILE, one a line in
a .txt, else from JSON lines with a "query"; without FILE they are the run's held-out ones.
Temperature, top-p and repetition penalty are the run's own unless they are named.
"""

import argparse
import json

from tqdm import tqdm

from data import TRAITS
from experiments.batched import generate_batch
from experiments.common import run_records
from experiments.generate import read_queries
from experiments.persona_cot import PERSONA_COT, parse_answer
from personafuse import load_run, pick_device
from plumbing.files import number, run_program
from router import ROUTES

# the steps of Persona-CoT come before the response, and need room of their own
COT_TOKENS = 300
# as many answers are written together
ROWS = 32


# ----------------------------------------------------------------------------------------- prompts

def cot_prompt(text):
    """Persona-CoT (Table 9 of the paper) around a query."""
    return PERSONA_COT.replace("{query}", text)


def cot_response(answer):
    """The response in an answer to Persona-CoT; all of it where it does not keep to the format."""
    try:
        return parse_answer(answer)["response"]
    except ValueError:
        return answer


def route_weights(model, queries, args):
    """w (n, E) as --route, --top-k and --seed say, or None for the bare base."""
    # with cot it is the bare base that is prompted
    route = "none" if args.route == "cot" else args.route
    return model.mixing_weights(queries, route, args.top_k, args.seed)


def ask_model(model, texts, args, max_new_tokens, queries=None, until=(), raw=False):
    """Texts -> greedy answers, the experts mixed by --route for `queries` (default: the texts)."""
    w = route_weights(model, queries or texts, args)
    return write_answers(model, texts, w, max_new_tokens, args.route == "cot", until, raw)


# ----------------------------------------------------------------------------------------- answers

def write_answers(model, texts, w, max_new_tokens, cot=False, until=(), raw=False, **sampling):
    """Texts and w (n, E), or None for the bare base -> an answer to each.

    An answer ends before the first of the strings `until`. `cot` asks through the Persona-CoT
    prompt, and takes the response. `raw` texts have no chat format. sampling: temperature, top_p,
    repetition_penalty and seed of generate_batch.
    """
    if cot:
        texts = [cot_prompt(text) for text in texts]
        max_new_tokens += COT_TOKENS
    tokenizer = model.tokenizer
    if raw:
        prompts = [tokenizer.prefix + tokenizer.encode(text) for text in texts]
    else:
        prompts = [tokenizer.encode_prompt(text) for text in texts]
    answers = continue_prompts(model, prompts, w, max_new_tokens, until, sampling)
    if cot:
        answers = [cot_response(answer) for answer in answers]
    return answers if raw else [answer.strip() for answer in answers]


def continue_prompts(model, prompts, w, max_new_tokens, until, sampling):
    """Prompts (token ids) -> what the model writes after each, as text."""
    # a prompt that fills the context is cut on the left: a quarter is left to answer in
    context = model.base.config.max_position_embeddings
    room = context - min(max_new_tokens, context // 4)
    # like lengths run side by side: the cache is read as far as the longest
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [[] for _ in prompts]
    finished = set()
    tokens = generate_batch(
        model.base, [prompts[i][-room:] for i in order], max_new_tokens, model.tokenizer.stop,
        None if w is None else w[order], rows=ROWS, finished=finished, **sampling)
    with tqdm(total=len(prompts), desc="answers", leave=False) as progress:
        for k, token in tokens:
            ids = answers[order[k]]
            if token is None:
                progress.update()
                continue
            ids.append(token)
            # a string may be spread over several tokens: look at the last few together
            end = model.tokenizer.decode(ids[-24:]) if until else ""
            if any(stop in end for stop in until):
                finished.add(k)
    return [cut_before(model.tokenizer.decode(ids), until) for ids in answers]


def cut_before(text, until):
    """The text before the first of the strings `until`."""
    ends = [text.index(stop) for stop in until if stop in text]
    return text[:min(ends, default=len(text))]


# ----------------------------------------------------------------------------------------- options

def add_sampling(parser):
    """Options that say how answers are drawn; what is not given is the run's own."""
    add = parser.add_argument
    add("--temperature", type=number(float, 0), help="0 takes the likeliest token")
    add("--top-p", type=number(float, 0, above=True, high=1))
    add("--repetition-penalty", type=number(float, 0, above=True))
    add("--seed", type=int, default=0)


def sampling(settings, args):
    """The options of generate_batch: as given, as the run was made for, or as sample.py has it."""
    options = {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.0}
    for name, default in options.items():
        given = getattr(args, name)
        options[name] = settings.get(name, default) if given is None else given
    return options | {"seed": args.seed}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("file", nargs="?", metavar="FILE", help="queries (default: the run's held-out ones)")
    add("--run", required=True, metavar="DIR")
    add("--route", default="learned", choices=ROUTES)
    add("--traits", metavar="WEIGHTS", help='by hand: "high agreeableness=0.7, ..."')
    add("--max-new-tokens", type=number(int, 1), default=200)
    add("--device", default="auto")
    add("--dtype", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    add_sampling(parser)
    args = parser.parse_args()
    queries = read_queries(args.file) if args.file else None
    model, settings = load_run(args.run, pick_device(args.device), args.dtype)
    if queries is None:
        queries = [record["query"] for record in run_records(settings)[1]]

    # in parts: what is written stays, and a long file shows that it goes on
    for start in range(0, len(queries), 4 * ROWS):
        part = queries[start:start + 4 * ROWS]
        w = model.mixing_weights(part, args.traits or args.route, seed=args.seed)
        answers = write_answers(model, part, w, args.max_new_tokens, **sampling(settings, args))
        for i, (query, answer) in enumerate(zip(part, answers)):
            weights = None
            if w is not None and w.shape[1] == len(TRAITS):
                weights = {trait: round(x, 6) for trait, x in zip(TRAITS, w[i].tolist())}
            line = {"query": query, "weights": weights, "response": answer}
            print(json.dumps(line, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    run_program(main)
