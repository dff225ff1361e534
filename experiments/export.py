"""A checkpoint for other programs: the base with the experts merged in, at the weights of one query
or at weights by hand.

    python -m experiments.export "I feel anxious" DIR                  the newest run under out/
    python -m experiments.export "I feel anxious" DIR --run out/tiny
    python -m experiments.export --traits "high agreeableness=0.7, low neuroticism=0.3" DIR

DIR is a new folder in the Hugging Face layout: transformers, vLLM and llama.cpp's converter read
it. Its chat template, the base's own where there is one, writes the prompt that the experts were
trained on, and its configs name every token that ends an answer.
"""

import argparse
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError

from lora import merge
from personafuse import load_run
from plumbing.files import UserError, read_json, read_text, run_program, write_json
from sample import check_query, newest_run

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
# what comes along from the base's folder as it is, where it is there
COPIED = ["tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
          "merges.txt", "chat_template.jinja"]
# a run's chat format for others; PARTS are the texts between what user and assistant say
TEMPLATE = """\
{%- set first, tail, before, later, end = PARTS %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- first if loop.first else later }}{{ message.content | trim }}{{ tail }}
    {%- elif message.role == 'assistant' %}
        {{- before }}{{ message.content | trim }}{{ end if loop.last }}
    {%- else %}
        {{- raise_exception('this format knows the roles user and assistant alone') }}
    {%- endif %}
{%- endfor %}"""


def export(model, w, folder, out):
    """Write the base of `folder` with its experts merged in at w (E,) into the new folder `out`,
    which is there when it is whole, or not at all.
    """
    merge(model.base, w)
    tensors = {}
    for name, t in model.base.named_parameters():
        if not name.endswith((".A", ".B")):
            tensors[name if name.startswith("lm_head") else f"model.{name}"] = t
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=out.parent) as tmp:
            whole = Path(tmp, "whole")
            whole.mkdir()
            save_torch_state_dict(tensors, whole)       # shards of 5 GB, and their index
            for name in COPIED:
                if (folder / name).exists():
                    shutil.copyfile(folder / name, whole / name)
            write_configs(model.base, folder, whole, model.tokenizer)
            write_tokenizer(folder, whole, model.tokenizer)
            for path in whole.glob("*.safetensors"):
                # they were saved for their owner alone
                shutil.copymode(whole / "config.json", path)
            whole.rename(out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {out}: {error}")


def write_configs(base, folder, out, tokenizer):
    """config.json and generation_config.json: the base's, with what is different now."""
    config = read_json(folder / "config.json")
    # every token that ends an answer, the one that was trained first
    ends = [tokenizer.end, *sorted(tokenizer.stop - {tokenizer.end})]
    eos = {"eos_token_id": ends if len(ends) > 1 else ends[0]}
    dtype = str(base.dtype).removeprefix("torch.")
    write_json(out / "config.json", config | eos | {
        "architectures": [ARCHITECTURES[config["model_type"]]],
        "tie_word_embeddings": base.config.tie_word_embeddings,
        "torch_dtype": dtype,
        "dtype": dtype,                                 # the newer name of the same
    })
    write_json(out / "generation_config.json", read_json(folder / "generation_config.json") | eos)


def write_tokenizer(folder, out, tokenizer):
    """tokenizer_config.json: the base's, with a template of ours where it brings none that the
    experts were trained on.
    """
    # without one transformers would build a tokenizer of its own for the family
    settings = read_json(folder / "tokenizer_config.json") or {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.tokenizer.id_to_token(tokenizer.end),
        "clean_up_tokenization_spaces": False,
    }
    own = out / "chat_template.jinja"
    template = read_text(own) if own.exists() else str(settings.get("chat_template"))
    # one that tells the date writes another prompt every day
    if tokenizer.source != "own" or "strftime_now" in template:
        own.unlink(missing_ok=True)
        settings["chat_template"] = chat_template(tokenizer)
    write_json(out / "tokenizer_config.json", settings)


def chat_template(tokenizer):
    """The format that a ChatTokenizer writes, as a jinja template.

    transformers' apply_chat_template makes the ids of our encode_prompt from it.
    """
    def text(parts):
        """A format's parts as text again: its control tokens by their names."""
        return "".join(tokenizer.tokenizer.id_to_token(part) if isinstance(part, int) else part
                       for part in parts)

    first, tail = text(tokenizer.first).split("{query}")
    before, later = text(tokenizer.later).split("{answer}")
    later = later.split("{query}")[0]
    end = text([tokenizer.answer.split("{answer}")[1], tokenizer.end])
    # JSON is read by jinja too, if it leaves letters as they are
    parts = json.dumps([first, tail, before, later, end], ensure_ascii=False)
    return TEMPLATE.replace("PARTS", parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("query", nargs="?", default="", help="its weights are merged; not needed with --traits")
    add("out", metavar="DIR", help="a new folder")
    add("--run", metavar="RUN", help="a folder that train.py wrote (default: the newest)")
    add("--base", help="where the run's base is now")
    add("--traits", metavar="WEIGHTS", help='by hand: "high agreeableness=0.7, ..."')
    add("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    # options may stand between the query and DIR
    args = parser.parse_intermixed_args()
    query = args.query if args.traits else check_query(args.query)
    out = Path(args.out)
    if out.exists():
        raise UserError(f"{out} exists already: name a new folder")
    # merging is one pass over the weights: the CPU does
    device = torch.device("cpu")
    model, settings = load_run(args.run or newest_run(), device, args.dtype, args.base)
    w = model.mixing_weights([query], args.traits or "learned")
    export(model, w[0], Path(settings["base_folder"]), out)
    print(f"wrote {out}: load it with transformers, vLLM, or any engine that reads Hugging Face "
          "checkpoints")


if __name__ == "__main__":
    run_program(main)
