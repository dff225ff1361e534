"""Persona-CoT records, the split, prompts in each model's own chat format, and batches.

A record is (q, r, p): a query, the response that fits its situation, and the trait activation vector p in {0,1}^10.
As a program this file makes records by Persona-CoT (section 4.2 of the paper), and looks at them:

    python data.py show "I feel anxious about tomorrow" --model falcon3-10b
    python data.py queries --source sharegpt,personahub,wildchat,infinity --n 100000 --out queries.jsonl
    python data.py generate --queries queries.jsonl --out records.jsonl --server http://localhost:8000 --model NAME
    python data.py check records.jsonl
"""

import argparse
import csv
import hashlib
import heapq
import http.client
import itertools
import json
import os
import queue
import random
import re
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter, deque
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
    """Run a program's main(): what the user can mend ends in one line and exit code 2, our own bugs in a traceback."""
    try:
        main()
    except UserError as e:
        problem = str(e)
    except KeyboardInterrupt:
        problem = "interrupted; what was saved before stays"
    except BrokenPipeError:                         # the reader of our output has gone, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (MemoryError, RuntimeError) as e:        # torch's own out-of-memory errors are RuntimeErrors
        if not isinstance(e, MemoryError) and not re.search("out of memory|can't allocate memory", str(e)):
            raise
        problem = "out of memory: try a smaller --micro-batch, --checkpointing, --dtype bf16 or shorter texts"
    else:
        return
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)


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


def read_json(path, missing):
    """The JSON in a file; UserError with `missing` where there is no such file, or with what is wrong with it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(missing)
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {path}: {e}")


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
        knows = self.tokenizer.token_to_id
        _, self.before, self.after, end = next(f for f in FORMATS if f[0] is None or knows(f[0]) is not None)
        eos = []                                                    # an id, a list of ids, or nothing
        for name in ("config.json", "generation_config.json"):
            if (Path(folder) / name).exists():
                ids = read_json(Path(folder) / name, "").get("eos_token_id")
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


# ----------------------------------------------------------------------------------------- Persona-CoT: prompt and parser

PERSONA_COT = """\
Answer a user in five steps. Write every step down under its number, with the lines that are named there.

The user wrote:
<<<
{query}
>>>

Step 1: Read the social cue. What do tone, feeling and intent say about the person, and about how they want to be met?
Social cue: [one sentence]

Step 2: Read the task cue. What does the person want done, and what must an answer to it be: exact, inventive, brief, kind?
Task cue: [one sentence]

Step 3: Choose the personality traits that the answer should show to fit each cue. They are the answer's, not the user's:
somebody worried may need somebody calm. Choose one to four of these ten, and never both poles of one trait:
High Openness (imaginative, curious) or Low Openness (practical, conventional)
High Conscientiousness (organised, thorough) or Low Conscientiousness (flexible, spontaneous)
High Extraversion (lively, talkative) or Low Extraversion (quiet, reserved)
High Agreeableness (warm, supportive) or Low Agreeableness (blunt, challenging)
High Neuroticism (alert to what may go wrong) or Low Neuroticism (calm, confident)
Social traits: [names from this list with commas between them, or none]
Task traits: [names from this list with commas between them, or none]

Step 4: Plan how each of these traits will be heard in what the answer says, in its order and in its words.
Plan: [one sentence for each trait]

