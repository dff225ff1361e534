"""experiments.evaluate --feedback: simulated readers and their remarks."""

import sys

import numpy as np
import pytest

from experiments import evaluate
from experiments.feedback import until

CALM_AT_LAST = [
    #  three readers: the first sees it at once, the second after two remarks, the third never
    [100, 0, 0],
    [0, 0, 0],
    [0, 100, 0],
]


@pytest.mark.parametrize("shown, remarks", [
    (CALM_AT_LAST, 2), (np.zeros((3, 4)), None), (np.full((3, 4), 100), 0)])
def test_until_half_of_the_readers_have_seen_it(shown, remarks):
    assert until(np.array(shown)) == remarks


def test_the_table_of_a_run(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate", "--run", str(run), "--feedback", "--limit", "2",
                                      "--max-new-tokens", "4"])
    evaluate.main()
    table = capsys.readouterr().out
    assert "0 remarks" in table and "5 remarks" in table
    assert "all poles" in table
    for word in ("kind", "blunt", "calm"):
        assert f"/more {word}" in table
