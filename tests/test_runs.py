"""plumbing/runs.py: what a run's folder may be, who writes into it, and where --resume goes on."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from plumbing.files import UserError
from plumbing.runs import Run

ROOT = Path(__file__).parent.parent
SETTINGS = dict(
    base="plain", base_folder="/models/plain", base_sha256="b1", encoder="plain",
    encoder_folder="/models/plain", encoder_sha256="e1", data="/data/ten.jsonl", data_sha256="d1",
    variant="personafuse", names=["high", "low"], rank=8, lora_alpha=16.0, pooling="last",
    query_format="raw", encoder_layers=0, train_encoder=True, start="means", seed=0, lr1=1e-3, steps1=3,
    save_every=None, save_minutes=60, device="auto", stage="all", resume=False, preset="quick")
ALL = [1, 2, 3]


def train(out, stages, resume=False, until=None, evaluate=True, **changes):
    """What train.py does with a Run: three steps a stage, each of them saved.

    `until` (stage, step): killed after that step. A state's tensor tells the stage and the step.
    """
    run = Run(out, SETTINGS | changes)
    start = run.plan(stages, resume)
    run.begin()
    for stage in stages[stages.index(start[0]):]:
        first_step = start[1] if stage == start[0] else 0
        for step in range(first_step, 3):
            run.log({"stage": stage, "step": step + 1, "lm": 0.5})
            run.save_state(stage, step + 1, weights(stage, step + 1), done=False)
            if (stage, step + 1) == until:
                run.close()
                return run
        run.save_state(stage, 3, weights(stage, 3), done=True)
        (run.out / "personafuse.json").write_text("{}")
        if evaluate:
            run.log({"stage": stage, "step": 3, "held_out": {"loss_base": 1.0}})
    run.close()
    return run


def weights(stage, step):
    return {"A": torch.tensor([stage, step])}


def plan(out, stages, resume=False, **changes):
    return Run(out, SETTINGS | changes).plan(stages, resume)


def files(folder):
    """Every file below a folder and what is in it, but for the lock."""
    return {path.relative_to(folder): path.read_bytes()
            for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def refused(folder, stages, *words, resume=False, begin=False, **changes):
    """Refused in one line with these words, and every file below `folder` as it was."""
    before = files(folder)
    run = Run(changes.pop("out", folder), SETTINGS | changes)
    with pytest.raises(UserError) as error:
        run.plan(stages, resume)
        if begin:
            run.begin()
    run.close()
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert files(folder) == before


def stages_in(folder):
    """(stage, step) of each state in a folder, as its tensor tells."""
    run = Run(folder, SETTINGS)
    return [tuple(run.load_state(n)[0]["A"].tolist()) for n in run.begun()]


# ----------------------------------------------------------------------------- where resume goes on

def test_a_state_is_read_as_it_was_written(tmp_path):
    run = Run(tmp_path / "run", SETTINGS)
    run.plan(ALL, resume=False)
    run.begin()
    tensors = {"A": torch.randn(3, 4).T, "exp_avg A": torch.randn(2).bfloat16()}
    run.save_state(1, 2, tensors, done=False)
    loaded, header = run.load_state(1)
    assert loaded.keys() == tensors.keys()
    for name, t in tensors.items():
        assert torch.equal(loaded[name], t) and loaded[name].dtype == t.dtype
    assert (header["step"], header["done"]) == (2, False)
    # how a program is started is not part of what a run is
    assert not {"stage", "resume", "preset", "shard"} & header["settings"].keys()
    run.close()


@pytest.mark.parametrize("until", [(1, 1), (2, 2), (3, 1)])
def test_resume_goes_on_after_the_last_saved_step(tmp_path, until):
    out = tmp_path / "run"
    train(out, ALL, until=until)
    assert plan(out, ALL, resume=True) == until
    train(out, ALL, resume=True)
    whole = train(tmp_path / "whole", ALL)
    # no step twice, none left out
    assert files(out)[Path("metrics.jsonl")] == files(whole.out)[Path("metrics.jsonl")]
    assert not (tmp_path / "run.1").exists()


def test_a_finished_stage_goes_on_with_the_next(tmp_path):
    train(tmp_path, [1])
    assert plan(tmp_path, ALL, resume=True) == (2, 0)


def test_a_finished_stage_that_was_not_evaluated_makes_up_for_it(tmp_path):
    train(tmp_path, [1], evaluate=False)
    assert plan(tmp_path, ALL, resume=True) == (1, 3)
    assert plan(tmp_path, [1], resume=True) == (1, 3)


def test_a_complete_run_has_nothing_to_resume(tmp_path):
    train(tmp_path, ALL)
    assert plan(tmp_path, ALL, resume=True) is None
    assert plan(tmp_path, [3], resume=True) is None


@pytest.mark.parametrize("evaluate", [True, False])
def test_an_earlier_stage_is_not_written_over_what_later_ones_trained(tmp_path, evaluate):
    train(tmp_path, ALL, evaluate=evaluate)
    assert plan(tmp_path, [1], resume=True) is None
    assert plan(tmp_path, [2], resume=True) is None


def test_a_stage_does_not_take_over_the_step_of_an_earlier_one(tmp_path):
    train(tmp_path, [1], until=(1, 2))
    refused(tmp_path, [2], "no finished stage 1", "--stage 1 first", "--resume", resume=True)
    train(tmp_path, [1], resume=True)
    refused(tmp_path, [3], "no finished stage 2", "--stage 2", resume=True)
    assert plan(tmp_path, [2]) == plan(tmp_path, [2], resume=True) == (2, 0)
    train(tmp_path, [2])
    assert plan(tmp_path, [3], resume=True) == (3, 0)
    train(tmp_path, [3], until=(3, 1))
    assert plan(tmp_path, [3], resume=True) == (3, 1)


def test_nothing_to_resume(tmp_path):
    refused(tmp_path, ALL, "nothing to resume", "without --resume", resume=True)
    refused(tmp_path, [2], "nothing to resume", resume=True)


def test_a_stage_alone_needs_the_earlier_ones(tmp_path):
    refused(tmp_path, [2], "no finished stage 1", "run --stage 1 first")
    train(tmp_path, [1], until=(1, 2))
    refused(tmp_path, [2], "no finished stage 1", "--stage 1 first", "--resume")
    train(tmp_path, [1], resume=True)
    refused(tmp_path, [3], "no finished stage 2")
    # they must be of the same base, data and shape; another rate is no matter
    refused(tmp_path, [2], "rank = 8", rank=4)
    refused(tmp_path, [2], "another --out", base_sha256="b2")
    assert plan(tmp_path, [2], lr1=5.0) == (2, 0)


def test_a_baseline_has_no_stage_2(tmp_path):
    baseline = dict(variant="direct", encoder=None, encoder_folder=None, encoder_sha256=None)
    train(tmp_path, [1, 3], until=(1, 3), **baseline)
    assert plan(tmp_path, [1, 3], resume=True, **baseline) == (1, 3)
    train(tmp_path, [1, 3], resume=True, **baseline)
    assert plan(tmp_path, [1, 3], resume=True, **baseline) is None
    assert plan(tmp_path, [3], **baseline) == (3, 0)


def test_an_unfinished_stage_below_a_later_one_is_not_gone_on_with(tmp_path):
    out = tmp_path / "run"
    train(out, ALL)
    half = train(tmp_path / "half", [1], until=(1, 2))
    half.state_file(1).replace(out / "stage1.safetensors")
    refused(out, [1], "no finished stage 1", "without --resume", resume=True)
    refused(out, ALL, "no finished stage 1", resume=True)
    (out / "stage1.safetensors").unlink()
    refused(out, ALL, "no finished stage 1", resume=True)
    refused(out, [1], "no finished stage 1", resume=True)


@pytest.mark.parametrize("damage", ["empty", "cut", "other"])
def test_a_state_that_cannot_be_read(tmp_path, damage):
    train(tmp_path, ALL, until=(2, 1))
    path = tmp_path / "stage2.safetensors"
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": whole[:-3], "other": b"mine" * 9}[damage])
    refused(tmp_path, ALL, str(path), "remove that file", resume=True)
    # which is what to do
    path.unlink()
    assert plan(tmp_path, ALL, resume=True) == (2, 0)


def test_a_state_without_our_header(tmp_path):
    from safetensors.torch import save_file
    save_file(weights(1, 1), tmp_path / "stage1.safetensors")
    refused(tmp_path, ALL, "stage1.safetensors", "remove that file", resume=True)


# -------------------------------------------------------------------------------- the same settings

def test_the_same_contents_resume_wherever_they_lie(tmp_path):
    train(tmp_path, ALL, until=(1, 2))
    assert plan(tmp_path, ALL, resume=True, base="/elsewhere/plain", base_folder="/elsewhere/plain",
                encoder="copy", encoder_folder="/cache/copy", data="/mnt/ten.jsonl") == (1, 2)
    assert plan(tmp_path, ALL, resume=True, device="cuda", micro_batch=2, checkpointing=True,
                save_every=7, save_minutes=3.0, shard=True, preset="paper") == (1, 2)


@pytest.mark.parametrize("what", ["base", "encoder", "data"])
def test_other_contents_are_refused(tmp_path, what):
    for until in ((1, 2), None):
        train(tmp_path, ALL, until=until, resume=until is None)
        refused(tmp_path, ALL, f"with {what} = '{SETTINGS[what]}'", "is not the same", "--out",
                resume=True, **{f"{what}_sha256": "other"})


def test_other_settings_are_named(tmp_path):
    train(tmp_path, ALL, until=(1, 2))
    refused(tmp_path, ALL, "lr1 = 0.001", "0.5 is not the same", resume=True, lr1=0.5)
    # a setting that the run did not know may have been otherwise
    refused(tmp_path, ALL, "new", resume=True, new=1)
    train(tmp_path, ALL, resume=True)
    refused(tmp_path, ALL, "lr1 = 0.001", "0.5 is not the same", resume=True, lr1=0.5)


# --------------------------------------------------------------------------------- only a run moves

def test_a_run_moves_aside(tmp_path, capsys):
    out = tmp_path / "run"
    stood = []
    for seed in range(4):
        train(out, ALL, until=(seed % 3 + 1, 3), seed=seed)
        stood.append(files(out))
    printed = capsys.readouterr().out
    for number in (1, 2, 3):
        assert files(tmp_path / f"run.{number}") == stood[number - 1]
        assert f"{out} holds a run already; it is now {out}.{number}\n" in printed
    assert (out / "metrics.jsonl").read_text().count("\n") == 3


def test_a_stage_run_again_moves_the_run_aside_and_keeps_what_it_builds_on(tmp_path):
    out = tmp_path / "run"
    train(out, ALL)
    before = files(out)
    train(out, [2], until=(2, 1))
    assert files(tmp_path / "run.1") == before
    assert stages_in(out) == [(1, 3), (2, 1)]
    assert files(out)[Path("stage1.safetensors")] == before[Path("stage1.safetensors")]
    # what stage 1 logged is there again, three steps and its evaluation, then the step of stage 2
    logged = [json.loads(line)["stage"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert logged == [1, 1, 1, 1, 2]
    train(out, [2])
    train(out, [3])
    assert stages_in(out) == [(1, 3), (2, 3), (3, 3)]
    assert not (tmp_path / "run.3").exists()


def test_a_run_that_saved_nothing_begins_again_where_it_is(tmp_path):
    run = Run(tmp_path, SETTINGS)
    run.plan(ALL, resume=False)
    run.begin()
    run.log({"stage": 1, "step": 1})
    run.close()
    # killed in its first save
    (tmp_path / "stage1.safetensors.tmp").write_bytes(b"half")
    refused(tmp_path, ALL, "nothing to resume", resume=True)
    train(tmp_path, [1])
    assert [line["step"] for line in run.metrics()] == [1, 2, 3, 3]
    assert not tmp_path.with_name(tmp_path.name + ".1").exists()


@pytest.mark.parametrize("name", ["notes.txt", "base/config.json", "metrics.jsonl", "stage1.txt"])
def test_a_folder_of_the_users_is_refused(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    refused(tmp_path, ALL, f"holds {Path(name).parts[0]}", "another --out")


def test_a_folder_without_content_is_used_as_it_is(tmp_path):
    (tmp_path / ".gitkeep").touch()
    (tmp_path / "lost+found").mkdir()
    train(tmp_path, ALL)
    # it is no part of the run, and does not move with it
    out = tmp_path / "run"
    out.mkdir()
    (out / ".gitkeep").touch()
    train(out, ALL)
    train(out, ALL)
    assert (out / ".gitkeep").exists() and not (tmp_path / "run.1" / ".gitkeep").exists()
    assert (tmp_path / ".gitkeep").exists()
    assert not tmp_path.with_name(tmp_path.name + ".1").exists()


@pytest.mark.parametrize("crash", range(1, 9))
def test_a_crash_on_the_way_aside_loses_nothing(tmp_path, monkeypatch, crash):
    out = tmp_path / "run"
    train(out, ALL, seed=1)
    (out / "high").mkdir()
    (out / "high" / "adapter.safetensors").write_bytes(b"high")
    before = files(out)
    rename = os.rename
    left = iter(range(1, crash))

    def rename_until(*paths):
        if next(left, None) is None:
            raise KeyboardInterrupt
        rename(*paths)

    monkeypatch.setattr(os, "rename", rename_until)
    # a folder's names come in any order
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: sorted(listdir(folder), reverse=True))
    run = Run(out, SETTINGS)
    run.plan(ALL, resume=False)
    with suppress(KeyboardInterrupt):
        run.begin()
    run.close()
    monkeypatch.setattr(os, "rename", rename)
    train(out, ALL, seed=2)
    # whole, but in two folders: no file was written over
    moved = {}
    for folder in sorted(tmp_path.glob("run.*")):
        moved |= files(folder)
    assert moved == before


@pytest.mark.parametrize("inside", ["base", "encoder", "base_folder", "encoder_folder", "data"])
def test_a_run_that_holds_what_the_next_one_reads_stays(tmp_path, inside):
    out = tmp_path / "run"
    train(out, ALL)
    refused(tmp_path, ALL, "lies in it", "another --out", out=out, **{inside: str(out / "mine")})
    # by another way to the same place
    (tmp_path / "link").symlink_to(out)
    refused(tmp_path, ALL, "lies in it", out=out, **{inside: str(tmp_path / "link" / "mine")})
    # which is no matter where nothing moves
    train(tmp_path / "other", [1])
    assert plan(tmp_path / "other", [2], **{inside: str(tmp_path / "other" / "mine")}) == (2, 0)


@pytest.mark.parametrize("below", [False, True])
def test_the_working_directory_stays_while_the_run_in_it_moves(tmp_path, monkeypatch, below):
    out = tmp_path / "run"
    train(out, ALL)
    before = files(out)
    (out / "sub").mkdir()
    monkeypatch.chdir(out / "sub" if below else out)
    assert plan(".." if below else ".", ALL, resume=True) is None
    train(".." if below else ".", [1])
    assert stages_in(out) == [(1, 3)] and files(tmp_path / "run.1") == before


def test_the_working_directory_is_used_when_it_is_empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(".", [1])
    assert stages_in(tmp_path) == [(1, 3)]


def test_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(tmp_path, ALL, "cannot write", "another --out", out=tmp_path / "file")
    refused(tmp_path, ALL, "cannot write", "another --out", out=tmp_path / "file" / "run" / "deep")
    refused(tmp_path, ALL, "cannot write", out=os.devnull)


def test_a_name_that_is_too_long_is_refused(tmp_path):
    refused(tmp_path, ALL, "cannot write into", out=tmp_path / ("long" * 100), begin=True)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_not_ours_to_write_is_refused(tmp_path):
    out = tmp_path / "run"
    train(out, ALL, until=(1, 2))
    out.chmod(0o500)
    try:
        refused(tmp_path, ALL, "cannot write", out=out, begin=True, resume=True)
        refused(tmp_path, ALL, "cannot write into", out=out / "new")
    finally:
        out.chmod(0o700)


def test_a_mount_point_with_a_run_is_refused(tmp_path, monkeypatch):
    out = tmp_path / "run"
    train(out, ALL)

    def busy(*_):
        raise OSError(errno.EBUSY, "Device or resource busy")
    monkeypatch.setattr(os, "rename", busy)
    refused(tmp_path, ALL, "cannot be moved aside (Device or resource busy)", out=out, begin=True)
    assert not (tmp_path / "run.1").exists()


def test_a_link_stays_and_the_folder_that_it_points_to_moves(tmp_path):
    big = tmp_path / "big" / "run"
    big.parent.mkdir()
    link = tmp_path / "link"
    link.symlink_to(big)
    train(link, [1], seed=1)
    before = files(big)
    train(f"{link}/", [1], seed=2)
    assert link.is_symlink() and link.resolve() == big
    assert files(tmp_path / "big" / "run.1") == before


@pytest.mark.parametrize("form", ["run/", "run/.", "other/../run", "./run//"])
def test_the_same_folder_written_otherwise(tmp_path, form):
    train(tmp_path / "run", [1])
    (tmp_path / "other").mkdir()
    train(f"{tmp_path}/{form}", [1])
    assert sorted(os.listdir(tmp_path)) == ["other", "run", "run.1"]


# ----------------------------------------------------------------------------------------- the lock

HOLD = """
import sys
from plumbing.runs import Run
run = Run(sys.argv[1], {"variant": "personafuse"})
run.plan([1], resume=False)
run.begin()
run.log({"stage": 1, "step": 1})
print("begun", flush=True)
input()
"""


@pytest.fixture
def other_process(tmp_path):
    """Another process that has begun a run in tmp_path/run; it ends with this one at the latest."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], cwd=ROOT, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "begun\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_is_refused_until_the_first_has_died(tmp_path, other_process):
    out = tmp_path / "run"
    refused(tmp_path, ALL, "another run is writing", "another --out", out=out)
    refused(tmp_path, ALL, "another run is writing", out=f"{tmp_path}/./run")
    other_process.send_signal(signal.SIGKILL)
    other_process.wait(timeout=60)
    train(out, [1])
    assert stages_in(out) == [(1, 3)]


