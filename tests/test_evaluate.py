"""The comparison and what was forgotten, by hand."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import evaluated, fails_in_one_line, make_model, program, train_arguments

from data import load_records, split
from experiments import evaluate
from experiments.common import break_ties
from experiments.forgetting import read_kinds
from experiments.statistics import bootstrap, cell
from personafuse import load_run
from plumbing.models import model_sha256
from router import average_precision, random_weights

CPU = torch.device("cpu")

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
    assert cell([0.1, -0.2, 0.3], "difference") == "0.100 [-0.200, 0.300] ="
    assert cell([0.1, 0.05, 0.3], "difference") == "0.100 [0.050, 0.300]" and cell(None, "difference") == ""
    assert cell([0.1, -0.2, 0.3], "loss") == "0.100 [-0.200, 0.300]" and cell([90.91, 87, 93], "%") == "90.9 [87.0, 93.0]"


def test_random_route():
    w = random_weights(300, 10, 2)
    assert (w.sum(dim=1) == 1).all() and ((w == 0.5).sum(dim=1) == 2).all()
    assert (w.mean(dim=0) - 0.1).abs().max() < 0.04 and torch.equal(w, random_weights(300, 10, 2))


def test_comparison_of_runs(run, baseline, small_data):
    tables = evaluated("--run", run, "--run", baseline)
    (title, table), = tables.items()
    rows = {r["name"]: r for r in table}
    name = run.name
    mixed = {f"{name}, {route}" for route in ("random1", "random2", "random5", "uniform", "oracle")}
    assert {"bare base", "Persona-CoT prompting", name, "direct"} | mixed <= set(rows)
    for r in rows.values():
        value, low, high = r["loss per token"]
        assert low <= value <= high and 0 <= r["% prefers Persona-CoT"][0] <= 100
    assert rows[f"{name}, oracle"]["router mAP"] == [1, 1, 1]
    assert "router mAP" not in rows["direct"] and "difference" not in rows[name]
    bare = rows["bare base"]
    difference = bare["loss per token"][0] - rows[name]["loss per token"][0]
    assert bare["difference"][0] == pytest.approx(difference, abs=2e-4)

    model, settings = load_run(run, CPU, torch.float32)             # the row of the run, record by record
    _, held = split(load_records(small_data))
    total, count, precision = 0.0, 0, []
    for r in held:
        prompt = model.tokenizer.encode_prompt(r["query"])
        if len(prompt) >= settings["max_length"]:
            continue
        w = model.route(model.encode_queries([r["query"]]))
        precision.append(average_precision(w.numpy(), np.array([r["p"]]))[0])
        ids = (prompt + model.tokenizer.encode_answer(r["response"]))[:settings["max_length"]]
        logits = model.base.logits(model.base(torch.tensor([ids]), w)[0, len(prompt) - 1:-1])
        total += F.cross_entropy(logits, torch.tensor(ids[len(prompt):]), reduction="sum").item()
        count += len(ids) - len(prompt)
    assert title == f"{len(precision)} held-out records"
    assert rows[name]["loss per token"][0] == pytest.approx(total / count, abs=1e-4)
    assert rows[name]["router mAP"][0] == pytest.approx(np.mean(precision), abs=1e-4)


def test_forgetting_by_hand(run, baseline, tmp_path):
    """The line's loss at the router's weights for it, its first token given, and the bare base's."""
    text = "The tide comes in twice a day."
    (tmp_path / "text.txt").write_text(text + "\n", encoding="utf-8")
    tables = evaluated("--run", run, "--run", baseline, "--forgetting", "--text", tmp_path / "text.txt", "--limit", 4)
    rows = {(row["texts"], row["name"]): row for row in tables["forgetting"]}
    names = ["bare base", run.name, "direct"]
    kinds = ["persona answers", "plain answers", "the text's lines"]
    assert list(rows) == [(kind, name) for kind in kinds for name in names]
    model, _ = load_run(run, CPU, torch.float32)
    ids = model.tokenizer.encode(text)
    w = model.route(model.encode_queries([text]))
    losses = []
    for mixing, name in ((None, "bare base"), (w, run.name)):
        logits = model.base.logits(model.base(torch.tensor([ids]), mixing))[0, :-1]
        losses.append(F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item())
        row = rows["the text's lines", name]
        assert row["loss per token"][0] == pytest.approx(losses[-1] / (len(ids) - 1), abs=1e-4)
        assert row["bits a byte"] == pytest.approx(losses[-1] / np.log(2) / len(text), abs=1e-3)
    assert row["difference"][0] == pytest.approx((losses[1] - losses[0]) / (len(ids) - 1), abs=1e-4)
    # no line is read beyond the context, whatever --max-length allowed
    *_, (_, _, _, examples) = read_kinds(model, 4096, [], [text * 100])
    assert examples[0].length == model.base.config.max_position_embeddings


def test_runs_of_different_bases_are_refused(run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    settings = json.loads((run / "personafuse.json").read_text(encoding="utf-8"))
    elsewhere = make_model(tmp_path / "base", seed=1)
    settings |= {"base": str(elsewhere), "base_folder": str(elsewhere), "base_sha256": model_sha256(elsewhere)}
    (other / "personafuse.json").write_text(json.dumps(settings), encoding="utf-8")
    assert fails_in_one_line(program("experiments.evaluate", "--run", run, "--run", other), other, "was made for the base")


@pytest.mark.parametrize("option", ["control", "steering", "routing", "questionnaire", "expression", "comparison", "feedback",
                                    "forgetting"])
def test_each_experiment_has_its_option(option, run, monkeypatch):
    asked = []
    for table in (evaluate.OF_EACH_RUN, evaluate.OF_ALL_RUNS):
        for name in table:
            made = lambda *given, name=name: asked.append((name, given[-1].run)) or {"made": [{"name": name}]}   # noqa: E731
            monkeypatch.setitem(table, name, (made, "what it means"))
    arguments = [] if option == "comparison" else [f"--{option}"]
    result = program("experiments.evaluate", "--run", run, *arguments, "--dtype", "fp32")
    assert result.returncode == 0, result.stderr
    assert asked == [(option, [str(run)])] and "what it means" in result.stdout


def test_equal_weights_stand_in_random_order():
    w = np.tile([0.5, 0.0, 0.5, 0.1], (4000, 1))
    scores = break_ties(w)
    assert (scores[:, 1] == 0).all() and (scores[:, 3] == 1).all()
    assert 0.45 < (scores[:, 0] > scores[:, 2]).mean() < 0.55
