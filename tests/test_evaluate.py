"""The comparison by hand, and the probe."""

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import fails_in_one_line, program, train_arguments

from data import TRAITS, load_records, split
from experiments import evaluate
from experiments.probe import softmax_regression
from experiments.statistics import bootstrap, shown_difference
from personafuse import load_run
from router import average_precision, keep_top, random_weights

CPU = torch.device("cpu")

def evaluated(monkeypatch, capsys, *arguments):
    """experiments.evaluate in this process, with --json -> what it printed, read."""
    monkeypatch.setattr(sys, "argv", ["experiments.evaluate", "--device", "cpu", "--dtype", "fp32", "--json", *map(str, arguments)])
    evaluate.main()
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def baseline(mini, small_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "direct"
    result = program(*train_arguments(mini, small_data, out, "--variant", "direct"))
    assert result.returncode == 0, result.stderr
    return out


# ------------------------------------------------------------------------------------------------------- the comparison

def test_bootstrap_intervals():
    zeros_and_ones = np.array([0.0, 1.0] * 50)
    value, low, high = bootstrap(lambda i: zeros_and_ones[i].mean(), 100)
    assert value == 0.5 and abs(low - (0.5 - 1.96 * 0.05)) < 0.02 and abs(high - (0.5 + 1.96 * 0.05)) < 0.02
    assert bootstrap(lambda i: np.full(9, 3.0)[i].mean(), 9) == [3, 3, 3]
    assert shown_difference([0.1, -0.2, 0.3]) == "0.10 [-0.20, 0.30] ="
    assert shown_difference([0.1, 0.05, 0.3], 1) == "0.1 [0.1, 0.3]" and shown_difference(None) == ""


def test_random_route_and_top_k():
    w = random_weights(300, 10, 2)
    assert (w.sum(dim=1) == 1).all() and ((w == 0.5).sum(dim=1) == 2).all()
    assert (w.mean(dim=0) - 0.1).abs().max() < 0.04 and torch.equal(w, random_weights(300, 10, 2))
    assert torch.allclose(keep_top(torch.tensor([[0.1, 0.6, 0.3]]), 2), torch.tensor([[0, 2 / 3, 1 / 3]]))


def test_comparison_of_runs(run, baseline, small_data, monkeypatch, capsys):
    table = evaluated(monkeypatch, capsys, "--run", run, "--run", baseline)
    rows = {r["name"]: r for r in table["rows"]}
    name = run.name
    mixed = {f"{name}, {route}" for route in ("random1", "random2", "random5", "uniform", "oracle")}
    assert {"bare base", name, "direct"} | mixed <= set(rows)
    for r in rows.values():
        assert r["loss"][1] <= r["loss"][0] <= r["loss"][2] and 0 <= r["prefers"][0] <= 100
    assert rows[f"{name}, oracle"]["map"] == [1, 1, 1] and set(rows[name]["auc_by_pole"]) == set(TRAITS)
    assert "map" not in rows["direct"] and "difference" not in rows[name]
    bare = rows["bare base"]
    assert bare["difference"][0] == pytest.approx(bare["loss"][0] - rows[name]["loss"][0], abs=2e-4)

    model, settings = load_run(run, CPU, torch.float32)             # the row of the run, record by record
    _, held = split(load_records(small_data))
    total, count, precision = 0.0, 0, []
    for r in held:
        prompt = model.tokenizer.encode_prompt(r["query"])
        if len(prompt) >= settings["max_length"]:
            continue
        ids = (prompt + model.tokenizer.encode_answer(r["response"]))[:settings["max_length"]]
        w = model.route([model.encoder_tokenizer.encode_query(r["query"])])
        precision.append(average_precision(w.numpy(), np.array([r["p"]]))[0])
        logits = model.base.logits(model.base(torch.tensor([ids]), w)[0, len(prompt) - 1:-1])
        total, count = total + F.cross_entropy(logits, torch.tensor(ids[len(prompt):]), reduction="sum").item(), \
            count + len(ids) - len(prompt)
    assert table["records"] == len(precision)
    assert rows[name]["loss"][0] == pytest.approx(total / count, abs=1e-4)
    assert rows[name]["map"][0] == pytest.approx(np.mean(precision), abs=1e-4)


def test_runs_of_different_bases_are_refused(run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "personafuse.json").write_text((run / "personafuse.json").read_text().replace('"base": "', '"base": "/other'))
    assert fails_in_one_line(program("experiments.evaluate", "--run", run, "--run", other), other, "was made for the base")


@pytest.mark.parametrize("option", ["control", "steering", "expression", "routing", "questionnaire"])
def test_each_experiment_has_its_option(option, run, monkeypatch):
    asked = []
    for name in ("compare", "control", "steering", "expression", "routing", "questionnaire"):
        monkeypatch.setattr(evaluate, name, lambda args, device, dtype, name=name: asked.append((name, args.run, dtype)))
    assert program("experiments.evaluate", "--run", run, f"--{option}", "--dtype", "fp32").returncode == 0
    assert asked == [(option, [str(run)], "fp32")]
    assert program("experiments.evaluate", "--run", run, "--dtype", "fp32").returncode == 0
    assert asked[1][0] == "compare"


# ---------------------------------------------------------------------------------------------------------- the probe

def test_softmax_regression_against_its_optimum():
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[3.0, 0, 0], [0, 3, 0], [0, 0, 3]])
    y = torch.arange(300) % 3
    h = centres[y] + torch.randn(300, 3, generator=generator)
    nearest = torch.cdist(h[200:], centres).argmin(dim=1)                       # what no classifier can much improve on
    assert (softmax_regression(h[:200], y[:200], h[200:]) == nearest).float().mean() > 0.93


def test_probe_reads_clinc150_and_csv(run, tmp_path, monkeypatch, capsys):
    texts = {"greeting": ["hello there", "good morning"], "goodbye": ["see you soon", "bye bye now"]}
    (tmp_path / "texts.csv").write_text("text,label\n" + "".join(
        f'"{t}, friend {n}",{k}\n' for k, ts in texts.items() for t in ts for n in range(30)))
    found = evaluated(monkeypatch, capsys, "--run", run, "--probe", tmp_path / "texts.csv")
    assert found["classes"] == 2 and found["train"] + found["test"] == 120 and 0 < found["test"] < 30
    (untrained, before), (trained, after), (_, gain) = found["accuracy"].items()
    assert "untrained" in untrained and trained == run.name and before[0] > 60
    assert gain[0] == pytest.approx(after[0] - before[0], abs=1e-3)
    pairs = [[t, k] for k, ts in texts.items() for t in ts]
    (tmp_path / "data_full.json").write_text(json.dumps({"train": pairs, "test": pairs, "val": [], "oos_val": [],
                                                         "oos_train": [["what", "oos"]], "oos_test": [["what", "oos"]]}))
    (tmp_path / "domains.json").write_text(json.dumps({"small_talk": ["greeting", "goodbye"]}))
    found = evaluated(monkeypatch, capsys, "--run", run, "--probe", tmp_path / "data_full.json")
    assert found["classes"] == 2 and found["train"] == found["test"] == 5      # one domain, and out-of-scope
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    assert fails_in_one_line(program("experiments.evaluate", "--run", run, "--probe", tmp_path / "bad.csv"), "text and label")
