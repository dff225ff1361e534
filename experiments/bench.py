"""How fast, beside the libraries: medians of seconds, the sides timed in turn.

    python -m experiments.bench                         training step and decoding
    python -m experiments.bench --dtype bf16 --device cuda

All of the shape of SmolLM2-135M, with random weights. Needs what tests/requirements.txt names.
"""

import argparse
import statistics
import tempfile
import time

import torch

from data import Example
from lora import TARGETS, merge
from personafuse import DTYPES, PersonaFuse, generate, load_llama, pick_device
from plumbing.files import UserError, keep_freed_memory, number, run_program
from train import response_loss

try:
    import peft
    import transformers
except ImportError:
    peft = transformers = None


def compare(what, rounds, sides):
    """Run the sides {name: function} in turn, once to warm up, then `rounds` times; print the
    median seconds of each, and the first side's divided by them.
    """
    times = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, function in sides.items():
            began = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - began)
    print(what)
    first = None
    for name, own in times.items():
        median = statistics.median(own[1:])
        first = first or median
        print(f"  {name:30} {median:8.3f} s   {first / median:.2f}")


def load_theirs(folder, args):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=args.dtype)
    return model.to(args.device)


# ----------------------------------------------------------------------------------- training step

def our_step(folder, args, experts, ids):
    """A step of stage 1 on ids (B, T + 1), as train.py computes it, less the optimizer's part."""
    base = load_llama(folder, args.device, args.dtype, experts)
    for name, t in base.named_parameters():
        t.requires_grad_(name.endswith((".A", ".B")))
    model = PersonaFuse(base, tokenizer=None)
    examples = [Example(row[:1], row[1:], [], ()) for row in ids.numpy()]
    w = torch.ones(len(ids), experts, device=args.device)

    def step():
        response_loss(model, examples, w, [1.0] * len(ids), args).backward()
        model.zero_grad()

    return step


def peft_step(folder, args, ids):
    """The same by transformers and peft with ten active adapters."""
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)
    model = peft.get_peft_model(load_theirs(folder, args), config)
    others = list("123456789")
    for name in others:
        model.add_adapter(name, config)
    model.base_model.set_adapter(["default", *others])
    # as many positions as ours reads
    ids = ids[:, 1:].to(args.device)

    def step():
        model(ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()

    return step


# -------------------------------------------------------------------------------------------- main

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=number(int, 1), default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.set_defaults(checkpointing=False)
    args = parser.parse_args()
    if transformers is None:
        raise UserError("this compares with transformers and peft: "
                        "`pip install -r tests/requirements.txt`")
    args.device = pick_device(args.device)
    args.dtype = DTYPES[args.dtype]
    keep_freed_memory()                     # as train.py does, here for all sides
    with tempfile.TemporaryDirectory() as folder:
        config = transformers.LlamaConfig(
            hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        # a GPU needs more rows, or the time is that of launching kernels
        rows, length = (16, 512) if args.device.type == "cuda" else (4, 256)
        ids = torch.randint(49152, (rows, length + 1))
        compare(f"training step, {rows} x {length} tokens", args.rounds, {
            "ten experts": our_step(folder, args, 10, ids),
            "one LoRA": our_step(folder, args, 1, ids),
            "peft, ten active adapters": peft_step(folder, args, ids),
        })
        ours = load_llama(folder, args.device, args.dtype, 10)
        merge(ours, torch.ones(10, device=args.device))
        theirs = load_theirs(folder, args)
        prompt = ids[:1, :32].to(args.device)
        fixed = dict(max_new_tokens=64, min_new_tokens=64, do_sample=False)
        compare("decoding 64 tokens", args.rounds, {
            "transformers": lambda: theirs.generate(prompt, **fixed),
            "ours, experts merged": lambda: list(generate(ours, prompt[0].tolist(), 64, stop=())),
        })


if __name__ == "__main__":
    run_program(main)
