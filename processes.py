"""Several processes that train as one, started by torchrun, and a base that is shared among them.

With one process every function here says so or does nothing.
"""

import math
import os
import signal
import sys
import time
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.rendezvous import rendezvous

from plumbing import UserError

# How long the others wait for one process. One that dies closes its connections, and they notice at
# once; this is for one that hangs. It is longer than what process 0 does alone: fetching a base
# (16 GB at 10 MB/s are 27 minutes), tokenizing, and writing a state of 6 GB.
TIME_LIMIT = timedelta(minutes=30)


def process_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def process_count():
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_processes(tensors):
    """Add each tensor up over all processes, in place.

    Plain all-reduce rather than DistributedDataParallel: the few trained tensors need it once.
    """
    if process_count() > 1:
        for t in tensors:
            dist.all_reduce(t)


def gradient_of(t):
    """A parameter's gradient; zeros where this process had no row that reached it."""
    if t.grad is None:
        t.grad = torch.zeros_like(t)
    return t.grad


def average_gradients(parameters):
    """The mean over all processes, in place, where each has the whole gradient already: it keeps
    them in step to the bit.
    """
    if process_count() == 1:
        return
    gradients = [gradient_of(t) for t in parameters]
    sum_over_processes(gradients)
    for gradient in gradients:
        gradient /= process_count()


def watch_signals():
    """A list that gets each SIGINT and SIGTERM: the run ends after the step that is under way.

    A second one ends it at once.
    """
    received = []

    def on_signal(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    return received


def interrupted(received):
    """Whether a signal came to this process or to any other."""
    count = torch.tensor(float(len(received)))
    sum_over_processes([count])
    return count.item() > 0


def my_share(n):
    """The members of range(n) that are this process's, and for each what it counts.

    Every process has as many: where the base is shared they must call it equally often, or wait for
    one another for ever. One that would be short has index 0 again, which counts 0.
    """
    indices = list(range(process_rank(), n, process_count()))
    counts = [1.0] * len(indices)
    if len(indices) < math.ceil(n / process_count()):
        indices.append(0)
        counts.append(0.0)
    return indices, counts


def shard(llama, device):
    """Spread each block of the frozen base over the processes (FSDP2), which put it together again
    for the moment of its use. Embeddings, head and experts stay whole on every process.

    The llama is on the CPU, its weights mapped from their file: only a process's own part of a
    block is copied out of it.
    """
    if process_count() == 1:
        raise UserError("--shard shares the base among processes: start several with torchrun")
    # here, because a run that shares nothing need not wait a second for this import
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (process_count(),))
    whole = {t for name, t in llama.named_parameters()
             if name.endswith((".A", ".B")) or not name.startswith("layers.")}
    for module in (*llama.layers, llama):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    llama.to(device)


@contextmanager
def joined_processes(device):
    """`with joined_processes(device) as device`: the group of all processes, and this one's device.

    An error in one of them ends them all, and one of them says it.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:               # torchrun sets it
        yield device
        return
    backend = "gloo"
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        # what is on the CPU, as whether a signal came, goes by gloo, which notices a loss at once
        backend = "cpu:gloo,cuda:nccl"
    store, rank, count = next(rendezvous("env://"))
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIME_LIMIT)
    try:
        yield device
    except Exception as error:
        lost = isinstance(error, dist.DistError) or "gloo" in str(error)
        if lost:
            # close the connections, so that those who wait for this process notice too
            dist.destroy_process_group()
        store.set(f"alive {rank}", "")
        if store.add("errors", 1) > 1:
            sys.exit(2)                         # another process says what happened
        if lost:
            raise UserError(f"process {silent_processes(store, count)} was lost and ended the run: "
                            "the same command with --resume goes on from the last saved step")
        raise
    dist.destroy_process_group()


def silent_processes(store, count):
    """Which processes do not say within ten seconds that they are there, as text."""
    end = time.monotonic() + 10
    while True:
        silent = [str(rank) for rank in range(count) if not store.check([f"alive {rank}"])]
        if len(silent) <= 1 or time.monotonic() > end:
            return ", ".join(silent) or "(it answers again)"
        time.sleep(0.1)
