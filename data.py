"""What the method learns from: traits, records and their check, the split, each model's chat format,
and the batches of the three stages. No torch here.

A record is (q, r, p): a query, the response that fits its situation, and the trait activation
vector p in {0,1}^10. Persona-CoT (section 4.2) makes them: experiments/persona_cot.py.
"""

import hashlib
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from plumbing.files import UserError, read_json, read_lines

# The ten poles, in the order of p, of the experts and of their embeddings (footnote 3).
TRAITS = [
    "high openness", "low openness",
    "high conscientiousness", "low conscientiousness",
    "high extraversion", "low extraversion",
    "high agreeableness", "low agreeableness",
    "high neuroticism", "low neuroticism",
]


# what is trained -> the key of the answer that it is trained on; all but the first are baselines
# (section 6.1)
VARIANTS = {"personafuse": "response", "direct": "naive_response",
            "human-like": "human_like_response", "cot-finetuned": "response"}


# ----------------------------------------------------------------------------------------- records

def activation(traits):
    """Trait names -> p, a tuple of ten zeros and ones.

    ValueError names an unknown trait or a contradiction.
    """
    p = [0] * len(TRAITS)
    for trait in traits:
        name = str(trait).lower().strip()
        if name not in TRAITS:
            raise ValueError(f"unknown trait {trait!r}")
        p[TRAITS.index(name)] = 1
    for high in range(0, len(p), 2):
        if p[high] and p[high + 1]:
            raise ValueError(f"both poles of one trait: {TRAITS[high]} and {TRAITS[high + 1]}")
    if not any(p):
        raise ValueError("no trait")
    return tuple(p)


# keys that only the baselines of section 6.1 need -> the option that makes them
MADE_BY = {"naive_response": "--naive", "human_like_response": "--human-like"}


def check_record(record, answers=("response",)):
    """The record with its p, the union of its traits; ValueError says what is wrong with it."""
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    for key in ("query", "social_traits", "task_traits", *answers):
        if key not in record:
            hint = ""
            if key in MADE_BY:
                command = f"python -m experiments.generate generate {MADE_BY[key]}"
                hint = f" (`{command}` makes it)"
            raise ValueError(f"missing key {key!r}{hint}")
        value = record[key]
        if key.endswith("traits"):
            if not isinstance(value, list):
                raise ValueError(f"{key} is not a list")
        elif not isinstance(value, str) or not value.strip():
            raise ValueError(f"empty {key}")
    return {**record, "p": activation(record["social_traits"] + record["task_traits"])}


def load_records(path, answers=("response",)):
    """All records of a JSONL file, each checked; UserError names file, line and reason."""
    records = []
    for number, line in read_lines(path):
        try:
            records.append(check_record(json.loads(line), answers))
        except ValueError as error:                     # JSON errors are ValueErrors too
            raise UserError(f"{path}, line {number}: {error}")
    if not records:
        raise UserError(f"{path} holds no records")
    return records


def by_hash(record):
    """A number that a record's query decides alone, whatever else the file holds."""
    return int(hashlib.sha256(record["query"].encode()).hexdigest(), 16)


def held_out(query):
    """Whether a query belongs to the held-out tenth: it never moves to the other side."""
    return by_hash({"query": query}) % 10 == 0


def split(records):
    """records -> (training records, held-out records), about 9 to 1."""
    training = [record for record in records if not held_out(record["query"])]
    held = [record for record in records if held_out(record["query"])]
    return training, held


def parse_traits(text):
    """"high agreeableness=0.7, low neuroticism=0.3" -> w by hand, ten numbers in [0, 1]."""
    w = [0.0] * len(TRAITS)
    for part in text.split(","):
        name, _, value = part.partition("=")
        name = name.strip().lower().replace("_", " ")
        if name not in TRAITS:
            raise UserError(f"unknown trait {name!r}; the ten are: {', '.join(TRAITS)}")
        try:
            weight = float(value) if value else 1.0
        except ValueError:
            raise UserError(f"the weight of {name!r} is not a number: {value.strip()!r}")
        if not 0 <= weight <= 1:
            raise UserError(f"the weight of {name!r} is {value.strip()}, out of the range 0 to 1")
        w[TRAITS.index(name)] = weight
    return w


# ------------------------------------------------------------------------------------ chat formats

class ChatFormat(NamedTuple):
    mark: str | None            # a special token that tells the family
    system: str                 # stands before the first turn
    turn: str                   # a turn up to where the answer starts
    end: str | None             # the end of an answer; None: the model's own end token
    between: str = ""           # stands between an answer and the next turn


