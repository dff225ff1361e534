import json
from pathlib import Path
from safetensors import safe_open
from safetensors.torch import load_file, save_file
class Run:
    def __init__(self, out, settings, is_main=True):
        self.out = Path(out); self.settings = settings; self.is_main = is_main; self.stop_requested = False
    def plan(self, stages, resume):
        return stages[0], 0
    def begin(self):
        self.out.mkdir(parents=True, exist_ok=True)
    def close(self): pass
    def log(self, line):
        with open(self.out / "metrics.jsonl", "a") as f: f.write(json.dumps(line) + "\n")
    def path(self, stage): return self.out / f"stage{stage}.safetensors"
    def has_state(self, stage): return self.path(stage).exists()
    def save_due(self, step): return False
    def save_state(self, stage, step, tensors, done):
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, self.path(stage), metadata={"personafuse": json.dumps({"step": step, "done": done})})
    def load_state(self, stage):
        with safe_open(self.path(stage), "pt") as f: h = json.loads(f.metadata()["personafuse"])
        return load_file(self.path(stage)), h
