"""A checkpoint for other programs: the base with the experts merged in, at the weights of one query
or at weights by hand.

    python -m experiments.export "I feel anxious" DIR                  the newest run under out/
    python -m experiments.export "I feel anxious" DIR --run out/tiny
    python -m experiments.export --traits "high agreeableness=0.7, low neuroticism=0.3" DIR
    python -m experiments.export --route uniform DIR

DIR is a new folder in the Hugging Face layout: transformers, vLLM and llama.cpp's converter read
it. Its chat template writes the prompt that the experts were trained on, and its configs name every
token that ends an answer.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from lora import merge, unmerge
from personafuse import OVERFLOW, load_run
from plumbing.files import UserError, read_json, run_program, write_json
from router import ROUTES
from sample import check_query, check_setting, newest_run

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
# what comes along from the base's folder as it is, where it is there
COPIED = ["tokenizer.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
          "vocab.json", "merges.txt", "LICENSE"]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("query", nargs="?", help="its weights are merged; not needed with --traits")
    add("out", metavar="DIR", help="a new folder")
    add("--run", metavar="RUN", help="a folder that train.py wrote (default: the newest)")
    add("--base", help="where the run's base is now")
    add("--traits", metavar="WEIGHTS", help='by hand: "high agreeableness=0.7, ..."')
    add("--route", default="learned", choices=[route for route in ROUTES if route != "none"])
    add("--seed", type=int, default=0, help="of the random routes")
    add("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    # options may stand between the query and DIR
    args = parser.parse_intermixed_args()
    args.setting = check_setting(args.traits or args.route)
    if args.setting == "learned":
        if args.query is None:
            parser.error("give a query, whose weights are merged, or --traits")
        args.query = check_query(args.query)
    return args


# --------------------------------------------------------------------------------- what is written

def merged_tensors(base, w):
    """The base's tensors by their names in a checkpoint, the experts merged in at w (E,)."""
    originals = merge(base, w)
    tensors = {}
    for name, t in base.named_parameters():
        if not name.endswith((".A", ".B")):
            tensors[name if name.startswith("lm_head") else f"model.{name}"] = t.detach()
    unmerge(base, originals)                            # `tensors` still holds the merged ones
    if not all(t.isfinite().all() for t in tensors.values()):
        raise UserError(OVERFLOW)
    return tensors


def end_tokens(tokenizer):
    """What ends an answer, as configs have it: an id or, where several do, a list, ours first."""
    ids = [tokenizer.end, *sorted(tokenizer.stop - {tokenizer.end})]
    return ids if len(ids) > 1 else ids[0]


def write_configs(base, folder, out, tokenizer):
    """config.json, generation_config.json and tokenizer_config.json: the base's, with all in them
    that is different now.
    """
    config = read_json(folder / "config.json", f"{folder} has no config.json")
    config["architectures"] = [ARCHITECTURES[config["model_type"]]]
    config["tie_word_embeddings"] = base.config.tie_word_embeddings
    config["torch_dtype"] = str(base.dtype).removeprefix("torch.")
    config.pop("dtype", None)                           # the newer name of the same
    config["eos_token_id"] = end_tokens(tokenizer)
    write_json(out / "config.json", config)

    path = folder / "generation_config.json"
    generation = read_json(path, "") if path.exists() else {}
    write_json(out / path.name, generation | {"eos_token_id": end_tokens(tokenizer)})

    path = folder / "tokenizer_config.json"
    if path.exists():
        settings = read_json(path, "")
    else:
        # without one transformers would build a tokenizer of its own for the family
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": tokenizer.tokenizer.id_to_token(tokenizer.end),
            "model_max_length": base.config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        }
    settings.pop("chat_template", None)                 # it has a file of its own
    write_json(out / path.name, settings)


# -------------------------------------------------------------------------------- the chat template

