"""What the method learns from: traits, records and their check, the split, and the batches of the
three stages. No torch here. How a model is talked to is in plumbing/chat.py.

A record is (q, r, p): a query, the response that fits its situation, and the trait activation
vector p in {0,1}^10. Persona-CoT (section 4.2) makes them: experiments/persona_cot.py.
"""

import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from plumbing.chat import ChatTokenizer  # noqa: F401, part of what a model's data is
from plumbing.files import UserError, check_text, read_lines

# The ten poles, in the order of p, of the experts and of their embeddings (footnote 3).
TRAITS = [
    "high openness", "low openness",
    "high conscientiousness", "low conscientiousness",
    "high extraversion", "low extraversion",
    "high agreeableness", "low agreeableness",
    "high neuroticism", "low neuroticism",
]
# a word for each, for a reader who says what answers should be more like
WORDS = ["imaginative", "down-to-earth", "organized", "spontaneous", "outgoing", "quiet",
         "kind", "blunt", "worried", "calm"]

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
    texts = {}
    for key, value in record.items():
        if isinstance(value, str):
            # half an emoji is no text; blanks around one are not what it says
            texts[key] = check_text(value).strip()
    return {**record, **texts, "p": activation(record["social_traits"] + record["task_traits"])}


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


# ----------------------------------------------------------------------------------------- batches

@dataclass
class Example:
    """A record as token ids, in arrays of int32."""
    prompt: np.ndarray          # the query in the base's chat format
    answer: np.ndarray          # the response and its end token
    query: np.ndarray           # the query as the router's encoder reads it; empty without a router
    p: tuple                    # its trait activation vector
    cut: bool = False           # whether something of the record is left out

    @property
    def length(self):
        return len(self.prompt) + len(self.answer)


def make_examples(records, tokenizer, encode_queries, max_length, answer="response"):
    """Records -> Examples. encode_queries: what the router's encoder reads of queries, or None.

    An answer is cut so that prompt and answer hold max_length tokens; a prompt that leaves it no
    room is dropped.
    """
    examples = []
    # a thousand at a time: as Python's numbers all of them would take gigabytes
    for start in range(0, len(records), 1000):
        part = records[start:start + 1000]
        queries = [record["query"] for record in part]
        encoder_queries = encode_queries(queries) if encode_queries else [[]] * len(part)
        for record, query in zip(part, encoder_queries):
            prompt = tokenizer.encode_prompt(record["query"])
            ids = tokenizer.encode_answer(record[answer])
            room = max_length - len(prompt)
            if room > 0:
                arrays = [np.array(row, np.int32) for row in (prompt, ids[:room], query)]
                examples.append(Example(*arrays, record["p"], len(ids) > room))
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


def joint_batch(examples, batch_size, step, seed, one_lora=False):
    """Stage 3: batch_size records, whatever their p. A baseline's one LoRA has weight 1."""
    picked = sample_indices(len(examples), batch_size, step, seed, 3)
    chosen = sorted((examples[k] for k in picked), key=lambda example: example.length)
    token_weight = 1 / sum(len(example.answer) for example in chosen)
    fixed_w = [[1.0]] * len(chosen) if one_lora else None
    return Batch(chosen, fixed_w, [token_weight] * len(chosen))
