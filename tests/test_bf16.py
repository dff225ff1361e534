"""What runs in bf16: near to fp32, on any CPU, and without a new shape for every length of a text."""

import pytest
import torch
import torch.nn.functional as F

from conftest import program, train_arguments
from data import load_records, make_examples
from lora import lora_layers
from personafuse import load_llama, load_run, pick_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize("amx, avx512_bf16, parameters, dtype", [
    (True, True, 5e6, torch.float32),
    (True, True, 135e6, torch.bfloat16),
    (False, True, 135e6, torch.float32),
    (False, True, 8e9, torch.bfloat16),
    (False, False, 8e9, torch.float32),
])
def test_auto_on_a_cpu_goes_by_its_instructions_and_the_size(monkeypatch, amx, avx512_bf16, parameters, dtype):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    assert pick_dtype("auto", CPU, parameters) == dtype
    assert pick_dtype("bf16", CPU, parameters) == torch.bfloat16


def test_auto_is_fp32_for_a_small_base_on_a_cpu(mini):
    assert load_llama(mini, CPU, "auto").dtype == torch.float32


def test_responses_score_alike_in_both_types(run, small_data):
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model, _ = load_run(run, CPU, dtype)
        examples = make_examples(load_records(small_data)[:20], model.tokenizer, model.encoder_tokenizer, 160)
        nll, counts, _ = model.response_nll(examples, torch.full((20, 10), 0.1))
        losses.append(nll / counts)
        alone = torch.cat([model.response_nll([example], torch.full((1, 10), 0.1))[0] for example in examples[:3]])
        assert (alone / counts[:3] - losses[-1][:3]).abs().max() < (1e-5 if dtype == torch.float32 else 2e-2)
    assert (losses[0] - losses[1]).abs().max() < 5e-2


def test_gradients_point_the_same_way_in_both_types(mini, small_data):
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        llama = load_llama(mini, CPU, dtype, experts=10, rank=4, alpha=8)
        for _, layer in lora_layers(llama):
            layer.B.data = torch.randn(layer.B.shape, generator=torch.Generator().manual_seed(0)) * 0.05
            layer.A.requires_grad_(True)
        tokens = torch.arange(1, 78)[None]
        hidden = llama(tokens, torch.full((1, 10), 0.1))
        F.cross_entropy(llama.logits(hidden[0, :-1]).float(), tokens[0, 1:]).backward()
        gradients.append(torch.cat([layer.A.grad.flatten() for _, layer in lora_layers(llama)]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


def test_texts_of_every_length_meet_the_products_in_few_shapes(mini, monkeypatch):
    llama = load_llama(mini, CPU, torch.bfloat16)
    shapes = set()
    plain = F.linear

    def spy(x, weight, bias=None):
        shapes.add((tuple(x.shape), tuple(weight.shape)))
        return plain(x, weight, bias)
    monkeypatch.setattr(F, "linear", spy)
    with torch.no_grad():
        whole = llama(torch.arange(1, 100)[None])
        for length in range(33, 97):
            hidden = llama(torch.arange(1, length + 1)[None])
            assert llama.logits(hidden[0]).shape == (length, 400)
            assert torch.cosine_similarity(hidden.float(), whole[:, :length].float(), dim=-1).min() > 0.999
    assert {x[1] for x, _ in shapes if len(x) == 3} == {64, 96, 128} and {x[0] for x, _ in shapes if len(x) == 2} == {128}


def test_a_run_in_bf16_and_its_answer(mini, small_data, tmp_path):
    result = program(*train_arguments(mini, small_data, tmp_path / "out", "--dtype", "bf16"))
    assert result.returncode == 0, result.stderr
    ask = ["sample.py", "hi", "--run", tmp_path / "out", "--dtype", "bf16", "--max-new-tokens", 5]
    assert program(*ask).stdout == program(*ask).stdout != ""
