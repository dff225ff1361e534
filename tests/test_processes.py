"""Several processes as one: a step, a run, their shares of the base, and what happens when one of
them is lost or stopped.
"""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, fails_in_one_line, program, succeeds, train_arguments
from safetensors.torch import load_file, save_file
from started import LIMIT, Started
from test_train import batch_of, make_trainer, our_step, plain_step, same_step

import train
from personafuse import load_llama
from plumbing.processes import my_share, process_rank, shard

CPU = torch.device("cpu")


def train_together(folder, mini, data, out, *more, count=2):
    return Started(folder, train.main, train_arguments(mini, data, out, *more), count)


def weights(out, stage=3):
    return load_file(out / f"stage{stage}.safetensors")


def same_to_rounding(a, b):
    assert a.keys() == b.keys()
    return max((a[key] - b[key]).abs().max() for key in a) < 2e-4


def figures(out):
    """What the held-out evaluations of a run logged."""
    text = (out / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    return [line["held_out"] for line in lines if "held_out" in line]


def has_logged(out, lines):
    path = out / "metrics.jsonl"
    return path.exists() and len(path.read_text(encoding="utf-8").splitlines()) >= lines


# ----------------------------------------------------------------------------------- one step

def steps_of_three():
    """A step of each stage by one of three processes; the first one writes down what came of it."""
    mini, data, folder = sys.argv
    dist.init_process_group("gloo")
    model, examples = make_trainer(mini, data)
    for stage in (1, 2, 3):
        moved = copy.deepcopy(model)
        loss, norm = our_step(moved, stage, batch_of(stage, examples), micro_batch=2, clip=0.3)
        if process_rank() == 0:
            save_file(moved.state_dict(), Path(folder, f"step{stage}.safetensors"))
            Path(folder, f"step{stage}.json").write_text(json.dumps([loss, norm]))
    dist.destroy_process_group()


def test_a_step_of_three_processes_is_the_plain_loss(mini, small_data, tmp_path):
    """Their shares are not equal: 30 and 10 rows, some of them counted by a weight of 0."""
    with Started(tmp_path, steps_of_three, [mini, small_data, tmp_path], count=3) as processes:
        result = processes.wait()
    assert result.returncode == 0, result.stderr
    before, examples = make_trainer(mini, small_data)
    for stage in (1, 2, 3):
        plain = copy.deepcopy(before)
        plain_loss, plain_norm = plain_step(plain, stage, batch_of(stage, examples), clip=0.3)
        loss, norm = json.loads((tmp_path / f"step{stage}.json").read_text())
        assert loss == pytest.approx(plain_loss / (10 if stage == 1 else 1), rel=1e-5)
        assert norm == pytest.approx(plain_norm, rel=1e-4)
        ours = copy.deepcopy(before)
        ours.load_state_dict(load_file(tmp_path / f"step{stage}.safetensors"))
        assert same_step(before, ours, plain), stage


def test_shares_are_equally_long_and_count_each_member_once(monkeypatch):
    for count in (1, 2, 3, 8):
        monkeypatch.setattr("plumbing.processes.process_count", lambda: count)
        for n in (1, 2, 7, 8, 30):
            lengths = set()
            counted = [0.0] * n
            for rank in range(count):
                monkeypatch.setattr("plumbing.processes.process_rank", lambda: rank)
                indices, counts = my_share(n)
                lengths.add(len(indices))
                assert len(counts) == len(indices)
                for i, c in zip(indices, counts):
                    counted[i] += c
            assert counted == [1.0] * n
            assert len(lengths) == 1


# ------------------------------------------------------------------------------ as one process

def test_two_processes_are_one(run, mini, small_data, tmp_path):
    """torchrun with two gloo processes and micro-batches: the weights of the one-process run."""
    arguments = train_arguments(mini, small_data, tmp_path / "two", "--micro-batch", 3)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
                "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    # a group of its own, so that no child outlives it
    process = subprocess.Popen([*torchrun, *map(str, arguments)], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True)
    try:
        printed, errors = process.communicate(timeout=LIMIT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 0, errors
    # one of them speaks
    assert printed.count("done:") == 1
    one = weights(run)
    assert same_to_rounding(one, weights(tmp_path / "two"))
    # and stage 3 has moved more than that
    before = weights(run, 1) | weights(run, 2)
    assert not same_to_rounding(one, before)


def test_a_shared_base_and_batches_smaller_than_the_processes(mini, small_data, tmp_path):
    """Three processes, batches of two records: the weights and figures of one process."""
    small = ["--batch1", 1, "--batch3", 2, "--batch2", 2, "--group", 1, "--held-out", 7,
             "--steps1", 2, "--steps2", 2]
    succeeds(*train_arguments(mini, small_data, tmp_path / "one", *small))
    with train_together(tmp_path, mini, small_data, tmp_path / "three", *small, "--shard",
                        "--checkpointing", count=3) as processes:
        result = processes.wait()
    assert result.returncode == 0, result.stderr
    assert same_to_rounding(weights(tmp_path / "one"), weights(tmp_path / "three"))
    pairs = zip(figures(tmp_path / "one"), figures(tmp_path / "three"), strict=True)
    for one, three in pairs:
        assert one == pytest.approx(three, abs=2e-4)


def bytes_of_own(llama):
    total = 0
    for t in llama.parameters():
        part = t.to_local() if hasattr(t, "to_local") else t
        total += part.numel() * part.element_size()
    return total


def share_and_count():
    """A llama's bytes before and after it is shared, and what it computes beside a whole one."""
    folder, out = sys.argv
    dist.init_process_group("gloo")
    whole = load_llama(folder, CPU, torch.float32)
    shared = load_llama(folder, CPU, torch.float32)
    shard(shared, CPU)
    embeddings = shared.embed_tokens.weight.nbytes
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        difference = (whole(tokens) - shared(tokens)).abs().max().item()
    numbers = [bytes_of_own(whole) - embeddings, bytes_of_own(shared) - embeddings, difference]
    Path(out, f"{process_rank()}.json").write_text(json.dumps(numbers))
    dist.destroy_process_group()


def test_each_process_holds_half_of_a_shared_base(mini, tmp_path):
    with Started(tmp_path, share_and_count, [mini, tmp_path], count=2) as processes:
        result = processes.wait()
    assert result.returncode == 0, result.stderr
    for rank in range(2):
        # of its blocks; embeddings are on each
        whole, own, difference = json.loads((tmp_path / f"{rank}.json").read_text())
        assert 0.49 < own / whole < 0.51
        assert difference < 1e-5


def test_one_process_cannot_share(mini, small_data, tmp_path):
    result = program(*train_arguments(mini, small_data, tmp_path / "o", "--shard"))
    assert fails_in_one_line(result, "--shard", "torchrun")


def test_a_run_that_was_shared_is_asked_like_any_other(mini, small_data, tmp_path):
    out = tmp_path / "run"
    with train_together(tmp_path, mini, small_data, out, "--shard") as processes:
        result = processes.wait()
    assert result.returncode == 0, result.stderr
    succeeds("sample.py", "hi", "--run", out, "--max-new-tokens", 2)


# -------------------------------------------------------------------------- a process is lost

@pytest.mark.parametrize("lost, more", [(1, []), (0, ["--shard"])])
def test_a_killed_process_ends_the_others_in_one_line(mini, small_data, tmp_path, lost, more):
    """SIGKILL to one of three: the others end within a minute, and --resume goes on with one."""
    out = tmp_path / "run"
    long = ["--steps1", 3000, "--save-every", 1]
    with train_together(tmp_path, mini, small_data, out, *long, *more, count=3) as started:
        started.wait_for(lambda: has_logged(out, 2))
        began = time.monotonic()
        started.processes[lost].kill()
        result = started.wait()
        assert time.monotonic() - began < 60
        codes = [process.exitcode for process in started.processes]
    assert codes == [-9 if rank == lost else 2 for rank in range(3)]
    # each of the other two says it once
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 2 and "Traceback" not in result.stderr
    for line in lines:
        assert "lost another one" in line and "--resume goes on" in line


def test_a_bad_record_is_said_once(mini, tmp_path):
    """Every process reads the data; the first one speaks."""
    data = tmp_path / "bad.jsonl"
    data.write_text("{}\n")
    with train_together(tmp_path, mini, data, tmp_path / "run") as processes:
        result = processes.wait()
    assert fails_in_one_line(result, "bad.jsonl, line 1", "missing key")


def test_missing_data_is_said_once(mini, tmp_path):
    arguments = (mini, tmp_path / "none.jsonl", tmp_path / "run")
    with train_together(tmp_path, *arguments) as processes:
        result = processes.wait()
    assert fails_in_one_line(result, "none.jsonl", "no regular file")


def test_a_folder_that_cannot_be_is_said_once(mini, small_data, tmp_path):
    (tmp_path / "file").write_text("mine")
    arguments = (mini, small_data, tmp_path / "file" / "run")
    with train_together(tmp_path, *arguments) as processes:
        result = processes.wait()
    assert fails_in_one_line(result, "cannot write into", "file/run")


# --------------------------------------------------------------------- stopping and going on

def test_a_signal_in_the_evaluation_of_two_goes_on_in_one(mini, small_data, tmp_path):
    many = tmp_path / "many.jsonl"
    lines = small_data.read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    with open(many, "w", encoding="utf-8") as file:
        for i in range(30):
            for record in records:
                file.write(json.dumps(record | {"query": f"{record['query']} {i}"}) + "\n")
    out = tmp_path / "run"
    arguments = train_arguments(mini, many, out, "--held-out", 512, "--stage", 1)
    with Started(tmp_path, train.main, arguments, count=2) as started:
        # the last file before the evaluation
        started.wait_for((out / "personafuse.json").exists)
        os.kill(started.processes[1].pid, signal.SIGTERM)
        result = started.wait()
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "in the evaluation" in result.stderr and "--resume goes on" in result.stderr
    succeeds(*arguments, "--resume")
    assert len(figures(out)) == 1


def test_a_stopped_run_of_one_goes_on_in_two_that_share(run, mini, small_data, tmp_path):
    out = tmp_path / "run"
    with train_together(tmp_path, mini, small_data, out, count=1) as started:
        started.wait_for(lambda: has_logged(out, 1))
        os.kill(started.processes[0].pid, signal.SIGINT)
        result = started.wait()
    assert fails_in_one_line(result, "interrupted", "--resume goes on")
    with train_together(tmp_path, mini, small_data, out, "--resume", "--shard") as processes:
        result = processes.wait()
    assert result.returncode == 0, result.stderr
    assert same_to_rounding(weights(out), weights(run))