Step 5: Write what the user will read, showing the traits without naming them. Then explain how you showed them. End with:
##Response: [what the user will read]
##Persona Behavior Rationale: [how it shows the traits]
"""
FRIEND = """\
You and I are old friends having a relaxed chat. Keep it casual and warm, the way people talk over coffee: everyday words,
a bit of humour where it fits, no lists, nothing official. Here is what I want to talk about:
{query}"""
# a key of the record -> the prompt that makes it: Persona-CoT (Table 9), then what the baselines of section 6.1 learn from
PROMPTS = {"response": PERSONA_COT, "naive_response": "{query}", "human_like_response": FRIEND}

LINES = ("social cue", "social trait", "task cue", "task trait", "response", "rationale")
HEADING = re.compile(       # at the start of a line, behind list numbers and bold marks, or anywhere behind ##
    r"(?:^|(?<!#)(?=##))[ \t>#*_.)\d-]*(?:step[ \t]*\d+[ \t]*[:.)-]+[ \t#*_]*)?"
    r"(social cue|social traits?|task cue|task traits?|(?:final )?response|(?:persona )?(?:behaviou?r )?rationale)"
    r"[ \t*_]*(?::[*_]*|$)", re.I | re.M)
TRAIT = re.compile(         # "High Openness", "**high** in openness", "Openness to Experience: High", "Openness (high)"
    r"(?:(?<![\w/])(high|low)[\s*_-]+(?:(?:in|on|levels? of)[\s*_]+)?)?"
    r"(openness|conscientiousness|extr[ao]version|agreeableness|neuroticism)(?: to experience)?"
    r"(?:[\s*_]*[:=(–-]+[\s*_]*(high|low)\b)?", re.I)


def read_traits(text):
    """What follows "Social traits:" -> trait names. Reads the lines that hold traits, up to the first that does not."""
    traits = []
    for line in filter(str.strip, text.splitlines()):
        pole, before = None, len(traits)
        for m in [] if re.match(r"\W*reason", line, re.I) else TRAIT.finditer(line):
            here, pole = m[1] or m[3] or pole, m[3] or m[1] or pole         # "High Openness and Extraversion" shares a pole
            if here:
                traits.append(f"{here} {m[2]}".title().replace("Extro", "Extra"))
            if line[m.end():].lstrip("*_ ").startswith((":", "–", "—", "- ")):
                break                                                       # the rest of the line explains this trait
        if len(traits) == before:
            break
    return list(dict.fromkeys(traits))


def parse_answer(text):
    """A model's answer to PERSONA_COT -> a dict: social_cue, social_traits, task_cue, task_traits, p, response, rationale.

    ValueError is the reason to drop it: no response, no trait (p is all zeros), both poles of one trait.
    """
    pieces = HEADING.split(text.replace("\r\n", "\n").rsplit("</think>", 1)[-1])    # before, heading, body, heading, body...
    found = dict.fromkeys(LINES, "")
    for heading, body in zip(pieces[1::2], pieces[2::2]):
        name = next(name for name in LINES if name in heading.lower())
        if re.search(r"\w", re.sub(r"\[[^]]*\]", "", body) if name == "response" else body):       # not "[your response]"
            found[name] = body.strip()                              # a heading may come twice, the first as a mere title
        if name == "rationale" and found["response"]:
            break                                                   # some models go on with a query of their own
    cues = [found[name].partition("\n")[0].strip("*_ ") for name in ("social cue", "task cue")]
    social, task = read_traits(found["social trait"]), read_traits(found["task trait"])
    response = re.sub(r"(\s*\n[-*_`]{3,})+$", "", found["response"])                # less a rule drawn below it
    rationale = re.split(r"\n\s*(?:#|-{3}|\*{3})", found["rationale"])[0].strip()   # less the talk that trails it
    if not response:
        raise ValueError("no response")
    return {"social_cue": cues[0], "social_traits": social, "task_cue": cues[1], "task_traits": task,
            "p": activation(social + task), "response": response, "rationale": rationale}


# --------------------------------------------------------------------------------------------- Persona-CoT: who answers

def ask(url, model, prompt, max_tokens=1024, temperature=0.0, seed=0, timeout=300, tries=6, wait=1.0):
    """One user turn to an OpenAI-compatible chat endpoint -> (its answer, whether the token limit cut that off).

    After 429, 5xx, a timeout, a broken connection or broken JSON it tries again, in `wait` seconds, then 2 · wait, ...
    ConnectionError: nobody there, or all tries failed. ValueError: longer than the context. UserError: refused otherwise.
    """
    url = ("" if "://" in url else "http://") + url.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens,
                       "temperature": temperature, "seed": seed}).encode()
    for k in range(tries):
        if k:
            time.sleep(wait * 2 ** (k - 1) * random.uniform(0.75, 1.25))    # workers turned away together come back apart
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=timeout) as reply:
                choice = json.load(reply)["choices"][0]
                return choice["message"]["content"] or "", choice.get("finish_reason") == "length"
        except urllib.error.HTTPError as e:
            problem = f"HTTP {e.code} " + " ".join(e.read(500).decode(errors="replace").split())
            if e.code < 500 and e.code not in (408, 429):
                if re.search(r"context|`inputs`", problem):         # as vLLM, llama.cpp and OpenAI put it; as TGI does
                    raise ValueError("longer than the context")
                raise UserError(f"{url} refuses: {problem}")
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as e:
            problem = getattr(e, "reason", e)
            if isinstance(problem, (ConnectionRefusedError, socket.gaierror)):
                break                                               # nobody is there: waiting will not help
    raise ConnectionError(f"{url}: {problem}")


def server_answers(args, prompts):
    """Ask a server, --workers requests at a time. Yields as model_answers does."""
    todo, done = deque(enumerate(prompts)), queue.SimpleQueue()

    def work():
        while True:
            try:
                i, prompt = todo.popleft()
            except IndexError:                                      # nothing is left to ask
                return
            try:
                done.put((i, ask(args.server, args.model, prompt, args.max_new_tokens, args.temperature, args.seed)))
            except Exception as e:                                  # whoever reads the answers decides what it means
                done.put((i, e))

    for _ in range(args.workers):
        threading.Thread(target=work, daemon=True).start()          # daemons: Ctrl-C does not wait for their answers
    yield from (done.get() for _ in prompts)


def model_answers(args, prompts):
    """Answer prompts with a model of our own, --workers sequences at a time. Yields, in the order in which they end,
    (index, (answer, whether the token limit cut it off) or the exception that came instead)."""
    import personafuse as pf                                        # here, because personafuse imports this file
    folder, device = pf.find_model(args.model, "--model"), pf.pick_device(args.device)
    llama, chat = pf.load_llama(folder, device, pf.pick_dtype(args.dtype, device)), Chat(folder)
    pf.check_vocabulary(chat, llama, folder)
    context = llama.config.max_position_embeddings
    for start in range(0, len(prompts), 1024):                      # the token ids of all 100,000 would take gigabytes
        ids = {i: chat.prompt(prompts[i]) for i in range(start, min(start + 1024, len(prompts)))}
        yield from ((i, ValueError("longer than the context")) for i in ids if len(ids[i]) >= context)
        fitting, new = [i for i in ids if len(ids[i]) < context], {i: [] for i in ids}
        for k, token in pf.generate(llama, [ids[i] for i in fitting], args.max_new_tokens, chat.stop, rows=args.workers,
                                    temperature=args.temperature, seed=args.seed) if fitting else ():
            i = fitting[k]
            if token is not None:
                new[i].append(token)
            else:
                cut = len(new[i]) == args.max_new_tokens or len(ids[i]) + len(new[i]) > context
                yield i, (chat.decode(new.pop(i)), cut)


# ------------------------------------------------------------------------------------------------- python data.py generate

def read_queries(path):
    """The distinct queries of a file, in order: one a line in a .txt, else JSONL with a `query` in every line."""
    queries = []
    for n, line in read_lines(path):
        try:
            query = line if str(path).endswith(".txt") else json.loads(line)["query"]
            queries.append(query.strip().encode(errors="replace").decode())     # half an emoji could not be written again
        except (ValueError, LookupError, TypeError, AttributeError):
            raise UserError(f'{path}, line {n}: no JSON object with a text as "query" (plain lines: call the file .txt)')
    if not any(queries):
        raise UserError(f"{path} holds no queries")
    return list(dict.fromkeys(filter(None, queries)))


def finished(path):
    """The lines of a JSONL file whose writer may have been interrupted: a half-written last line is cut off."""
    try:
        data = Path(path).read_bytes() if os.path.exists(path) else b""
        if len(data) > (end := data.rfind(b"\n") + 1):
            os.truncate(path, end)
        return [json.loads(line) for line in data[:end].splitlines()]
    except (OSError, ValueError) as e:
        raise UserError(f"cannot go on with {path}: {e}")


def append(path, record):
    """Add a line to a JSONL file; on return it is on disk. When the disk is full no part of it stays."""
    try:
        with open(path, "ab") as file:
            file.write((json.dumps(record, ensure_ascii=False) + "\n").encode(errors="replace"))
            file.flush()
            os.fsync(file.fileno())
    except OSError as e:
        finished(path)
        raise UserError(f"cannot write {path}: {e.strerror}; its lines are whole; make room, then repeat the command")


def make_record(query, answers):
    """A query and {key: (answer, cut) or an exception} -> its record. ValueError is the reason to drop it."""
    for answer in answers.values():
        if isinstance(answer, Exception):
            raise answer
        if answer[1]:
            raise ValueError("cut off by the token limit")
    record = {"query": query, **parse_answer(answers["response"][0])}
    record.update({key: text.strip() for key, (text, _) in answers.items() if key != "response"})
    del record["p"]                                                 # it follows from the traits
    return check_record(record, tuple(answers)) and record


def generate(args):
    """Put every query through Persona-CoT (section 4.2). Records are appended to OUT, queries dropped to OUT.dropped.jsonl
    with the reason; a query in neither is still to do. OUT.settings.json says what they are made with."""
    out, dropped, settings_file = args.out, f"{args.out}.dropped.jsonl", f"{args.out}.settings.json"
    keys = ["response"] + ["naive_response"] * args.naive + ["human_like_response"] * args.human_like
    queries, digest = read_queries(args.queries), lambda texts: hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
    settings = {"queries": digest(queries), "model": args.model, "answers": keys, "max_new_tokens": args.max_new_tokens,
                "temperature": args.temperature, "seed": args.seed, "prompts": digest(PROMPTS[key] for key in keys)}
    if old := finished(settings_file):
        if changed := [f"{k} ({old[0].get(k)}, now {v})" for k, v in settings.items() if old[0].get(k) != v]:
            raise UserError(f"{out} was made with other {', '.join(changed)}: give another --out, or repeat what made it")
    elif os.path.exists(out):
        raise UserError(f"{out} is there already and was not made by this program: give another --out")
    elif not os.access(Path(out).resolve().parent, os.W_OK):
        raise UserError(f"the folder of {out} is not there, or cannot be written to")
    queries = queries[:args.n]
    done = {r["query"]: r.get("reason", "kept") for file in (dropped, out) for r in finished(file)}
    counts = Counter(done[q] for q in queries if q in done)
    jobs = [(q, key) for q in queries if q not in done for key in keys]
    prompts = [PROMPTS[key].replace("{query}", query) for query, key in jobs]
    before, parts, failed, in_a_row, start, shown = counts.total(), {}, 0, 0, time.time(), 0
    for i, answer in (server_answers if args.server else model_answers)(args, prompts) if jobs else ():
        query, key = jobs[i]
        parts.setdefault(query, {})[key] = answer
        if len(parts[query]) < len(keys):
            continue
        answers, in_a_row = parts.pop(query), in_a_row + 1
        try:
            reason, record = "kept", make_record(query, answers)
        except ValueError as e:
            reason = str(e).split(":")[0]
            record = {"query": query, "reason": reason, "answers": [a[0] for a in answers.values() if isinstance(a, tuple)]}
        except (OSError, http.client.HTTPException) as e:           # the server's trouble, not the query's: it stays to do
            failed, problem = failed + 1, e
            if in_a_row == 3:
                break
            continue
        if not old:                                                 # only now: a run that fails at once leaves no trace
            append(settings_file, settings)
            old = [settings]
        append(out if reason == "kept" else dropped, record)
        counts[reason] += 1
        in_a_row = 0
        if time.time() - shown > 5 or counts.total() == len(queries):
            rate, shown = (counts.total() - before) / (time.time() - start), time.time()
            print(f"{counts.total()} of {len(queries)} queries, {rate:.2f} a second: {tally(counts)}", file=sys.stderr)
    if failed:
        raise UserError(f"{failed} queries got no answer ({problem}). Of {len(queries)}, {tally(counts)} are on disk: "
                        "see to the server, then repeat the same command to go on")
    print(f"{out}: {tally(counts)} of {len(queries)} queries")


def tally(counts):
    """{"kept": n, reason to drop: n, ...} -> "9 kept, 2 dropped (1 no response, 1 no trait)"."""
    reasons = ", ".join(f"{n} {reason}" for reason, n in counts.most_common() if reason != "kept")
    return f"{counts['kept']} kept, {counts.total() - counts['kept']} dropped" + (f" ({reasons})" if reasons else "")


def show(args):
    """One query's way through the five steps: the prompt, the answer, what is read in it or why it is dropped."""
    prompt = PERSONA_COT.replace("{query}", args.query)
    print(f"{' the prompt ':-^100}\n{prompt}", flush=True)
    _, answer = next((server_answers if args.server else model_answers)(args, [prompt]))
    if isinstance(answer, Exception):
        raise UserError(f"no answer: {answer}")
    print(f"{' the answer ':-^100}\n{answer[0]}\n{' what is read in it ':-^100}")
    try:
        record = make_record(args.query, {"response": answer})
        print(*(f"{key}: {value}" for key, value in record.items()), f"p: {list(check_record(record)['p'])}", sep="\n")
    except ValueError as e:
        print(f"dropped: {e}")


