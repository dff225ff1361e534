"""The questionnaire: its items, its scoring by hand, and the probabilities that it asks for."""

from collections import Counter

import numpy as np
import pytest
import torch

from conftest import evaluated, program
from data import TRAITS
from experiments import questionnaire
from personafuse import load_run

CPU = torch.device("cpu")


def test_the_items():
    items = questionnaire.read_items()
    assert Counter(trait for trait, _, _ in items) == {trait: 10 for trait in questionnaire.BIG_FIVE}
    # as the published key counts them; neuroticism is emotional stability turned round
    positive = Counter(trait for trait, key, _ in items if key == "+")
    assert positive == {"extraversion": 5, "agreeableness": 6, "conscientiousness": 6, "neuroticism": 8, "openness": 7}
    assert ("extraversion", "-", "I don't talk a lot.") in items
    assert ("neuroticism", "-", "I seldom feel blue.") in items
    assert len({statement for _, _, statement in items}) == 50


def test_scoring_by_hand():
    certain = np.log(np.array([[1e-30, 1e-30, 1e-30, 1e-30, 1.0]]))
    assert questionnaire.score(certain, ["+"]) == pytest.approx([5])
    assert questionnaire.score(certain, ["-"]) == pytest.approx([1])
    # 0.1 · 1 + 0.2 · 2 + 0.3 · 3 + 0.4 · 4 + 0 · 5 = 3, and what the five do not sum to is left out
    mixed = np.log(np.array([[0.1, 0.2, 0.3, 0.4, 1e-30]]))
    assert questionnaire.score(mixed, ["+"]) == pytest.approx([3])
    assert questionnaire.score(mixed - 700, ["+"]) == pytest.approx([3])
    even = np.zeros((2, 5))
    assert questionnaire.score(even, ["+", "-"]) == pytest.approx([3, 3])


def test_high_minus_low_is_over_the_items_of_the_trait():
    items = [("openness", "+", "I a."), ("openness", "-", "I b."), *((t, "+", "I c.") for t in questionnaire.BIG_FIVE[1:])]
    scores = {name: np.full(6, 3.0) for name in ["bare base", *TRAITS]}
    scores["high openness"] = np.array([5.0, 4.0, 1.0, 1.0, 1.0, 1.0])
    result = questionnaire.summarise(scores, items)
    rows = {row.pop("name"): row for row in result["questionnaire"]}
    assert rows["high - low"]["openness"] == [1.5, 1, 2]
    assert rows["high openness"] == {"openness": 4.5, "conscientiousness": 1, "extraversion": 1,
                                     "agreeableness": 1, "neuroticism": 1}


def test_probabilities_are_those_of_whole_answers(run):
    """Against the model's plain forward: log p(answer, end | prompt) for one item."""
    model, _ = load_run(run, CPU, torch.float32)
    trait, key, text = questionnaire.read_items()[1]
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
    assert questionnaire.ask(model, [(trait, key, text)]) == pytest.approx([6 - value], abs=1e-4)


def test_the_table_of_a_run(run):
    rows = evaluated("--run", run, "--questionnaire")[f"{run}, questionnaire"]
    assert [row.pop("name") for row in rows] == ["bare base", *TRAITS, "high - low"]
    assert all(1 <= value <= 5 for row in rows[:-1] for value in row.values())
    result = program("experiments.evaluate", "--run", run, "--questionnaire", "--dtype", "fp32")
    assert "high neuroticism" in result.stdout
