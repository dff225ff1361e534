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
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
from data import load_records, split  # noqa: E402
from personafuse import Config, Llama  # noqa: E402
from plumbing.files import UserError, atomic_write, read_json, run_program, write_json  # noqa: E402

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
    rounds = []
    for query, answer in zip(turns[::2], turns[1::2]):
        rounds.append(f"User: {query}\nAssistant: {answer}")
    return END.join(rounds)


def part_of(record):
    """The name in MIX that a line belongs to."""
    name = record["source"]
    if f"{name}, short" not in MIX:
        return name
    first_answer = record["turns"][1]
    length = "short" if len(first_answer) <= SHORT else "long"
    return f"{name}, {length}"


def read_texts(folder):
    """The lines of every file in the folder -> {part: its texts}."""
    parts = {}
    for path in sorted(Path(folder).glob("*.jsonl*")):
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as file:
            for line in file:
                record = json.loads(line)
                record.setdefault("source", path.name.split(".")[0])
                texts = parts.setdefault(part_of(record), [])
                texts.append(render(record))
    if not parts:
        raise UserError(f"{folder} holds no *.jsonl and no *.jsonl.gz")
    return parts


def plain_answers(path):
    """Queries and plain answers of the training split, as texts."""
    texts = []
    training, _ = split(load_records(path, answers=("naive_response",)))
    for record in training:
        turns = [record["query"], record["naive_response"]]
        texts.append(render({"turns": turns}))
    return texts


def make_tokenizer(parts, vocab_size):
    # at most 4,000 texts of each part, so that no large one rules the vocabulary
    sample = []
    for texts in parts.values():
        sample += [text.replace(END, "\n") for text in texts[:4000]]
    tokenizer = Tokenizer(models.BPE())
    # with a space before the first word, a word is one token wherever it stands
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False)
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def make_streams(parts, tokenizer):
    """{part: texts} -> {part: one array of tokens} twice: to train on, and held out."""
    training = {}
    held_out = {}
    for part, texts in parts.items():
        encoded = tokenizer.encode_batch([text + END for text in texts])
        ids = [np.array(text.ids, dtype=np.uint16) for text in encoded]
        stream = np.concatenate(ids)
        # the first 2% is held out: one window at least, 40 at most
        cut = min(len(stream) // 50, 40 * WINDOW)
        cut = max(cut, WINDOW + 1)
        held_out[part] = stream[:cut]
        # what is left is of use if it holds more than a window
        if len(stream) - cut > WINDOW + 1:
            training[part] = stream[cut:]
    return training, held_out


def cut_windows(stream, starts):
    """-> arrays of WINDOW tokens and the one that follows them."""
    return [stream[start:start + WINDOW + 1] for start in starts]


def stack(windows):
    """-> tokens (number of windows, WINDOW + 1)"""
    return torch.from_numpy(np.stack(windows).astype(np.int64))


def sample_windows(streams, column, rng):
    """ROWS random windows of random parts, drawn as the column of MIX says."""
    names = list(streams)
    sizes = [len(streams[name]) * MIX.get(name, OTHERS)[column] for name in names]
    chances = np.array(sizes) / sum(sizes)
    windows = []
    for i in rng.choice(len(names), ROWS, p=chances):
        stream = streams[names[i]]
        start = rng.integers(len(stream) - WINDOW - 1)
        windows += cut_windows(stream, [start])
    return stack(windows)


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
    matrices = []
    others = []
    for name, t in llama.named_parameters():
        is_matrix = t.dim() == 2 and name.startswith("layers.")
        if is_matrix:
            matrices.append(t)
        else:
            others.append(t)
    muon = torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.1)
    adamw = torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    return [muon, adamw]


def window_loss(llama, windows):
    hidden = llama(windows[:, :-1])                                     # (B, WINDOW, d)
    logits = llama.logits(hidden).flatten(0, 1)                         # (B·WINDOW, V)
    return F.cross_entropy(logits.float(), windows[:, 1:].flatten())


def print_held_out(llama, held_out):
    """The loss on at most eight windows of each part that was kept apart."""
    for part, stream in held_out.items():
        starts = range(0, len(stream) - WINDOW, WINDOW)
        windows = cut_windows(stream, starts[:8])
        if windows:
            with torch.no_grad():
                loss = window_loss(llama, stack(windows))
            print(f"held-out loss of {part:40} {loss.item():.3f}")


def save(folder, tokenizer, llama):
    tensors = {}
    for name, t in llama.named_parameters():
        tensors[f"model.{name}"] = t.detach().bfloat16()
    config = read_json(HERE / "config.json")
    write_json(folder / "config.json", config)
    with atomic_write(folder / "tokenizer.json") as tmp:
        tokenizer.save(str(tmp))
    with atomic_write(folder / "model.safetensors") as tmp:
        save_file(tensors, tmp, metadata={"format": "pt"})


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--texts", required=True, help="the folder with the texts")
    add("--data", default=ROOT / "persona_cot.jsonl", help="the plain answers (default: ours)")
    add("--out", type=Path, default=HERE, help="where the model goes (default: this folder)")
    add("--steps", type=int, default=4300)
    add("--minutes", type=float, help="in place of --steps: as many as fit")
    add("--compile", action="store_true", help="torch.compile: twice as fast, needs a C++ compiler")
    return parser.parse_args()


def main():
    args = parse_arguments()
    config = Config.from_folder(HERE)
    args.out.mkdir(parents=True, exist_ok=True)

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
    # fp32 weights; what is computed with them is bf16 where that is the faster of the two
    has_amx = torch.cpu._is_amx_tile_supported()
    dtype = torch.bfloat16 if has_amx else torch.float32
    llama = Llama(config, dtype=dtype)
    init_weights(llama)
    optimizers = make_optimizers(llama)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    loss_of = torch.compile(window_loss) if args.compile else window_loss

    begin = time.time()
    step = 0
    progress = 0.0                          # from 0 to 1
    average = None                          # of the loss, over some fifty steps
    while progress < 1:
        # a warm-up, then constant, then straight to 0
        factor = min(1, (step + 1) / 50, (1 - progress) / DECAY)
        for optimizer, peak in zip(optimizers, peaks):
            optimizer.param_groups[0]["lr"] = peak * factor

        in_tail = progress > 1 - TAIL
        windows = sample_windows(streams, int(in_tail), rng)
        loss = loss_of(llama, windows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

        value = loss.item()
        average = value if average is None else 0.98 * average + 0.02 * value
        step += 1
        minutes = (time.time() - begin) / 60
        progress = step / args.steps
        if args.minutes:
            progress = minutes / args.minutes
        if step % 50 == 0 or progress >= 1:
            millions = step * ROWS * WINDOW / 1e6
            print(f"step {step}, {millions:.2f} million tokens, {minutes:.1f} minutes, "
                  f"loss {average:.3f}", flush=True)
            save(args.out, tokenizer, llama)
    print_held_out(llama, held_out)


if __name__ == "__main__":
    run_program(main)