def test_a_folder_is_locked_from_the_plan_to_the_end(tmp_path):
    out = tmp_path / "run"
    train(out, ALL)
    first = Run(out, SETTINGS)
    first.plan(ALL, resume=False)
    refused(tmp_path, ALL, "another run is writing", out=out, resume=True)
    first.begin()
    refused(tmp_path, ALL, "another run is writing", out=out)
    first.save_state(1, 3, weights(1, 3), done=True)
    first.close()
    assert plan(out, [1], resume=True) == (1, 3)
    # the run moved aside is locked by nobody
    assert plan(tmp_path / "run.1", ALL, resume=True) is None


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_file_system_without_locks_is_used_all_the_same(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def unsupported(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")
    monkeypatch.setattr(fcntl, "flock", unsupported)
    train(tmp_path, [1])
    assert stages_in(tmp_path) == [(1, 3)]


def test_planning_makes_only_the_folder_and_its_lock(tmp_path):
    assert plan(tmp_path / "new" / "run", ALL) == (1, 0)
    assert os.listdir(tmp_path / "new" / "run") == [".lock"]
    # and what is resumed must be there
    refused(tmp_path, ALL, "nothing to resume", resume=True, out=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    train(tmp_path / "run", ALL)
    before = files(tmp_path)
    assert plan(tmp_path / "run", ALL) == (1, 0)
    assert files(tmp_path) == before


def test_a_process_that_is_not_the_first_writes_nothing(tmp_path):
    run = Run(tmp_path / "run", SETTINGS, is_main=False)
    run.log({"stage": 1, "step": 1})
    run.save_state(1, 1, weights(1, 1), done=False)
    run.close()
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------ metrics

@pytest.mark.parametrize("tail", [b'{"stage": 3', b"\0" * 40, b'{"stage": 3}\n', b"[1, 2]\n",
                                  b"\xff\xfe", b'{"stage": "a", "step": "b"}\n', b"7", b"\n\n"])
def test_a_broken_line_of_the_metrics_is_dropped(tmp_path, tail):
    out = tmp_path / "run"
    train(out, ALL, until=(2, 2))
    path = out / "metrics.jsonl"
    whole = path.read_bytes()
    first, rest = whole.split(b"\n", 1)
    # somewhere in the middle, and at the end
    path.write_bytes(first + b"\n" + tail.strip(b"\n") + b"\n" + rest + tail)
    assert plan(out, ALL, resume=True) == (2, 2)
    train(out, ALL, resume=True, until=(2, 3))
    assert path.read_bytes() == whole + b'{"stage": 2, "step": 3, "lm": 0.5}\n'


def test_what_was_logged_after_the_state_is_dropped(tmp_path):
    out = tmp_path / "run"
    run = train(out, ALL, until=(2, 2))
    whole = (out / "metrics.jsonl").read_bytes()
    run.log({"stage": 2, "step": 3, "lm": 0.1})
    train(out, ALL, resume=True, until=(2, 3))
    assert (out / "metrics.jsonl").read_bytes() == whole + b'{"stage": 2, "step": 3, "lm": 0.5}\n'


def test_an_evaluation_is_not_dropped_with_the_steps_of_the_next_stage(tmp_path):
    run = train(tmp_path, [1])
    run.log({"stage": 2, "step": 1, "lm": 0.1})         # killed before the first state of stage 2
    train(tmp_path, [2])
    logged = [(line["stage"], line["step"], "held_out" in line) for line in run.metrics()]
    one_stage = [(1, False), (2, False), (3, False), (3, True)]
    assert logged == [(stage, *line) for stage in (1, 2) for line in one_stage]


def test_a_full_disk_ends_in_one_line(tmp_path):
    run = train(tmp_path, [1])
    path = tmp_path / "metrics.jsonl"
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="cannot write .*metrics.jsonl.*--resume"):
        run.log({"stage": 1, "step": 1})


# -------------------------------------------------------------------------------- clock and signals

def test_when_to_save(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    run = Run(tmp_path, SETTINGS | {"save_minutes": 2, "save_every": 10})
    run.plan(ALL, resume=False)
    now[0] += 500                       # the base is loaded
    run.begin()
    assert [step for step in range(1, 31) if run.save_due(step)] == [10, 20, 30]
    now[0] += 119
    assert not run.save_due(1)
    now[0] += 1
    assert run.save_due(1) and run.save_due(2)
    run.save_state(1, 2, weights(1, 2), done=False)
    assert not run.save_due(3)
    run.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_to_stop_and_a_second_one_ends_at_once(tmp_path, number):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run = Run(tmp_path, SETTINGS, is_main=False)
    run.watch_signals()
    try:
        assert not run.stop_requested
        signal.raise_signal(number)
        assert run.stop_requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    finally:
        run.close()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
