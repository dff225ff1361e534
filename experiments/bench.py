"""How fast, beside the libraries: every figure is a ratio of medians, the sides timed in turn.

    python -m experiments.bench                         training step and decoding
    python -m experiments.bench --dtype bf16 --device cuda
    python -m experiments.bench --memory                what a training step adds to the memory

All of the shape of SmolLM2-135M, with random weights. Needs what tests/requirements.txt names.
"""

import argparse
import json
import re
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import peft
import torch
import torch.nn.functional as F
import transformers

from data import TRAITS, Example
from lora import TARGETS, lora_layers, merge
from personafuse import DTYPES, PersonaFuse, generate, load_llama, pick_device
from plumbing.files import UserError, keep_freed_memory, run_program
from train import response_loss

SMOLLM2_135M = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "rms_norm_eps": 1e-5,
    "rope_theta": 100000, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}


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


# --------------------------------------------------------------------------------------- both sides

def our_step(folder, args, experts, rows, length):
    """A step of stage 1 as train.py computes it, without the optimizer -> a function."""
    base = load_llama(folder, args.device, args.dtype, experts)
    for _, layer in lora_layers(base):
        layer.A.requires_grad_(True)
        layer.B.requires_grad_(True)
    model = PersonaFuse(base, tokenizer=None)
    ids = np.random.default_rng(0).integers(49152, size=(rows, length + 1))
    examples = [Example(row[:1], row[1:], [], ()) for row in ids]
    w = torch.full((rows, experts), 1 / experts, device=args.device)

    def step():
        response_loss(model, examples, w, [1 / ids.size] * rows, args).backward()
        for _, layer in lora_layers(base):
            layer.A.grad = layer.B.grad = None

    return step


def peft_step(folder, args, rows, length):
    """The same by transformers and peft with ten active adapters -> a function."""
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=args.dtype)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)
    names = [name.replace(" ", "_") for name in TRAITS]
    model = peft.get_peft_model(base.to(args.device), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.base_model.set_adapter(names)
    tokens = torch.randint(49152, (rows, length + 1), device=args.device)

    def step():
        logits = model(tokens[:, :-1], use_cache=False).logits
        F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()).backward()
        model.zero_grad()

    return step


def training_step(folder, args):
    keep_freed_memory()                     # as train.py does, here for all three sides
    # a GPU needs more rows, or the time is that of launching kernels
    size = (16, 512) if args.device.type == "cuda" else (4, 256)
    ten, one, theirs = in_turn(
        args.rounds,
        our_step(folder, args, 10, *size),
        our_step(folder, args, 1, *size),
        peft_step(folder, args, *size),
    )
    print(f"training step, {size[0]} x {size[1]} tokens: ten experts {ten:.3f} s; {ten / one:.2f} "
          f"of one LoRA; {ten / theirs:.2f} of peft with ten active adapters")


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


def peak_memory():
    """Bytes that this program ever held, on Linux."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def memory(folder, args, rows=8, length=256):
    before = peak_memory()
    step = our_step(folder, args, 10, rows, length)
    step()
    step()
    print(f"{rows} x {length} tokens: {(peak_memory() - before) / 2**30:.2f} GiB")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--memory", action="store_true")
    add("--checkpointing", action="store_true", help="recompute activations in backward")
    add("--rounds", type=int, default=5)
    add("--device", default="cpu")
    add("--dtype", default="fp32", choices=DTYPES)
    args = parser.parse_args()
    args.device = pick_device(args.device)
    args.dtype = DTYPES[args.dtype]
    if args.memory and args.device.type != "cpu":
        raise UserError("--memory measures the CPU's")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SMOLLM2_135M), encoding="utf-8")
        config = transformers.AutoConfig.from_pretrained(folder)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        if args.memory:
            return memory(folder, args)
        training_step(folder, args)
        decoding(folder, args)


if __name__ == "__main__":
    run_program(main)
