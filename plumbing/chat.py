"""How a model is talked to: tokenizer and chat format of a folder, text to token ids and back.

What a user types is text, never control, and only a format's own tags become control tokens.
"""

import math
import re
from datetime import date
from pathlib import Path

# sandboxed, for a template is a stranger's program; jinja2 comes with torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from plumbing.files import UserError, read_json, read_text

# from one answer to the next, in the format of Qwen2.5 and SmolLM2
CHATML = """\
{answer}<|im_end|>
<|im_start|>user
{query}<|im_end|>
<|im_start|>assistant
"""
# of published models, for copies of them without their template: a token that tells the family ->
# its name, what stands up to the first answer, and from there to the next one
FAMILIES = {
    "<|start_header_id|>": ("Llama 3.1's", """\
<|start_header_id|>system<|end_header_id|>

Cutting Knowledge Date: December 2023
Today Date: 26 Jul 2024

<|eot_id|><|start_header_id|>user<|end_header_id|>

{query}<|eot_id|><|start_header_id|>assistant<|end_header_id|>

""", """\
{answer}<|eot_id|><|start_header_id|>user<|end_header_id|>

{query}<|eot_id|><|start_header_id|>assistant<|end_header_id|>

"""),
    "<|object_ref_start|>": ("Qwen2.5's", """\
<|im_start|>system
You are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>
<|im_start|>user
{query}<|im_end|>
<|im_start|>assistant
""", CHATML),
    "<|im_start|>": ("SmolLM2's", """\
<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
<|im_start|>user
{query}<|im_end|>
<|im_start|>assistant
""", CHATML),
    ">>QUESTION<<": ("Falcon3's", """\
<|user|>
{query}
<|assistant|>
""", """\
{answer}<|endoftext|>
<|user|>
{query}
<|assistant|>
"""),
}


def own_turns(folder):
    """The turns that a model folder's chat template writes, as texts with {query} and {answer} in
    them: from the start to where the first answer starts, and from there to where the next one
    does. None where the folder brings no template.

    A template is a program in the jinja language. It runs here, as in transformers, on stand-ins
    for the texts. That may raise anything; ValueError where its turns are not all alike, or change
    what the user says.
    """
    config = read_json(folder / "special_tokens_map.json")
    config |= read_json(folder / "tokenizer_config.json")
    source = config.get("chat_template")
    if isinstance(source, list):
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    path = folder / "chat_template.jinja"
    if path.exists():
        source = read_text(path)
    if not source:
        return None
    # blocks of transformers' own around what an assistant says, for masks: here without effect
    source = re.sub(r"(\{%[+-]?\s*(end)?)generation\b", r"\1with", source)
    # what it may use; the date is the same every day: a prompt stays what it was in training
    names = {"tools": None, "documents": None, "add_generation_prompt": True,
             "strftime_now": date(2024, 7, 26).strftime}
    # bos_token and its like, as text or as {"content": text, ...}
    for key, value in config.items():
        # null is what it has no token for: in the template too it is not there
        if key.endswith("_token") and value is not None:
            names[key] = value["content"] if isinstance(value, dict) else value
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                          extensions=["jinja2.ext.loopcontrols"])
    template = jinja.from_string(source)
    turns = 3 * [{"role": "user", "content": "{query}"},
                 {"role": "assistant", "content": "{answer}"}]
    # up to where the first, the second and the third answer starts
    first, second, third = [template.render(names, messages=turns[:n]) for n in (1, 3, 5)]
    later = second.removeprefix(first)
    if third != first + later + later or not later.strip().startswith("{answer}"):
        raise ValueError("its turns are not all alike")
    if "{query}" not in first or "{query}" not in later:
        raise ValueError("it does not write what the user says as it is")
    return first, later


def untrained(ids, embedding):
    """The set of those token ids that a model has not learned; embedding (V, d).

    Rows that training has never reached are near zero, or copies of one another. Trained ones are
    alike in length: SmolLM2's and tiny's shortest have more than half of the median.
    """
    short = embedding.norm(dim=1).median() / 10
    bad = set()
    for i in ids:
        # empty, and so of length 0, where the model has no such row
        row = embedding[i:i + 1]
        copies = sum(row.equal(embedding[j:j + 1]) for j in ids)
        if row.norm() < short or copies > 1:
            bad.add(i)
    return bad


