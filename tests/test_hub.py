"""A hub on localhost that speaks the hub's protocol (model info, HEAD with ETag and commit, redirect to the file), and none."""

import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import fails_in_one_line, make_model, program

COMMIT = "a" * 40


@pytest.fixture
def hub(tmp_path):
    """Serves tmp_path/hub as the model owner/small; owner/gated asks for access. -> (its URL, the requests it saw)"""
    folder, seen = make_model(tmp_path / "hub"), []
    (folder / "pytorch_model.bin").write_bytes(b"a pickle that nobody may fetch")
    (folder / "README.md").write_text("not needed")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, code, body=b"", **headers):
            self.send_response(code)
            for name, value in {"Content-Length": len(body), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self):
            seen.append((self.command, self.path, self.headers.get("Authorization")))
            path = self.path.split("?")[0]
            if "owner/gated" in path:
                return self.answer(403, b"{}", X_Error_Code="GatedRepo", X_Error_Message="Access to this model is restricted")
            if "owner/small" not in path and not path.startswith("/files/"):
                return self.answer(404, b"{}", X_Error_Code="RepoNotFound")
            if path.startswith("/api/models/"):
                files = [{"rfilename": f.name, "path": f.name, "type": "file", "size": f.stat().st_size, "oid": COMMIT}
                         for f in sorted(folder.iterdir())]
                body = files if "/tree/" in path else {"id": "owner/small", "sha": COMMIT, "siblings": files, "private": False}
                return self.answer(200, json.dumps(body).encode(), Content_Type="application/json")
            file = folder / path.split("/")[-1]
            if not file.exists():
                return self.answer(404, X_Error_Code="EntryNotFound")
            body = file.read_bytes()
            about = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
            if not path.startswith("/files/"):                          # the hub sends large files to another place
                return self.answer(302, **about, Location=f"/files/{file.name}", X_Linked_Size=len(body), X_Linked_Etag=about["ETag"])
            self.answer(200, body, **about)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()


def ask(model, env, *more):
    return program("sample.py", "hello", "--route", "none", "--base", model, "--max-new-tokens", 4, "--json", *more, env=env)


def test_fetch_then_offline_from_the_cache(hub, tmp_path):
    url, seen = hub
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"HF_HOME": str(tmp_path / "home")}
    result = ask("owner/small", env | {"HF_ENDPOINT": url, "HF_TOKEN": "hf_secret"})
    assert result.returncode == 0, result.stderr
    fetched = {path.split("/")[-1] for method, path, _ in seen if method == "GET" and path.startswith("/files/")}
    assert fetched == {"config.json", "tokenizer.json", "model.safetensors"}            # only what we read
    assert ("Bearer hf_secret") in {token for _, path, token in seen if path.startswith("/api")}
    count = len(seen)
    offline = ask("owner/small", env | {"HF_HUB_OFFLINE": "1"})
    assert offline.returncode == 0 and offline.stdout == result.stdout and len(seen) == count
    unreachable = ask("owner/small", env | {"HF_ENDPOINT": "http://127.0.0.1:9"})       # no network, but a filled cache
    assert unreachable.returncode == 0 and unreachable.stdout == result.stdout


def test_no_hub_gated_and_unknown_end_in_one_line(hub, tmp_path):
    url, _ = hub
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"HF_HOME": str(tmp_path / "home")}
    down = ask("smollm2", env | {"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert fails_in_one_line(down, "HuggingFaceTB/SmolLM2-135M-Instruct", "hub was not reached", "--base DIR", "--base tiny")
    gated = ask("owner/gated", env | {"HF_ENDPOINT": url})
    assert fails_in_one_line(gated, "owner/gated", "ask for access", "log in")
    assert fails_in_one_line(ask("owner/unknown", env | {"HF_ENDPOINT": url}), "owner/unknown", "no model")


def test_help_prints_the_table_of_models():
    text = program("train.py", "--help").stdout
    for name in ("tiny", "smollm2", "smollm2-360m", "smollm2-1.7b", "llama-3.1-8b", "qwen2.5-0.5b", "falcon3-10b"):
        assert f"\n  {name} " in text
    assert "meta-llama/Llama-3.1-8B" in text
