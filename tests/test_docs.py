"""docs/walk.md says what is so: its lines are typed in, and what they print is compared."""

import doctest
import re

import pytest
import torch
from conftest import ROOT, program

WALK = (ROOT / "docs" / "walk.md").read_text(encoding="utf-8")
THERE, BACK = WALK.split("\n# And back")
NUMBER = re.compile(r"-?\d+\.\d*(?:e-?\d+)?")


class SameNumbers(doctest.OutputChecker):
    """A number with a point may differ by two of its last digit: machines sum in another order."""

    def check_output(self, want, got, optionflags):
        if NUMBER.split(want) != NUMBER.split(got):
            return False
        return all(close(a, b) for a, b in zip(NUMBER.findall(want), NUMBER.findall(got)))


class SameShapes(doctest.OutputChecker):
    """Shapes, ids and truths must agree; numbers with a point and words are another run's."""

    def check_output(self, want, got, optionflags):
        if NUMBER.search(want) or "'" in want or '"' in want:
            return True
        return want == got


def close(want, got):
    digits = len(want.partition(".")[2])
    return abs(float(want) - float(got)) <= 2.1 * 10 ** -digits


def type_in(text, checker):
    """Run a page's examples one after the other -> what went wrong, as doctest reports it."""
    test = doctest.DocTestParser().get_doctest(text, {}, "walk.md", "docs/walk.md", 0)
    assert len(test.examples) > 30
    report = []
    doctest.DocTestRunner(checker, verbose=False).run(test, out=report.append)
    return "".join(report)


@pytest.fixture(autouse=True)
def own_print_options():
    """The page sets how tensors are printed; other tests should not see it."""
    yield
    torch.set_printoptions(profile="default")


def test_the_way_back_prints_what_the_page_says(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert type_in(BACK, SameNumbers()) == ""


def test_the_way_there_runs_and_has_the_shapes_of_the_page(tmp_path, monkeypatch):
    # the page's own run takes minutes: this one has a step, on the same base
    result = program("train.py", "--steps1", 1, "--batch1", 1, "--steps2", 1, "--batch2", 4,
                     "--steps3", 0, "--held-out", 1, "--out", tmp_path / "out" / "tiny")
    assert result.returncode == 0, result.stderr
    monkeypatch.chdir(tmp_path)
    assert type_in(THERE, SameShapes()) == ""


def test_numbers_that_differ_and_lines_that_fail_are_reported():
    page = "".join(f">>> {k}.25 + 1\n{k + 1}.25\n" for k in range(31))
    assert type_in(page, SameNumbers()) == ""
    assert "Failed example" in type_in(page.replace("\n9.25", "\n9.35"), SameNumbers())
    assert "NameError" in type_in(page + ">>> nothing\n", SameShapes())