# ------------------------------------------------------------------------------------------------- python data.py queries

# --source: name -> (data set on the hub, which part of it, the field that holds a text or a list of turns)
SOURCES = {
    "sharegpt": ("RyokoAI/ShareGPT52K", {"data_files": "sg_90k_part*.json"}, "conversations"),
    "personahub": ("proj-persona/PersonaHub", {"name": "instruction"}, "synthesized text"),
    "wildchat": ("allenai/WildChat-1M", {}, "conversation"),
    "infinity": ("BAAI/Infinity-Instruct", {"name": "0625"}, "conversations"),
}


def read_rows(name, path, seed):
    """The rows, as dicts, of a JSON, JSONL, CSV or Parquet file, or if `path` is None of one of SOURCES on the hub."""
    hub, part, _ = SOURCES.get(name, (None, None, None))
    try:
        if not path:
            from datasets import load_dataset
            yield from load_dataset(hub, split="train", streaming=True, **part).shuffle(seed=seed, buffer_size=1000)
        elif path.endswith(".parquet"):
            from pyarrow.parquet import ParquetFile
            yield from (row for batch in ParquetFile(path).iter_batches() for row in batch.to_pylist())
        else:
            with open(path, encoding="utf-8", newline="") as file:
                csv.field_size_limit(2**31 - 1)
                yield from (csv.DictReader(file) if path.endswith(".csv") else json.load(file) if path.endswith(".json") else
                            (json.loads(line) for line in file if line.strip()))
    except ImportError as e:
        raise UserError(f"{path or name} needs another library: pip install {e.name.partition('.')[0]}")
    except Exception as e:                  # the hub, the network and Arrow have dozens of their own
        why = getattr(e, "strerror", None) or f"{type(e).__name__}: {e}".splitlines()[0]
        raise UserError(f"cannot read {path or hub}: {why}" + ("" if path else "; if it is gated, ask for access there, "
                        f"then `hf auth login`; or give a copy of it: --source {name}=FILE"))


