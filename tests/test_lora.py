"""The stacked experts against a loop over them, against peft, merged and unmerged."""

import pytest
import torch
from conftest import FAMILIES, make_model

import lora
from data import TRAITS
from lora import LoRALinear, clip_experts, expert_scales, lora_layers, merge, unmerge
from personafuse import Cache, load_llama, load_run

CPU = torch.device("cpu")


def with_random_experts(folder, experts=10, rank=4):
    llama = load_llama(folder, CPU, torch.float32, experts, rank, alpha=2 * rank)
    generator = torch.Generator().manual_seed(0)
    for _, layer in lora_layers(llama):
        layer.B.data = 0.1 * torch.randn(layer.B.shape, generator=generator)
    return llama


def test_stacked_is_a_loop_over_experts():
    generator = torch.Generator().manual_seed(0)
    layer = LoRALinear(12, 7, bias=True, experts=10, rank=3)
    for t in layer.parameters():
        t.data = torch.randn(t.shape, generator=generator)
    x = torch.randn(4, 5, 12, generator=generator)
    w = torch.rand(4, 10, generator=generator)
    y = layer(x, expert_scales(w, rank=3, alpha=6, dtype=torch.float32))
    # every example has mixing weights of its own
    for row in range(4):
        expected = x[row] @ layer.weight.T + layer.bias
        for i in range(10):
            A = layer.A[3 * i:3 * i + 3]
            B = layer.B[:, 3 * i:3 * i + 3]
            expected = expected + w[row, i] * (x[row] @ (B @ A).T) * 6 / 3
        assert (y[row] - expected).abs().max() < 1e-4


def test_untrained_experts_change_nothing(mini):
    llama = load_llama(mini, CPU, torch.float32, experts=10)
    tokens = torch.arange(20)[None]
    w = torch.full((1, 10), 0.1)
    assert torch.equal(llama(tokens, w), llama(tokens))
    # q, k, v, o, gate, up, down of both layers
    assert len(lora_layers(llama)) == 7 * 2


# without and with biases at q, k and v; on either kind of CPU
@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("family", ["smollm2", "qwen25"])
def test_merged_is_mixed_and_unmerged_is_the_base_to_the_bit(family, amx, tmp_path, monkeypatch):
    monkeypatch.setattr(lora, "AMX", amx)
    llama = with_random_experts(make_model(tmp_path / family, **FAMILIES[family]))
    tokens = torch.arange(30)[None]
    w = torch.rand(10, generator=torch.Generator().manual_seed(1))
    before = {name: t.clone() for name, t in llama.state_dict().items()}
    with torch.no_grad():
        mixed = llama(tokens, w[None])
        base = llama(tokens)
        originals = merge(llama, w)
        merged = llama(tokens)
        # one token alone, as in generation
        cache = Cache(llama, 30)
        llama(tokens[:, :29], cache=cache)
        alone = llama(tokens[:, 29:], cache=cache)
        unmerge(llama, originals)
        again = llama(tokens)
    assert (merged - mixed).abs().max() < 1e-4
    assert (merged - base).abs().max() > 0.01
    assert (alone - mixed[:, 29:]).abs().max() < 1e-4
    assert torch.equal(again, base)
    for name, t in llama.state_dict().items():
        assert torch.equal(t, before[name])


@pytest.mark.parametrize("amx", [False, True])
def test_one_token_alone_is_mixed_as_among_others(mini, amx, monkeypatch):
    monkeypatch.setattr(lora, "AMX", amx)
    llama = with_random_experts(mini)
    tokens = torch.arange(30)[None]
    w = torch.rand(1, 10, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        together = llama(tokens, w)
        cache = Cache(llama, 30)
        llama(tokens[:, :29], w, cache)
        alone = llama(tokens[:, 29:], w, cache)
    assert (alone - together[:, 29:]).abs().max() < 1e-4


def test_each_expert_is_clipped_as_if_it_were_alone(mini):
    """Against torch's own clipping of a copy of one expert's part of every gradient."""
    llama = with_random_experts(mini, experts=3, rank=2)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([0.001, 1.0, 0.1]).repeat_interleave(2)       # the first stays as it is
    for _, layer in lora_layers(llama):
        layer.A.grad = torch.randn(layer.A.shape, generator=generator) * sizes[:, None]
        layer.B.grad = torch.randn(layer.B.shape, generator=generator) * sizes
    alone = []
    for i in range(3):
        rows = slice(2 * i, 2 * i + 2)
        parts = []
        for _, layer in lora_layers(llama):
            for gradient in (layer.A.grad[rows], layer.B.grad[:, rows]):
                part = torch.zeros(gradient.shape)
                part.grad = gradient.clone()
                parts.append(part)
        alone.append((torch.nn.utils.clip_grad_norm_(parts, 0.5), parts))

    norms = clip_experts(llama, 3, 0.5)
    for i, (norm, parts) in enumerate(alone):
        rows = slice(2 * i, 2 * i + 2)
        assert norms[i].item() == pytest.approx(norm.item(), rel=1e-5)
        expected = iter(parts)
        for _, layer in lora_layers(llama):
            assert torch.allclose(layer.A.grad[rows], next(expected).grad, rtol=1e-4)
            assert torch.allclose(layer.B.grad[:, rows], next(expected).grad, rtol=1e-4)
    assert norms[0] < 0.5 < norms[1]


# ------------------------------------------------------------------------------- beside peft

def their_base(mini):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(mini, dtype=torch.float32)


def test_each_expert_loads_in_peft_with_our_logits(run, mini):
    peft = pytest.importorskip("peft")
    model, _ = load_run(run, CPU, torch.float32)
    tokens = torch.randint(0, 400, (2, 40), generator=torch.Generator().manual_seed(0))
    for i in (0, 7):
        theirs = peft.PeftModel.from_pretrained(their_base(mini), run / TRAITS[i].replace(" ", "_"))
        one_hot = torch.eye(10)[i].expand(2, 10)
        with torch.no_grad():
            ours = model.base.logits(model.base(tokens, one_hot))
            bare = model.base.logits(model.base(tokens))
            assert (ours - theirs(tokens).logits).abs().max() < 1e-4
        # it has learned something
        assert (ours - bare).abs().max() > 1e-4


def test_the_mixture_is_peft_with_weighted_adapters(run, mini):
    peft = pytest.importorskip("peft")
    model, _ = load_run(run, CPU, torch.float32)
    w = torch.softmax(torch.randn(10, generator=torch.Generator().manual_seed(0)), dim=0)
    names = [name.replace(" ", "_") for name in TRAITS]
    theirs = peft.PeftModel.from_pretrained(their_base(mini), run / names[0],
                                            adapter_name=names[0])
    for name in names[1:]:
        theirs.load_adapter(run / name, adapter_name=name)
    theirs.base_model.set_adapter(names)
    for layer in theirs.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            for name, weight in zip(names, w.tolist()):
                layer.scaling[name] *= weight
    tokens = torch.arange(50)[None]
    with torch.no_grad():
        ours = model.base.logits(model.base(tokens, w[None]))
        assert (ours - theirs(tokens).logits).abs().max() < 1e-4
