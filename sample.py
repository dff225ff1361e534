"""Ask a trained PersonaFuse: the router's weights as bars, then the answer as it is written.

    python sample.py "I feel anxious"                                     the newest run under out/
    python sample.py "I feel anxious" --traits "high agreeableness=0.7, low neuroticism=0.3"
    python sample.py "I feel anxious" --compare                           the bare base, then PersonaFuse
    python sample.py --file queries.txt --json                            one line of JSON for each line of the file
"""

import argparse
import json
from pathlib import Path

import torch

from data import TRAITS, UserError, parse_traits, read_lines, run_program
from lora import merge, unmerge
from personafuse import Chat, PersonaFuse, find_model, generate, load_llama, load_run, model_table, pick_device, pick_dtype


def newest_run():
    runs = sorted(Path("out").glob("*/personafuse.json"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise UserError("there is no run under out/ yet: train one with `python train.py`, or name one with --run DIR "
                        "(or ask the bare base: --route none --base tiny)")
    return runs[-1].parent


def mixing_weights(model, queries, s):
    """What --traits or --route says -> w (len(queries), E), or None for the bare base."""
    if s.route == "none" or s.traits is None:
        return model.mixing_weights(queries, s.route, seed=s.seed)
    if model.experts != len(TRAITS):
        raise UserError("this run has a single LoRA: --traits needs the ten experts of --variant personafuse")
    return torch.tensor([parse_traits(s.traits)] * len(queries), device=model.device)


def check_length(queries, tokens, context, what):
    for query, ids in zip(queries, tokens):
        if len(ids) >= context:
            raise UserError(f"the query {query[:40]!r}... has {len(ids)} tokens, the context of the {what} is {context}")


def print_weights(w):
    for i in w.argsort(descending=True).tolist():
        print(f"  {TRAITS[i]:22} {w[i]:.3f} {'█' * round(40 * w[i].item())}")
    print()


def answer(model, prompts, w, s, stream):
    """Prompts (token ids) -> answers (strings); with `stream`, also printed as they come, the only one or none."""
    originals = merge(model.base, w[0]) if w is not None and len(prompts) == 1 else None    # one w: cost of the plain model
    ids, shown = [[] for _ in prompts], ""
    for i, token in generate(model.base, prompts, s.max_new_tokens, model.chat.stop, None if originals else w,
                             s.temperature, s.top_p, s.seed):
        if token is not None:
            ids[i].append(token)
        if stream:
            text = model.chat.decode(ids[i]).lstrip()
            if token is None or not text.endswith("\ufffd"):            # a character may be spread over several tokens
                print(text[len(shown):], end="", flush=True)
                shown = text
    if stream:
        print()
    if originals:
        unmerge(model.base, originals)
    return [model.chat.decode(one).strip() for one in ids]


def main():
    parser = argparse.ArgumentParser(description=__doc__, epilog=model_table(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("query", nargs="?", help="what the user says")
    add("--file", help="a text file with one query a line, routed and answered in batches; goes with --json")
    add("--run", help="a folder that train.py wrote (default: the newest under out/)")
    add("--base", help="refuse a run made for another base; with --route none no run is needed")
    add("--traits", help='weights by hand in place of the router: "high agreeableness=0.7, low neuroticism=0.3"')
    add("--route", default="learned", choices=["learned", "uniform", "none", "random1", "random2", "random5"],
        help="how the experts are mixed (default: learned; none is the bare base)")
    add("--compare", action="store_true", help="answer with the bare base too")
    add("--json", action="store_true", help="print one JSON object: query, weights, response")
    add("--max-new-tokens", type=int, default=200)
    add("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest tokens that hold this probability (default: 1)")
    add("--seed", type=int, default=0)
    add("--device", default="auto")
    add("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    s = parser.parse_args()
    if (s.query is None) == (s.file is None):
        parser.error("give a query, or --file with one query a line")
    if s.file and not s.json:
        parser.error("--file goes with --json")
    if s.temperature < 0 or not 0 < s.top_p <= 1 or s.max_new_tokens < 1:
        parser.error("--temperature is at least 0, --top-p is in (0, 1], --max-new-tokens is at least 1")
    queries = [s.query.strip()] if s.query is not None else [line.strip() for _, line in read_lines(s.file)]
    if not queries or not all(queries):
        raise UserError("the query is empty" if s.query is not None else f"{s.file} holds no queries")
    if s.traits is not None:
        parse_traits(s.traits)                                          # complain before anything is loaded

    device = pick_device(s.device)
    dtype = pick_dtype(s.dtype, device)
    if s.route == "none" and s.base and not s.run:
        folder = find_model(s.base)
        model = PersonaFuse(load_llama(folder, device, dtype), Chat(folder), None, None)
    else:
        model, settings = load_run(s.run or newest_run(), device, dtype, s.base)
    prompts = [model.chat.prompt(q) for q in queries]
    check_length(queries, prompts, model.base.config.max_position_embeddings, "base")
    if model.router:
        check_length(queries, [model.encoder_chat.query(q) for q in queries],
                     model.router.encoder.config.max_position_embeddings, "encoder")
    w = mixing_weights(model, queries, s)

    if s.json:
        for k, response in enumerate(answer(model, prompts, w, s, stream=False)):
            weights = None if w is None or w.shape[1] == 1 else dict(zip(TRAITS, (round(x, 6) for x in w[k].tolist())))
            print(json.dumps({"query": queries[k], "weights": weights, "response": response}, ensure_ascii=False))
        return
    if w is not None and w.shape[1] == len(TRAITS):
        print_weights(w[0])
    if s.compare:
        print("bare base:")
        answer(model, prompts, None, s, stream=True)
        print("\nPersonaFuse:")
    answer(model, prompts, w, s, stream=True)


if __name__ == "__main__":
    run_program(main)
