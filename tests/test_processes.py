"""Several processes as one: their weights, their share of the base, what one of them does to the others, and the cache of
examples that they share.
"""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, fails_in_one_line, make_tokenizer, program, train_arguments
from safetensors.torch import load_file

import train
from plumbing.chat import ChatTokenizer, load_records, make_examples, split
from personafuse import load_llama
from plumbing import UserError, file_sha256, run_program
from processes import process_rank, shard
from runs import Settings, read_examples, write_examples

# children of a server that has imported torch once start in no time; forks of this process could not run backward
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["conftest", "train"])


def child(rank, count, port, folder, main, arguments):
    """One of `count` processes as torchrun starts them, its output in a file of the folder."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "localhost",
                   "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    file = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(ROOT)
    sys.argv = [str(part) for part in arguments]
    run_program(main)


class Together:
    """Processes started together, with the store that torchrun's agent would hold."""

    def __init__(self, folder, main, arguments=(), count=2):
        self.folder = folder
        self.store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self.processes = [FORKS.Process(target=child, args=(rank, count, self.store.port, folder, main, arguments))
                          for rank in range(count)]
        for process in self.processes:
            process.start()

    def wait(self):
        """-> what a program's result has: the largest exit code, and all that was written."""
        for process in self.processes:
            process.join(120)
        output = [(self.folder / f"{rank}.txt").read_text() for rank in range(len(self.processes))]
        codes = [process.exitcode for process in self.processes]
        return subprocess.CompletedProcess([], max(codes, key=abs), output[0], "\n".join(output))


def train_together(folder, mini, data, out, *more, count=2):
    return Together(folder, train.main, train_arguments(mini, data, out, *more), count)


def weights(out, stage=3):
    return load_file(out / f"stage{stage}.safetensors")


def same_to_rounding(a, b):
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max() for k in a) < 2e-4


def figures(out):
    """What the held-out evaluations of a run logged."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["held_out"] for line in lines if "held_out" in line]


def wait_for_steps(out, steps):
    """Until the run has logged so many steps."""
    metrics = out / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < steps:
        pass


# --------------------------------------------------------------------------------------------------- as one process

def test_two_processes_are_one(run, mini, small_data, tmp_path):
    """torchrun with two gloo processes and micro-batches: the weights of the one-process run, to rounding."""
    arguments = train_arguments(mini, small_data, tmp_path / "two", "--micro-batch", 3)
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d",
                             "--rdzv_endpoint", "localhost:0", *map(str, arguments)],
                            cwd=ROOT, capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("done:") == 1                                    # one of them speaks
    one, two = weights(run), weights(tmp_path / "two")
    assert same_to_rounding(one, two)
    assert max((one[k] - weights(run, 1 if k.startswith("base") else 2)[k]).abs().max() for k in one) > 1e-4


def test_a_shared_base_and_batches_smaller_than_the_processes(mini, small_data, tmp_path):
    """Three processes, batches of two records, the base shared: the weights and the held-out figures of one process."""
    small = ["--batch1", 1, "--batch3", 2, "--batch2", 2, "--group", 1, "--held-out", 7, "--steps1", 2, "--steps2", 2]
    assert program(*train_arguments(mini, small_data, tmp_path / "one", *small)).returncode == 0
    result = train_together(tmp_path, mini, small_data, tmp_path / "three", *small, "--shard", "--checkpointing", count=3).wait()
    assert result.returncode == 0, result.stderr
    assert same_to_rounding(weights(tmp_path / "one"), weights(tmp_path / "three"))
    for one, three in zip(figures(tmp_path / "one"), figures(tmp_path / "three"), strict=True):
        for key in one.keys() - {"auc"}:
            assert one[key] == pytest.approx(three[key], abs=2e-4), key


def bytes_of_own(llama):
    parts = [t.to_local() if hasattr(t, "to_local") else t for name, t in llama.named_parameters()]
    return sum(t.numel() * t.element_size() for t in parts)


def share_and_count():
    """A llama's bytes before and after it is shared; then what it computes beside one that is not."""
    dist.init_process_group("gloo")
    folder = sys.argv[0]
    whole = load_llama(folder, torch.device("cpu"), torch.float32)
    shared = load_llama(folder, torch.device("cpu"), torch.float32)
    shard(shared, torch.device("cpu"))
    embeddings = shared.embed_tokens.weight.nbytes
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        difference = (whole(tokens) - shared(tokens)).abs().max().item()
    blocks = (bytes_of_own(whole) - embeddings, bytes_of_own(shared) - embeddings)
    Path(sys.argv[1], f"{process_rank()}.json").write_text(json.dumps([*blocks, difference]))
    dist.destroy_process_group()


def test_each_process_holds_half_of_a_shared_base(mini, tmp_path):
    result = Together(tmp_path, share_and_count, [mini, tmp_path]).wait()
    assert result.returncode == 0, result.stderr
    for rank in range(2):
        whole, own, difference = json.loads((tmp_path / f"{rank}.json").read_text())
        assert 0.49 < own / whole < 0.51 and difference < 1e-5                  # of its blocks; embeddings are on each


def test_one_process_cannot_share(mini, small_data, tmp_path):
    assert fails_in_one_line(program(*train_arguments(mini, small_data, tmp_path / "o", "--shard")), "--shard", "torchrun")


# ---------------------------------------------------------------------------------------------- a process is lost

