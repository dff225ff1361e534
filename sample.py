"""Ask a trained PersonaFuse: the router's weights as bars, then the answer as it is written.

    python sample.py "I feel anxious"                   the newest run under out/
    python sample.py                                    a conversation
    python sample.py "I feel anxious" --traits "high agreeableness=0.7, low neuroticism=0.3"
    python sample.py "I feel anxious" --compare "low agreeableness" --compare none
"""

import argparse
import os
import sys
from pathlib import Path

from data import TRAITS, WORDS, ChatTokenizer, parse_traits
from lora import merge, unmerge
from personafuse import (DTYPES, PersonaFuse, base_sampling, generate, load_llama, load_run,
                         pick_device)
from plumbing.files import UserError, check_text, number, read_json, run_program, write_json
from plumbing.models import find_model, model_table
from router import ROUTES

# where neither run nor base says it: what suits a small model that can speak
SAMPLING = {"temperature": 0.5, "top_p": 0.9, "repetition_penalty": 1.1}
# whose answer it is, above the answers of --compare; of others the setting says it
TITLES = {"none": "bare base", "learned": "PersonaFuse"}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, epilog=model_table(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("query", nargs="?", type=check_query,
        help="what the user says; without it a conversation begins")
    add("--run", help="a folder that train.py wrote (default: the newest under out/)")
    add("--base", help="where the run's base is now; with --route none no run is needed")
    add("--traits", type=check_setting,
        help='weights by hand, not by the router: "high agreeableness=0.7, low neuroticism=0.3"')
    add("--route", default="learned", choices=ROUTES,
        help="how the experts are mixed (default: learned; none is the bare base)")
    add("--compare", action="append", nargs="?", const="none", default=[], metavar="WEIGHTS",
        type=check_setting,
        help="before that another answer: of the bare base, or with these weights or this route; "
             "may be given again")
    add("--profile", help="a file that keeps what a reader asked for by /more and /less")
    add_answering(parser, max_new_tokens=200)
    args = parser.parse_args()
    if args.query is None and not sys.stdin.isatty():
        parser.error("give a query")
    # one setting says how the experts are mixed: a route's name, or weights by hand
    args.setting = args.traits or args.route
    if args.profile and args.setting != "learned":
        parser.error("--profile shifts the router's weights: it goes with no --traits or --route")
    saved = read_json(args.profile) if args.profile else {}
    args.remarks = check_remarks(args.profile, saved)
    return args


def add_answering(parser, max_new_tokens):
    """Options that say how answers are drawn, how long they may be, and what computes them."""
    add = parser.add_argument
    add("--max-new-tokens", type=number(int, 1), default=max_new_tokens)
    # what these are by default belongs to the base: a small one repeats itself, or goes astray
    add("--temperature", type=number(float, 0),
        help="0 takes the likeliest token (default, as of the next two: the base's or the run's)")
    add("--top-p", type=number(float, 0, above=True, high=1),
        help="draw from the likeliest tokens that hold this probability")
    add("--repetition-penalty", type=number(float, 0, above=True),
        help="makes tokens that were there before less likely; 1 does not")
    add("--seed", type=number(int, 0, high=2**32 - 1), default=0)
    add("--device", default="auto")
    add("--dtype", choices=["auto", *DTYPES], default="auto")


def check_setting(setting):
    if setting not in ROUTES:
        parse_traits(setting)
    return setting


def check_query(query):
    """The query without the blanks around it, as in training; UserError where it is no text."""
    try:
        query = check_text(query).strip()
    except ValueError as error:
        raise UserError(f"the query cannot be read: {error}")
    if not query:
        raise UserError("the query is empty")
    return query


def check_remarks(where, remarks):
    """A reader's remarks {word: number}: how often they asked for more of a pole, less how often
    for less; UserError, with `where` they come from, for what is none.
    """
    for word, count in remarks.items():
        if word not in WORDS or type(count) is not int or abs(count) > 99:
            raise UserError(f"{where}: {word!r} ({count!r}) is no remark: the words are "
                            f"{', '.join(WORDS)}, the numbers whole and up to 99")
    return remarks


def newest_run():
    newest = max(Path("out").glob("*/personafuse.json"), key=os.path.getmtime, default=None)
    if not newest:
        raise UserError("there is no run under out/ yet: train one with `python train.py`, or name "
                        "one with --run DIR (or ask the bare base: --route none --base tiny)")
    return newest.parent


def load_model(args):
    """What --run and --base name -> the model; args gets the sampling that belongs to it."""
    device = pick_device(args.device, args.base)
    if args.route == "none" and args.base and not args.run:
        folder = find_model(args.base)
        llama = load_llama(folder, device, args.dtype)
        tokenizer = ChatTokenizer(folder, llama.embed_tokens.weight)
        model = PersonaFuse(llama, tokenizer)
        settings = base_sampling(folder)
    else:
        model, settings = load_run(args.run or newest_run(), device, args.dtype, args.base)
    if args.profile and model.experts == 1:
        raise UserError("--profile shifts the router's weights: a single LoRA has none")
    vars(args).update(sampling(settings, args))
    print(model.tokenizer.format_note, file=sys.stderr)
    return model


def sampling(settings, args):
    """How answers are drawn: as the options say, else as suits the run or the base, else SAMPLING.
    """
    options = {"seed": args.seed}
    for name, default in SAMPLING.items():
        given = getattr(args, name)
        options[name] = settings.get(name, default) if given is None else given
    return options


# ---------------------------------------------------------------------------------------- answering

def print_weights(w):
    """The weights w (1, E) as bars, the largest first; a bar of four is the tenth that each of ten
    equal ones would have. Nothing for the bare base and for one LoRA.
    """
    if w is None or w.shape[1] != len(TRAITS):
        return
    for i in w[0].argsort(descending=True).tolist():
        if w[0, i] > 0:
            print(f"  {TRAITS[i]:22} {w[0, i]:.3f} {'█' * round(40 * w[0, i].item())}")
    print()


def answer(model, prompt, w, args):
    """Print the answer to a prompt (token ids) as it is written, at weights w (1, E), or None for
    the bare base -> its text.
    """
    # w belongs to the query: merged in once, every token costs what the plain model's does
    originals = {} if w is None else merge(model.base, w[0])
    ids = []
    text = shown = ""
    try:
        for token in generate(model.base, prompt, args.max_new_tokens, model.tokenizer.stop,
                              temperature=args.temperature, top_p=args.top_p, seed=args.seed,
                              repetition_penalty=args.repetition_penalty):
            ids.append(token)
            text = model.tokenizer.decode(ids).lstrip()
            # a character may be spread over several tokens: wait for the last of them
            if not text.endswith("\ufffd"):
                print(text[len(shown):], end="", flush=True)
                shown = text
    finally:
        unmerge(model.base, originals)
    print(text[len(shown):])
    return text.strip()


def answer_turn(model, query, history, args):
    """One turn: the bars of the weights, then an answer for each setting of --compare and the main
    one, which is returned. history, (query, answer) pairs, loses its oldest turns where it must.
    """
    context = model.base.config.max_position_embeddings
    prompt = model.tokenizer.encode_prompt(query, history)
    while history and len(prompt) + args.max_new_tokens > context:
        history.pop(0)                                  # the oldest turn makes room
        prompt = model.tokenizer.encode_prompt(query, history)
    if not history:
        prompt = model.encode_prompts([query], args.max_new_tokens)[0]
    remarks = [args.remarks.get(word, 0) for word in WORDS]
    w = model.mixing_weights([query], args.setting, args.seed, remarks)
    print_weights(w)
    for setting in args.compare:
        print(f"{TITLES.get(setting, setting)}:")
        answer(model, prompt, model.mixing_weights([query], setting, args.seed), args)
        print()
    if args.compare:
        print(f"{TITLES.get(args.setting, args.setting)}:")
    return answer(model, prompt, w, args)


# ------------------------------------------------------------------------------------ conversation

def converse(model, args):
    """A conversation in the terminal. The router reads the last user turn; the base reads all."""
    print("/traits high openness=0.5, ...   weights by hand        /new    a new conversation\n"
          "/route learned (uniform, none)   the router's again     /quit   or Ctrl-D\n"
          "/more kind, /less blunt          from now on; also " + ", ".join(WORDS))
    history = []
    while True:
        try:
            line = input("\nyou: ").strip()
            command, _, rest = line.partition(" ")
            if command == "/quit":
                return
            elif command == "/new":
                history = []
            elif command in ("/traits", "/route"):
                args.setting = check_setting(rest.strip())
            elif command in ("/more", "/less"):
                if model.router is None or args.setting != "learned":
                    raise UserError("remarks shift the router's weights: /route learned first")
                remark(command, rest.strip(), args)
            elif line.startswith("/"):
                raise UserError(f"there is no {command}: /traits, /route, /more, /less, /new, "
                                "/quit")
            elif line:
                query = check_query(line)
                history.append((query, answer_turn(model, query, history, args)))
        except EOFError:
            print()
            return
        except UserError as error:                      # a slip of the hand ends no conversation
            print(f"error: {error}")


def remark(command, word, args):
    """"/more" or "/less" of one of WORDS: args.remarks change, and the profile if there is one."""
    count = args.remarks.get(word, 0) + (1 if command == "/more" else -1)
    remarks = check_remarks(command, args.remarks | {word: count})
    # one taken back is none
    remarks = {word: count for word, count in remarks.items() if count}
    if args.profile:
        write_json(args.profile, remarks)
    # what could not be kept counts for nothing
    args.remarks = remarks
    print(", ".join(f"{word} {count:+}" for word, count in remarks.items()) or "as it was")


# -------------------------------------------------------------------------------------------- main

def main():
    args = parse_arguments()
    model = load_model(args)
    if args.query:
        answer_turn(model, args.query, [], args)
    else:
        converse(model, args)


if __name__ == "__main__":
    run_program(main)
