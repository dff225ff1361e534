"""Several processes that train as one, started by torchrun, and a base that is shared among them.

With one process every function here says so or does nothing.
"""

import math
import os
import re
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
    one another for ever. One that would be short has one of the first again, which counts 0.
    """
    share = math.ceil(n / process_count())
    mine = range(process_rank(), share * process_count(), process_count())
    return [i % n for i in mine], [float(i < n) for i in mine]


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
    if os.environ.get("WORLD_SIZE", "1") == "1":                # torchrun sets it
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
        # DistBackendError and its like; gloo has no type of its own
        if not re.search("^Dist|[Gg]loo", repr(error)):
            raise
        raise UserError(f"process {process_rank()} lost another one, which ended or hangs: the "
                        "same command with --resume goes on from the last saved step")
    finally:
        dist.destroy_process_group()


def from_first(make):
    """What make() returns in process 0, given to all: only one process reads and writes files.

    Its UserError or OSError ends them all, and is said once.
    """
    result = [None]
    if process_rank() == 0:
        try:
            result = [make()]
        except (UserError, OSError) as error:
            result = [error]
    if process_count() > 1:
        dist.broadcast_object_list(result)
    if not isinstance(result[0], Exception):
        return result[0]
    if process_rank() > 0:
        sys.exit(2)
    # held here no longer, or it would hold what it came through: a run's lock
    raise result.pop()


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
