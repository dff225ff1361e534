"""What every program needs and the method does not: errors in one line, and files that are read
and written the same way on every system.
"""

import argparse
import ctypes
import hashlib
import json
import os
import re
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

HERE = Path(__file__).parent.parent             # the project's folder


# ---------------------------------------------------------------------------------------- programs

class UserError(Exception):
    """Something the user can mend. Programs print it as one line and exit with code 2."""


def run_program(main):
    """Run a program's main(): what the user can mend, or the operating system refuses, ends in one
    line and exit code 2. Our own bugs end in a traceback.
    """
    # a pipe on Windows is cp1252, which has no bars: better a ? than no answer
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        main()
        sys.stdout.flush()
        return
    except BrokenPipeError:
        # the reader of our output has gone, as in `... | head`: an ordinary exit would write to it
        os._exit(0)
    except (UserError, OSError) as error:
        # an OSError names its file
        problem = str(error)
    except KeyboardInterrupt:
        problem = "interrupted; what was saved before stays"
    except (MemoryError, RuntimeError) as error:
        # torch's own out-of-memory errors are RuntimeErrors
        if not re.search("MemoryError|out of memory|can't allocate memory", repr(error)):
            raise
        problem = ("out of memory: try a smaller --micro-batch, --checkpointing, --dtype bf16 "
                   "or shorter texts")
    # what libraries say can have several lines
    print("error:", *problem.split("\n"), file=sys.stderr)
    sys.exit(2)


def number(kind, low, above=False, high=1e9):
    """A type= for argparse: an int or float (`kind`) from low to high, never nan.

    above: low itself is refused too.
    """
    # argparse names the function: "invalid numeric value"
    def numeric(text):
        value = kind(text)
        # nan compares false with everything
        inside = low < value <= high if above else low <= value <= high
        if not inside:
            bounds = f"{'above' if above else 'at least'} {low}, at most {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range ({bounds})")
        return value

    return numeric


def check_text(text):
    """`text`; ValueError where it holds half a character, what is left of bytes that are no UTF-8.
    """
    text.encode()
    return text


def keep_freed_memory():
    """Have glibc, on Linux, keep the memory that a step frees for the next one.

    It would give it back to the kernel, which clears it before it hands it out again: a fifth of a
    step of stage 1 on `tiny`. Blocks of more than 32 MB still go back.
    """
    # the others have no library of this name
    with suppress(OSError):
        libc = ctypes.CDLL("libc.so.6")
        # the numbers are those of M_TRIM_THRESHOLD and M_MMAP_THRESHOLD in malloc.h
        libc.mallopt(-1, 2**31 - 1)
        libc.mallopt(-3, 32 * 2**20)


# ------------------------------------------------------------------------------------------- files

@contextmanager
def atomic_write(path):
    """`with atomic_write(path) as tmp`: tmp takes path's place once it is whole and on disk."""
    tmp = Path(f"{path}.tmp")
    try:
        yield tmp
        # "r+" and not "r": Windows syncs only what was opened for writing
        with open(tmp, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(tmp, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}; what stood there before is untouched")
    finally:
        with suppress(OSError):
            tmp.unlink()


def write_text(path, text):
    with atomic_write(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_text(path):
    """The text of a UTF-8 file, with or without a byte order mark; UserError where it is not."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"cannot read {path}: line {line} is not UTF-8; save it as UTF-8")


def read_json(path, missing=""):
    """The JSON object in a file -> dict. If there is no file: {}, or UserError with the text
    `missing`.
    """
    if not Path(path).exists():
        if missing:
            raise UserError(missing)
        return {}
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}")
    if not isinstance(value, dict):
        raise UserError(f"cannot read {path}: it holds no JSON object {{...}}")
    return value


def read_lines(path):
    """(line number, text) of the non-empty lines of a UTF-8 file."""
    # splitlines would also split at characters that a JSON string may hold
    lines = read_text(path).split("\n")
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
