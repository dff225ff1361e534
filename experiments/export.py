"""A checkpoint for other programs: the base with the experts merged in, at the weights of one query
or at weights by hand.

    python -m experiments.export "I feel anxious" DIR                  the newest run under out/
    python -m experiments.export "I feel anxious" DIR --run out/tiny
    python -m experiments.export --traits "high agreeableness=0.7, low neuroticism=0.3" DIR

DIR is a new folder in the Hugging Face layout: transformers, vLLM and llama.cpp's converter read
it. Its chat template writes the prompt that the experts were trained on, and its configs name every
token that ends an answer.
"""

import argparse
import shutil
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError

from data import parse_traits
from experiments.chat_template import chat_template
from lora import merge, unmerge
from personafuse import OVERFLOW, load_run
from plumbing.files import UserError, read_json, run_program, write_json
from sample import check_query, newest_run

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
# what comes along from the base's folder as it is, where it is there
COPIED = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
          "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("query", nargs="?", help="its weights are merged; not needed with --traits")
    add("out", metavar="DIR", help="a new folder")
    add("--run", metavar="RUN", help="a folder that train.py wrote (default: the newest)")
    add("--base", help="where the run's base is now")
    add("--traits", metavar="WEIGHTS", help='by hand: "high agreeableness=0.7, ..."')
    add("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    # options may stand between the query and DIR
    args = parser.parse_intermixed_args()
    if args.traits:
        parse_traits(args.traits)                       # complain before anything is loaded
    elif args.query is None:
        parser.error("give a query, whose weights are merged, or --traits")
    else:
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


def write_configs(base, folder, out, tokenizer):
    """config.json, generation_config.json and tokenizer_config.json: the base's, with all in them
    that is different now.
    """
    config = read_json(folder / "config.json", f"{folder} has no config.json")
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

    path = folder / "generation_config.json"
    generation = read_json(path)
    write_json(out / "generation_config.json", generation | eos)

    path = out / "tokenizer_config.json"
    if not path.exists():
        # without one transformers would build a tokenizer of its own for the family
        write_json(path, {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": tokenizer.tokenizer.id_to_token(tokenizer.end),
            "model_max_length": base.config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        })


def write_template(out, tokenizer):
    """Leave the base's own chat template where the experts were trained on the prompts that it
    writes; else write ours in its place.
    """
    # one that tells the date writes another prompt every day
    if tokenizer.source == "own" and not tells_date(out):
        return
    settings = read_json(out / "tokenizer_config.json")
    settings.pop("chat_template", None)
    write_json(out / "tokenizer_config.json", settings)
    (out / "chat_template.jinja").write_text(chat_template(tokenizer), encoding="utf-8")


def tells_date(out):
    paths = [out / name for name in ("chat_template.jinja", "tokenizer_config.json")]
    return any("strftime_now" in path.read_text(encoding="utf-8-sig")
               for path in paths if path.exists())


# ---------------------------------------------------------------------------------- the checkpoint

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
        write_template(tmp, model.tokenizer)
        for path in tmp.glob("*.safetensors"):
            # they were saved for their owner alone
            shutil.copymode(tmp / "config.json", path)
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
    w = model.mixing_weights([args.query or ""], args.traits or "learned")
    export(model, w[0], Path(settings["base_folder"]), out)
    print(f"wrote {out}: load it with transformers, vLLM, or any engine that reads Hugging Face "
          "checkpoints")


if __name__ == "__main__":
    run_program(main)
