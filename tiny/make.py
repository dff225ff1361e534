"""Make the tiny model that stands in this folder: a byte-level BPE tokenizer and a small Llama, both from scratch.

    python tiny/make.py                # two minutes on two idle CPU cores
    python tiny/make.py --epochs 2     # to step through

They learn from the queries and the naive answers of the training split of persona_cot.jsonl: never from a held-out
record, a persona response or a trait label. The English is poor, but the folder loads like any other checkpoint.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from data import Chat, draw, load_records, replacing, run_program, split, write_json
from personafuse import Config, Llama, pad

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 4096, "hidden_size": 192,
          "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32,
          "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 1024,
          "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0, "torch_dtype": "bfloat16"}


def make_tokenizer(texts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)         # a word is one token wherever it stands
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"], special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    with replacing(HERE / "tokenizer.json") as tmp:
        tokenizer.save(str(tmp))


def init_weights(llama, generator):
    """Normal with deviation 0.02, less for the two layers that write to the residual stream; norms start at 1."""
    for name, t in llama.named_parameters():
        if t.dim() == 1:
            torch.nn.init.ones_(t)
        else:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            t.data.normal_(0, 0.02 / math.sqrt(2 * CONFIG["num_hidden_layers"]) if residual else 0.02, generator=generator)


def loss(llama, rows, drop=0.0, rng=None):
    """Mean cross-entropy of every token after the first, query and answer alike; `drop` hides that share of the input."""
    tokens, lengths = pad(rows, "cpu")
    real = torch.arange(tokens.shape[1] - 1) < lengths[:, None] - 1                         # (B, T - 1)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    if drop:            # token dropout: a hidden token reads as the end token, so the model leans on no single word
        inputs = inputs.masked_fill(torch.from_numpy(rng.random(inputs.shape) < drop), 0)
    return F.cross_entropy(llama.logits(llama(inputs)[real]), targets[real])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak of a cosine, after a warm-up over a twentieth of the steps")
    parser.add_argument("--weight-decay", type=float, default=0.3)
    parser.add_argument("--drop", type=float, default=0.2, help="share of input tokens hidden in training")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    records, _ = split(load_records(HERE.parent / "persona_cot.jsonl", answers=("naive_response",)))
    write_json(HERE / "config.json", CONFIG)
    make_tokenizer([r[key] for r in records for key in ("query", "naive_response")])
    chat = Chat(HERE)
    rows = [chat.prompt(r["query"]) + chat.answer(r["naive_response"]) for r in records]
    train, valid = rows[len(rows) // 12:], rows[:len(rows) // 12]          # validation: a part of the training split
    print(f"{len(train)} texts to train on, {len(valid)} to validate, {sum(map(len, train))} tokens")

    llama = Llama(Config.from_folder(HERE))
    init_weights(llama, torch.Generator().manual_seed(args.seed))
    print(f"{sum(t.numel() for t in llama.parameters()):,} parameters")
    decay = [t for t in llama.parameters() if t.dim() > 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": args.weight_decay},
                                   {"params": [t for t in llama.parameters() if t.dim() == 1], "weight_decay": 0.0}],
                                  lr=args.lr, betas=(0.9, 0.95))
    per_epoch, best, begin = math.ceil(len(train) / args.batch_size), math.inf, time.time()
    steps = args.epochs * per_epoch
    for step in range(steps):
        progress = step / steps
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(20 * progress + 1 / steps, 0.5 + 0.5 * math.cos(math.pi * progress))
        batch = [train[i] for i in draw(len(train), args.batch_size, step, args.seed)]
        value = loss(llama, batch, args.drop, np.random.default_rng([args.seed, step]))
        value.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % per_epoch == 0:
            with torch.no_grad():
                held = loss(llama, valid).item()
            print(f"epoch {(step + 1) // per_epoch}, train {value.item():.3f}, validation {held:.3f}, {time.time() - begin:.0f} s", flush=True)
            if held < best:                                                 # early stopping: keep the best on validation
                best = held
                with replacing(HERE / "model.safetensors") as tmp:
                    tensors = {f"model.{name}": t.detach().bfloat16() for name, t in llama.named_parameters()}
                    save_file(tensors, tmp, metadata={"format": "pt"})
    print(f"kept the weights of validation loss {best:.3f}")


if __name__ == "__main__":
    run_program(main)
