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
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from plumbing.files import UserError, atomic_write

if os.name == "nt":
    import msvcrt
else:
    import fcntl

# options that say how a program is started, not what the run is
NOT_SAVED = {"stage", "resume", "preset", "shard"}
# the hashes tell whether these are the same, wherever they lie
PATHS = {"base", "encoder", "base_folder", "encoder_folder", "data"}
FREE_ON_RESUME = PATHS | {"out", "device", "micro_batch", "checkpointing", "save_every",
                          "save_minutes"}
# in these a stage and the ones that it builds on must agree
SHARED_BY_STAGES = ["base_sha256", "encoder_sha256", "data_sha256", "variant", "rank", "lora_alpha",
                    "pooling", "query_format", "encoder_layers", "train_encoder", "start",
                    "seed"]


class Run:
    """One process's hold on a run's folder: plan(), then begin(), in the end close().

    Of several processes only the main one writes; all of them may load states.
    """

    def __init__(self, out, settings, is_main=True):
        # the real folder: what a link points to is moved aside, and the link stays
        self.out = Path(os.path.realpath(out))
        self.metrics_file = self.out / "metrics.jsonl"
        self.settings = settings
        saved = {key: value for key, value in settings.items() if key not in NOT_SAVED}
        # as they will be read again: JSON makes lists of tuples
        self.saved = json.loads(json.dumps(saved))
        self.is_main = is_main
        self.lock = None
        self.stop_requested = False
        self.handlers = {}
        self.saved_at = time.monotonic()

    # ------------------------------------------------------------------------------------ planning

    def plan(self, stages, resume):
        """-> the stage and the step to start at, or None where all is done. Changes nothing.

        stages: those asked for, in order. UserError for whatever stands in the way.
        """
        self.asked = stages, resume
        # the first folder on the way up that is there
        place = self.out
        while not os.path.exists(place):
            place = place.parent
        if not os.path.isdir(place) or not os.access(place, os.R_OK | os.W_OK | os.X_OK):
            raise UserError(f"cannot write into {place}: it is no folder, or not yours to write; "
                            "give another --out")
        if not self.lock and os.path.exists(self.out / ".lock"):
            # better refused now than when the base is loaded
            self.take_lock()
            self.close()
        if resume:
            self.moves_aside = False
            self.start = self.plan_resumed(stages)
        else:
            self.start = stages[0], 0
            self.check_earlier(stages[0])
            self.moves_aside = self.in_the_way(stages[0])
        return self.start

    def plan_resumed(self, stages):
        """The last begun of these stages, or the next one where that is complete."""
        begun = self.begun()
        if not begun:
            raise UserError(f"there is nothing to resume in {self.out}: start without --resume")
        stage = max(set(begun) & set(stages), default=stages[0])
        self.check_earlier(stage)
        if stage not in begun:
            raise UserError(f"stage {stage} has not begun in {self.out}: start it without --resume")
        _, header = self.load_state(stage, tensors=False)
        self.refuse_difference(header, [key for key in self.saved if key not in FREE_ON_RESUME])
        if begun[-1] > stage:
            # what others read is the later stage's now: nothing may be written over it
            if header["done"]:
                return None
            raise UserError(f"{self.out} holds stage {begun[-1]}, but no finished stage {stage} "
                            "that it came from: start without --resume")
        # a stage is complete when it is evaluated: killed before, it makes up for that
        evaluated = [line["stage"] for line in self.metrics() if "held_out" in line]
        if not header["done"] or stage not in evaluated:
            return stage, header["step"]
        following = [n for n in stages if n > stage]
        return (following[0], 0) if following else None

    def check_earlier(self, stage):
        """UserError unless the stages that this one builds on are finished, with like settings."""
        for earlier in range(1, stage):
            # a baseline has no router
            if earlier == 2 and self.settings["variant"] != "personafuse":
                continue
            header = {"done": False}
            what_to_do = f"run --stage {earlier} first, or --stage all"
            if self.has_state(earlier):
                _, header = self.load_state(earlier, tensors=False)
                what_to_do = f"finish it first (--stage {earlier} --resume)"
            if not header["done"]:
                raise UserError(f"stage {stage} starts from what stage {earlier} wrote, and "
                                f"{self.out} has no finished stage {earlier}: {what_to_do}")
            self.refuse_difference(header, SHARED_BY_STAGES)

    def refuse_difference(self, header, keys):
        """UserError naming the first of these settings in which a saved state differs."""
        for key in keys:
            if key in header["settings"] and header["settings"][key] == self.saved.get(key):
                continue
            name = key.removesuffix("_sha256")
            other = "" if name == key else ", whose contents are not known to be the same"
            raise UserError(f"{self.out} was made with {name} = {header['settings'].get(name)!r}, "
                            f"this command says {self.saved.get(name)!r}{other}: "
                            "give the same, or another --out")

    def in_the_way(self, first_stage):
        """Whether a run stands here that must move aside; UserError where something else does."""
        begun = self.begun()
        if first_stage > 1 and begun[-1] < first_stage:
            return False
        names = set(os.listdir(self.out)) if os.path.exists(self.out) else set()
        if not begun and "personafuse.json" not in names:
            # a run that ended before it saved anything begins again where it is
            if {".lock", "metrics.jsonl"} <= names:
                return False
            # what a fresh disk or a checkout puts into a folder is nobody's work
            content = [name for name in names if name[0] != "." and name != "lost+found"]
            if content:
                raise UserError(f"{self.out} holds {min(content)}, which is not of a run: "
                                "give another --out")
            return False
        for path in [".", *(self.settings.get(key) for key in PATHS)]:
            if path and Path(os.path.realpath(path)).is_relative_to(self.out):
                raise UserError(f"{self.out} holds a run that would move aside, and {path} lies in "
                                "it: give another --out")
        return True

    # ------------------------------------------------------------------------------------- the lock

    def begin(self):
        """Lock the folder and make it ready for what plan() said."""
        if not self.is_main:
            return
        planned = self.start
        self.take_lock()
        # much can happen while a base is loaded
        if self.plan(*self.asked) != planned:
            raise UserError(f"another run has just written into {self.out}: start again")
        if self.moves_aside:
            self.move_aside(planned[0])
        self.forget_later_metrics(*planned)
        self.saved_at = time.monotonic()

    def take_lock(self):
        """The operating system's lock: it goes with the process, however that ends."""
        path = self.out / ".lock"
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            lock = open(path, "a")
        except OSError as error:
            raise UserError(f"cannot write into {self.out}: {error.strerror}")
        try:
            if os.name == "nt":
                msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # not one that moved aside with its folder between the two lines
            mine = os.path.samestat(os.fstat(lock.fileno()), os.stat(path))
        except (BlockingIOError, PermissionError, FileNotFoundError):
            mine = False
        except OSError:
            # some network file systems have no locks
            mine = True
        if not mine:
            lock.close()
            raise UserError(f"another run is writing into {self.out}: wait for its end, or give "
                            "another --out")
        self.lock = lock

    def move_aside(self, first_stage):
        """out/tiny becomes out/tiny.1, or the next free number; earlier stages are copied back."""
        number = 1
        while os.path.lexists(f"{self.out}.{number}"):
            number += 1
        aside = Path(f"{self.out}.{number}")
        old_lock = self.lock
        if os.name == "nt":
            # no folder with an open file can be renamed there, so that nobody else's moves either
            old_lock.close()
        try:
            self.out.rename(aside)
        except OSError as error:
            raise UserError(f"{self.out} holds a run and cannot be moved aside ({error.strerror}): "
                            "give another --out")
        print(f"{self.out} holds a run already; it is now {aside}")
        # the old lock is held until the new one is: nobody finds the run unlocked on its way
        self.take_lock()
        old_lock.close()
        for stage in range(1, first_stage):
            path = self.state_file(stage)
            if (aside / path.name).exists():
                with atomic_write(path) as tmp:
                    shutil.copyfile(aside / path.name, tmp)

    def close(self):
        if self.lock:
            self.lock.close()
            self.lock = None
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    # -------------------------------------------------------------------------------------- metrics

    def log(self, line):
        """Append a dict with "stage" and "step" to metrics.jsonl."""
        if not self.is_main:
            return
        try:
            with open(self.metrics_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.metrics_file}: {error.strerror}; "
                            "--resume goes on from the last saved step")

    def metrics(self):
        """The lines of metrics.jsonl as dicts, but for those that a full disk or a crash broke."""
        if not self.metrics_file.exists():
            return []
        lines = []
        for text in self.metrics_file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
                if isinstance(line["stage"] + line["step"], int):
                    lines.append(line)
            except (ValueError, KeyError, TypeError):
                pass
        return lines

    def forget_later_metrics(self, stage, step):
        """Drop what was logged after the state that a run goes on from, and what is broken."""
        kept = []
        for line in self.metrics():
            if (line["stage"], line["step"], "held_out" in line) <= (stage, step, False):
                kept.append(json.dumps(line) + "\n")
        with atomic_write(self.metrics_file) as tmp:
            tmp.write_text("".join(kept), encoding="utf-8")

    # --------------------------------------------------------------------------------------- states

    def state_file(self, stage):
        return self.out / f"stage{stage}.safetensors"

    def has_state(self, stage):
        return os.path.exists(self.state_file(stage))

    def begun(self):
        """The stages that have a state."""
        return [stage for stage in (1, 2, 3) if self.has_state(stage)]

    def save_state(self, stage, step, tensors, done):
        """Write a stage's tensors by name, and where it stands."""
        self.saved_at = time.monotonic()
        if not self.is_main:
            return
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        header = {"stage": stage, "step": step, "done": done, "settings": self.saved}
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
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"cannot read the saved state {path}: {error}; remove that file, and "
                            "its stage starts again")

    # ---------------------------------------------------------------------------- clock and signals

    def save_due(self, step):
        """Whether it is time to save, after `save_every` steps or `save_minutes`."""
        every = self.settings.get("save_every")
        if every and step % every == 0:
            return True
        minutes = self.settings.get("save_minutes")
        return bool(minutes) and time.monotonic() - self.saved_at >= 60 * minutes

    def watch_signals(self):
        """From now on Ctrl-C and SIGTERM only ask the run to stop; a second one ends it at once."""
        self.handlers = {number: signal.signal(number, self.on_signal)
                         for number in (signal.SIGINT, signal.SIGTERM)}

    def on_signal(self, number, frame):
        if self.stop_requested:
            raise KeyboardInterrupt
        self.stop_requested = True
