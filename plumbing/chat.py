"""How a model is talked to: tokenizer and chat format of a folder, text to token ids and back.

What a user types is text, never control, and only a format's own tags become control tokens.
"""

import re
from datetime import date
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from plumbing.files import UserError, read_json

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
        path = Path(folder) / "tokenizer.json"
        if not path.exists():
            raise UserError(f"{folder} has no tokenizer.json")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:                      # tokenizers raises bare Exception
            raise UserError(f"cannot read {path}: {error}")
        self.folder = folder
        kind = type(self.tokenizer.model).__name__
        if kind != "BPE":
            # their vocabulary holds control tokens itself: a user's text could become one
            raise UserError(f"{path}: a tokenizer of type {kind} is not supported (BPE is)")
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