FORMATS = [
    ChatFormat(                                                                         # Llama 3.1
        "<|start_header_id|>",
        "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\n{query}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>"),
    ChatFormat(                                                                         # Qwen2.5
        "<|object_ref_start|>",
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        "<|im_end|>\n",
        "<|im_start|>user\n{query}<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>", "\n"),
    ChatFormat(                                                                         # SmolLM2
        "<|im_start|>",
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n",
        "<|im_start|>user\n{query}<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>", "\n"),
    ChatFormat(                                                                         # Falcon3
        ">>QUESTION<<", "", "<|user|>\n{query}\n<|assistant|>\n", "<|endoftext|>", "\n"),
    ChatFormat(None, "", "User: {query}\nAssistant:", None),            # no chat tokens: plain text
]
TAG = re.compile(r"(<\|\w+\|>)")


class ChatTokenizer:
    """A model folder's tokenizer.json and its chat format: text to token ids and back."""

    def __init__(self, folder):
        from tokenizers import Tokenizer
        path = Path(folder) / "tokenizer.json"
        if not path.exists():
            raise UserError(f"{folder} has no tokenizer.json")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:                      # tokenizers raises bare Exception
            raise UserError(f"cannot read {path}: {error}")
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        # what a user types is text, never control
        self.tokenizer.encode_special_tokens = True
        # BOS, where the tokenizer adds one by itself
        self.prefix = self.tokenizer.encode("").ids

        known = self.tokenizer.token_to_id
        fitting = [f for f in FORMATS if f.mark is None or known(f.mark) is not None]
        format = fitting[0]
        self.first_turn = self.pieces(format.system + format.turn)
        self.later_turn = self.pieces(format.between + format.turn)
        # in the plain format a space parts the answer from the prompt
        self.space = " " if format.turn.endswith(":") else ""
        eos = self.end_tokens(folder)
        end = known(format.end) if format.end else None
        if end is None and not eos:
            raise UserError(f"{folder}: neither config.json nor the tokenizer names an end token")
        self.end = eos[0] if end is None else end       # closes an answer in training
        self.stop = {self.end, *eos}                    # any of these ends one in generation

    def end_tokens(self, folder):
        """The eos_token_id of config.json and generation_config.json: an id, several, or none."""
        eos = []
        for name in ("config.json", "generation_config.json"):
            if (Path(folder) / name).exists():
                ids = read_json(Path(folder) / name, "").get("eos_token_id")
                if isinstance(ids, int):
                    ids = [ids]
                eos += ids or []
        return eos

    def pieces(self, template):
        """A template -> its parts: the ids of its tags, and the texts between them.

        A tag that this vocabulary does not have stays text.
        """
        parts = [""]
        for piece in TAG.split(template):
            tag = self.tokenizer.token_to_id(piece) if TAG.fullmatch(piece) else None
            if tag is None:
                parts[-1] += piece
            else:
                parts += [tag, ""]
        return parts

    def fill(self, parts, queries):
        """A template's parts with each query in its place -> token ids, a list for each query.

        Only the template's own tags become control tokens.
        """
        rows = [[] for _ in queries]
        for part in parts:
            if isinstance(part, int):
                filled = [[part]] * len(queries)
            else:
                filled = self.encode_batch([part.replace("{query}", query) for query in queries])
            for row, ids in zip(rows, filled):
                row += ids
        return rows

    def encode_batch(self, texts):
        """Texts -> token ids of each; the library spreads a batch over the cores, and fast leaves
        out where in the text each token stands.
        """
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def encode_query(self, query):
        """The bare query, as the router's encoder reads it -> token ids."""
        return self.prefix + self.encode(query)

    def encode_prompt(self, query, history=()):
        """The query in the model's chat format, up to where the answer starts -> token ids.

        history: the (query, response) pairs of the turns before it.
        """
        ids = list(self.prefix)
        parts = self.first_turn
        for past_query, response in history:
            ids += self.fill(parts, [past_query])[0] + self.encode_answer(response)
            parts = self.later_turn
        return ids + self.fill(parts, [query])[0]

    def encode_queries(self, queries, format="raw", max_length=None):
        if format == "raw":
            rows = [self.prefix + ids for ids in self.encode_batch(queries)]
        else:
            rows = [self.prefix + ids for ids in self.fill(self.first_turn, queries)]
        return [row[:max_length] for row in rows]

    format_note = "chat format: ?"
    def check_against(self, weight):
        pass

    def encode_answer(self, response):
        """A response and its end token -> token ids."""
        return self.encode(self.space + response) + [self.end]


# ----------------------------------------------------------------------------------------- batches

@dataclass
class Example:
    """A record as token ids."""
    prompt: list                # the query in the base's chat format
    answer: list                # the response and its end token
    query: list                 # the bare query, for the router's encoder; empty without a router
    p: tuple                    # its trait activation vector

    @property
    def length(self):
        return len(self.prompt) + len(self.answer)