class ChatTokenizer:
    """A model folder's tokenizer.json and its chat format: text to token ids and back.

    `format_note` says which format that is, and why. `first` and `later` are its turns, as lists of
    ids of control tokens and the texts between them. With the model's embedding (V, d) it is
    checked against the model, see check_against.
    """

    def __init__(self, folder, embedding=None):
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:                      # tokenizers raises bare Exception
            raise UserError(f"cannot read {path}: {error}")
        kind = type(tokenizer.model).__name__
        if kind != "BPE":
            # their vocabulary holds control tokens itself: a user's text could become one
            raise UserError(f"{path}: a tokenizer of type {kind} is not supported (BPE is)")
        tokenizer.no_truncation()
        tokenizer.no_padding()
        added = tokenizer.get_added_tokens_decoder()
        # left out where an answer is shown
        self.hidden = {i for i, token in added.items() if token.special}
        # added words and runs of blanks are not control but vocabulary
        self.control = {i: token for i, token in added.items()
                        if token.special or re.search(r"[^\w\s]", token.content)}
        # what the tokenizer by itself puts before a text: BOS
        probe = tokenizer.encode("a")
        self.prefix = probe.ids[:probe.special_tokens_mask.index(0)]
        self.tokenizer = tokenizer

        self.eos = []
        for name in ("config.json", "generation_config.json"):
            ids = read_json(self.folder / name).get("eos_token_id")
            self.eos += [ids] if isinstance(ids, int) else ids or []
        if not self.eos:
            raise UserError(f"{folder}: config.json names no end token (eos_token_id)")
        self.choose_format()
        # the format's own tags are read; from here on what a user types is text, never control,
        # however the folder marks its added tokens: all are special now, and so are held back
        tokenizer.add_special_tokens(list(self.control.values()))
        tokenizer.encode_special_tokens = True
        if embedding is not None:
            self.check_against(embedding)

    def choose_format(self):
        """The folder's own template, else that of its family, else the plain format."""
        why = ""
        try:
            turns = own_turns(self.folder)
            if turns:
                self.use("own", "the folder's own template", *map(self.pieces, turns))
                return
        except Exception as error:                      # a template may raise anything
            why = f" (the folder's own template cannot be followed: {error})"
        for mark, (name, first, later) in FAMILIES.items():
            if self.tokenizer.token_to_id(mark) is not None:
                self.use("family", name + why, self.prefix + self.pieces(first), self.pieces(later))
                return
        self.use_plain(why)

    def use_plain(self, why):
        turn = "User: {query}\nAssistant:"
        # a space parts the answer from the prompt
        self.use("plain", f"plain text 'User: ... Assistant:'{why}",
                 [*self.prefix, turn], [" {answer}", self.eos[0], turn])

    def use(self, source, name, first, later):
        """Write conversations in these turns from now on; source: "own", "family" or "plain"."""
        self.source = source
        self.format_note = f"chat format: {name}"
        self.first = first
        self.later = later
        # an answer ends with the control token behind it, else with the model's own end token;
        # blanks before such a control token are part of it
        self.answer = re.match(r"\s*\{answer\}(\s*\Z)?", later[0])[0]
        self.end = later[1] if self.answer == later[0] else self.eos[0]
        # any of these ends one in generation
        self.stop = {self.end, *self.eos}

    def pieces(self, text):
        """A template's text -> its parts: ids of control tokens, and the texts between them."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        parts = []
        done = 0
        for i, (start, end) in zip(encoding.ids, encoding.offsets):
            if i in self.control:
                # some take the blanks beside them with them
                parts += [text[done:start], i]
                done = end
        return [*parts, text[done:]]

    def check_against(self, embedding):
        """Look at the model's embedding (V, d), once it is loaded.

        UserError where texts need rows that it lacks. Where it has not learned the control tokens
        of its chat format, the plain one takes its place.
        """
        rows = len(embedding)
        vocabulary = self.tokenizer.get_vocab()
        needed = self.tokenizer.encode("").ids + self.eos[:1]
        for i in vocabulary.values():
            # a vocabulary may be padded with what no text leads to: then it is not among these
            if i >= rows:
                needed += self.encode(self.decode([i]))
        if max(needed) >= rows:
            raise UserError(f"{self.folder}: tokenizer.json has {len(vocabulary)} tokens, the "
                            f"model's vocabulary {rows}: they are not of one model")
        tags = {part for part in self.first + self.later if isinstance(part, int)}
        bad = untrained(tags | set(self.eos), embedding)
        if tags & bad and self.source != "plain":
            self.eos.sort(key=lambda i: i in bad)
            self.use_plain(" (the model has not learned the tokens of its chat format)")

    def fill(self, parts, **texts):
        """A format's parts with texts in their places -> token ids. Only the parts' own ids are
        control tokens.
        """
        ids = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            else:
                # one pass: a text that holds "{query}" itself says just that
                ids += self.encode(re.sub(r"\{(query|answer)\}",
                                          lambda place: texts[place[1]], part))
        return ids

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        shown = [i for i in ids if i not in self.hidden]
        return self.tokenizer.decode(shown, skip_special_tokens=False)

    def encode_query(self, query, format="raw", max_length=math.inf):
        """A query -> token ids: "raw", as an encoder reads a text, or "chat", in the chat format up
        to where the answer starts.

        One of more than max_length tokens loses the end of its text; what stands around it stays.
        """
        while True:
            if format == "chat":
                ids = self.encode_prompt(query)
            else:
                ids = self.tokenizer.encode(query).ids
            excess = len(ids) - max_length
            if excess <= 0 or not query:
                return ids
            # where in the text each of its tokens stands
            spans = self.tokenizer.encode(query, add_special_tokens=False).offsets
            end, _ = spans[-excess:][0]
            # cut there, the rest may still come to a token too many; a character goes in any case,
            # for some tokenizers say of blanks that they stand behind themselves
            query = query[:-1][:end]

    def encode_prompt(self, query, history=()):
        """The query in the chat format, up to where the answer starts -> token ids.

        history: the (query, response) pairs of the turns before it.
        """
        ids = []
        parts, answer = self.first, ""
        for asked, response in [*history, (query, "")]:
            ids += self.fill(parts, query=asked, answer=answer)
            parts, answer = self.later, response
        return ids

    def encode_answer(self, response):
        """A response with its end token -> token ids."""
        return self.fill([self.answer, self.end], answer=response)
