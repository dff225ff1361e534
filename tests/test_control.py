"""Control: accuracy, rank and matrix by hand, losses against merged experts, the shuffled floor."""

import json
from argparse import Namespace
from collections import Counter
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from conftest import fails_in_one_line, program, train_arguments
from data import TRAITS, held_out, load_records
from experiments import control, figures
from lora import lora_layers, merge, unmerge
from personafuse import load_run
from plumbing import run_program

CPU = torch.device("cpu")


def arguments(*runs, **changes):
    return Namespace(run=[str(run) for run in runs], json=True, seed=0, **changes)


# two records, by hand: the first has high openness and low neuroticism, the second low openness
LOSSES = np.array([[1.0, 2.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 3.0, 4.0],
                   [2.0, 2.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0]])
P = np.array([[1, 0, 0, 0, 0, 0, 0, 0, 0, 1],
              [0, 1, 0, 0, 0, 0, 0, 0, 0, 0]])


def test_the_expert_of_an_active_pole_wins_ties_or_loses():
    wins = control.pole_wins(LOSSES)
    assert wins[0].tolist() == [1, 0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 1, 0]
    assert wins[1].tolist() == [0.5] * 10


def test_ranks_count_lower_losses_and_share_places():
    ranks = control.expert_ranks(LOSSES)
    assert ranks[0].tolist() == [1, 2, 7.5, 7.5, 7.5, 7.5, 7.5, 7.5, 3, 4]
    assert ranks[1].tolist() == [1.5, 1.5, *[6.5] * 8]


def test_accuracy_and_rank_of_the_hand_made_case():
    result = control.measure_control(LOSSES, P)
    assert result["pairs"] == 3
    assert result["accuracy"][0] == 50                              # (1 + 0 + 1/2) / 3
    assert result["rank"][0] == pytest.approx((1 + 4 + 1.5) / 3, abs=1e-4)
    assert result["by_pole"]["high openness"]["accuracy"] == [100, 100, 100]
    assert result["by_pole"]["low openness"]["accuracy"][0] == 50
    assert result["by_pole"]["low neuroticism"]["rank"][0] == 4
    assert result["by_pole"]["low neuroticism"]["pairs"] == 1


def test_the_matrix_compares_with_the_mean_expert():
    matrix = control.control_matrix(LOSSES, P)
    assert matrix[0, 0] == pytest.approx(4.0 - 1.0)                 # the first record's mean is 4.0
    assert matrix[9, 9] == pytest.approx(0) and matrix[1, 1] == pytest.approx(7.6 - 2.0)
    assert np.isnan(matrix[:, 2]).all()                             # nobody calls for it
    seen = matrix[:, [0, 1, 9]]
    assert seen.sum(axis=0) == pytest.approx(0)                     # the mean expert is no better


def test_the_dial_shares_what_is_left():
    assert control.dial_weights(3, 0.4, 10)[3] == pytest.approx(0.4)
    assert control.dial_weights(3, 0.4, 10)[0] == pytest.approx(0.6 / 9)
    assert control.dial_weights(2, 1.0, 10).tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 0, 0]


def test_gain_of_a_turn_is_what_the_pole_gains_over_its_opposite():
    own = np.array([1, 0, 1, 0])
    opposite = np.array([0, 1, 0, 0])
    # three steps of two own records, one of the opposite and one that was not measured
    losses = np.array([[3.0, 4.0, 5.0, np.nan], [2.0, 4.5, 5.0, np.nan], [1.0, 4.5, 4.0, np.nan]])
    dial = control.measure_dial(losses, own, opposite)
    assert dial["own"] == [4, 3.5, 2.5] and dial["opposite"] == [4, 4.5, 4.5]
    assert dial["gain"][0] == pytest.approx(1.5 + 0.5) and dial["rising"] == 2


@pytest.fixture(scope="module")
def model(run):
    """The run with experts that change a lot, so that a wrong mix shows."""
    model, settings = load_run(run, CPU, torch.float32)
    generator = torch.Generator().manual_seed(1)
    for _, layer in lora_layers(model.base):
        layer.B.copy_(0.05 * torch.randn(layer.B.shape, generator=generator))
    return model, settings


