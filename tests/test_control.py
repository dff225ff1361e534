"""Control: accuracy, rank and matrix by hand, losses against merged experts, the shuffled floor."""

from argparse import Namespace
from collections import Counter
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from conftest import evaluated, fails_in_one_line, program, train_arguments
from data import TRAITS, by_hash, held_out, load_records, split
from experiments import control, figures
from experiments.common import SHORT, held_out_examples, response_nll, run_records
from lora import lora_layers, merge, unmerge
from personafuse import load_run, read_settings
from plumbing.files import HERE, UserError, file_sha256

CPU = torch.device("cpu")


ARGS = Namespace(device=CPU, dtype=torch.float32, data=None, limit=None)


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
    rows = {row["name"]: row for row in control.measure_control(LOSSES, P)}
    accuracy = {name: row["pole accuracy, %"] for name, row in rows.items()}
    assert rows["all poles"]["pairs"] == 3
    assert accuracy["all poles"][0] == 50                           # (1 + 0 + 1/2) / 3
    assert rows["all poles"]["rank"][0] == pytest.approx((1 + 4 + 1.5) / 3, abs=1e-4)
    assert accuracy["high openness"] == [100, 100, 100]
    assert accuracy["low openness"][0] == 50
    assert rows["low neuroticism"]["rank"][0] == 4
    assert rows["low neuroticism"]["pairs"] == 1


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
    losses = np.array([[3.0, 4.0, 5.0, 0.0], [2.0, 4.5, 5.0, 0.0], [1.0, 4.5, 4.0, 0.0]])
    curve, gain, rising = control.measure_dial(losses, own, opposite)
    assert curve == [4, 3.5, 2.5]
    assert gain[0] == pytest.approx(1.5 + 0.5) and rising == 2


@pytest.mark.filterwarnings("error")
def test_the_dial_of_a_pole_without_records_is_nan():
    curve, gain, rising = control.measure_dial(np.ones((6, 3)), np.zeros(3), np.ones(3))
    assert np.isnan(curve).all() and np.isnan(gain).all() and rising == 0


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
    records, examples = held_out_examples(model, settings, ARGS)
    assert len(records) == len(examples) > 3 and all(held_out(r["query"]) for r in records)
    losses = control.expert_losses(model, examples)
    assert losses.shape == (len(examples), 10) and losses.std(axis=1).min() > 1e-3
    for i in (0, 7):
        originals = merge(model.base, torch.eye(10)[i])
        nll, counts = response_nll(model, examples)
        unmerge(model.base, originals)
        assert losses[:, i] == pytest.approx(nll / counts, abs=1e-4)


def test_control_and_steering_of_a_run(run):
    result = program("experiments.evaluate", "--run", run, "--control", "--dtype", "fp32")
    assert result.returncode == 0, result.stderr
    assert "low neuroticism" in result.stdout
    tables = evaluated("--run", run, "--control")
    rows = {row["name"]: row for row in tables[f"{run}, control"]}
    assert set(rows) == {"all poles", *TRAITS}
    assert 0 <= rows["all poles"]["pole accuracy, %"][0] <= 100 and 1 <= rows["all poles"]["rank"][0] <= 10
    matrix = tables[f"{run}, matrix"]
    assert [row["name"] for row in matrix] == TRAITS and all(len(row) == 11 for row in matrix)

    rows = evaluated("--run", run, "--steering", "--limit", "8")[f"{run}, steering"]
    assert [row["name"] for row in rows] == TRAITS
    assert all(f"w = {value}" in row for row in rows for value in control.DIAL)


def test_a_baseline_has_no_experts_to_compare(mini, small_data, tmp_path):
    result = program(*train_arguments(mini, small_data, tmp_path / "one", "--variant", "direct"))
    assert result.returncode == 0, result.stderr
    result = program("experiments.evaluate", "--run", tmp_path / "one", "--control")
    assert fails_in_one_line(result, "not one for each of the 10 poles")


# ------------------------------------------------------------------------------------------------- the run's own data