def make_examples(records, model, max_length, answer="response"):
    """Records -> Examples.

    An answer is cut so that prompt and answer hold max_length tokens; a prompt that leaves it no
    room is dropped.
    """
    tokenizer = model.tokenizer
    queries = [record["query"] for record in records]
    prompts = tokenizer.encode_queries(queries, "chat")
    answers = tokenizer.encode_batch([tokenizer.space + record[answer] for record in records])
    encoder_queries = model.encode_queries(queries) if model.router else prompts
    max_length = min(max_length, model.base.config.max_position_embeddings)
    examples = []
    for record, prompt, ids, query in zip(records, prompts, answers, encoder_queries):
        room = max_length - len(prompt)
        if room > 0:
            ids = ids + [tokenizer.end]
            arrays = [np.array(row, np.int32) for row in (prompt, ids[:room], query)]
            examples.append(Example(*arrays, record["p"]))
    return examples


@lru_cache(maxsize=2 * len(TRAITS))
def shuffled(n, *key):
    """range(n) in an order that the key decides. Every step of an epoch asks for the same one."""
    return np.random.default_rng(key).permutation(n)


def sample_indices(n, count, step, *key):
    """The `count` members of range(n) that belong to this step, walking through fresh shuffles.

    A function of its arguments alone (key: seed, stage, ...), so a run can be resumed at any step.
    n = 3, count = 2: steps 0, 1, 2 -> [2, 0], [1, 0], [1, 2], of the shuffles 2 0 1 and 0 1 2.
    """
    chosen = []
    while len(chosen) < count:
        epoch, start = divmod(step * count + len(chosen), n)
        order = shuffled(n, *key, epoch)
        missing = count - len(chosen)
        chosen += order[start:start + missing].tolist()
    return chosen


def expert_subsets(examples):
    """P_i = {(q, r) : p_i = 1} for each expert i, as lists of indices. They overlap."""
    subsets = [[] for _ in TRAITS]
    for index, example in enumerate(examples):
        for i, active in enumerate(example.p):
            if active:
                subsets[i].append(index)
    return subsets


def trait_groups(examples):
    """p -> the indices of the examples that share it."""
    groups = defaultdict(list)
    for index, example in enumerate(examples):
        groups[example.p].append(index)
    return groups


@dataclass
class Batch:
    """The examples of one step, like lengths together, so that little is padded."""
    examples: list
    fixed_w: list | None = None     # a row of mixing weights each; None where the router decides
    token_weight: list | None = None    # what each response token of an example counts in Eq. 8
    experts: int = 1                # how many experts' losses the weights add up to


def expert_batch(examples, subsets, batch_size, step, seed):
    """Stage 1: batch_size records of each expert's subset, each with the one-hot w of its expert.

    A row with a one-hot w sends gradient to its own expert alone, and each expert's tokens are
    averaged on their own: one batch trains all experts, each exactly as if alone.
    """
    rows = []
    for i, subset in enumerate(subsets):
        if not subset:
            continue
        picked = sample_indices(len(subset), batch_size, step, seed, 1, i)
        chosen = [examples[subset[k]] for k in picked]
        one_hot = [float(j == i) for j in range(len(subsets))]
        token_weight = 1 / sum(len(example.answer) for example in chosen)
        rows += [(example, one_hot, token_weight) for example in chosen]
    rows.sort(key=lambda row: row[0].length)
    batch, one_hots, token_weights = zip(*rows)
    with_records = sum(bool(subset) for subset in subsets)
    return Batch(list(batch), list(one_hots), list(token_weights), with_records)


def router_batch(examples, groups, batch_size, group_size, step, seed):
    """Stage 2: batch_size queries, in groups of up to group_size that share one p (Eq. 5)."""
    chosen = []
    count = max(1, batch_size // group_size)
    for k in sample_indices(len(examples), count, step, seed, 2):
        others = [index for index in groups[examples[k].p] if index != k]
        order = np.random.default_rng([seed, 2, step, k]).permutation(len(others))
        chosen.append(examples[k])
        chosen += [examples[others[j]] for j in order[:group_size - 1]]
    return Batch(chosen)


def joint_batch(examples, batch_size, step, seed):
    """Stage 3: batch_size records, whatever their p."""
    picked = sample_indices(len(examples), batch_size, step, seed, 3)
    chosen = sorted((examples[k] for k in picked), key=lambda example: example.length)
    token_weight = 1 / sum(len(example.answer) for example in chosen)
    return Batch(chosen, token_weight=[token_weight] * len(chosen))
