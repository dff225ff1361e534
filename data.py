"""Persona-CoT records, the split, prompts in each model's own chat format, and batches.

A record is (q, r, p): a query, the response that fits its situation, and the trait activation vector p in {0,1}^10.
"""

import hashlib
import json
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

# The ten poles, in the order of p, of the experts and of their embeddings (footnote 3 of the paper).
TRAITS = [f"{pole} {trait}" for trait in ("openness", "conscientiousness", "extraversion", "agreeableness", "neuroticism")
          for pole in ("high", "low")]


class UserError(Exception):
    """Something the user can mend. Programs print it as one line and exit with code 2."""


def run_program(main):
    """Run a program's main(): what the user can mend ends in one line, our own bugs in a traceback."""
    try:
        main()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:                         # the reader of our output has gone, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


@contextmanager
def replacing(path):
    """`with replacing(path) as tmp`: write to tmp, which takes path's place only when it is whole and on disk."""
    tmp = Path(f"{path}.tmp")
    try:
        yield tmp
        with open(tmp, "rb") as file:
            os.fsync(file.fileno())
        os.replace(tmp, path)
    except (OSError, SafetensorError) as e:
        tmp.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {getattr(e, 'strerror', None) or e}; what stood there before is untouched")


def write_json(path, value):
    with replacing(path) as tmp:
        tmp.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


# ----------------------------------------------------------------------------------------------------------- records

def activation(traits):
    """Trait names -> p, a tuple of ten zeros and ones. ValueError names an unknown trait or a contradiction."""
    p = [0] * len(TRAITS)
    for trait in traits:
        name = str(trait).lower().strip()
        if name not in TRAITS:
            raise ValueError(f"unknown trait {trait!r}")
        p[TRAITS.index(name)] = 1
    for i in range(0, len(p), 2):
        if p[i] and p[i + 1]:
            raise ValueError(f"both poles of one trait: {TRAITS[i]} and {TRAITS[i + 1]}")
    if not any(p):
        raise ValueError("no trait")
    return tuple(p)


def check_record(record, answers=("response",)):
    """Return the record with its p, the union of social and task traits; ValueError says what is wrong with it."""
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    for key in ("query", "social_traits", "task_traits", *answers):
        if key not in record:
            how = {"naive_response": "--naive", "human_like_response": "--human-like"}.get(key)
            raise ValueError(f"missing key {key!r}" + (f" (`python data.py generate {how}` makes it)" if how else ""))
        if key.endswith("traits"):
            if not isinstance(record[key], list):
                raise ValueError(f"{key} is not a list")
        elif not isinstance(record[key], str) or not record[key].strip():
            raise ValueError(f"empty {key}")
    return {**record, "p": activation(record["social_traits"] + record["task_traits"])}


