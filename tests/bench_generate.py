"""How fast answers come: two measurements that bench.py prints."""

import contextlib
import io
import json
import sys
import tempfile
import threading
import time
from argparse import Namespace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import personafuse
from experiments.batched import generate_batch
from experiments.generate import generate_records


def generate_throughput(folder, new_tokens=64):
    """16 prompts of 40 to 300 tokens, fp32, CPU: tokens a second batched, one prompt at a time, and transformers batched."""
    from transformers import AutoModelForCausalLM
    llama = personafuse.load_llama(folder, torch.device("cpu"), torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1000, 40000, (int(n),), generator=generator).tolist() for n in torch.linspace(40, 300, 16)]
    prompts = [prompts[i] for i in torch.randperm(16, generator=generator)]

    def ours(rows):
        out = [[] for _ in prompts]
        for i, token in generate_batch(llama, prompts, new_tokens, stop=(), rows=rows):
            if token is not None:
                out[i].append(token)
        return out

    def batched():
        ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, p in enumerate(prompts):
            ids[i, -len(p):], mask[i, -len(p):] = torch.tensor(p), 1
        with torch.inference_mode():
            out = theirs.generate(ids, attention_mask=mask, do_sample=False, min_new_tokens=new_tokens,
                                  max_new_tokens=new_tokens, pad_token_id=0)
        return out[:, ids.shape[1]:].tolist()

    seconds, outputs = {}, {}
    for name, run in (("batched", lambda: ours(16)), ("transformers", batched), ("one at a time", lambda: ours(1)),
                      ("batched", lambda: ours(16)), ("transformers", batched)):
        start = time.perf_counter()
        outputs[name] = run()
        seconds[name] = min(seconds.get(name, 1e9), time.perf_counter() - start)            # the better of two
    for name, s in seconds.items():
        print(f"{name:16} {len(prompts) * new_tokens / s:8.1f} tokens a second")
    same = sum(a == b for a, b in zip(outputs["batched"], outputs["one at a time"]))
    print(f"batched over one at a time {seconds['one at a time'] / seconds['batched']:.2f} (wanted: 3), "
          f"over transformers {seconds['transformers'] / seconds['batched']:.2f} (wanted: 1.2); "
          f"{same} of 16 outputs equal those of one at a time")


def server_throughput(requests=320, workers=32, delay=0.2):
    """experiments.generate against a server that answers after 200 ms: seconds for 320 requests with 32 workers."""
    answer = "Social traits: High Agreeableness\n##Response: Here you are.\n##Persona Behavior Rationale: kind"
    reply = json.dumps({"choices": [{"message": {"content": answer}, "finish_reason": "stop"}]}).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(delay)
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *args):
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        queries = Path(folder) / "queries.txt"
        queries.write_text("\n".join(f"Question number {i}?" for i in range(requests)))
        args = Namespace(queries=str(queries), out=f"{folder}/out.jsonl", model="m", workers=workers, n=None, seed=0,
                         server=f"http://127.0.0.1:{server.server_port}", max_new_tokens=64, temperature=0.0, naive=False,
                         human_like=False)
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            generate_records(args)
        seconds = time.perf_counter() - start
        records = len((Path(folder) / "out.jsonl").read_text().splitlines())
    server.shutdown()
    print(f"{records} requests of {delay * 1000:.0f} ms with {workers} workers: {seconds:.2f} s (wanted: 3)")

