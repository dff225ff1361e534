"""Make the model that stands in this folder from nothing but its config.json and texts.

    python tiny/make.py --texts DIR --compile               an hour on two cores with AMX
    python tiny/make.py --texts DIR --minutes 5 --out /tmp/tiny         a taste of it

DIR holds *.jsonl or *.jsonl.gz; a line is an object with `turns` (user, assistant, user, ...) or
`text`, and its `source`. README.md beside this file says where the texts come from. With them go
the queries and plain answers of the training split of persona_cot.jsonl: never a held-out record,
a persona response or a trait label.
"""

import argparse
import gzip
import json
import math
import random
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
from data import load_records, split  # noqa: E402
from personafuse import Config, Llama, pick_device, pick_dtype  # noqa: E402
from plumbing import UserError, atomic_write, read_json, run_program, write_json  # noqa: E402

END = "<|endoftext|>"                       # token 0: closes an answer, and a text
WINDOW = 384                                # tokens the model sees at once in training
ROWS = 21                                   # windows in a batch
SHORT = 600                                 # characters of a short answer
PLAIN = "plain answers of persona_cot"

# A source is drawn by its size times its weight: in the main mix, and in the tail, which is the
# last 35% of training and nearly all answers. "short" and "long" say how long the answers are.
MIX = {
    "childrens_books_pd": (0.4, 0.05),
    "fairytaleqa_stories": (1.0, 0.1),
    "sgd": (0.15, 0.05),
    "star": (0.3, 0.05),
    "taskmaster": (0.5, 0.05),
    "topical_chat": (0.5, 1.0),
    "synthetic_persona_chat": (1.5, 1.0),
    "personality_chat_friendly_mit": (4.0, 4.0),
    "oasst_model_eval, short": (3.0, 3.0),
    "oasst_model_eval, long": (1.0, 0.5),
    "oasst_model_eval_more, short": (2.0, 1.0),
    "oasst_model_eval_more, long": (0.5, 0.05),
    "just_eval_outputs, short": (3.0, 3.0),
    "gpteacher_roleplay, short": (3.0, 3.0),
    "gpteacher_roleplay, long": (2.0, 1.0),
    "prometheus_eval, short": (2.0, 2.0),
    "counsel_chat, short": (4.0, 6.0),
    "counsel_chat, long": (2.0, 2.0),
    "medquad, short": (0.8, 0.5),
    "medquad, long": (0.4, 0.05),
    "openinstruct_selfinstruct_eval, short": (1.0, 2.0),
    PLAIN: (4.0, 10.0),
}
OTHERS = (1.0, 0.05)
TAIL = 0.35
DECAY = 0.4                                 # share of training over which the rate falls to 0


def render(record):
    """A line of the texts -> one string, every answer but the last closed by the end token."""
    if "text" in record:
        return record["text"].strip()
    turns = [turn.strip() for turn in record["turns"]]
    pairs = zip(turns[::2], turns[1::2])
    return END.join(f"User: {query}\nAssistant: {answer}" for query, answer in pairs)


def part_of(record):
    """The name in MIX that a line belongs to."""
    name = record["source"]
    if f"{name}, short" not in MIX:
        return name
    return f"{name}, short" if len(record["turns"][1]) <= SHORT else f"{name}, long"


def read_texts(folder):
    """The lines of every file in the folder -> {part: its texts, shuffled}."""
    parts = {}
    for path in sorted(Path(folder).glob("*.jsonl*")):
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as file:
            for line in file:
                record = {"source": path.name.split(".")[0], **json.loads(line)}
                parts.setdefault(part_of(record), []).append(render(record))
    if not parts:
        raise UserError(f"{folder} holds no *.jsonl and no *.jsonl.gz")
    return parts


def plain_answers(path):
    """Queries and plain answers of the training split, as texts."""
    records, _ = split(load_records(path, answers=("naive_response",)))
    return [render({"turns": [record["query"], record["naive_response"]]}) for record in records]