def read_lines(path):
    """(line number, text) of the non-empty lines of a UTF-8 file."""
    try:
        with open(path, encoding="utf-8") as file:
            return [(n, line) for n, line in enumerate(file, 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}")


def load_records(path, answers=("response",)):
    """All records of a JSONL file, each checked; UserError names file, line and reason. Other keys ride along."""
    records = []
    for n, line in read_lines(path):
        try:
            records.append(check_record(json.loads(line), answers))
        except ValueError as e:                                     # JSON errors are ValueErrors too
            raise UserError(f"{path}, line {n}: {e}")
    if not records:
        raise UserError(f"{path} holds no records")
    return records


def held_out(query):
    """Whether a query belongs to the held-out tenth: decided by its own hash, so it never moves to the other side."""
    return int(hashlib.sha256(query.encode()).hexdigest(), 16) % 10 == 0


def split(records):
    """records -> (training records, held-out records), about 9 to 1."""
    return [r for r in records if not held_out(r["query"])], [r for r in records if held_out(r["query"])]


def parse_traits(text):
    """"high agreeableness=0.7, low neuroticism=0.3" -> weights by hand, a list of ten numbers in [0, 1]."""
    w = [0.0] * len(TRAITS)
    for part in text.split(","):
        name, _, value = part.partition("=")
        name = name.strip().lower().replace("_", " ")
        if name not in TRAITS:
            raise UserError(f"unknown trait {name!r}; the ten are: {', '.join(TRAITS)}")
        try:
            w[TRAITS.index(name)] = float(value) if value else 1.0
        except ValueError:
            raise UserError(f"the weight of {name!r} is not a number: {value.strip()!r}")
        if not 0 <= w[TRAITS.index(name)] <= 1:
            raise UserError(f"the weight of {name!r} is {value.strip()}, out of the range 0 to 1")
    return w


# ----------------------------------------------------------------------------------------------------------- prompts

# (a special token that tells the family, what stands before the query, what stands after it, the end of an answer)
FORMATS = [
    ("<|start_header_id|>",                                                                             # Llama 3.1
     "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
     "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
     "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    ("<|object_ref_start|>",                                                                            # Qwen2.5
     "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
     "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    ("<|im_start|>",                                                                                    # SmolLM2
     "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n<|im_start|>user\n",
     "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    (">>QUESTION<<", "<|user|>\n", "\n<|assistant|>\n", "<|endoftext|>"),                               # Falcon3
    (None, "User: ", "\nAssistant:", None),                                     # no chat tokens: plain text, then eos
]
TAG = re.compile(r"(<\|\w+\|>)")


class Chat:
    """A model folder's tokenizer.json and its chat format: text to token ids and back."""

    def __init__(self, folder):
        from tokenizers import Tokenizer
        path = Path(folder) / "tokenizer.json"
        if not path.exists():
            raise UserError(f"{folder} has no tokenizer.json")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as e:                                      # tokenizers raises bare Exception
            raise UserError(f"cannot read {path}: {e}")
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True                 # what a user types is text, never control
        self.prefix = self.tokenizer.encode("").ids                 # BOS, where the tokenizer adds one by itself
        _, self.before, self.after, end = next(f for f in FORMATS if f[0] is None or self.tokenizer.token_to_id(f[0]) is not None)
        eos = []                                                    # an id, a list of ids, or nothing
        for name in ("config.json", "generation_config.json"):
            if (Path(folder) / name).exists():
                ids = json.loads((Path(folder) / name).read_text()).get("eos_token_id")
                eos += ids if isinstance(ids, list) else [] if ids is None else [ids]
        end = self.tokenizer.token_to_id(end) if end else None
        if end is None and not eos:
            raise UserError(f"{folder}: neither config.json nor the tokenizer names an end token")
        self.end = eos[0] if end is None else end                   # closes an answer in training
        self.stop = {self.end, *eos}                                # ends an answer in generation

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def query(self, query):
        """The bare query, as the router's encoder reads it -> token ids."""
        return self.prefix + self.encode(query)

    def prompt(self, query):
        """The query in the model's chat format, up to where the answer starts -> token ids."""
        before, after = TAG.split(self.before), TAG.split(self.after)
        parts = before[:-1] + [before[-1] + query + after[0]] + after[1:]       # tags stand at the odd places
        ids, text = list(self.prefix), ""
        for k, part in enumerate(parts):
            tag = self.tokenizer.token_to_id(part) if k % 2 else None
            if tag is None:
                text += part
            else:
                ids, text = ids + self.encode(text) + [tag], ""
        return ids + self.encode(text)

    def answer(self, response):
        """A response and its end token -> token ids. In the plain format a space parts it from the prompt."""
        return self.encode(" " + response if self.after.endswith(":") else response) + [self.end]


# ----------------------------------------------------------------------------------------------------------- batches

def tokenize(records, chat, encoder_chat, max_length, answer="response"):
    """Records -> examples: dicts with `prompt` and `answer` ids for the base, `query` ids for the encoder, and p.

    An answer is cut so that prompt and answer hold max_length tokens; a prompt that leaves it no room is dropped.
    """
    examples = []
    for r in records:
        prompt = chat.prompt(r["query"])
        if len(prompt) < max_length:
            examples.append({"prompt": prompt, "answer": chat.answer(r[answer])[:max_length - len(prompt)],
                             "query": encoder_chat.query(r["query"])[:max_length] if encoder_chat else [], "p": r["p"]})
    return examples


def draw(n, count, step, *key):
    """The `count` members of range(n) that belong to this step, walking through fresh shuffles of all n.

    A function of its arguments alone (key: seed, stage, ...), so a run can be resumed at any step.
    """
    chosen = []
    while len(chosen) < count:
        epoch, start = divmod(step * count + len(chosen), n)
        order = np.random.default_rng([*key, epoch]).permutation(n)
        chosen += order[start:start + count - len(chosen)].tolist()
    return chosen
