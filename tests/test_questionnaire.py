"""The questionnaire: its items, its scoring by hand, and the probabilities that it asks for."""

from argparse import Namespace
from collections import Counter

import numpy as np
import pytest
import torch

from conftest import evaluated, program
from experiments import questionnaire
from personafuse import load_run

CPU = torch.device("cpu")


def test_the_items():
    items = {trait: questionnaire.read_items(trait) for trait in questionnaire.BIG_FIVE}
    assert {trait: len(own) for trait, own in items.items()} == dict.fromkeys(questionnaire.BIG_FIVE, 10)
    # as the published key counts them; neuroticism is emotional stability turned round
    positive = Counter(trait for trait, own in items.items() for key, _ in own if key == "+")
    assert positive == {"extraversion": 5, "agreeableness": 6, "conscientiousness": 6, "neuroticism": 8, "openness": 7}
    assert ("-", "I don't talk a lot.") in items["extraversion"]
    assert ("-", "I seldom feel blue.") in items["neuroticism"]
    assert len({statement for own in items.values() for _, statement in own}) == 50


def test_scoring_by_hand():
    certain = -np.log(np.array([[1e-30, 1e-30, 1e-30, 1e-30, 1.0]]))
    assert questionnaire.score(certain, ["+"]) == pytest.approx([5])
    assert questionnaire.score(certain, ["-"]) == pytest.approx([1])
    # 0.1 · 1 + 0.2 · 2 + 0.3 · 3 + 0.4 · 4 + 0 · 5 = 3, and what the five do not sum to is left out
    mixed = -np.log(np.array([[0.1, 0.2, 0.3, 0.4, 1e-30]]))
    assert questionnaire.score(mixed, ["+"]) == pytest.approx([3])
    assert questionnaire.score(mixed + 700, ["+"]) == pytest.approx([3])
    even = np.zeros((2, 5))
    assert questionnaire.score(even, ["+", "-"]) == pytest.approx([3, 3])


def test_a_trait_is_asked_of_the_base_and_of_its_two_experts(monkeypatch):
    """Each expert's scores here are its own number and, half of them, one more."""
    asked = []

    def ask(model, items, w=None):
        asked.append([statement for _, statement in items])
        return np.arange(10) % 2 + (100.0 if w is None else int(w.argmax()) ** 2)

    monkeypatch.setattr(questionnaire, "ask", ask)
    model = Namespace(experts=10, device=CPU)
    table = questionnaire.questionnaire(model, None, None)["questionnaire"]
    assert [row["name"] for row in table] == questionnaire.BIG_FIVE
    assert asked[:3] == 3 * [[statement for _, statement in questionnaire.read_items("openness")]]
    for k, row in enumerate(table):
        high, low = (2 * k) ** 2, (2 * k + 1) ** 2
        assert (row["bare base"], row["high expert"], row["low expert"]) == (100.5, high + 0.5, low + 0.5)
        # over the items, paired
        assert row["difference"] == [high - low] * 3


def test_probabilities_are_those_of_whole_answers(run):
    """Against the model's plain forward: log p(answer, end | prompt) for one item."""
    model, _ = load_run(run, CPU, torch.float32)
    key, text = questionnaire.read_items("extraversion")[1]
    logs = []
    for answer in questionnaire.ANSWERS:
        prompt = model.tokenizer.encode_prompt(questionnaire.QUESTION.format(
            answers=", ".join(questionnaire.ANSWERS), statement=text))
        ids = prompt + model.tokenizer.encode_answer(answer)
        assert ids[-1] == model.tokenizer.end
        logits = model.base.logits(model.base(torch.tensor([ids])))[0].log_softmax(dim=-1)
        logs.append(sum(logits[t - 1, ids[t]].item() for t in range(len(prompt), len(ids))))
    p = np.exp(np.array(logs) - max(logs))
    value = (p / p.sum()) @ [1, 2, 3, 4, 5]
    assert key == "-"
    assert questionnaire.ask(model, [(key, text)]) == pytest.approx([6 - value], abs=1e-4)


def test_the_table_of_a_run(run):
    rows = evaluated("--run", run, "--questionnaire")[f"{run}, questionnaire"]
    assert [row.pop("name") for row in rows] == questionnaire.BIG_FIVE
    for row in rows:
        assert row.pop("difference")[0] == pytest.approx(row["high expert"] - row["low expert"], abs=1e-4)
        assert all(1 <= value <= 5 for value in row.values())
    result = program("experiments.evaluate", "--run", run, "--questionnaire", "--dtype", "fp32")
    assert "neuroticism" in result.stdout and "high expert" in result.stdout
