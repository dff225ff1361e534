"""Many prompts at a time against one at a time, whatever ends when and wherever it stands."""

import json

import pytest
import torch

from conftest import program
from experiments.batched import generate_batch
from lora import lora_layers
from personafuse import generate, load_llama, load_run
from test_llama import plain_greedy

CPU = torch.device("cpu")


def make_prompts(*lengths):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 400, (n,), generator=generator).tolist() for n in lengths]


def collect(ended, n):
    """What generate_batch yields -> the answers, and the order in which they ended."""
    answers = [None] * n
    order = []
    for i, ids in ended:
        answers[i] = ids
        order.append(i)
    return answers, order


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_generating_many_is_generating_each(mini, rows):
    llama = load_llama(mini, CPU, torch.float32)
    prompts = make_prompts(5, 40, 1, 17, 9, 30, 2)
    with torch.no_grad():
        first = plain_greedy(llama, prompts[1], 12, set())
        stop = {first[4]}                                   # so that prompt 1, at least, ends early
        expected = [plain_greedy(llama, prompt, 12, stop) for prompt in prompts]
    answers, ended = collect(generate_batch(llama, prompts, 12, stop, rows=rows), len(prompts))
    assert answers == expected
    assert sorted(ended) == list(range(len(prompts)))
    assert len(answers[1]) <= 4


def test_every_row_has_the_weights_of_its_prompt(mini):
    llama = load_llama(mini, CPU, torch.float32, experts=3)
    generator = torch.Generator().manual_seed(0)
    for _, layer in lora_layers(llama):
        layer.B.data = torch.randn(layer.B.shape, generator=generator) * 0.3
    # one prompt for all, so that only the weights can tell the answers apart
    prompts = make_prompts(8) * 6
    w = torch.eye(3).repeat(2, 1)
    answers, _ = collect(generate_batch(llama, prompts, 10, set(), w, rows=4), 6)
    for prompt, row, answer in zip(prompts, w, answers):
        assert answer == list(generate(llama, prompt, 10, set(), row[None]))
    assert answers[0] != answers[1] != answers[2] != answers[0]


def test_repetition_is_penalized_in_each_row_by_its_own_tokens(mini):
    llama = load_llama(mini, CPU, torch.float32)
    prompts = make_prompts(7, 30, 12, 5)
    plain, _ = collect(generate_batch(llama, prompts, 16, set()), 4)
    answers, _ = collect(generate_batch(llama, prompts, 16, set(), rows=3, repetition_penalty=1.5), 4)
    for prompt, answer in zip(prompts, answers):
        assert answer == list(generate(llama, prompt, 16, set(), repetition_penalty=1.5))
    assert answers != plain


def test_generation_ends_with_the_context(mini):
    llama = load_llama(mini, CPU, torch.float32)
    answers, ended = collect(generate_batch(llama, [[5] * 500, [5, 6]], 100, set()), 2)
    # the last one is predicted from the last place, and not read
    assert [len(answer) for answer in answers] == [512 - 500 + 1, 100]
    assert ended == [0, 1]
    # and no more memory is taken than that needs
    answers, _ = collect(generate_batch(llama, [[5] * 500, [5, 6]], 10**9, set()), 2)
    assert [len(answer) for answer in answers] == [13, 511]


@pytest.mark.parametrize("seed", [-1, 10**30])
def test_a_seed_without_a_meaning_is_refused(run, seed):
    result = program("experiments.answers", "--run", run, "--seed", seed)
    assert result.returncode == 2 and f"argument --seed: {seed}" in result.stderr


def test_sampling_repeats_with_its_seed(mini):
    llama = load_llama(mini, CPU, torch.float32)
    prompts = make_prompts(7, 3, 12)

    def drawn(seed):
        tokens = generate_batch(llama, prompts, 12, set(), temperature=1.5, top_p=0.9, seed=seed)
        return collect(tokens, 3)[0]

    assert drawn(1) == drawn(1) != drawn(2)


def test_answers_to_a_file_are_those_of_each_query(run, tmp_path):
    (tmp_path / "queries.txt").write_text("How are you?\n\nI feel anxious\n", encoding="utf-8")
    result = program("experiments.answers", "--run", run, tmp_path / "queries.txt", "--max-new-tokens", 6,
                     "--temperature", 0, "--dtype", "fp32")
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["query"] for line in lines] == ["How are you?", "I feel anxious"]
    model, _ = load_run(run, CPU, torch.float32)
    for line in lines:
        w = model.mixing_weights([line["query"]])
        assert list(line["weights"].values()) == pytest.approx(w[0].tolist(), abs=1e-6)
        prompt = model.tokenizer.encode_prompt(line["query"])
        ids = list(generate(model.base, prompt, 6, model.tokenizer.stop, w))
        assert line["response"] == model.tokenizer.decode(ids).strip()
    result = program("experiments.answers", "--run", run, "--route", "none", "--max-new-tokens", 2, "--dtype", "fp32")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(lines) > 3 and all(line["weights"] is None for line in lines)
