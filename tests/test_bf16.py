"""What runs in bf16: near to fp32, on any CPU."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import program, succeeds, train_arguments

from data import load_records
from experiments.common import response_nll
from lora import lora_layers
from personafuse import load_llama, load_run, pick_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize("avx512_bf16, parameters, dtype", [
    (True, 5e6, torch.float32),
    (True, 135e6, torch.bfloat16),
    (False, 8e9, torch.float32),
])
def test_auto_on_a_cpu_goes_by_its_instructions_and_the_size(monkeypatch, avx512_bf16,
                                                             parameters, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    assert pick_dtype("auto", CPU, parameters) == dtype
    assert pick_dtype("bf16", CPU, parameters) == torch.bfloat16


def test_auto_is_fp32_for_a_small_base_on_a_cpu(mini):
    assert load_llama(mini, CPU, "auto").dtype == torch.float32


def test_responses_score_alike_in_both_types(run, small_data):
    w = torch.full((20, 10), 0.1)
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model, _ = load_run(run, CPU, dtype)
        examples = model.examples(load_records(small_data)[:20], 160)
        nll, counts = response_nll(model, examples, w)
        losses.append(nll / counts)
        alone = np.concatenate([response_nll(model, [example], w[:1])[0] for example in examples[:3]])
        rounding = 1e-5 if dtype == torch.float32 else 2e-2
        assert np.abs(alone / counts[:3] - losses[-1][:3]).max() < rounding
    assert np.abs(losses[0] - losses[1]).max() < 5e-2


def test_gradients_point_the_same_way_in_both_types(mini):
    tokens = torch.arange(1, 78)[None]
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        llama = load_llama(mini, CPU, dtype, experts=10, rank=4, alpha=8)
        generator = torch.Generator().manual_seed(0)
        for _, layer in lora_layers(llama):
            layer.B.data = 0.05 * torch.randn(layer.B.shape, generator=generator)
            layer.A.requires_grad_(True)
        hidden = llama(tokens, torch.full((1, 10), 0.1))
        logits = llama.logits(hidden[0, :-1]).float()
        F.cross_entropy(logits, tokens[0, 1:]).backward()
        gradients.append(torch.cat([layer.A.grad.flatten() for _, layer in lora_layers(llama)]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


def test_a_run_in_bf16_and_its_answer(mini, small_data, tmp_path):
    out = tmp_path / "out"
    succeeds(*train_arguments(mini, small_data, out, "--dtype", "bf16"))
    ask = ["sample.py", "hi", "--run", out, "--dtype", "bf16", "--max-new-tokens", 5]
    assert program(*ask).stdout == program(*ask).stdout != ""