def candidates(rows, field, seed, seen):
    """Yield (hash of seed and query, query) for the rows in which the user first says 3 to 1,000 words, in English where the
    row tells the language, and nothing that is in `seen` already, a set of hashes."""
    for row in rows:
        if not isinstance(row, dict) or field not in row:
            has = ", ".join(map(str, row)) if isinstance(row, dict) else f"a {type(row).__name__}"
            raise UserError(f"a row without {field!r}; it has {has}: give another --field")
        text, language = row[field], str(row.get("language") or row.get("langdetect") or "en")
        if isinstance(text, list):                                  # of turns: from/value, or role/content
            turns = [(t.get("from", t.get("role")), t.get("value", t.get("content"))) for t in text if isinstance(t, dict)]
            who, text = next((turn for turn in turns if turn[0] != "system"), (None, None))
            text = text if who in ("human", "user") else None
        if language.lower() in ("en", "english") and isinstance(text, str) and 3 <= len(text.split()) <= 1000:
            key = hashlib.sha256(f"{seed} {' '.join(text.lower().split())}".encode(errors="replace")).digest()
            if key not in seen:
                seen.add(key)
                yield key, text.strip()


def sample_queries(args):
    """Sample --n queries from --source, in equal parts: those with the least hashes. So every distinct query is as likely as
    any other, whatever the order of the source, and no more than are wanted are held at a time."""
    sources, seen, chosen = args.source.split(","), set(), []
    for k, source in enumerate(sources):
        name, _, path = source.rpartition("=")
        if path in SOURCES:
            name, path = path, None
        if not (name in SOURCES or not name and args.field):
            raise UserError(f"--source {source}: none of {', '.join(SOURCES)}, and a file of your own needs --field")
        rows = itertools.islice(read_rows(name, path, args.seed), args.rows)
        n = (args.n + k) // len(sources)
        best = heapq.nsmallest(n, candidates(rows, SOURCES[name][2] if name else args.field, args.seed, seen))
        print(f"{source}: {len(best)} queries" + (f", which is all; {n} were wanted" if len(best) < n else ""))
        chosen += [(key, {"query": query, "source": name or path}) for key, query in best]
    with replacing(args.out) as tmp:
        tmp.write_text("".join(json.dumps(record) + "\n" for _, record in sorted(chosen, key=lambda c: c[0])))


