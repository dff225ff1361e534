"""Files that are whole or not there, text in UTF-8 on every system, errors in one line."""

import argparse
import errno
import fcntl
import os
import subprocess
import sys

import pytest

from plumbing.files import (HERE, UserError, atomic_write, check_text, file_sha256, number, read_json, read_lines, read_text,
                            write_json)


def program(code, env=None, after="", **kw):
    """run_program(main) in a Python of its own, where `code` is main's body -> CompletedProcess."""
    text = "import os, sys\nfrom plumbing.files import *\ndef main():\n    " + code + "\nrun_program(main)"
    command = f'"{sys.executable}" -c "$0" {after}'
    env = os.environ | {"PYTHONPATH": str(HERE)} | (env or {})
    return subprocess.run(["bash", "-c", command, text], env=env, capture_output=True, timeout=60, **kw)


@pytest.mark.parametrize("code, line", [
    ("raise UserError('no such\\nfolder')", "error: no such folder"),
    ("open('no/such/file')", "error: [Errno 2] No such file or directory: 'no/such/file'"),
    ("raise KeyboardInterrupt", "error: interrupted"),
    ("raise MemoryError", "error: out of memory"),
    ("raise RuntimeError('DefaultCPUAllocator: can\\'t allocate memory')", "error: out of memory")])
def test_what_a_user_can_mend_is_one_line(code, line):
    result = program(code)
    assert result.returncode == 2 and result.stderr.decode().startswith(line) and result.stderr.count(b"\n") == 1


def test_our_own_bugs_show_where_they_are():
    result = program("raise RuntimeError('shapes')")
    assert result.returncode == 1 and b"Traceback" in result.stderr


def test_bars_print_where_stdout_has_no_utf8():
    for env in ({"PYTHONIOENCODING": "cp1252"}, {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}):
        result = program("print('0.43 \\u2588\\u2588 \\u03b1')", env)
        assert (result.returncode, result.stdout.split()[0], result.stderr) == (0, b"0.43", b"")


def test_a_reader_that_goes_is_no_error():
    result = program("for k in range(100000): print(k)", after="| head -1; exit ${PIPESTATUS[0]}")
    assert (result.returncode, result.stdout, result.stderr) == (0, b"0\n", b"")
    result = program("print('short')", after="| true; exit ${PIPESTATUS[0]}")           # noticed at the end only
    assert (result.returncode, result.stderr) == (0, b"")


def test_numbers_of_the_command_line(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--top-p", type=number(float, 0, above=True, high=1))
    parser.add_argument("--steps", type=number(int, 0))
    parser.add_argument("--lr", type=number(float, 0, above=True))
    good = parser.parse_args(["--top-p", "1", "--steps", "0", "--lr", "1e-30"])
    assert (good.top_p, good.steps, good.lr) == (1, 0, 1e-30) and isinstance(good.steps, int)
    for option, value in [("--top-p", "0"), ("--top-p", "1.01"), ("--top-p", "nan"), ("--steps", "-1"), ("--steps", "2.5"),
                          ("--steps", "many"), ("--lr", "inf"), ("--lr", "nan"), ("--lr", "-1"), ("--lr", "")]:
        with pytest.raises(SystemExit):
            parser.parse_args([f"{option}={value}"])
        assert f"argument {option}" in capsys.readouterr().err


def test_text_is_text():
    assert check_text("naïve 日本 😀") == "naïve 日本 😀"
    with pytest.raises(ValueError):
        check_text(b"caf\xe9".decode("utf-8", "surrogateescape"))


def test_text_with_and_without_a_mark_and_with_any_line_end(tmp_path):
    path = tmp_path / "text.jsonl"
    for mark in (b"", b"\xef\xbb\xbf"):
        for end in (b"\n", b"\r\n"):
            path.write_bytes(mark + end.join(["één\u2028 line".encode(), b"  ", b"last"]))
            assert read_lines(path) == [(1, "één\u2028 line"), (3, "last")]
    path.write_bytes(b"\xef\xbb\xbf{}")
    assert read_text(path) == "{}" and read_json(path, "") == {}


def test_what_cannot_be_read_is_named_with_its_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"one\ntwo\ncaf\xe9\n")
    for read in (read_text, read_lines, lambda p: read_json(p, "")):
        with pytest.raises(UserError, match="data.jsonl.*line 3.*UTF-8"):
            read(path)
    for text in ("{", "[1]", "3", "null", "[" * 100_000, ""):
        path.write_text(text)
        with pytest.raises(UserError, match="cannot read .*data.jsonl"):
            read_json(path, "")
    with pytest.raises(UserError, match="^train first$"):
        read_json(tmp_path / "none.json", "train first")
    for read in (read_text, read_lines, file_sha256):
        for missing in (tmp_path / "none", tmp_path):
            with pytest.raises(OSError, match=str(missing)):
                read(missing)


def test_files_are_utf8_whatever_the_locale(tmp_path):
    """A locale that is not UTF-8 is what Python does on Windows without -X utf8."""
    code = "write_json(sys.argv[1], {'base': 'b\\u00e4se'}); print(read_json(sys.argv[1], '')['base'] == 'b\\u00e4se')"
    result = program(code, {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}, after=f'"{tmp_path}/x.json"')
    assert result.stdout == b"True\n", result.stderr
    assert '"bäse"' in (tmp_path / "x.json").read_bytes().decode("utf-8")


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})
    for problem in (KeyboardInterrupt, ZeroDivisionError):
        with pytest.raises(problem), atomic_write(path) as tmp:
            tmp.write_text("half")
            raise problem
    with pytest.raises(UserError, match="x.json.*No space.*untouched"), atomic_write(path) as tmp:
        tmp.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert read_json(path, "") == {"old": 1} and os.listdir(tmp_path) == ["x.json"]
    with pytest.raises(UserError, match="cannot write"):
        write_json(path / "below", {})


def test_saves_under_windows_rule_for_fsync(tmp_path, monkeypatch):
    real, synced = os.fsync, []

    def fsync(fd):
        """There, a handle that may only read cannot be synced."""
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        synced.append(real(fd))

    monkeypatch.setattr(os, "fsync", fsync)
    write_json(tmp_path / "x.json", {"a": 1})
    assert read_json(tmp_path / "x.json", "") == {"a": 1} and len(synced) == 1
