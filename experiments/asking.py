"""Who answers a prompt: an OpenAI-compatible server."""

import http.client
import json
import os
import random
import re
import socket
import time
import urllib.error
import urllib.request
from multiprocessing.pool import ThreadPool

from plumbing.files import UserError


def ask(url, model, prompt, max_tokens=1024, timeout=300, tries=6, wait=1.0):
    """One user turn to an OpenAI-compatible chat endpoint -> the text of its likeliest answer.

    After 429, 5xx, `timeout` seconds, a broken connection or broken JSON it tries again, in `wait`
    seconds, then 2 · wait, and so on.
    ConnectionError: nobody is there, or all tries failed. ValueError: longer than the context, or
    an answer cut off at max_tokens. UserError: refused for another reason.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 0.0,
    }
    request = chat_request(url, body)
    for attempt in range(tries):
        if attempt > 0:
            # workers that were turned away together come back apart
            time.sleep(wait * 2 ** (attempt - 1) * random.uniform(0.75, 1.25))
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                choice = json.load(reply)["choices"][0]
            text, reason = choice["message"]["content"], choice.get("finish_reason")
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            problem = f"HTTP {error.code} {' '.join(said.split())[:500]}"
            if error.code < 500 and error.code not in (408, 429):
                refuse(url, problem)
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            # urllib wraps what the network says as the reason of an error of its own
            problem = getattr(error, "reason", error)
            if isinstance(problem, (ConnectionRefusedError, socket.gaierror)):
                break       # nobody is there: waiting will not help
        else:
            if reason == "length":
                raise ValueError("cut off by the token limit")
            return text or ""
    raise ConnectionError(f"{url}: {problem}")


def chat_request(url, body):
    """The request that puts a JSON body to a server, named with http:// and /v1 or without."""
    if "://" not in url:
        url = f"http://{url}"
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    url = url.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
    return urllib.request.Request(url, json.dumps(body).encode(), headers)


def refuse(url, problem):
    # "context" as vLLM, llama.cpp and OpenAI put it, `inputs` as TGI does
    if re.search(r"context|`inputs`", problem):
        raise ValueError("longer than the context")
    raise UserError(f"{url} refuses: {problem}")


def server_answers(url, model, jobs, max_tokens=1024, workers=8):
    """Jobs, each a list of prompts -> yield (i, the answers to jobs[i], or the exception that one
    of them ended in), in the order in which they end; the server gets `workers` prompts at a time.
    """
    def work(numbered):
        i, prompts = numbered
        try:
            return i, [ask(url, model, prompt, max_tokens) for prompt in prompts]
        except Exception as error:
            return i, error         # whoever reads the answers decides what it means

    # its threads are daemons, so that Ctrl-C does not wait for the answers under way
    with ThreadPool(workers) as pool:
        yield from pool.imap_unordered(work, enumerate(jobs))
