"""What the method learns from: traits, records and their check, the split, each model's chat
format, and the batches of the three stages. No torch here.

A record is (q, r, p): a query, the response that fits its situation, and the trait activation
vector p in {0,1}^10. Persona-CoT (section 4.2) makes them: experiments/persona_cot.py.
"""

import hashlib
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from plumbing.files import UserError, check_text, read_json, read_lines

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


# ------------------------------------------------------------------------------------ chat formats

class ChatFormat(NamedTuple):
    """How a conversation is written, as text with {query} and {answer} in it."""
    name: str
    mark: str | None            # a special token that tells the family
    first: str                  # from the start to where the first answer starts
    later: str                  # from there to where the next answer starts


LLAMA_TURN = ("<|start_header_id|>user<|end_header_id|>\n\n{query}<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\n")
CHATML_TURN = "<|im_start|>user\n{query}<|im_end|>\n<|im_start|>assistant\n"
FALCON_TURN = "<|user|>\n{query}\n<|assistant|>\n"
PLAIN_TURN = "User: {query}\nAssistant:"
# of no family: a space parts the answer from the prompt, {eos} is the model's own end token
PLAIN = ChatFormat("plain text 'User: ... Assistant:'", None, PLAIN_TURN,
                   " {answer}{eos}" + PLAIN_TURN)

# for folders without a template of their own: the first whose mark the tokenizer knows
FORMATS = [
    ChatFormat(
        "Llama 3.1's", "<|start_header_id|>",
        "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n<|eot_id|>" + LLAMA_TURN,
        "{answer}<|eot_id|>" + LLAMA_TURN),
    ChatFormat(
        "Qwen2.5's", "<|object_ref_start|>",
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        "<|im_end|>\n" + CHATML_TURN,
        "{answer}<|im_end|>\n" + CHATML_TURN),
    ChatFormat(
        "SmolLM2's", "<|im_start|>",
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n" + CHATML_TURN,
        "{answer}<|im_end|>\n" + CHATML_TURN),
    ChatFormat("Falcon3's", ">>QUESTION<<", FALCON_TURN, "{answer}<|endoftext|>\n" + FALCON_TURN),
]
PLACE = re.compile(r"\{(query|answer)\}")


def json_of(folder, name):
    """What a JSON file of a model folder says; {} where the folder does not have it."""
    path = Path(folder) / name
    return read_json(path, "") if path.exists() else {}


def own_format(folder):
    """The chat template that a model folder brings, as a ChatFormat; None where it brings none.

    A template is a program in the jinja language. It runs here, as in transformers, on stand-ins
    for the texts. That may raise anything; ValueError where its turns are not all alike.
    """
    config = json_of(folder, "special_tokens_map.json") | json_of(folder, "tokenizer_config.json")
    source = config.get("chat_template")
    if isinstance(source, list):
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    path = Path(folder) / "chat_template.jinja"
    if path.exists():
        source = path.read_text(encoding="utf-8-sig")
    if not source:
        return None
    # what it may use: bos_token and its like, as text or as {"content": text, ...}, and today's
    # date, the same every day, so that a prompt stays what it was in training
    names = {key: value["content"] if isinstance(value, dict) else value
             for key, value in config.items() if key.endswith("_token")}
    names |= {"tools": None, "documents": None, "add_generation_prompt": True,
              "strftime_now": date(2024, 7, 26).strftime}
    # sandboxed, for it is a stranger's program; jinja2 comes with torch
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                          extensions=["jinja2.ext.loopcontrols"])
    template = jinja.from_string(source)
    query = {"role": "user", "content": "{query}"}
    answer = {"role": "assistant", "content": "{answer}"}
    first = template.render(names, messages=[query])
    second = template.render(names, messages=[query, answer, query])
    third = template.render(names, messages=[query, answer, query, answer, query])
    later = second[len(first):]
    if third != first + later + later or not later.strip().startswith("{answer}"):
        raise ValueError("its turns are not all alike")
    return ChatFormat("the folder's own template", None, first, later)


