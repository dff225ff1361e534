"""How fast, beside the libraries: every figure is a ratio of medians, the sides timed in turn.

    python -m experiments.bench                         training step and decoding
    python -m experiments.bench --dtype bf16 --device cuda

All of the shape of SmolLM2-135M, with random weights. Needs what tests/requirements.txt names.
"""

import argparse
import statistics
import tempfile
import time

import numpy as np
import peft
import torch
import torch.nn.functional as F
import transformers

from data import TRAITS, Example
from lora import TARGETS, lora_layers, merge
from personafuse import DTYPES, PersonaFuse, generate, load_llama, pick_device
from plumbing.files import keep_freed_memory, number, run_program
from train import response_loss

SMOLLM2_135M = transformers.LlamaConfig(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, vocab_size=49152, rope_theta=100000, max_position_embeddings=8192,
    tie_word_embeddings=True)


def in_turn(rounds, *functions):
    """Run the functions in turn, once to warm up, then `rounds` times -> median seconds of each."""
    times = [[] for _ in functions]
    for _ in range(rounds + 1):
        for function, own in zip(functions, times):
            began = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            own.append(time.perf_counter() - began)
    return [statistics.median(own[1:]) for own in times]


# ----------------------------------------------------------------------------------- training step

def our_step(folder, args, experts, ids):
    """A step of stage 1 on ids (B, T + 1), as train.py computes it, less the optimizer's part."""
    base = load_llama(folder, args.device, args.dtype, experts)
    trained = [t for _, layer in lora_layers(base) for t in (layer.A, layer.B)]
    for t in trained:
        t.requires_grad_(True)
    model = PersonaFuse(base, tokenizer=None)
    examples = [Example(row[:1], row[1:], [], ()) for row in ids]
    w = torch.full((len(ids), experts), 1 / experts, device=args.device)

    def step():
        response_loss(model, examples, w, [1 / ids.size] * len(ids), args).backward()
        for t in trained:
            t.grad = None

    return step


def peft_step(folder, args, ids):
    """The same by transformers and peft with ten active adapters."""
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=args.dtype)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)
    names = [name.replace(" ", "_") for name in TRAITS]
    model = peft.get_peft_model(base.to(args.device), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.base_model.set_adapter(names)
    tokens = torch.tensor(ids, device=args.device)

    def step():
        logits = model(tokens[:, :-1], use_cache=False).logits
        F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()).backward()
        model.zero_grad()

    return step


def training_step(folder, args):
    keep_freed_memory()                     # as train.py does, here for all three sides
    # a GPU needs more rows, or the time is that of launching kernels
    rows, length = (16, 512) if args.device.type == "cuda" else (4, 256)
    ids = np.random.default_rng(0).integers(49152, size=(rows, length + 1))
    ten, one, theirs = in_turn(
        args.rounds,
        our_step(folder, args, 10, ids),
        our_step(folder, args, 1, ids),
        peft_step(folder, args, ids),
    )
    print(f"training step, {rows} x {length} tokens: ten experts {ten:.3f} s; {ten / one:.2f} of "
          f"one LoRA; {ten / theirs:.2f} of peft with ten active adapters")


# ---------------------------------------------------------------------------------------- decoding

def decoding(folder, args, new=64):
    ours = load_llama(folder, args.device, args.dtype, 10)
    merge(ours, torch.full((10,), 0.1, device=args.device))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=args.dtype)
    theirs.to(args.device)
    prompt = torch.randint(3, 49152, (1, 32), device=args.device)
    ours_takes, theirs_takes = in_turn(
        args.rounds,
        lambda: list(generate(ours, prompt[0].tolist(), new, stop=())),
        lambda: theirs.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False),
    )
    print(f"decoding with merged experts: {new / ours_takes:.1f} tokens a second, "
          f"{theirs_takes / ours_takes:.2f} times transformers")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=number(int, 1), default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.set_defaults(checkpointing=False)
    args = parser.parse_args()
    args.device = pick_device(args.device)
    args.dtype = DTYPES[args.dtype]
    with tempfile.TemporaryDirectory() as folder:
        transformers.AutoModelForCausalLM.from_config(SMOLLM2_135M).save_pretrained(folder)
        training_step(folder, args)
        decoding(folder, args)


if __name__ == "__main__":
    run_program(main)
