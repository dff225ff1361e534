"""Ask a trained PersonaFuse: the router's weights as bars, then the answer as it is written.

    python sample.py "I feel anxious"                   the newest run under out/
    python sample.py                                    a conversation
    python sample.py "I feel anxious" --traits "high agreeableness=0.7, low neuroticism=0.3"
    python sample.py "I feel anxious" --compare "low agreeableness" --compare none
"""

import argparse
import sys
from pathlib import Path

from data import TRAITS, WORDS, ChatTokenizer, parse_traits
from lora import merge, unmerge
from personafuse import (PersonaFuse, base_sampling, generate, load_llama, load_run,
                         pick_device)
from plumbing.files import (UserError, check_text, number, read_json, run_program,
                            write_json)
from plumbing.models import find_model, model_table
from router import ROUTES

# where neither run nor base says it: what suits a small model that can speak
SAMPLING = {"temperature": 0.5, "top_p": 0.9, "repetition_penalty": 1.1}
# of each word, in a profile
MOST_REMARKS = 99


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, epilog=model_table(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("query", nargs="?", help="what the user says; without it a conversation begins")
    add("--run", help="a folder that train.py wrote (default: the newest under out/)")
    add("--base", help="where the run's base is now; with --route none no run is needed")
    add("--traits", metavar="WEIGHTS", help="weights by hand in place of the router: "
                                            '"high agreeableness=0.7, low neuroticism=0.3"')
    add("--route", default="learned", choices=ROUTES,
        help="how the experts are mixed (default: learned; none is the bare base)")
    add("--compare", action="append", nargs="?", const="none", default=[], metavar="WEIGHTS",
        help="before that another answer: of the bare base, or with these weights or this route; "
             "may be given again")
    add("--profile", metavar="FILE", help="keeps what a reader asked for by /more and /less")
    add("--max-new-tokens", type=number(int, 1), default=200)
    # what these are by default belongs to the base: a small one repeats itself, or goes astray
    add("--temperature", type=number(float, 0), help="0 takes the likeliest token (default, as of "
                                                     "the next two: the base's or the run's)")
    add("--top-p", type=number(float, 0, above=True, high=1), help="draw from the likeliest tokens "
                                                                   "that hold this probability")
    add("--repetition-penalty", type=number(float, 0, above=True),
        help="makes tokens that were there before less likely; 1 does not")
    add("--seed", type=number(int, 0, high=2**32 - 1), default=0)
    add("--device", default="auto")
    add("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    args = parser.parse_args()
    if args.query is None and not sys.stdin.isatty():
        parser.error("give a query")
    # one setting says how the experts are mixed: a route's name, or weights by hand
    args.setting = args.traits or args.route
    # complain before anything is loaded
    for setting in [args.setting, *args.compare]:
        check_setting(setting)
    if args.profile and args.setting != "learned":
        parser.error("--profile shifts the router's weights: it goes with no --traits or --route")
    args.remarks = load_profile(args.profile)
    if args.query is not None:
        args.query = check_query(args.query)
    return args


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


def load_profile(path):
    """A reader's remarks, from the JSON file {word: number} where there is one -> a number for each
    pole: how often they asked for more of it, less how often for less.
    """
    remarks = [0] * len(TRAITS)
    saved = read_json(path) if path else {}
    for word, count in saved.items():
        if word not in WORDS or type(count) is not int or abs(count) > MOST_REMARKS:
            raise UserError(f"{path}: {word!r}: {count!r} is no remark; it has whole numbers for "
                            f"{', '.join(WORDS)}")
        remarks[WORDS.index(word)] = count
    return remarks


def newest_run():
    runs = sorted(Path("out").glob("*/personafuse.json"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UserError("there is no run under out/ yet: train one with `python train.py`, or name "
                        "one with --run DIR (or ask the bare base: --route none --base tiny)")
    return runs[-1].parent


def load_model(args):
    """What --run and --base name -> the model; args gets the sampling that belongs to it."""
    device = pick_device(args.device, args.base)
    settings = dict(SAMPLING)
    if args.route == "none" and args.base and not args.run:
        folder = find_model(args.base)
        llama = load_llama(folder, device, args.dtype)
        tokenizer = ChatTokenizer(folder)
        tokenizer.check_against(llama.embed_tokens.weight)
        model = PersonaFuse(llama, tokenizer)
        settings |= base_sampling(folder)
    else:
        model, run = load_run(args.run or newest_run(), device, args.dtype, args.base)
        settings |= run
    if args.profile and model.experts == 1:
        raise UserError("--profile shifts the router's weights: a single LoRA has none")
    for name in SAMPLING:
        if getattr(args, name) is None:
            setattr(args, name, settings[name])
    if model.tokenizer.format_note:
        print(model.tokenizer.format_note, file=sys.stderr)
    return model


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
    originals = {}
    if w is not None:
        # w belongs to the query: merged in once, every token costs what the plain model's does
        originals = merge(model.base, w[0])
    ids = []
    shown = ""
    for token in generate(model.base, prompt, args.max_new_tokens, model.tokenizer.stop,
                          temperature=args.temperature, top_p=args.top_p, seed=args.seed,
                          repetition_penalty=args.repetition_penalty):
        ids.append(token)
        text = model.tokenizer.decode(ids).lstrip()
        # a character may be spread over several tokens: wait for the last of them
        if not text.endswith("\ufffd"):
            print(text[len(shown):], end="", flush=True)
            shown = text
    unmerge(model.base, originals)
    text = model.tokenizer.decode(ids).lstrip()
    print(text[len(shown):])
    return text.strip()


def answer_once(model, query, args):
    """The bars of the weights, then an answer for each setting of --compare and the main one."""
    prompt = model.encode_prompts([query], args.max_new_tokens)[0]
    w = model.mixing_weights([query], args.setting, seed=args.seed, remarks=args.remarks)
    print_weights(w)
    for setting in args.compare:
        print("bare base:" if setting == "none" else f"{setting}:")
        answer(model, prompt, model.mixing_weights([query], setting, seed=args.seed), args)
        print()
    if args.compare:
        print(f"{args.traits or 'PersonaFuse'}:")
    answer(model, prompt, w, args)


# ------------------------------------------------------------------------------------ conversation

def converse(model, args):
    """A conversation in the terminal. The router reads the last user turn; the base reads all."""
    print("/traits high openness=0.5, ...   weights by hand        /new    a new conversation\n"
          "/route learned (uniform, none)   the router's again     /quit   or Ctrl-D\n"
          "/more kind, /less blunt          from now on; also " + ", ".join(WORDS))
    setting = args.setting
    history = []
    while True:
        try:
            line = input("\nyou: ").strip()
        except EOFError:
            print()
            return
        command, _, rest = line.partition(" ")
        try:
            if command == "/quit":
                return
            elif command == "/new":
                history = []
            elif command in ("/traits", "/route"):
                setting = check_setting(rest.strip())
            elif command in ("/more", "/less"):
                if model.router is None or setting != "learned":
                    raise UserError("remarks shift the router's weights: /route learned first")
                remark(command, rest.strip(), args)
            elif line.startswith("/"):
                raise UserError(f"there is no {command}: /traits, /route, /more, /less, /new, "
                                "/quit")
            elif line:
                query = check_query(line)
                history.append((query, answer_turn(model, query, history, setting, args)))
        except UserError as error:                      # a slip of the hand ends no conversation
            print(f"error: {error}")


def remark(command, word, args):
    """"/more" or "/less" of one of WORDS: args.remarks change, and the profile if there is one."""
    if word not in WORDS:
        raise UserError(f"{command} what? One of {', '.join(WORDS)}")
    remarks = list(args.remarks)
    remarks[WORDS.index(word)] += 1 if command == "/more" else -1
    if max(map(abs, remarks)) > MOST_REMARKS:
        raise UserError(f"{command} {word}: {MOST_REMARKS} times is the most that a profile keeps")
    said = {word: count for word, count in zip(WORDS, remarks) if count}
    if args.profile:
        write_json(args.profile, said)
    # what could not be kept counts for nothing
    args.remarks = remarks
    print(", ".join(f"{word} {count:+}" for word, count in said.items()) or "as it was")


def answer_turn(model, query, history, setting, args):
    """One turn: the bars and the answer, with the turns so far in the prompt -> the answer."""
    context = model.base.config.max_position_embeddings
    prompt = model.tokenizer.encode_prompt(query, history)
    while history and len(prompt) + args.max_new_tokens > context:
        history.pop(0)                                  # the oldest turn makes room
        prompt = model.tokenizer.encode_prompt(query, history)
    if not history:
        prompt = model.encode_prompts([query], args.max_new_tokens)[0]
    w = model.mixing_weights([query], setting, seed=args.seed, remarks=args.remarks)
    print_weights(w)
    return answer(model, prompt, w, args)


# -------------------------------------------------------------------------------------------- main

def main():
    args = parse_arguments()
    model = load_model(args)
    if args.query is None:
        converse(model, args)
    else:
        answer_once(model, args.query, args)


if __name__ == "__main__":
    run_program(main)