def test_an_expert_alone_is_the_base_with_that_expert_merged(model):
    model, settings = model
    records, examples = control.held_out_examples(model, settings)
    assert len(records) == len(examples) > 3 and all(held_out(r["query"]) for r in records)
    losses = control.expert_losses(model, examples)
    assert losses.shape == (len(examples), 10) and losses.std(axis=1).min() > 1e-3
    for i in (0, 7):
        originals = merge(model.base, torch.eye(10)[i])
        nll, counts, _ = model.response_nll(examples)
        unmerge(model.base, originals)
        assert losses[:, i] == pytest.approx((nll / counts).numpy(), abs=1e-4)


def test_control_and_steering_of_a_run(run, capsys):
    control.control(arguments(run), CPU, torch.float32)
    results = json.loads(capsys.readouterr().out)
    control.print_control(results)
    assert "low neuroticism" in capsys.readouterr().out
    result = results[str(run)]
    assert result["records"] > 3 and 0 <= result["accuracy"][0] <= 100 and 1 <= result["rank"][0] <= 10
    assert set(result["by_pole"]) == set(TRAITS) and np.shape(result["matrix"]) == (10, 10)

    control.steering(arguments(run), CPU, torch.float32)
    result = json.loads(capsys.readouterr().out)
    control.print_steering(result["runs"])
    assert "opposite's" in capsys.readouterr().out
    curves = result["runs"][str(run)]
    assert set(curves) == set(TRAITS)
    assert all(len(dial["own"]) == len(dial["opposite"]) == len(result["dial"]) for dial in curves.values())


def test_a_baseline_has_no_experts_to_compare(mini, small_data, tmp_path, capsys):
    result = program(*train_arguments(mini, small_data, tmp_path / "one", "--variant", "direct"))
    assert result.returncode == 0, result.stderr
    with pytest.raises(SystemExit) as stopped:
        run_program(lambda: control.control(arguments(tmp_path / "one"), CPU, torch.float32))
    assert stopped.value.code == 2
    assert "not one for each of the 10 poles" in capsys.readouterr().err


def test_shuffled_labels(small_data, tmp_path):
    out = tmp_path / "out" / "shuffled.jsonl"
    assert program("experiments.shuffle", "--data", small_data, "--out", out).returncode == 0
    before = load_records(small_data)
    after = load_records(out)
    assert [r["query"] for r in after] == [r["query"] for r in before]
    moved = 0
    for old, new in zip(before, after):
        assert new["response"] == old["response"]
        if held_out(old["query"]):
            assert new == old
        moved += new["p"] != old["p"]
    assert moved > len(before) / 2
    assert Counter(r["p"] for r in after) == Counter(r["p"] for r in before)
    assert fails_in_one_line(program("experiments.shuffle", "--data", tmp_path / "none.jsonl", "--out", out), "none.jsonl")


# --------------------------------------------------------------------------------------------------------- pictures

def test_two_axes_keep_what_sets_the_experts_apart():
    e = torch.eye(4)[:3] * torch.tensor([[1.0], [5.0], [2.0]])
    h = torch.tensor([[0.0, 3.0, 0.0, 9.0], [3.0, 0.0, 0.0, 9.0], [0.0, 0.0, 3.0, 9.0]])
    h_places, e_places = figures.two_axes(h, e)
    # lengths play no part, nor does what all queries share: three directions at equal distances
    distances = (e_places[[0, 1, 2]] - e_places[[1, 2, 0]]).norm(dim=1)
    assert torch.allclose(distances, distances[0].expand(3), atol=1e-5) and distances[0] > 1
    assert torch.allclose(h_places, e_places[[1, 0, 2]], atol=1e-5)


def test_telling_queries_are_the_sharpest_of_different_experts():
    w = np.array([[0.2, 0.5, 0.3], [0.9, 0.05, 0.05], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    assert figures.telling_queries(w, 2) == [1, 2] and figures.telling_queries(w, 6) == [1, 2, 3]


def test_pictures_of_a_run(run, tmp_path):
    pytest.importorskip("matplotlib")
    result = program("experiments.figures", "--run", run, "--out", tmp_path / "new", "--dtype", "fp32")
    assert result.returncode == 0, result.stderr
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    assert set(pictures) == {"control.svg", "map.svg", "curves.svg", "bars.svg", "steering.svg"}
    for name, picture in pictures.items():
        assert len(picture) < 100_000, name
        ElementTree.fromstring(picture)
    for text in (b"high openness", b"O+"):
        assert text in pictures["control.svg"]
