"""Who answers a prompt: an OpenAI-compatible server."""

import json
import os
import re
import time
from multiprocessing.pool import ThreadPool
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from plumbing.files import UserError

# seconds: before each try, and how long one may take
PAUSES = (0, 1, 2, 4, 8, 16)
TIMEOUT = 300


def ask(url, model, prompt, max_tokens):
    """One user turn to an OpenAI-compatible chat endpoint -> the text of its likeliest answer.

    After 429, 5xx, TIMEOUT, a broken connection or broken JSON it tries again.
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
    for pause in PAUSES:
        time.sleep(pause)
        try:
            with urlopen(request, timeout=TIMEOUT) as reply:
                choice = json.load(reply)["choices"][0]
            text = choice["message"]["content"]
        except HTTPError as error:
            said = error.read().decode(errors="replace")
            problem = f"HTTP {error.code} {' '.join(said.split())[:500]}"
            if error.code < 500 and error.code not in (408, 429):
                # "context" as vLLM, llama.cpp and OpenAI put it, `inputs` as TGI does
                if re.search(r"context|`inputs`", problem):
                    raise ValueError("longer than the context")
                raise UserError(f"{url} refuses: {problem}")
        except Exception as error:      # of the network, of HTTP, of JSON that is not as expected
            # urllib wraps what the network says as the reason of an error of its own
            problem = getattr(error, "reason", error)
            if isinstance(problem, ConnectionRefusedError):
                break       # nobody is there: waiting will not help
        else:
            if choice.get("finish_reason") == "length":
                raise ValueError("cut off by the token limit")
            return text if isinstance(text, str) else ""
    raise ConnectionError(f"{url}: {problem}")


def chat_request(url, body):
    """The request that puts a JSON body to a server, named with http:// and /v1 or without."""
    if "://" not in url:
        url = f"http://{url}"
    url = url.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
    # a server that asks for no key reads none
    key = os.environ.get("OPENAI_API_KEY", "none")
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    return Request(url, json.dumps(body).encode(), headers)


def server_answers(url, model, jobs, max_tokens=1024, workers=8):
    """Jobs, each a list of prompts -> yield (i, the answers to jobs[i], or the OSError or
    ValueError that one of them ended in), in the order in which they end; the server gets
    `workers` prompts at a time. UserError: the server refuses.
    """
    def work(numbered):
        i, prompts = numbered
        try:
            return i, [ask(url, model, prompt, max_tokens) for prompt in prompts]
        except (OSError, ValueError) as error:
            return i, error         # whoever reads the answers decides what it means

    # its threads are daemons, so that Ctrl-C does not wait for the answers under way
    with ThreadPool(workers) as pool:
        yield from pool.imap_unordered(work, enumerate(jobs))
