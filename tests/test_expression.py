"""The reader on hand-made texts, its equations, and the tables of expression and routing."""

import json
from argparse import Namespace

import numpy as np
import pytest
import torch

from conftest import evaluated, program, train_arguments
from data import held_out, load_records
from experiments import expression, routing
from experiments.common import break_ties, held_out_examples
from personafuse import load_run, read_settings
from router import average_precision

CPU = torch.device("cpu")


def test_words_pairs_and_punctuation():
    assert expression.words_and_pairs("No! I can't.") == ["no", "!", "i", "can't", ".", "no !", "! i", "i can't", "can't ."]
    assert "\n" in expression.words_and_pairs("1.\n2.")


def test_features_by_hand():
    x = expression.features(["b a b", "c", ""], {"a": 0, "b": 1, "b a": 2})
    counts = torch.tensor([1.0, 2.0, 1.0]).log1p()
    assert torch.allclose(x[0], counts / counts.norm())
    assert not x[1:].any()                                  # nothing known, nothing divided by zero


def test_the_vocabulary_leaves_out_rare_words():
    texts = ["one two"] * expression.MIN_TEXTS + ["three three three three three"]
    assert set(expression.make_vocabulary(texts)) == {"one", "two", "one two"}


def test_the_fit_is_at_the_minimum():
    """There, by hand: x' (sigmoid(x W + b) - p) + 2 · penalty · W = 0, and Σ (sigmoid - p) = 0."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=generator)
    p = (torch.rand(60, 3, generator=generator) < 0.4).float()
    W, b = expression.fit_logistic(x, p, 0.5)
    error = torch.sigmoid(x @ W + b) - p
    assert (x.T @ error + 2 * 0.5 * W).abs().max() < 1e-2
    assert error.sum(dim=0).abs().max() < 1e-2 and W.abs().max() > 0.05


VOICES = ["Wow! Let's go!", "Check the list. Then check it again.", "I worry: what if it breaks?"]


def hand_made(n):
    """Texts in three voices, some in two of them at once, and the p that says which."""
    rng = np.random.default_rng(0)
    texts, p = [], []
    for _ in range(n):
        row = np.zeros(10, int)
        row[[0, 2, 8]] = rng.random(3) < 0.4
        if not row.any():
            row[0] = 1
        voices = [voice for voice, active in zip(VOICES, row[[0, 2, 8]]) if active]
        noise = " ".join(rng.choice(["tea", "rain", "bus", "map", "sun"], size=6))
        texts.append(" ".join([noise, *voices]))
        p.append(row)
    return texts, np.array(p)


def test_a_reader_reads_what_it_has_learned():
    texts, p = hand_made(200)
    training = [{"response": text, "p": row} for text, row in zip(texts[:150], p)]
    reader = expression.make_reader(training)
    assert average_precision(reader.scores(texts[150:]), p[150:]).mean() == 1
    scores = reader.scores(["Wow! Let's go!", "what if it breaks?", ""])
    assert scores[0].argmax() == 0 and scores[1].argmax() == 8
    assert scores[2] == pytest.approx(reader.b.numpy(), abs=1e-6)         # nothing read


@pytest.fixture(scope="module")
def one_lora(mini, small_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "one"
    result = program(*train_arguments(mini, small_data, out, "--variant", "cot-finetuned"))
    assert result.returncode == 0, result.stderr
    return out


def test_expression_of_runs(run, one_lora, small_data):
    command = "--expression", "--run", run, "--run", one_lora, "--max-new-tokens", 8
    table = evaluated(*command)
    answers = table["answers"]
    rows = {row["name"]: row for row in table["expression"]}
    records = load_records(small_data)
    held = [record for record in records if held_out(record["query"])]
    training = [record for record in records if not held_out(record["query"])]
    (reading,) = table["how it was drawn"]
    assert reading["records"] == len(held)
    # the run's own, as its preset has them
    settings = read_settings(run)
    for name in ("temperature", "top_p", "repetition_penalty"):
        assert reading[name] == settings[name]
    mixed = [f"{run.name}{how}" for how in ("", ", uniform", ", random1", ", random2", ", oracle")]
    assert {"the records' responses", "bare base", "Persona-CoT prompting", *mixed, "one"} <= set(rows)
    assert "difference" not in rows["one"]
    figure = "mean average precision"
    difference = rows[run.name][figure][0] - rows["one"][figure][0]
    assert rows[run.name]["difference"][0] == pytest.approx(difference, abs=2e-4)
    # what knows nothing of the answer ranks by how common the traits are
    prior = np.mean([record["p"] for record in training], axis=0)
    p = np.array([record["p"] for record in held])
    expected = average_precision(np.tile(prior, (len(p), 1)), p).mean()
    assert rows["always the commonest traits"][figure][0] == pytest.approx(expected, abs=1e-4)
    # every word of the records is a word, few of what random weights write are
    assert rows["the records' responses"]["words, %"] == 100 > rows["bare base"]["words, %"]
    # answers are drawn by the seed
    assert rows["bare base"][figure] != rows[f"{run.name}, oracle"][figure]
    result = program("experiments.evaluate", *command, "--json", "--device", "cpu", "--dtype", "fp32")
    assert json.loads(result.stdout) == table
    assert len(answers["bare base"]) == len(held) and answers["bare base"] != answers[f"{run.name}, oracle"]
    assert answers["the records' responses"] == [record["response"] for record in held]
    result = program("experiments.evaluate", *command, "--limit", 2, "--temperature", 0)
    assert "difference" in result.stdout and "Persona-CoT prompting" in result.stdout


def test_loops_are_phrases_of_four_words_three_times():
    assert expression.loops("I am so happy. " * 3) and not expression.loops("I am so happy. " * 2)
    assert not expression.loops("happy happy happy happy happy") and expression.loops("happy " * 6)


# ---------------------------------------------------------------------------------------------------------- routing

def test_a_perfect_ranking_is_as_sharp_as_what_it_deals_out():
    w = np.array([[0.5, 0.25, 0.15, 0.1], [0.1, 0.2, 0.3, 0.4]])
    p = np.array([[0, 1, 0, 1], [0, 0, 0, 1]])
    dealt = routing.perfect_ranking(w, p)
    assert dealt.tolist() == [[0.15, 0.5, 0.1, 0.25], [0.1, 0.2, 0.3, 0.4]]
    assert average_precision(dealt, p).mean() == 1


def test_equal_weights_rank_by_chance():
    p = np.zeros((4000, 10), int)
    p[:, 0] = 1
    # the mean of 1/rank over ten places; taking the columns in order would give 1
    expected = (1 / np.arange(1, 11)).mean()
    assert average_precision(break_ties(np.ones(p.shape)), p).mean() == pytest.approx(expected, abs=0.02)
    assert average_precision(break_ties(p.astype(float)), p).mean() == 1


def test_routing_of_a_run(run):
    table = evaluated("--routing", "--run", run, "--max-new-tokens", 4)[f"{run}, routing"]
    rows = {row["name"]: row for row in table}
    tau = read_settings(run)["tau"]
    own, sharp, flat = (f"tau {t:g}" for t in (tau, tau / 2, 2 * tau))
    ranked = {f"{name}, ranked" for name in (own, sharp, flat)}
    assert set(rows) == {"bare base", "oracle", "uniform", sharp, own, flat} | ranked
    for figure in ("expression", "loss"):
        assert rows["bare base"][f"share of {figure}"] == 0 and rows["oracle"][f"share of {figure}"] == 100
    # of the way down from the bare base's loss to the oracle's
    bare, uniform, oracle = (rows[name]["loss"][0] for name in ("bare base", "uniform", "oracle"))
    assert rows["uniform"]["share of loss"] == pytest.approx(100 * (uniform - bare) / (oracle - bare), rel=0.05)
    largest = [rows[name]["largest weight"] for name in (sharp, own, flat, "uniform")]
    assert largest == sorted(largest, reverse=True) and largest[-1] == pytest.approx(0.1)
    assert rows[own]["largest weight"] == rows[f"{own}, ranked"]["largest weight"]
    # at the run's own, the weights are the router's
    model, _ = load_run(run, CPU, torch.float32)
    records, _ = held_out_examples(model, read_settings(run), Namespace(data=None, limit=None))
    w = model.mixing_weights([record["query"] for record in records])
    assert rows[own]["largest weight"] == pytest.approx(w.max(dim=1).values.mean().item(), abs=1e-6)


def test_routing_at_temperatures_by_name():
    similarity = np.random.default_rng(0).uniform(-1, 1, (6, 10))
    p = np.eye(10)[:6]
    weights = routing.curve_weights(torch.tensor(similarity), p, [0.02, 0.5])
    assert set(weights) == {"uniform", "tau 0.02", "tau 0.5", "tau 0.02, ranked", "tau 0.5, ranked"}
    assert (weights["tau 0.5, ranked"].argmax(axis=1) == range(6)).all()
    expected = np.exp(similarity / 0.5)
    assert weights["tau 0.5"] == pytest.approx(expected / expected.sum(axis=1, keepdims=True))
