"""Programs that run beside the tests: several processes as one, or one that is to be killed."""

import multiprocessing
import os
import subprocess
import sys
import time

import torch.distributed as dist
from conftest import ROOT

from plumbing.files import run_program

# children of a server that has imported torch once start in no time; forks of this process could
# not run backward
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["conftest", "train"])
# seconds; all that is started here takes a few
LIMIT = 120


def child(rank, count, port, folder, main, arguments):
    """One of `count` processes as torchrun starts them, its output in a file of the folder."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                   "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
                   "TORCHELASTIC_USE_AGENT_STORE": "True"}
    file = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(ROOT)
    sys.argv = [str(part) for part in arguments]
    run_program(main)


class Started:
    """`count` processes, with the store that torchrun's agent would hold; use it in a `with`.

    main: the program, a function of a module. folder: where their output goes.
    """

    def __init__(self, folder, main, arguments=(), count=1):
        self.folder = folder
        self.store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self.processes = []
        for rank in range(count):
            details = (rank, count, self.store.port, folder, main, arguments)
            self.processes.append(FORKS.Process(target=child, args=details))
        for process in self.processes:
            process.start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        """Whatever a test made of them, none of them outlives it."""
        for process in self.processes:
            process.kill()
            process.join()

    def wait_for(self, happened):
        """Until happened() is true or the first process has ended."""
        end = time.monotonic() + LIMIT
        while not happened() and self.processes[0].exitcode is None:
            assert time.monotonic() < end, f"nothing happened in {LIMIT} s"
            self.processes[0].join(0.01)

    def wait(self):
        """-> what a program's result has: the largest exit code, and all that was written."""
        for process in self.processes:
            process.join(LIMIT)
        output = []
        for rank in range(len(self.processes)):
            output.append((self.folder / f"{rank}.txt").read_text(encoding="utf-8"))
        codes = [process.exitcode for process in self.processes]
        assert None not in codes, f"not ended after {LIMIT} s: {codes}\n" + "\n".join(output)
        return subprocess.CompletedProcess([], max(codes, key=abs), output[0], "\n".join(output))
