"""The stacked experts against a loop over them, against peft, and merged, unmerged and exported."""

import json

import pytest
import torch
from conftest import GREEDY, FAMILIES, fails_in_one_line, make_model, program

from data import TRAITS
from lora import LoRALinear, expert_scales, join, lora_layers, merge, unmerge
from personafuse import Cache, load_llama, load_run

CPU = torch.device("cpu")


def with_random_experts(folder, experts=10, rank=4):
    llama, g = load_llama(folder, CPU, torch.float32, experts, rank, alpha=2 * rank), torch.Generator().manual_seed(0)
    for _, layer in lora_layers(llama):
        layer.B.data = torch.randn(layer.B.shape, generator=g) * 0.1
    return llama


def test_stacked_is_a_loop_over_experts():
    g = torch.Generator().manual_seed(0)
    layer = LoRALinear(12, 7, bias=True, experts=10, rank=3)
    for t in layer.parameters():
        t.data = torch.randn(t.shape, generator=g)
    x, w = torch.randn(4, 5, 12, generator=g), torch.rand(4, 10, generator=g)
    y = layer(x, expert_scales(w, rank=3, alpha=6, dtype=torch.float32))
    for row in range(4):                                            # every example has mixing weights of its own
        expected = x[row] @ layer.weight.T + layer.bias
        for i in range(10):
            A, B = layer.A[3 * i:3 * i + 3], layer.B[:, 3 * i:3 * i + 3]
            expected = expected + w[row, i] * (x[row] @ (B @ A).T) * 6 / 3
        assert (y[row] - expected).abs().max() < 1e-4


def test_untrained_experts_change_nothing(mini):
    llama = load_llama(mini, CPU, torch.float32, experts=10)
    tokens, w = torch.arange(20)[None], torch.full((1, 10), 0.1)
    assert torch.equal(llama(tokens, w), llama(tokens))
    assert len(lora_layers(llama)) == 7 * 2                         # q, k, v, o, gate, up, down of both layers


@pytest.mark.parametrize("family", ["smollm2", "qwen25"])                # without and with biases at q, k and v
def test_merged_is_mixed_and_unmerged_is_the_base_to_the_bit(family, tmp_path):
    llama, tokens = with_random_experts(make_model(tmp_path / family, **FAMILIES[family])), torch.arange(30)[None]
    before, w = {k: t.clone() for k, t in llama.state_dict().items()}, torch.rand(10, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        mixed, base = llama(tokens, w[None]), llama(tokens)
        originals = merge(llama, w)
        merged, cache = llama(tokens), Cache(llama, 30)
        join(llama)
        llama(tokens[:, :29], cache=cache)
        alone = llama(tokens[:, 29:], cache=cache)                  # one token, as in generation
        joined = llama(tokens)
        unmerge(llama, originals)
        again = llama(tokens)
    assert (merged - mixed).abs().max() < 1e-4 and (merged - base).abs().max() > 0.01
    assert (joined - mixed).abs().max() < 1e-4 and (alone - mixed[:, 29:]).abs().max() < 1e-4
    assert all(torch.equal(t, before[k]) for k, t in llama.state_dict().items()) and torch.equal(again, base)


def test_each_expert_loads_in_peft_with_our_logits(run, mini):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    model, _ = load_run(run, CPU, torch.float32)
    tokens = torch.randint(0, 400, (2, 40), generator=torch.Generator().manual_seed(0))
    for i in (0, 7):
        base = transformers.AutoModelForCausalLM.from_pretrained(mini, dtype=torch.float32)
        theirs = peft.PeftModel.from_pretrained(base, run / TRAITS[i].replace(" ", "_"))
        with torch.no_grad():
            ours = model.base.logits(model.base(tokens, torch.eye(10)[i].expand(2, 10)))
            assert (ours - theirs(tokens).logits).abs().max() < 1e-4
            assert (ours - model.base.logits(model.base(tokens))).abs().max() > 1e-4            # it has learned something


def test_the_mixture_is_peft_with_weighted_adapters(run, mini):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    model, _ = load_run(run, CPU, torch.float32)
    w = torch.softmax(torch.randn(10, generator=torch.Generator().manual_seed(0)), dim=0)
    base = transformers.AutoModelForCausalLM.from_pretrained(mini, dtype=torch.float32)
    names = [name.replace(" ", "_") for name in TRAITS]
    theirs = peft.PeftModel.from_pretrained(base, run / names[0], adapter_name=names[0])
    for name in names[1:]:
        theirs.load_adapter(run / name, adapter_name=name)
    theirs.base_model.set_adapter(names)
    for layer in theirs.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            for name, weight in zip(names, w.tolist()):
                layer.scaling[name] *= weight
    tokens = torch.arange(50)[None]
    with torch.no_grad():
        assert (model.base.logits(model.base(tokens, w[None])) - theirs(tokens).logits).abs().max() < 1e-4


@pytest.mark.parametrize("how", [["--traits", "high agreeableness=0.7, low neuroticism=0.3"], ["I feel anxious"]])
def test_an_exported_mixture_answers_alike_in_transformers(run, mini, tmp_path, how):
    transformers = pytest.importorskip("transformers")
    result = program("sample.py", *how, "--run", run, "--export", tmp_path / "merged", "--dtype", "fp32")
    assert result.returncode == 0, result.stderr
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    model, _ = load_run(run, CPU, torch.float32)
    w = torch.zeros(10)
    w[TRAITS.index("high agreeableness")], w[TRAITS.index("low neuroticism")] = 0.7, 0.3
    if how[0] != "--traits":
        w = model.route([model.encoder_tokenizer.encode_query("I feel anxious")])[0]
    prompt = model.tokenizer.encode_prompt("I feel anxious")
    with torch.no_grad():
        ours = model.base.logits(model.base(torch.tensor([prompt]), w[None]))
        assert (ours - theirs(torch.tensor([prompt])).logits).abs().max() < 1e-4
    chosen = ["--traits", how[1]] if how[0] == "--traits" else []
    ours = json.loads(program("sample.py", "I feel anxious", "--run", run, *chosen, "--json", "--max-new-tokens", 20, *GREEDY).stdout)
    ids = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=0, pad_token_id=0)
    assert ours["response"] == model.tokenizer.decode(ids[0, len(prompt):].tolist()).strip()


def test_export_refuses_what_it_cannot_do(run, tmp_path):
    assert fails_in_one_line(program("sample.py", "hi", "--run", tmp_path, "--export", tmp_path / "x"), "personafuse.json")
    assert fails_in_one_line(program("sample.py", "hi", "--run", run, "--export", run), "exists already")
    assert fails_in_one_line(program("sample.py", "--run", run, "--traits", "high ego=1", "--export", tmp_path / "x"), "high ego")