def base_template(folder):
    """The chat template of a model's folder, from either place that one may have, or None."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    path = folder / "tokenizer_config.json"
    template = read_json(path, "").get("chat_template") if path.exists() else None
    # a few have several, by name
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def our_template(tokenizer):
    """The chat format in use as a Jinja template: as encode_prompt, answer by answer."""
    def text(parts):
        shown = [tokenizer.tokenizer.id_to_token(part) if isinstance(part, int) else part
                 for part in parts]
        return "".join(shown)

    first, after = text([*tokenizer.prefix, *tokenizer.first_turn]).split("{query}")
    later, _ = text(tokenizer.later_turn).split("{query}")
    # a JSON string is a Jinja string too
    first, later, after, space, end = (
        json.dumps(part, ensure_ascii=False)
        for part in (first, later, after, tokenizer.space, text([tokenizer.end])))
    return (
        "{%- for message in messages %}"
        "{%- if message['role'] == 'user' %}"
        f"{{{{- ({first} if loop.first else {later}) + message['content'] | trim + {after} }}}}"
        "{%- elif message['role'] == 'assistant' %}"
        f"{{{{- {space} + message['content'] | trim + {end} }}}}"
        "{%- else %}"
        "{{- raise_exception('the experts were trained on turns of user and assistant alone') }}"
        "{%- endif %}"
        "{%- endfor %}"
    )


def template_prompt(template, folder, query, settings):
    """The prompt that a template makes of a query, as transformers has it -> token ids."""
    def refuse(message):
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = refuse
    tokens = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = settings.get(name)
        tokens[name] = token["content"] if isinstance(token, dict) else token
    text = environment.from_string(template).render(
        messages=[{"role": "user", "content": query}], add_generation_prompt=True, **tokens)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return tokenizer.encode(text, add_special_tokens=False).ids


def write_template(folder, out, tokenizer):
    """The base's chat template where it writes the prompt that the experts were trained on, for it
    can do more (system messages, tools); else ours.
    """
    template = base_template(folder)
    settings = read_json(out / "tokenizer_config.json", "")
    query = "A question,\nin two lines?"
    ours = tokenizer.encode_prompt(query)
    try:
        same = template and template_prompt(template, out, query, settings) == ours
    except TemplateError:
        same = False
    if not same:
        if template:
            print("the base's chat template writes another prompt than the one in training: "
                  "replaced by ours")
        template = our_template(tokenizer)
    (out / "chat_template.jinja").write_text(template, encoding="utf-8")


# ------------------------------------------------------------------------------------- the checkpoint

def check_written(out, tensors):
    """UserError unless each tensor is in the files under its name, in its shape.

    Opening a file compares its length with its header's, so none is cut short.
    """
    written = {}
    for path in out.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                written[name] = file.get_slice(name).get_shape()
    for name, t in tensors.items():
        if written.get(name) != list(t.shape):
            raise UserError(f"{out}: {name} is {written.get(name)}, not {list(t.shape)}")


def export(model, w, folder, out):
    """Write the base of `folder` with its experts merged at w (E,) into the new folder `out`,
    which is there when it is whole, or not at all.
    """
    tensors = merged_tensors(model.base, w)
    tmp = Path(f"{out}.tmp")
    try:
        tmp.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write {tmp}: {error.strerror}")
    try:
        save_torch_state_dict(tensors, tmp)             # shards of 5 GB, and their index
        for name in COPIED:
            if (folder / name).exists():
                shutil.copyfile(folder / name, tmp / name)
        write_configs(model.base, folder, tmp, model.tokenizer)
        write_template(folder, tmp, model.tokenizer)
        check_written(tmp, tensors)
        tmp.rename(out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {out}: {getattr(error, 'strerror', None) or error}")
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def main():
    args = parse_arguments()
    out = Path(args.out)
    if out.exists():
        raise UserError(f"{out} exists already: name a new folder")
    # merging is one pass over the weights: the CPU does
    device = torch.device("cpu")
    model, settings = load_run(args.run or newest_run(), device, args.dtype, args.base)
    w = model.mixing_weights([args.query or ""], args.setting, seed=args.seed)
    export(model, w[0], Path(settings["base_folder"]), out)
    print(f"wrote {out}: load it with transformers, vLLM, or any engine that reads Hugging Face "
          "checkpoints")


if __name__ == "__main__":
    run_program(main)