def untrained(ids, embedding):
    """The set of those token ids that a model has not learned; embedding (V, d).

    Rows that training has never reached are near zero, or copies of one another. Trained ones are
    alike in length: SmolLM2's and tiny's shortest have more than half of the median.
    """
    lengths = embedding.norm(dim=1)                                     # (V)
    known = [i for i in ids if i < len(embedding)]
    bad = set(ids) - set(known)
    for i in known:
        copies = sum(embedding[i].equal(embedding[j]) for j in known)
        if lengths[i] < lengths.median() / 10 or copies > 1:
            bad.add(i)
    return bad


class ChatTokenizer:
    """A model folder's tokenizer.json and its chat format: text to token ids and back.

    `format_note` says which format that is, and why.
    """

    def __init__(self, folder):
        from tokenizers import Tokenizer
        path = Path(folder) / "tokenizer.json"
        if not path.exists():
            raise UserError(f"{folder} has no tokenizer.json")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:                      # tokenizers raises bare Exception
            raise UserError(f"cannot read {path}: {error}")
        self.folder = folder
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.hold_back_control()
        # what the tokenizer by itself puts before a text, BOS, and behind it, an embedding's end
        probe = self.tokenizer.encode("a")
        start = probe.special_tokens_mask.index(0)
        self.prefix = probe.ids[:start]
        self.suffix = probe.ids[start + probe.special_tokens_mask.count(0):]

        self.eos = []
        for name in ("config.json", "generation_config.json"):
            ids = json_of(folder, name).get("eos_token_id")
            self.eos += [ids] if isinstance(ids, int) else ids or []
        self.choose_format()

    def hold_back_control(self):
        """What a user types is text, never control, however the folder marks its added tokens."""
        added = self.tokenizer.get_added_tokens_decoder()
        # left out where an answer is shown
        self.hidden = {i for i, token in added.items() if token.special}
        # added words and runs of blanks are not control but vocabulary
        self.control = {i: token for i, token in added.items()
                        if token.special or re.search(r"[^\w\s]", token.content)}
        # they were added before; now all of them are special, and so is held back
        self.tokenizer.add_special_tokens(list(self.control.values()))
        self.tokenizer.encode_special_tokens = True

    def choose_format(self):
        """The folder's own template, else the format of the family with that mark, else PLAIN."""
        why = ""
        try:
            format = own_format(self.folder)
        except Exception as error:                      # a template may raise anything
            format = None
            why = f" (the folder's own template cannot be followed: {error})"
        known = self.tokenizer.token_to_id
        fitting = [f for f in FORMATS if known(f.mark) is not None]
        self.use(format or (fitting + [PLAIN])[0], why)

    def use(self, format, why=""):
        """Write conversations in this format from now on."""
        self.format = format
        self.format_note = f"chat format: {format.name}{why}"
        own_end = self.tokenizer.id_to_token(self.eos[0]) if self.eos else None
        self.first = self.pieces(format.first)
        self.later = self.pieces(format.later.replace("{eos}", own_end or ""))
        # a folder's template writes BOS itself, where it wants one
        if format in (PLAIN, *FORMATS):
            self.first = self.prefix + self.first
        # an answer ends with the control token behind it, else with the model's own end token
        before, _, after = self.later[0].partition("{answer}")
        ends = self.later[1:2]
        if after.strip() or not ends:
            after = ""
            ends = self.eos
        if not ends:
            raise UserError(f"{self.folder}: config.json and the chat format name no end token")
        self.answer = before + "{answer}" + after
        self.end = ends[0]                              # closes an answer in training
        self.stop = {self.end, *self.eos}               # any of these ends one in generation

    def pieces(self, text):
        """A format's text -> its parts: ids of control tokens, and the texts between them."""
        self.tokenizer.encode_special_tokens = False
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        self.tokenizer.encode_special_tokens = True
        parts = []
        done = 0
        for i, (start, end) in zip(encoding.ids, encoding.offsets):
            if i in self.control:
                # some take the blanks beside them with them
                parts += [text[done:start], i]
                done = end
        parts.append(text[done:])
        return [part for part in parts if part != ""]

    def check_against(self, embedding):
        """Look at the model's embedding (V, d), once it is loaded.

        UserError where texts need rows that it lacks. Where it has not learned the control tokens
        of its chat format, the plain one takes its place.
        """
        vocabulary = self.tokenizer.get_vocab()
        rows = len(embedding)
        needed = {0, *self.prefix, *self.suffix, *self.eos[:1]}
        for token, i in vocabulary.items():
            if i >= rows and i not in self.control:
                # a vocabulary may be padded with what no merge of letters leads to
                alone = [piece.id for piece in self.tokenizer.model.tokenize(token)]
                if i in alone + self.encode(token):
                    needed.add(i)
        if max(needed) >= rows:
            raise UserError(f"{self.folder}: tokenizer.json has {len(vocabulary)} tokens, the "
                            f"model's vocabulary {rows}: they are not of one model")
        tags = {part for part in self.first + self.later if isinstance(part, int)}
        bad = untrained(sorted({*tags, *self.eos}), embedding)
        if self.format is not PLAIN and tags & bad:
            self.eos.sort(key=lambda i: i in bad)
            self.use(PLAIN, " (the model has not learned the tokens of its chat format)")

    def fill(self, parts, places):
        """A format's parts with texts in their places -> token ids, a list for each of `places`,
        dicts of the texts. Only the parts' own ids are control tokens.
        """
        rows = [[] for _ in places]
        for part in parts:
            if isinstance(part, int):
                filled = [[part]] * len(rows)
            else:
                # one pass: a text that holds "{query}" itself says just that
                filled = self.encode_batch([PLACE.sub(lambda place: texts[place[1]], part)
                                            for texts in places])
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
        return self.encode_batch([text])[0]

    def decode(self, ids):
        shown = [i for i in ids if i not in self.hidden]
        return self.tokenizer.decode(shown, skip_special_tokens=False)

    def encode_queries(self, queries, format="raw", max_length=None):
        """Queries -> token ids of each: "raw", as an encoder reads a text, or "chat", in the chat
        format up to where the answer starts.

        One of more than max_length tokens loses the end of its text; what stands around it stays.
        """
        if format == "chat":
            rows = self.fill(self.first, [{"query": query} for query in queries])
        else:
            rows = [self.prefix + ids + self.suffix for ids in self.encode_batch(queries)]
        for i, row in enumerate(rows):
            excess = len(row) - (max_length or len(row))
            if excess > 0 and queries[i]:
                # where in the text each of its tokens stands
                spans = self.tokenizer.encode(queries[i], add_special_tokens=False).offsets
                shorter = queries[i][:spans[-excess:][0][0]]
                # cut there, the rest may still come to a token too many
                rows[i] = self.encode_query(shorter, format, max_length)
        return rows

    def encode_query(self, query, format="raw", max_length=None):
        return self.encode_queries([query], format, max_length)[0]

    def encode_prompt(self, query, history=()):
        """The query in the chat format, up to where the answer starts -> token ids.

        history: the (query, response) pairs of the turns before it.
        """
        queries = [past for past, _ in history] + [query]
        ids = self.encode_query(queries[0], "chat")
        for (_, response), after in zip(history, queries[1:]):
            ids += self.fill(self.later, [{"answer": response, "query": after}])[0]
        return ids

    def encode_answers(self, responses):
        """Responses, each with its end token -> token ids of each."""
        return self.fill([self.answer, self.end], [{"answer": text} for text in responses])

    def encode_answer(self, response):
        return self.encode_answers([response])[0]


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


def make_examples(records, model, max_length, answer="response"):
    """Records -> Examples for a PersonaFuse.

    An answer is cut so that prompt and answer hold max_length tokens, and no more than the base's
    context; a prompt that leaves it no room is dropped. A query is cut at the encoder's context.
    """
    max_length = min(max_length, model.base.config.max_position_embeddings)
    examples = []
    # a thousand at a time: as Python's numbers all of them would take gigabytes
    for start in range(0, len(records), 1000):
        part = records[start:start + 1000]
        queries = [record["query"] for record in part]
        prompts = model.tokenizer.encode_queries(queries, "chat")
        answers = model.tokenizer.encode_answers([record[answer] for record in part])
        encoder_queries = model.encode_queries(queries) if model.router else [[]] * len(part)
        for record, prompt, ids, query in zip(part, prompts, answers, encoder_queries):
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


def joint_batch(examples, batch_size, step, seed):
    """Stage 3: batch_size records, whatever their p."""
    picked = sample_indices(len(examples), batch_size, step, seed, 3)
    chosen = sorted((examples[k] for k in picked), key=lambda example: example.length)
    token_weight = 1 / sum(len(example.answer) for example in chosen)
    return Batch(chosen, token_weight=[token_weight] * len(chosen))