# --------------------------------------------------------------------------------------------------- python data.py check

def check(args):
    """Name every line that is no record, with the reason; then show how the records' poles, trait sets and lengths fall."""
    records, bad = {}, 0
    for n, line in read_lines(args.file):
        try:
            record = check_record(json.loads(line))
            if record["query"] in records:
                raise ValueError("repeats the query of an earlier line")
            records[record["query"]] = record
        except ValueError as e:
            print(f"line {n}: {e}")
            bad += 1
    dropped, total = f"{args.file}.dropped.jsonl", max(len(records), 1)
    counts = Counter(json.loads(line)["reason"] for _, line in read_lines(dropped)) if os.path.exists(dropped) else Counter()
    print(f"{args.file}: {len(records)} records" + (f"; {tally(counts + Counter(kept=len(records)))}" if counts else ""))
    for i, trait in enumerate(TRAITS):
        n = sum(r["p"][i] for r in records.values())
        print(f"  {trait:22}{n:7} {n / total:6.1%}  {'█' * round(60 * n / total)}")
    sets = Counter(", ".join(t for t, on in zip(TRAITS, r["p"]) if on) for r in records.values())
    print(f"{len(sets)} sets of traits, the commonest:")
    print(*(f"{n:9} {n / total:6.1%}  {name}" for name, n in sets.most_common(10)), sep="\n")
    for key in ("query", "response", "naive_response", "human_like_response"):
        if words := sorted(len(r[key].split()) for r in records.values() if isinstance(r.get(key), str)):
            half = f"{words[len(words) // 4]} to {words[len(words) * 3 // 4]}"
            print(f"{key}: {words[0]} to {words[-1]} words, half of them {half}")
    if bad or not records:
        raise UserError(f"{args.file}: {bad} bad lines" if bad else f"{args.file} holds no records")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands, who = parser.add_subparsers(required=True, metavar="COMMAND"), argparse.ArgumentParser(add_help=False)
    add = who.add_argument
    add("--model", required=True, help="tiny, falcon3-10b, ..., owner/model on the hub, a folder; or its name on the server")
    add("--server", metavar="URL", help="ask this OpenAI-compatible server instead; its key in OPENAI_API_KEY")
    add("--workers", type=int, default=16, metavar="N", help="requests at a time, or sequences decoded together (16)")
    add("--max-new-tokens", type=int, default=1024, metavar="N", help="an answer that needs more is dropped (1024)")
    add("--temperature", type=float, default=0.0, help="0 always takes the likeliest token (0)")
    add("--seed", type=int, default=0, help="of the drawing of tokens (0)")
    add("--device", default="auto", help="cuda, mps or cpu (the first of these that is here)")
    add("--dtype", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    command = commands.add_parser("generate", parents=[who], help="queries to records; repeat it to go on where it stopped")
    add = command.add_argument
    add("--queries", required=True, metavar="FILE", help="JSONL with a `query` in each line, or .txt, one a line")
    add("--out", required=True, metavar="FILE", help="JSONL; dropped queries go to FILE.dropped.jsonl")
    add("--n", type=int, help="only the first N queries")
    add("--naive", action="store_true", help="add naive_response, for the Direct baseline")
    add("--human-like", action="store_true", help="add human_like_response, for the Human-Like baseline")
    command.set_defaults(run=generate)
    command = commands.add_parser("show", parents=[who], help="one query's way through the five steps")
    command.add_argument("query")
    command.set_defaults(run=show)
    command = commands.add_parser("queries", help="sample queries from public data sets or files")
    add = command.add_argument
    add("--source", required=True, help=f"{', '.join(SOURCES)}, NAME=FILE (a copy of one of these), or FILE; "
        "or several, with commas between them")
    add("--field", help="where a FILE of your own holds the queries: a text or a list of turns")
    add("--n", type=int, required=True, help="how many, in equal parts; the paper took 100000 from the four")
    add("--rows", type=int, metavar="N", help="read no more than N rows of a source (all)")
    add("--seed", type=int, default=0, help="of the sample (0)")
    add("--out", required=True, metavar="FILE", help="JSONL")
    command.set_defaults(run=sample_queries)
    command = commands.add_parser("check", help="validate a data file and show its balance")
    command.add_argument("file")
    command.set_defaults(run=check)
    args = parser.parse_args()
    for name in ("n", "rows", "workers", "max_new_tokens"):
        if getattr(args, name, None) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    args.run(args)


if __name__ == "__main__":
    import data                 # the module that personafuse imports, so that its UserError is the one that is caught
    data.run_program(data.main)
