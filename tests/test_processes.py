"""Several processes as one: their weights, their share of the base, what one of them does to the others, and the cache of
examples that they share.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import FAST, ROOT, fails_in_one_line, make_model, program, train_arguments
from safetensors.torch import load_file


def start(arguments, processes=2, **more):
    """A program under torchrun, as a user starts it -> Popen."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", processes, "--rdzv_backend", "c10d",
               "--rdzv_endpoint", "localhost:0", *arguments]
    return subprocess.Popen([str(part) for part in command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_WAIT_POLICY": "passive"}, **more)


def together(arguments, processes=2):
    process = start(arguments, processes)
    out, error = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def weights(out, stage=3):
    return load_file(out / f"stage{stage}.safetensors")


def same_to_rounding(a, b):
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max() for k in a) < 2e-4


@pytest.mark.parametrize("more", [[], ["--shard"], ["--shard", "--checkpointing"]], ids=str)
def test_two_processes_are_one(run, mini, small_data, tmp_path, more):
    """Two gloo processes and micro-batches, the base whole or shared: the weights of the one-process run, to rounding."""
    result = together(train_arguments(mini, small_data, tmp_path / "two", "--micro-batch", 3, *more))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("done:") == 1                                    # one of them speaks
    one, two = weights(run), weights(tmp_path / "two")
    assert same_to_rounding(one, two)
    assert max((one[k] - weights(run, 1 if k.startswith("base") else 2)[k]).abs().max() for k in one) > 1e-4
