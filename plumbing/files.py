"""What every program needs and the method does not: errors in one line, files that are whole or not
there, and the table of the models that a name stands for. No torch here, so --help answers at once.
"""

import ctypes
import hashlib
import json
import os
import platform
import re
import sys
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent.parent


class UserError(Exception):
    """Something the user can mend. Programs print it as one line and exit with code 2."""


def run_program(main):
    """Run a program's main(): what the user can mend ends in one line and exit code 2.

    Our own bugs end in a traceback.
    """
    try:
        main()
        return
    except UserError as error:
        problem = str(error)
    except KeyboardInterrupt:
        problem = "interrupted; what was saved before stays"
    except BrokenPipeError:
        # the reader of our output has gone, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (MemoryError, RuntimeError) as error:
        # torch's own out-of-memory errors are RuntimeErrors
        full = re.search("out of memory|can't allocate memory", str(error))
        if not full and not isinstance(error, MemoryError):
            raise
        problem = ("out of memory: try a smaller --micro-batch, --checkpointing, --dtype bf16 "
                   "or shorter texts")
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)


def keep_freed_memory():
    """Have glibc, on Linux, keep the memory that a step frees for the next one.

    It would give it back to the kernel, which clears it before it hands it out again: a fifth of a
    step of stage 1 on `tiny`. Blocks of more than 32 MB still go back.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    # the numbers are those of M_TRIM_THRESHOLD and M_MMAP_THRESHOLD in malloc.h
    libc.mallopt(-1, 2**31 - 1)
    libc.mallopt(-3, 32 * 2**20)


# ------------------------------------------------------------------------------------------- files

@contextmanager
def atomic_write(path):
    """`with atomic_write(path) as tmp`: tmp takes path's place once it is whole and on disk."""
    from safetensors import SafetensorError
    tmp = Path(f"{path}.tmp")
    try:
        yield tmp
        with open(tmp, "rb") as file:
            os.fsync(file.fileno())
        os.replace(tmp, path)
    except (OSError, SafetensorError) as error:
        tmp.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path}: {reason}; what stood there before is untouched")


def write_json(path, value):
    with atomic_write(path) as tmp:
        tmp.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path, missing):
    """The JSON in a file; UserError with the text `missing` where there is no such file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(missing)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}")


def read_lines(path):
    """(line number, text) of the non-empty lines of a UTF-8 file."""
    try:
        with open(path, encoding="utf-8") as file:
            return [(number, line) for number, line in enumerate(file, 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}")


def file_sha256(path):
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}")



import argparse, math
def number(kind, low, above=False, high=math.inf):
    def read(text):
        value = kind(text)
        if not (low < value if above else low <= value) or not value <= high or math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text} is out of range")
        return value
    return read
def check_text(text):
    text.encode()
    return text