def make_tokenizer(parts, vocab_size):
    """BPE on at most 4,000 texts of each part, so that no large source rules the vocabulary."""
    sample = [text.replace(END, "\n") for texts in parts.values() for text in texts[:4000]]
    tokenizer = Tokenizer(models.BPE())
    # with a space before the first word, a word is one token wherever it stands
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def make_streams(parts, tokenizer):
    """{part: texts} -> {part: one array of tokens} twice: to train on, and held out (the first 2%,
    at most 40 windows)."""
    training = {}
    held_out = {}
    for part, texts in parts.items():
        encoded = tokenizer.encode_batch([text + END for text in texts])
        stream = np.concatenate([np.array(one.ids, dtype=np.uint16) for one in encoded])
        cut = max(WINDOW + 1, min(len(stream) // 50, 40 * WINDOW))
        held_out[part] = stream[:cut]
        # what would not hold a window is left out
        if len(stream) - cut > WINDOW + 1:
            training[part] = stream[cut:]
    return training, held_out


def sample_windows(streams, column, rng):
    """Random windows of random parts -> tokens (ROWS, WINDOW + 1)."""
    names = list(streams)
    sizes = np.array([len(streams[name]) * MIX.get(name, OTHERS)[column] for name in names])
    rows = []
    for i in rng.choice(len(names), ROWS, p=sizes / sizes.sum()):
        stream = streams[names[i]]
        start = rng.integers(len(stream) - WINDOW - 1)
        rows.append(stream[start:start + WINDOW + 1])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def init_weights(llama):
    """Normal with deviation 0.02, less for the layers that write to the residual stream."""
    for name, t in llama.named_parameters():
        deviation = 0.02
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            deviation /= math.sqrt(2 * llama.config.num_hidden_layers)
        if t.dim() == 1:
            torch.nn.init.ones_(t)          # norms
        else:
            torch.nn.init.normal_(t, std=deviation)


def make_optimizers(llama):
    """Muon for the matrices of the blocks, AdamW for embedding and norms."""
    matrices = [t for t in llama.layers.parameters() if t.dim() == 2]
    others = [t for t in llama.layers.parameters() if t.dim() == 1]
    others += [llama.embed_tokens.weight, llama.norm.weight]
    return [torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.1),
            torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)]


def save(folder, tokenizer, llama):
    tensors = {f"model.{name}": t.detach().bfloat16() for name, t in llama.named_parameters()}
    write_json(folder / "config.json", read_json(HERE / "config.json", ""))
    with atomic_write(folder / "tokenizer.json") as tmp:
        tokenizer.save(str(tmp))
    with atomic_write(folder / "model.safetensors") as tmp:
        save_file(tensors, tmp, metadata={"format": "pt"})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--texts", required=True, help="the folder with the texts")
    add("--data", default=HERE.parent / "persona_cot.jsonl", help="the plain answers (default: ours)")
    add("--out", type=Path, default=HERE, help="where the model goes (default: this folder)")
    add("--steps", type=int, default=4300)
    add("--minutes", type=float, help="in place of --steps: as many as fit")
    add("--compile", action="store_true", help="torch.compile: twice as fast, needs a C++ compiler")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    config = Config.from_folder(HERE)

    parts = read_texts(args.texts)
    parts[PLAIN] = plain_answers(args.data)
    for texts in parts.values():
        random.Random(0).shuffle(texts)
    tokenizer = make_tokenizer(parts, config.vocab_size)
    streams, held_out = make_streams(parts, tokenizer)
    for part, stream in streams.items():
        print(f"{part:40} {len(parts[part]):6} texts {len(stream):8} tokens")

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    # fp32 weights; what is computed with them is bf16 where the hardware has it
    llama = Llama(config, dtype=pick_dtype("auto", pick_device("cpu")))
    init_weights(llama)
    optimizers = make_optimizers(llama)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]

    def window_loss(windows):
        logits = llama.logits(llama(windows[:, :-1]))                   # (ROWS, WINDOW, V)
        return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())

    training_loss = torch.compile(window_loss) if args.compile else window_loss
    start = time.time()
    step = 0
    progress = 0.0                          # from 0 to 1
    while progress < 1:
        # a warm-up, then constant, then straight to 0
        factor = min(1, (step + 1) / 50) * min(1, (1 - progress) / DECAY)
        for optimizer, peak in zip(optimizers, peaks):
            optimizer.param_groups[0]["lr"] = peak * factor
        loss = training_loss(sample_windows(streams, int(progress > 1 - TAIL), rng))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

        smooth = loss.item() if step == 0 else 0.98 * smooth + 0.02 * loss.item()
        step += 1
        minutes = (time.time() - start) / 60
        progress = minutes / args.minutes if args.minutes else step / args.steps
        if step % 50 == 0 or progress >= 1:
            millions = step * ROWS * WINDOW / 1e6
            print(f"step {step}, {millions:.2f} million tokens, {minutes:.1f} minutes, "
                  f"loss {smooth:.3f}", flush=True)
            save(args.out, tokenizer, llama)

    for part, stream in held_out.items():
        count = min(8, (len(stream) - 1) // WINDOW)
        rows = [stream[i * WINDOW:(i + 1) * WINDOW + 1] for i in range(count)]
        if rows:
            with torch.no_grad():
                value = window_loss(torch.from_numpy(np.stack(rows).astype(np.int64)))
            print(f"held-out loss of {part:40} {value:.3f}")


if __name__ == "__main__":
    run_program(main)
