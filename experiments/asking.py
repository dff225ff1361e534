"""Who answers a prompt: an OpenAI-compatible server, or a model of our own.

Both `server_answers` and `model_answers` yield (i, answer to prompts[i]) in the order in which the
answers come, with an exception in place of an answer that did not, so whoever reads them need not
know which of the two it is.
"""

import http.client
import json
import os
import queue
import random
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from typing import NamedTuple

from plumbing.chat import ChatTokenizer
from experiments.batched import generate_batch
from personafuse import load_llama, pick_device
from plumbing.files import UserError
from plumbing.models import find_model


class Answer(NamedTuple):
    text: str
    cut: bool       # whether the token limit, or the context, cut it off


# ----------------------------------------------------------------------------------------- a server

def ask(url, model, prompt, max_tokens=1024, temperature=0.0, seed=0,
        timeout=300, tries=6, wait=1.0):
    """One user turn to an OpenAI-compatible chat endpoint -> Answer.

    After 429, 5xx, `timeout` seconds, a broken connection or broken JSON it tries again, in `wait`
    seconds, then 2 · wait, and so on.
    ConnectionError: nobody is there, or all tries failed. ValueError: longer than the context.
    UserError: refused for another reason.
    """
    # an address with http:// and /v1, or without
    if "://" not in url:
        url = f"http://{url}"
    url = url.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
    }
    for attempt in range(tries):
        if attempt > 0:
            # workers that were turned away together come back apart
            time.sleep(wait * 2 ** (attempt - 1) * random.uniform(0.75, 1.25))
        try:
            status, text = post_json(url, body, timeout)
            if status < 300:
                choice = json.loads(text)["choices"][0]
                content = choice["message"]["content"] or ""
                return Answer(content, choice.get("finish_reason") == "length")
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            # urllib wraps what the network says as the reason of an error of its own
            problem = getattr(error, "reason", error)
            if isinstance(problem, (ConnectionRefusedError, socket.gaierror)):
                break       # nobody is there: waiting will not help
            continue
        problem = f"HTTP {status} {' '.join(text.split())[:500]}"
        if status < 500 and status not in (408, 429):
            refuse(url, problem)
    raise ConnectionError(f"{url}: {problem}")


def post_json(url, body, timeout):
    """Send a JSON body -> (HTTP status, text of the reply), be the status an error or not."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    # urllib raises what carries an error's status, though it can be read like any other reply
    try:
        reply = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        reply = error
    with reply:
        return reply.status, reply.read().decode(errors="replace")


def refuse(url, problem):
    # "context" as vLLM, llama.cpp and OpenAI put it, `inputs` as TGI does
    if re.search(r"context|`inputs`", problem):
        raise ValueError("longer than the context")
    raise UserError(f"{url} refuses: {problem}")


def server_answers(url, model, prompts, max_tokens=1024, workers=8, temperature=0.0, seed=0):
    """Answers of a server, which gets that many requests at a time."""
    waiting = queue.SimpleQueue()
    answered = queue.SimpleQueue()
    for job in enumerate(prompts):
        waiting.put(job)

    def work():
        for i, prompt in iter(waiting.get, None):
            try:
                answer = ask(url, model, prompt, max_tokens, temperature, seed)
            except Exception as error:
                answer = error      # whoever reads the answers decides what it means
            answered.put((i, answer))

    for _ in range(workers):
        waiting.put(None)           # tells one of the workers that nothing is left to ask
        # daemons, so that Ctrl-C does not wait for the answers under way
        threading.Thread(target=work, daemon=True).start()
    for _ in prompts:
        yield answered.get()


# ---------------------------------------------------------------------------------- a model of ours

def model_answers(name, prompts, max_tokens, rows):
    """Greedy answers of a model of ours, by name, which decodes `rows` sequences together."""
    folder = find_model(name, "--model")
    llama = load_llama(folder, pick_device(base=name), "auto")
    tokenizer = ChatTokenizer(folder)
    tokenizer.check_against(llama.embed_tokens.weight)
    # in parts: the token ids of all 100,000 prompts would take gigabytes
    for start in range(0, len(prompts), 1024):
        encoded = {}
        for i, prompt in enumerate(prompts[start:start + 1024], start):
            encoded[i] = tokenizer.encode_prompt(prompt)
        yield from decode_answers(llama, tokenizer, encoded, max_tokens, rows)


def decode_answers(llama, tokenizer, prompts, max_tokens, rows):
    """{i: prompt as token ids} -> (i, answer to it), as they end."""
    context = llama.config.max_position_embeddings
    fitting = [i for i, ids in prompts.items() if len(ids) < context]
    for i in prompts.keys() - set(fitting):
        yield i, ValueError("longer than the context")
    if not fitting:
        return
    answers = generate_batch(llama, [prompts[i] for i in fitting], max_tokens, tokenizer.stop,
                             rows=rows)
    for k, ids in answers:
        i = fitting[k]
        # the last token is written but not read, so a full context has one more
        full = len(prompts[i]) + len(ids) > context
        yield i, Answer(tokenizer.decode(ids), full or len(ids) == max_tokens)