def test_the_data_of_a_run_is_found_or_missed_by_its_contents(mini, run, small_data, tmp_path):
    settings = read_settings(run)
    assert run_records(settings) == split(load_records(small_data))
    first = run_records(settings, limit=3)[1]
    assert len(first) == 3 and first == sorted(split(load_records(small_data))[1], key=by_hash)[:3]

    # another file has taken its place, or nothing has
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(small_data.read_bytes())
    lines = small_data.read_text(encoding="utf-8").splitlines(keepends=True)
    other = tmp_path / "other.jsonl"
    other.write_text("".join(lines[:60]), encoding="utf-8")
    for place, problem in ((other, "has other contents now"), (tmp_path / "none.jsonl", "is not there any more")):
        with pytest.raises(UserError, match=f"{problem}.*--data FILE"):
            run_records(settings | {"data": str(place)})
    assert run_records(settings | {"data": str(other)}, data=moved) == run_records(settings)
    # ours stands in for a copy of it
    ours = settings | {"data": str(other), "data_sha256": file_sha256(HERE / "persona_cot.jsonl")}
    assert len(run_records(ours)[1]) == len(split(load_records(HERE / "persona_cot.jsonl"))[1])


def test_other_data_is_never_read_without_a_word(run, small_data, tmp_path):
    lines = small_data.read_text(encoding="utf-8").splitlines(keepends=True)
    other = tmp_path / "other.jsonl"
    other.write_text("".join(lines[:60]), encoding="utf-8")
    result = program("experiments.evaluate", "--run", run, "--control", "--data", other, "--limit", "3")
    assert result.returncode == 0, result.stderr
    assert f"note: {other} is not what the run was trained on" in result.stderr


def test_shuffled_labels(small_data, tmp_path):
    out = tmp_path / "out" / "shuffled.jsonl"
    assert program("experiments.control", out, "--data", small_data).returncode == 0
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
    assert fails_in_one_line(program("experiments.control", out, "--data", tmp_path / "none.jsonl"), "none.jsonl")


# --------------------------------------------------------------------------------------------------------- pictures

def test_an_answer_is_shown_up_to_its_last_whole_sentence():
    assert figures.whole_sentences("Yes! It is 3.5 m. And then") == "Yes! It is 3.5 m."
    assert figures.whole_sentences('He said "no." Then') == 'He said "no."'
    assert figures.whole_sentences("no end") == "no end"


def texts_of(path):
    """The texts of an SVG file."""
    return [element.text for element in ElementTree.parse(path).iter() if element.text and element.text.strip()]


def test_what_people_and_models_write_stays_well_formed(tmp_path):
    voices = figures.draw_voices(["Is 1 < 2 & so on?"], [[0.25] * 10], ["a <b> & a bell \x07"])
    figures.write(tmp_path / "voices.svg", *voices)
    shown = texts_of(tmp_path / "voices.svg")
    assert "“Is 1 < 2 & so on?”" in shown and "a <b> & a bell" in shown[-1]
    assert [text for text in shown if text in TRAITS] == TRAITS and shown.count("0.25") == 10


def test_pictures_of_a_run(run, tmp_path):
    command = "experiments.figures", "--run", run, "--out", tmp_path / "new", "--dtype", "fp32", "--max-new-tokens", 8
    result = program(*command)
    assert result.returncode == 0, result.stderr
    shown = texts_of(tmp_path / "new" / "voices.svg")
    assert sum(text.startswith("“") for text in shown) == 2
    model, _ = load_run(run, CPU, torch.float32)
    for row in model.mixing_weights(figures.QUERIES):
        assert {f"{weight:.2f}" for weight in row} <= set(shown)
    assert [text for text in shown if text in TRAITS] == 2 * TRAITS
    shown = texts_of(tmp_path / "new" / "control.svg")
    rows = evaluated("--run", run, "--control")[f"{run}, matrix"]
    values = [row[pole] for row in rows for pole in SHORT]
    drawn = [int(text) for text in shown if text[0] in "+-"]
    assert drawn == pytest.approx([value for value in values if value == value], abs=0.6)
