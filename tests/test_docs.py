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
    """A number with a point may differ by two of its last digit.

    Machines sum in another order.
    """

    def check_output(self, want, got, optionflags):
        if NUMBER.split(want) != NUMBER.split(got):
            return False
        pairs = zip(NUMBER.findall(want), NUMBER.findall(got))
        return all(close(a, b) for a, b in pairs)


class SameShapes(doctest.OutputChecker):
    """Shapes, ids and truths must agree.

    Words, and numbers with a point, are another run's.
    """

    def check_output(self, want, got, optionflags):
        if NUMBER.search(want) or "'" in want or '"' in want:
            return True
        return want == got


def close(want, got):
    _, _, digits = want.partition(".")
    return abs(float(want) - float(got)) <= 2.1 * 0.1 ** len(digits)


def type_in(text, checker):
    """Run a page's examples one after the other -> what went wrong, in doctest's words."""
    parser = doctest.DocTestParser()
    page = parser.get_doctest(text, {}, "walk.md", "docs/walk.md", 0)
    assert len(page.examples) > 30
    report = []
    doctest.DocTestRunner(checker).run(page, out=report.append)
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
    # the page's own run takes minutes: this one has a step a stage, on the same base
    result = program("train.py", "--steps1", 1, "--batch1", 1, "--steps2", 1, "--batch2", 4,
                     "--steps3", 0, "--held-out", 1, "--out", tmp_path / "out" / "tiny")
    assert result.returncode == 0, result.stderr
    monkeypatch.chdir(tmp_path)
    assert type_in(THERE, SameShapes()) == ""


def test_numbers_that_differ_and_lines_that_fail_are_reported():
    page = "".join(f">>> {k}.25 + 1\n{k + 1}.25\n" for k in range(31))
    assert type_in(page, SameNumbers()) == ""
    wrong = page.replace("\n9.25", "\n9.35")
    assert "Failed example" in type_in(wrong, SameNumbers())
    broken = page + ">>> nothing\n"
    assert "NameError" in type_in(broken, SameShapes())


PAGES = [*ROOT.glob("README*.md"), *ROOT.glob("docs/*.md")]
LINK = re.compile(r"\]\(([^)#\s]+)")
NAMED_LINE = re.compile(r"`([\w.]+)` \[(\w+\.py):(\d+)\]")     # `train_step` [train.py:64]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    text = page.read_text(encoding="utf-8")
    for target in LINK.findall(text):
        if target.startswith("http"):
            continue
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_line_that_a_page_names_defines_what_it_says(page):
    text = page.read_text(encoding="utf-8")
    for name, file, number in NAMED_LINE.findall(text):
        source = (ROOT / file).read_text(encoding="utf-8")
        line = source.splitlines()[int(number) - 1].strip()
        own = name.split(".")[-1]
        starts = (f"def {own}(", f"class {own}(", f"class {own}:")
        assert line.startswith(starts), f"{file}:{number} is not {name}"
