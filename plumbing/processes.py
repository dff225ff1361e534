"""Several processes that train as one, started by torchrun, and a base that is shared among them.

With one process every function here says so or does nothing.
"""

import math
import os
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from plumbing.files import UserError

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
        fully_shard(module, mesh=mesh, ignored_params=whole)
    llama.to(device)


@contextmanager
def joined_processes(device):
    """`with joined_processes(device) as device`: the group of all processes, and this one's device.

    When one of them ends with an error, torchrun ends the others and names it.
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
    dist.init_process_group(backend, timeout=TIME_LIMIT)
    try:
        yield device
    except RuntimeError as error:
        # gloo has no error type of its own
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        raise UserError(f"process {process_rank()} lost another one, which ended or hangs: the "
                        "same command with --resume goes on from the last saved step")
    finally:
        dist.destroy_process_group()


def from_first(make):
    """What make() returns in process 0, given to all: only one process reads and writes files.

    Its UserError ends them all, and is said once.
    """
    result = [None, None]
    if process_rank() == 0:
        try:
            result[0] = make()
        except UserError as error:
            result[1] = str(error)
    if process_count() > 1:
        dist.broadcast_object_list(result)
    if result[1] is None:
        return result[0]
    if process_rank() > 0:
        sys.exit(2)
    raise UserError(result[1])


def settle_math():
    """The same bits in every run: call this before several threads compute.

    MKL, which computes cos and sin for PyTorch on Intel's CPUs, chooses a kernel at the first call
    of each. When two threads make that call at once, one of them may get a coarse kernel, off by
    1e-4 (github.com/pytorch/pytorch/issues/188792). Here one thread makes it.
    """
    torch.zeros(1).cos()
    torch.zeros(1).sin()


def any_process(flag):
    """Whether `flag` is true in any of the processes."""
    count = torch.tensor(float(flag))
    sum_over_processes([count])
    return count.item() > 0
