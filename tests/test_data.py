"""Records, the split, weights by hand, and the batches of the three stages."""

import json
import os
import re

import pytest
import torch
from conftest import ROOT, fails_in_one_line, program

from data import (TRAITS, Example, expert_batch, expert_subsets, held_out, joint_batch,
                  load_records, parse_traits, router_batch, sample_indices, split,
                  trait_groups)
from personafuse import PersonaFuse, load_llama
from plumbing.chat import ChatTokenizer
from plumbing.files import UserError

GOOD = {"query": "I feel anxious", "response": "That sounds hard.",
        "social_traits": ["High Agreeableness"],
        "task_traits": ["low neuroticism", "High Agreeableness"]}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


# --------------------------------------------------------------------------------------- records

def test_p_is_the_union_of_both_trait_lists(tmp_path):
    path = write(tmp_path / "d.jsonl", GOOD)
    path.write_text(path.read_text() + "\n")
    record, = load_records(path)
    assert record["p"] == (0, 0, 0, 0, 0, 0, 1, 0, 0, 1)
    assert TRAITS[6] == "high agreeableness" and TRAITS[9] == "low neuroticism"


@pytest.mark.parametrize("change, reason", [
    ({"query": None}, "missing key 'query'"),
    ({"response": None}, "missing key 'response'"),
    ({"task_traits": None}, "missing key 'task_traits'"),
    ({"social_traits": "High Openness"}, "not a list"),
    ({"query": "  "}, "empty query"),
    ({"response": ""}, "empty response"),
    ({"query": 7}, "empty query"),
    ({"task_traits": ["High Ego"]}, "unknown trait 'High Ego'"),
    ({"social_traits": [], "task_traits": []}, "no trait"),
    ({"social_traits": ["Low Agreeableness"]}, "both poles"),
])
def test_a_bad_record_stops_with_file_line_and_reason(change, reason, tmp_path):
    bad = {key: value for key, value in (GOOD | change).items() if value is not None}
    path = write(tmp_path / "d.jsonl", GOOD, bad)
    with pytest.raises(UserError, match=f"d.jsonl, line 2: .*{reason}"):
        load_records(path)


def test_a_bad_line_is_one_line_on_the_command_line(tmp_path, mini):
    path = tmp_path / "d.jsonl"
    command = ["train.py", "--base", mini, "--encoder", mini, "--out", tmp_path / "o", "--data"]
    bad = {"{not json": "line 1", "[1]": "not a JSON object", "": "no records"}
    for text, reason in bad.items():
        path.write_text(text)
        assert fails_in_one_line(program(*command, path), path, reason)
    assert fails_in_one_line(program(*command, tmp_path / "none"), "none")
    assert fails_in_one_line(program(*command, tmp_path), tmp_path, "no regular file")
    assert not (tmp_path / "o").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name")
def test_a_pipe_as_data_is_refused(tmp_path, mini):
    """It can be read once only, and records are read and hashed."""
    os.mkfifo(tmp_path / "pipe")
    result = program("train.py", "--base", mini, "--data", tmp_path / "pipe", "--out", tmp_path)
    assert fails_in_one_line(result, "pipe", "no regular file")


def test_the_split_holds_still_and_is_about_a_tenth():
    records = load_records(ROOT / "persona_cot.jsonl")
    training, held = split(records)
    assert len(training) + len(held) == len(records)
    assert 0.07 < len(held) / len(records) < 0.13
    assert all(held_out(record["query"]) for record in held)
    # where a query falls is its own affair
    assert split(records[100:])[1] == [record for record in held if record in records[100:]]


def test_traits_by_hand():
    w = parse_traits("high agreeableness=0.7, Low_Neuroticism = 0.3,high openness")
    named = {name: weight for name, weight in zip(TRAITS, w) if weight}
    assert named == {"high openness": 1, "high agreeableness": 0.7, "low neuroticism": 0.3}


@pytest.mark.parametrize("text, reason", [
    ("high ego=1", "high ego"),
    ("high openness=1.5", "out of the range"),
    ("high openness=nan", "out of the range"),
    ("high openness=much", "not a number"),
    ("", "unknown trait"),
])
def test_weights_by_hand_that_are_none_are_refused(text, reason):
    with pytest.raises(UserError, match=reason):
        parse_traits(text)


# -------------------------------------------------------------------------------------- examples

def test_examples_fit_the_length_and_keep_the_answer(mini):
    tokenizer = ChatTokenizer(mini)
    model = PersonaFuse(load_llama(mini, torch.device("cpu"), torch.float32), tokenizer)
    p = (1,) + (0,) * 9
    records = [GOOD | {"p": p}, GOOD | {"query": "long " * 300, "p": p}]
    # the long query leaves its answer no room
    example, = model.examples(records, 40)
    assert example.length == len(example.prompt) + len(example.answer) <= 40
    whole = model.examples(records[:1], 400)[0]
    answer = tokenizer.decode(whole.answer.tolist())
    assert re.sub(r"\s+", " ", answer).strip() == GOOD["response"]
    assert whole.answer[-1] == tokenizer.end and not whole.cut
    cut = model.examples(records[:1], whole.length - 2)[0]
    assert cut.cut and cut.answer.tolist() == whole.answer[:-2].tolist()


# --------------------------------------------------------------------------------------- batches

def test_sampling_walks_through_all_before_it_repeats():
    seen = []
    for step in range(7):
        seen += sample_indices(10, 3, step, 0, 1)
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10))
    assert seen[:10] != seen[10:20]
    # a step's are a function of the step alone
    assert sample_indices(10, 3, 2, 0, 1) == seen[6:9]
    assert sample_indices(10, 25, 0, 0, 1)[:9] == seen[:9]
    # and of the seed
    assert sample_indices(10, 10, 0, 1, 1) != sample_indices(10, 10, 0, 0, 1)


def examples_of(*poles, copies=5):
    """Examples of different lengths, each with the pole of one trait."""
    examples = []
    for k in range(copies):
        for pole in poles:
            p = tuple(int(i == pole) for i in range(10))
            length = 3 + len(examples)
            examples.append(Example([1] * length, [2] * (k + 1), [3], p))
    return examples


def test_each_experts_tokens_are_averaged_on_their_own():
    examples = examples_of(0, 4, 9)
    batch = expert_batch(examples, expert_subsets(examples), 2, 0, seed=0)
    assert batch.experts == 3
    counted = [0.0] * 10
    for example, w, weight in zip(batch.examples, batch.fixed_w, batch.token_weight):
        expert = w.index(1)
        assert example.p[expert] == 1 and sum(w) == 1
        counted[expert] += weight * len(example.answer)
    assert counted == pytest.approx([float(i in (0, 4, 9)) for i in range(10)])
    lengths = [example.length for example in batch.examples]
    assert lengths == sorted(lengths)


def test_the_groups_of_a_router_batch_share_their_p():
    examples = examples_of(0, 4, 9)
    groups = trait_groups(examples)
    for step in range(5):
        batch = router_batch(examples, groups, 6, 3, step, seed=0).examples
        for first in (0, 3):
            group = batch[first:first + 3]
            assert len({example.p for example in group}) == 1
            # no query twice
            assert len({example.length for example in group}) == 3


def test_the_tokens_of_a_joint_batch_count_alike():
    batch = joint_batch(examples_of(0, 4, 9), 6, 0, seed=0)
    tokens = sum(len(example.answer) for example in batch.examples)
    assert len(batch.examples) == 6
    assert batch.token_weight == pytest.approx([1 / tokens] * 6)
