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
from plumbing.files import run_program
from router import ROUTES
from sample import add_answering, sampling

# the steps of Persona-CoT come before the response, and need room of their own
COT_TOKENS = 300


def cot_prompt(text):
    """Persona-CoT (Table 9 of the paper) around a query."""
    return PERSONA_COT.replace("{query}", text)


def cot_response(answer):
    """The response in an answer to Persona-CoT; all of it where it does not keep to the format."""
    try:
        return parse_answer(answer)["response"]
    except ValueError:
        return answer


def write_answers(model, texts, w, max_new_tokens, cot=False, **sampling):
    """Texts and w (n, E), or None for the bare base -> an answer to each.

    `cot` asks through the Persona-CoT prompt, and takes the response. sampling: temperature, top_p,
    repetition_penalty and seed of generate_batch; without them the answers are greedy.
    """
    if cot:
        texts = [cot_prompt(text) for text in texts]
        max_new_tokens += COT_TOKENS
    tokenizer = model.tokenizer
    prompts = model.encode_prompts(texts, max_new_tokens)
    written = generate_batch(model.base, prompts, max_new_tokens, tokenizer.stop, w, **sampling)
    answers = [""] * len(texts)
    for i, ids in tqdm(written, "answers", len(texts), leave=False):
        answer = tokenizer.decode(ids)
        answers[i] = (cot_response(answer) if cot else answer).strip()
    return answers


def ask_model(model, texts, args, max_new_tokens):
    """Texts -> greedy answers, the experts mixed by --route."""
    # with cot it is the bare base that is prompted
    cot = args.route == "cot"
    route = "none" if cot else args.route
    w = model.mixing_weights(texts, route, seed=args.seed)
    return write_answers(model, texts, w, max_new_tokens, cot)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("file", nargs="?", metavar="FILE", help="queries (default: the run's held-out ones)")
    add("--run", required=True, metavar="DIR")
    add("--route", default="learned", choices=ROUTES)
    add("--traits", metavar="WEIGHTS", help='by hand: "high agreeableness=0.7, ..."')
    add_answering(parser, max_new_tokens=200)
    args = parser.parse_args()
    queries = read_queries(args.file) if args.file else None
    model, settings = load_run(args.run, pick_device(args.device), args.dtype)
    if queries is None:
        queries = [record["query"] for record in run_records(settings)[1]]

    # in parts: what is written stays, and a long file shows that it goes on
    for start in range(0, len(queries), 128):
        part = queries[start:start + 128]
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
