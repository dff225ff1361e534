"""A run's folder: planned, locked, moved aside, logged, and its states saved and resumed.

    out/tiny/stage1.safetensors, ...    what each stage trains, and where it stands
    out/tiny/metrics.jsonl              every step and every evaluation
    out/tiny/.lock                      locked while a process writes into the folder
    out/tiny.1                          the run that stood in out/tiny before
"""

import json
import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout         # comes with torch
from safetensors import safe_open
from safetensors.torch import save_file

from plumbing.files import UserError, atomic_write, write_text

# options that say how a program is started, not what the run is
NOT_SAVED = {"stage", "resume", "preset", "shard"}
# where a run's inputs lie; their hashes tell whether they are the same
PLACES = ["base", "base_folder", "encoder", "encoder_folder", "data"]
FREE_ON_RESUME = {*PLACES, "out", "device", "micro_batch", "checkpointing", "save_every",
                  "save_minutes"}
# in these a stage and the ones that it builds on must agree
SHARED_BY_STAGES = ["base_sha256", "encoder_sha256", "data_sha256", "variant", "rank", "lora_alpha",
                    "pooling", "query_format", "encoder_layers", "train_encoder", "start",
                    "seed"]
# by each of these a folder is known as a run's
OURS = {".lock", "stage1.safetensors", "personafuse.json"}


