"""Ask a trained PersonaFuse: the router's weights as bars, then the answer as it is written.

    python sample.py "I feel anxious"                   the newest run under out/
    python sample.py                                    a conversation
    python sample.py "I feel anxious" --traits "high agreeableness=0.7, low neuroticism=0.3"
    python sample.py "I feel anxious" --compare "low agreeableness" --compare none
    python sample.py --file queries.txt --json          a line of JSON for each line of the file
    python sample.py "I feel anxious" --export DIR      a checkpoint with these weights merged in
"""

import argparse
import json
import sys
from pathlib import Path

from data import TRAITS, ChatTokenizer, parse_traits
from plumbing import UserError, find_model, model_table, read_json, read_lines, run_program
from runs import export_merged

# torch, and what imports it, is imported where it is used: --help and a mistyped option answer at
# once

ROUTES = ["learned", "uniform", "none", "random1", "random2", "random5"]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, epilog=model_table(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("query", nargs="?", help="what the user says; without it a conversation begins")
    add("--file", help="a text file with one query a line; goes with --json")
    add("--run", help="a folder that train.py wrote (default: the newest under out/)")
    add("--base", help="refuse a run made for another base; with --route none no run is needed")
    add("--traits", metavar="WEIGHTS", help="weights by hand in place of the router: "
                                            '"high agreeableness=0.7, low neuroticism=0.3"')
    add("--route", default="learned", choices=ROUTES,
        help="how the experts are mixed (default: learned; none is the bare base)")
    add("--compare", action="append", nargs="?", const="none", default=[], metavar="WEIGHTS",
        help="before that another answer: of the bare base, or with these weights or this route; "
             "may be given again")
    add("--export", metavar="DIR", help="write the base with these weights merged in, as an "
                                        "ordinary checkpoint, and answer nothing")
    add("--json", action="store_true", help="print a JSON object: query, weights, response")
    add("--max-new-tokens", type=int, default=200)
    # small models repeat themselves when they always take the likeliest token
    add("--temperature", type=float, default=0.7, help="0 takes the likeliest token (default: 0.7)")
    add("--top-p", type=float, default=0.9, help="draw from the likeliest tokens that hold this "
                                                 "probability (default: 0.9)")
    add("--repetition-penalty", type=float, default=1.0,
        help="makes tokens that were there before less likely (default: 1, which does not)")
    add("--seed", type=int, default=0)
    add("--device", default="auto")
    add("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    args = parser.parse_args()

    if args.query is not None and args.file:
        parser.error("give a query, or --file with one query a line")
    if args.file and not args.json:
        parser.error("--file goes with --json")
    if args.temperature < 0 or not 0 < args.top_p <= 1 or args.max_new_tokens < 1:
        parser.error("--temperature is at least 0, --top-p is in (0, 1], --max-new-tokens is at "
                     "least 1")
    if args.repetition_penalty <= 0:
        parser.error("--repetition-penalty is above 0")
    alone = args.query is None and not args.file
    if alone and not (args.export and args.traits) and not sys.stdin.isatty():
        parser.error("give a query, or --file with one query a line")
    # one setting says how the experts are mixed: a route's name, or weights by hand
    args.setting = args.traits or args.route
    for setting in [args.setting, *args.compare]:
        if setting not in ROUTES:
            parse_traits(setting)                       # complain before anything is loaded
    return args


def read_queries(args):
    """The queries of the command line, or none for a conversation."""
    if args.file:
        queries = [line.strip() for _, line in read_lines(args.file)]
        if not queries:
            raise UserError(f"{args.file} holds no queries")
        return queries
    if args.query is None:
        return []
    if not args.query.strip():
        raise UserError("the query is empty")
    return [args.query.strip()]


def newest_run():
    runs = sorted(Path("out").glob("*/personafuse.json"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UserError("there is no run under out/ yet: train one with `python train.py`, or name "
                        "one with --run DIR (or ask the bare base: --route none --base tiny)")
    return runs[-1].parent


def load_model(args):
    """What --run and --base name -> the model and its base's name."""
    if args.route == "none" and args.base and not args.run:
        folder = find_model(args.base)
        from personafuse import PersonaFuse, load_llama, pick_device
        device = pick_device(args.device, args.base)
        llama = load_llama(folder, device, args.dtype)
        return PersonaFuse(llama, ChatTokenizer(folder)), args.base
    run = args.run or newest_run()
    missing = f"{run} holds no finished stage (no personafuse.json): train with train.py first"
    base = read_json(Path(run) / "personafuse.json", missing)["base"]
    from personafuse import load_run, pick_device
    # merging for a checkpoint is one pass over the weights: the CPU does
    device = pick_device("cpu" if args.export else args.device, base)
    model, settings = load_run(run, device, args.dtype, args.base)
    return model, settings["base"]


# ---------------------------------------------------------------------------------------- answering

def weights_for(model, query, setting, seed):
    """A query and a route's name, or weights by hand -> w (1, E), or None for the bare base."""
    import torch
    if setting in ROUTES:
        return model.mixing_weights([query], setting, seed=seed)
    if model.experts != len(TRAITS):
        raise UserError("this run has a single LoRA: --traits needs the ten experts of "
                        "--variant personafuse")
    return torch.tensor([parse_traits(setting)], device=model.device)


def print_weights(w):
    """The weights as bars, the largest first; a bar of four is the tenth that each would have."""
    for i in w.argsort(descending=True).tolist():
        if w[i] > 0:
            print(f"  {TRAITS[i]:22} {w[i]:.3f} {'█' * round(40 * w[i].item())}")
    print()


def answer(model, prompt, w, args, stream):
    """The answer to a prompt (token ids) at weights w (1, E), or None for the bare base.

    With `stream` it is printed as it is written.
    """
    from lora import join, merge, unmerge
    from personafuse import generate
    originals = {}
    if w is not None:
        # w belongs to the query: merged in once, every token costs what the plain model's does
        originals = merge(model.base, w[0])
        join(model.base)
    ids = []
    shown = ""
    for token in generate(model.base, prompt, args.max_new_tokens, model.tokenizer.stop,
                          temperature=args.temperature, top_p=args.top_p, seed=args.seed,
                          repetition_penalty=args.repetition_penalty):
        ids.append(token)
        text = model.tokenizer.decode(ids).lstrip()
        # a character may be spread over several tokens: wait for the last of them
        if stream and not text.endswith("\ufffd"):
            print(text[len(shown):], end="", flush=True)
            shown = text
    if originals:
        unmerge(model.base, originals)
    text = model.tokenizer.decode(ids)
    if stream:
        print(text.lstrip()[len(shown):])
    return text.strip()


def check_length(model, query, prompt):
    """UserError for a query that leaves no room for an answer, or is too long to be routed."""
    lengths = [("base", len(prompt), model.base)]
    if model.router:
        length = len(model.encoder_tokenizer.encode_query(query))
        lengths.append(("encoder", length, model.router.encoder))
    for what, length, llama in lengths:
        context = llama.config.max_position_embeddings
        if length >= context:
            raise UserError(f"the query {query[:40]!r}... has {length} tokens, the context of the "
                            f"{what} is {context}")


def answer_json(model, query, prompt, args):
    w = weights_for(model, query, args.setting, args.seed)
    weights = None
    if w is not None and w.shape[1] == len(TRAITS):
        weights = {}
        for trait, weight in zip(TRAITS, w[0].tolist()):
            weights[trait] = round(weight, 6)
    response = answer(model, prompt, w, args, stream=False)
    line = {"query": query, "weights": weights, "response": response}
    print(json.dumps(line, ensure_ascii=False), flush=True)


def answer_once(model, query, prompt, args):
    """The bars of the weights, then an answer for each setting of --compare and the main one."""
    w = weights_for(model, query, args.setting, args.seed)
    if w is not None and w.shape[1] == len(TRAITS):
        print_weights(w[0])
    for setting in args.compare:
        print("bare base:" if setting == "none" else f"{setting}:")
        other = weights_for(model, query, setting, args.seed)
        answer(model, prompt, other, args, stream=True)
        print()
    if args.compare:
        print(f"{args.traits or 'PersonaFuse'}:")
    answer(model, prompt, w, args, stream=True)


# ------------------------------------------------------------------------------------ conversation

def converse(model, args):
    """A conversation in the terminal. The router reads the last user turn; the base reads all."""
    print("/traits high openness=0.5, ...   weights by hand        /new    a new conversation\n"
          "/route learned (uniform, none)   the router's again     /quit   or Ctrl-D")
    setting = args.setting
    history = []
    while True:
        try:
            query = input("\nyou: ").strip()
        except EOFError:
            print()
            return
        command, _, rest = query.partition(" ")
        try:
            if command == "/quit":
                return
            elif command == "/new":
                history = []
            elif command in ("/traits", "/route"):
                setting = check_setting(command, rest.strip())
            elif query.startswith("/"):
                raise UserError(f"there is no {command}: /traits, /route, /new, /quit")
            elif query:
                response = answer_turn(model, query, history, setting, args)
                history.append((query, response))
        except UserError as error:                      # a slip of the hand ends no conversation
            print(f"error: {error}")


def check_setting(command, text):
    if command == "/traits":
        parse_traits(text)
    elif text not in ROUTES:
        raise UserError(f"no route {text!r}; there are {', '.join(ROUTES)}")
    return text


def answer_turn(model, query, history, setting, args):
    """One turn: the bars and the answer, with the turns so far in the prompt -> the answer."""
    context = model.base.config.max_position_embeddings
    prompt = model.tokenizer.encode_prompt(query, history)
    while history and len(prompt) + args.max_new_tokens > context:
        history.pop(0)                                  # the oldest turn makes room
        prompt = model.tokenizer.encode_prompt(query, history)
    check_length(model, query, prompt)
    w = weights_for(model, query, setting, args.seed)
    if w is not None and w.shape[1] == len(TRAITS):
        print_weights(w[0])
    return answer(model, prompt, w, args, stream=True)


# -------------------------------------------------------------------------------------------- main

def main():
    args = parse_arguments()
    queries = read_queries(args)
    model, base = load_model(args)
    prompts = [model.tokenizer.encode_prompt(query) for query in queries]
    for query, prompt in zip(queries, prompts):
        check_length(model, query, prompt)

    if args.export:
        query = queries[0] if queries else ""           # --traits asks no router
        w = weights_for(model, query, args.setting, args.seed)
        if w is None:
            raise UserError("--export merges experts: --route none has none")
        export_merged(model, w[0], find_model(base), args.export)
        print(f"wrote {args.export}: load it with transformers, vLLM, or any engine that reads "
              "Hugging Face checkpoints")
    elif not queries:
        converse(model, args)
    elif args.json:
        for query, prompt in zip(queries, prompts):
            answer_json(model, query, prompt, args)
    else:
        answer_once(model, queries[0], prompts[0], args)


if __name__ == "__main__":
    run_program(main)