@pytest.mark.parametrize("lost, more", [(1, []), (0, ["--shard"])])
def test_a_killed_process_ends_the_others_in_one_line(run, mini, small_data, tmp_path, lost, more):
    """SIGKILL to one of three: the others end within a minute, say which it was, and --resume goes on with one process."""
    out = tmp_path / "run"
    started = train_together(tmp_path, mini, small_data, out, "--steps1", 3000, "--save-every", 1, *more, count=3)
    wait_for_steps(out, 2)
    started.processes[lost].kill()
    began = time.monotonic()
    result = started.wait()
    assert time.monotonic() - began < 60
    assert [process.exitcode for process in started.processes] == [-9 if rank == lost else 2 for rank in range(3)]
    result.returncode = 2
    assert fails_in_one_line(result, f"process {lost} was lost", "--resume goes on")


def test_a_bad_record_is_said_once(mini, tmp_path):
    data = tmp_path / "bad.jsonl"
    data.write_text("{}\n")
    result = train_together(tmp_path, mini, data, tmp_path / "run").wait()
    assert fails_in_one_line(result, "bad.jsonl, line 1", "missing key")


# ------------------------------------------------------------------------------------------ stopping and going on

def test_a_signal_in_the_evaluation_of_two_goes_on_in_one(mini, small_data, tmp_path):
    many = tmp_path / "many.jsonl"
    records = [json.loads(line) for line in small_data.read_text().splitlines()]
    with open(many, "w") as file:
        for i in range(30):
            file.writelines(json.dumps(r | {"query": f"{r['query']} {i}"}) + "\n" for r in records)
    arguments = train_arguments(mini, many, tmp_path / "run", "--held-out", 0, "--stage", 1)
    started = Together(tmp_path, train.main, arguments)
    while not (tmp_path / "run/personafuse.json").exists():                     # the last file before the evaluation
        pass
    os.kill(started.processes[1].pid, signal.SIGTERM)
    result = started.wait()
    assert fails_in_one_line(result, "in the evaluation", "--resume goes on") and "held out" in result.stderr
    assert program(*arguments, "--resume").returncode == 0
    assert len(figures(tmp_path / "run")) == 1


def test_a_stopped_run_of_one_goes_on_in_two_that_share(run, mini, small_data, tmp_path):
    out = tmp_path / "run"
    started = Together(tmp_path, train.main, train_arguments(mini, small_data, out), count=1)
    while not (out / "stage1.safetensors").exists():                            # the state of step 0
        pass
    os.kill(started.processes[0].pid, signal.SIGINT)
    assert fails_in_one_line(started.wait(), "interrupted", "--resume goes on")
    result = train_together(tmp_path, mini, small_data, out, "--resume", "--shard").wait()
    assert result.returncode == 0, result.stderr
    assert same_to_rounding(weights(out), weights(run))


# ------------------------------------------------------------------------------------------- the examples that they share

def test_a_cache_cut_short_is_made_again(run, mini, small_data, tmp_path):
    out = shutil.copytree(run, tmp_path / "run")
    cache = out / "examples.safetensors"
    whole = cache.read_bytes()
    for cut in (whole[:len(whole) // 2], whole[:5], b""):
        cache.write_bytes(cut)
        result = program(*train_arguments(mini, small_data, out, "--resume"))
        assert result.returncode == 0 and f"{cache} cannot be read (cut short?): made again" in result.stdout
        assert cache.read_bytes() == whole


def test_a_cache_of_another_tokenizer_is_made_again(mini, small_data, tmp_path):
    base = shutil.copytree(mini, tmp_path / "base")
    arguments = train_arguments(base, small_data, tmp_path / "run", "--stage", 1)
    assert program(*arguments).returncode == 0
    cache = tmp_path / "run" / "examples.safetensors"
    before = cache.read_bytes()
    assert "made again" not in program(*arguments, "--resume").stdout
    make_tokenizer(base / "tokenizer.json", texts=["another language altogether"] * 9)
    result = program(*arguments, "--resume")
    assert result.returncode == 0 and f"{cache} is of other data or another tokenizer: made again" in result.stdout
    assert cache.read_bytes() != before


def test_examples_come_back_as_they_were_written(mini, small_data, tmp_path):
    settings = Settings(base=str(mini), encoder=str(mini), data=str(small_data), out=str(tmp_path), max_length=160,
                        data_sha256=file_sha256(small_data), held_out=3)
    records = load_records(small_data)
    write_examples(settings, records)
    training, held = read_examples(settings)
    tokenizer = ChatTokenizer(mini)
    expected = make_examples(split(records)[0], tokenizer, tokenizer, 160)
    assert [(list(e.prompt), list(e.answer), list(e.query), e.p) for e in training] == \
           [(e.prompt, e.answer, e.query, e.p) for e in expected]
    assert len(held) == 3


def test_data_that_changes_while_a_run_reads_it_is_refused(mini, small_data, tmp_path):
    data = shutil.copy(small_data, tmp_path / "data.jsonl")
    settings = Settings(base=str(mini), encoder=str(mini), data=str(data), out=str(tmp_path), max_length=160,
                        data_sha256=file_sha256(data))
    with open(data, "a") as file:
        file.write(small_data.read_text())
    with pytest.raises(UserError, match="data.jsonl has changed while it was read"):
        write_examples(settings, load_records(data))
    assert not (tmp_path / "examples.safetensors").exists()