class Run:
    """One process's hold on a run's folder: plan(), then begin(), in the end close().

    Of several processes only the main one plans, begins and writes; all of them may load states.
    """

    def __init__(self, out, settings, is_main=True):
        # the real folder, by whatever name: one folder has one lock
        self.out = Path(os.path.realpath(out))
        self.metrics_file = self.out / "metrics.jsonl"
        self.settings = {key: value for key, value in settings.items() if key not in NOT_SAVED}
        self.is_main = is_main
        self.lock = FileLock(self.out / ".lock", timeout=0)
        self.stop_requested = False
        self.saved_at = time.monotonic()

    # ------------------------------------------------------------------------------------ planning

    def plan(self, stages, resume):
        """Lock the folder -> the stage and the step to start at, or None where all is done.

        stages: those asked for, in order. UserError for whatever stands in the way. Nothing moves
        before begin().
        """
        if resume and not self.begun():
            raise UserError(f"there is nothing to resume in {self.out} yet: start without --resume")
        self.take_lock()
        begun = self.begun()
        start = stages[0], 0
        if resume:
            start = self.first_incomplete(stages)
            if start is None:
                return None
        stage, step = start
        # --resume trains nothing below a later stage, which came from what stood there
        last = max(stage, *begun) if resume else stage
        # a baseline has no router
        order = [1, 2, 3] if self.settings["variant"] == "personafuse" else [1, 3]
        for earlier in order:
            if earlier < last and not self.header(earlier)["done"]:
                raise UserError(f"stage {last} starts from what stage {earlier} wrote, and "
                                f"{self.out} has no finished stage {earlier}: run --stage "
                                f"{earlier} first, with --resume where it is the last that has "
                                "begun, else without --resume")
        # a run may have been stripped of its states
        if os.path.exists(self.out / "personafuse.json"):
            begun.append(1)
        self.moves_aside = not resume and max(begun, default=0) >= stage
        for key in PLACES:
            # a base may also be a name, which lies nowhere
            path = Path("/", self.settings.get(key) or "").resolve()
            if self.moves_aside and path.is_relative_to(self.out):
                raise UserError(f"{self.out} holds a run that would move aside, and {path} lies in "
                                "it: give another --out")
        self.start = start
        return start

    def take_lock(self):
        """The operating system's lock: it goes with the process, however that ends."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            names = os.listdir(self.out)
            # what a fresh disk or a checkout puts into a folder is nobody's work
            content = [name for name in names if name[0] != "." and name != "lost+found"]
            if content and not OURS & set(names):
                raise UserError(f"{self.out} holds {min(content)}, which is not of a run: "
                                "give another --out")
            self.lock.acquire()
        except Timeout:
            raise UserError(f"another run is writing into {self.out}: wait for its end, or give "
                            "another --out")
        except OSError as error:
            raise UserError(f"cannot write into {self.out}: {error.strerror}; give another --out")

    def first_incomplete(self, stages):
        """The (stage, step) where --resume goes on; None where nothing is left to do."""
        fixed = [key for key in self.settings if key not in FREE_ON_RESUME]
        # a stage is complete when it is evaluated: killed before, it makes up for that, but not
        # when a later one has begun, for what others read is the later one's then
        evaluated = [line["stage"] for line in self.metrics() if "held_out" in line]
        last = max(self.begun())
        for stage in stages:
            # those of these that have begun were begun by a command like this one
            header = self.header(stage, fixed)
            if not header["done"] or (stage == last and stage not in evaluated):
                return stage, header["step"]

    def header(self, stage, keys=SHARED_BY_STAGES):
        """What a stage's state says of itself; UserError where its settings differ in these keys.
        """
        if stage not in self.begun():
            return {"step": 0, "done": False}
        _, header = self.load_state(stage, tensors=False)
        theirs = header["settings"]
        for key in keys:
            if theirs.get(key) != self.settings.get(key):
                # of a hash the name that goes with it
                key = key.removesuffix("_sha256")
                raise UserError(f"{self.out} was made with {key} = {theirs.get(key)!r}, this "
                                f"command's {self.settings.get(key)!r} is not the same: give that, "
                                "or another --out")
        return header

    # ----------------------------------------------------------------------------------- beginning

    def begin(self):
        """Make the folder ready for what plan() said."""
        # what was logged after the state that the run goes on from is logged again
        kept = []
        for line in self.metrics():
            if (line["stage"], line["step"], "held_out" in line) <= (*self.start, False):
                kept.append(json.dumps(line) + "\n")
        if self.moves_aside:
            self.move_aside()
        write_text(self.metrics_file, "".join(kept))
        self.saved_at = time.monotonic()

    def move_aside(self):
        """What is in out/tiny goes to out/tiny.1, or the next free number; of the stages that the
        new run builds on a copy.
        """
        number = 1
        while os.path.lexists(f"{self.out}.{number}"):
            number += 1
        aside = Path(f"{self.out}.{number}")
        copied = [self.state_file(earlier).name for earlier in range(1, self.start[0])]
        try:
            aside.mkdir()
            # in this order the states go last: what a crash leaves here still moves aside, as a run
            for name in sorted(os.listdir(self.out)):
                if name in copied:
                    shutil.copy2(self.out / name, aside)
                elif name[0] != ".":
                    os.rename(self.out / name, aside / name)
        except OSError as error:
            # only where nothing has moved yet
            with suppress(OSError):
                aside.rmdir()
            raise UserError(f"{self.out} holds a run and cannot be moved aside ({error.strerror}): "
                            "give another --out")
        print(f"{self.out} holds a run already; it is now {aside}")

    def close(self):
        self.lock.release()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    # -------------------------------------------------------------------------------------- metrics

    def log(self, line):
        """Append a dict with "stage" and "step" to metrics.jsonl, as ASCII."""
        if not self.is_main:
            return
        try:
            with open(self.metrics_file, "a") as file:
                print(json.dumps(line), file=file)
        except OSError as error:
            raise UserError(f"cannot write {self.metrics_file}: {error.strerror}; "
                            "--resume goes on from the last saved step")

    def metrics(self):
        """Yield the lines of metrics.jsonl as dicts, but for those that a full disk or a crash
        broke.
        """
        if not self.metrics_file.is_file():
            return
        for text in self.metrics_file.read_bytes().splitlines():
            with suppress(ValueError, KeyError, TypeError):
                line = json.loads(text)
                if line["stage"] + line["step"] > 0:
                    yield line

    # --------------------------------------------------------------------------------------- states

    def state_file(self, stage):
        return self.out / f"stage{stage}.safetensors"

    def begun(self):
        """The stages that have a state."""
        return [stage for stage in (1, 2, 3) if self.state_file(stage).exists()]

    def save_state(self, stage, step, tensors, done):
        """Write a stage's tensors by name, and where it stands."""
        self.saved_at = time.monotonic()
        if not self.is_main:
            return
        tensors = {name: t.contiguous() for name, t in tensors.items()}
        header = {"step": step, "done": done, "settings": self.settings}
        with atomic_write(self.state_file(stage)) as tmp:
            save_file(tensors, tmp, metadata={"personafuse": json.dumps(header)})

    def load_state(self, stage, tensors=True):
        """-> what `save_state` wrote: tensors by name (none if not asked for), and the header."""
        path = self.state_file(stage)
        try:
            with safe_open(path, "pt") as file:
                header = json.loads(file.metadata()["personafuse"])
                names = file.keys() if tensors else []
                # copies, for Windows cannot replace a file that is still mapped
                return {name: file.get_tensor(name).clone() for name in names}, header
        except Exception as error:      # of the disk, of safetensors, or a header that is not ours
            raise UserError(f"cannot read the saved state {path}: {error}; remove that file, and "
                            "its stage starts again")

    # ---------------------------------------------------------------------------- clock and signals

    def save_due(self, step):
        """Whether it is time to save, after `save_every` steps or `save_minutes`."""
        every = self.settings["save_every"]
        minutes = (time.monotonic() - self.saved_at) / 60
        return minutes >= self.settings["save_minutes"] or (every and step % every == 0)

    def watch_signals(self):
        """From now on Ctrl-C and SIGTERM only ask the run to stop; a second one ends it at once."""
        signal.signal(signal.SIGINT, self.on_signal)
        signal.signal(signal.SIGTERM, self.on_signal)

    def on_signal(self, number, frame):
        if self.stop_requested:
            raise KeyboardInterrupt
        self.stop_requested = True
