"""The record anyone can beat: its table, its cache of features, and its yardstick by hand."""

import re

import numpy as np
import pytest
import torch
from conftest import FAST, QUICK_ROUTER, program

from data import load_records, split
from experiments import record
from personafuse import load_run


def table(*arguments):
    """What experiments.record prints -> its rows, without the line that tells the seconds."""
    result = program("experiments.record", *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[1:]


def test_features_are_read_once_and_give_the_same_table(mini, small_data, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = ["--base", mini, "--encoder", mini, "--data", small_data, "--folds", 2, "--seeds", 2,
               *FAST, *QUICK_ROUTER]
    first = table(*command)
    kept, = (tmp_path / "personafuse").iterdir()
    assert re.match("bag of words +0", first[2]) and re.match(r"ours +0.*0\.\d+  0\.\d+$", first[3])
    written = kept.stat().st_mtime_ns
    assert table(*command) == first
    assert kept.stat().st_mtime_ns == written
    # what another pooling makes of the queries is another file
    table(*command, "--pooling", "last")
    assert len(list((tmp_path / "personafuse").iterdir())) == 2


def test_the_features_are_those_of_the_encoder(run, small_data, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, settings = load_run(run, torch.device("cpu"), torch.float32)
    records, _ = split(load_records(small_data))
    queries = model.encode_queries([each["query"] for each in records[:5]])
    for _ in range(2):
        features = record.read_features(model, settings["encoder_folder"], queries)
        for row, query in zip(features, queries):
            hidden = model.router.encoder(torch.tensor([query]))[0, -1]
            assert torch.allclose(row, hidden, atol=1e-5)


def test_an_encoder_that_is_trained_is_read_anew(mini, small_data, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rows = table("--base", mini, "--encoder", mini, "--data", small_data, "--folds", 2,
                 "--seeds", 1, *FAST)
    assert rows[3].startswith("ours") and not list(tmp_path.iterdir())


def test_the_bag_of_words_knows_the_words_that_it_was_fitted_to():
    rows = [("sad rain", 9), ("sad bus", 9), ("glad rain", 4), ("glad bus", 4)]
    records = [{"query": query, "p": np.eye(10)[pole]} for query, pole in rows]
    records += [{"query": "sad unknown", "p": np.eye(10)[9]}, {"query": "", "p": np.eye(10)[9]}]
    scores = record.bag_of_words(records, range(4))
    assert scores[4].argmax() == 9 and scores[2].argmax() == 4
    # nothing known: how common each pole is
    assert scores[5, 4] == pytest.approx(scores[5, 9], abs=1e-3)
    assert scores[5, 4] > scores[5, 0]
