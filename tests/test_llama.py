"""The hand-written Llama against transformers, its cache against the full pass, and loading.

Loading with everything wrong, too.
"""

import json
import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES, MINI, fails_in_one_line, make_model, program
from safetensors.torch import load_file, save_file

import personafuse
from personafuse import Cache, Config, Llama, generate, load_llama, sample_token
from plumbing.chat import ChatTokenizer
from plumbing.files import UserError

CPU = torch.device("cpu")


def random_tokens(*shape, vocabulary=MINI["vocab_size"], seed=1):
    return torch.randint(1, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------- one pass

@pytest.mark.parametrize("family", FAMILIES)
def test_logits_agree_with_transformers(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    shards = 2 if family == "llama31" else 1
    folder = make_model(tmp_path / family, shards, **FAMILIES[family])
    ours = load_llama(folder, CPU, torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = random_tokens(2, 200)
    with torch.no_grad():
        assert (ours.logits(ours(tokens)) - theirs(tokens).logits).abs().max() < 1e-4


TRUE_SHAPES = {
    "smollm2-135m": dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, rope_theta=100000),
    # six of its 24 blocks, for time
    "qwen2.5-0.5b": dict(
        model_type="qwen2", hidden_size=896, intermediate_size=4864, num_hidden_layers=6,
        num_attention_heads=14, num_key_value_heads=2, vocab_size=151936, rope_theta=1000000.0,
        rms_norm_eps=1e-6),
}


@pytest.mark.parametrize("name", TRUE_SHAPES)
def test_true_shapes_agree_with_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = TRUE_SHAPES[name]
    (tmp_path / "config.json").write_text(json.dumps(MINI | shape))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    theirs.save_pretrained(tmp_path)
    ours = load_llama(tmp_path, CPU, torch.float32)
    tokens = random_tokens(1, 24, vocabulary=shape["vocab_size"])
    with torch.no_grad():
        assert (ours.logits(ours(tokens)) - theirs(tokens).logits).abs().max() < 1e-4


def test_a_large_vocabularys_logits_come_in_parts_and_are_the_same(tmp_path):
    V = 2**20
    large = MINI | dict(vocab_size=V, hidden_size=4, num_hidden_layers=1)
    (tmp_path / "config.json").write_text(json.dumps(large))
    llama = Llama(Config.from_folder(tmp_path)).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    llama.embed_tokens.weight.data = torch.randn(V, 4, generator=generator)
    hidden = torch.randn(20, 4, generator=generator, requires_grad=True)
    targets = torch.randint(0, V, (20,), generator=generator)
    whole = hidden @ llama.embed_tokens.weight.T
    loss = F.cross_entropy(whole, targets, reduction="sum")
    wanted, = torch.autograd.grad(loss, hidden)

    parts = list(llama.logits_in_parts(hidden))
    # no more than 6 * 2**20 numbers each
    assert [len(logits) for _, logits in parts] == [6, 6, 6, 2]
    assert (torch.cat([logits for _, logits in parts]) - whole).abs().max() < 1e-4
    loss = 0
    for some, logits in parts:
        loss = loss + F.cross_entropy(logits, targets[some], reduction="sum")
    found, = torch.autograd.grad(loss, hidden)
    assert (found - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_token_by_token_agrees_with_the_full_pass(family, tmp_path):
    llama = load_llama(make_model(tmp_path / family, **FAMILIES[family]), CPU, torch.float32)
    tokens = random_tokens(1, 60)
    with torch.no_grad():
        full = llama(tokens)
        cache = Cache(llama, capacity=60)
        parts = [llama(tokens[:, :20], cache=cache)]
        for i in range(20, 60):
            parts.append(llama(tokens[:, i:i + 1], cache=cache))
    assert (torch.cat(parts, dim=1) - full).abs().max() < 1e-4


# ----------------------------------------------------------------------------- generation

def plain_greedy(llama, prompt, count, stop):
    """The whole sequence again for every token: what `generate` must agree with."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count:
        hidden = llama(torch.tensor([ids]))
        token = int(llama.logits(hidden[0, -1]).argmax())
        if token in stop:
            break
        ids.append(token)
    return ids[len(prompt):]


def test_generating_is_the_whole_pass_again_for_every_token(mini):
    llama = load_llama(mini, CPU, torch.float32)
    prompt = random_tokens(40, seed=3).tolist()
    with torch.no_grad():
        plain = plain_greedy(llama, prompt, 12, set())
        assert list(generate(llama, prompt, 12, set())) == plain
        # an end token that comes up ends it
        stop = {plain[4]}
        expected = plain_greedy(llama, prompt, 12, stop)
    assert list(generate(llama, prompt, 12, stop)) == expected
    assert len(expected) <= 4


@pytest.mark.parametrize("penalty", [1.3, 5.0])
def test_the_repetition_penalty_is_that_of_transformers(mini, penalty):
    transformers = pytest.importorskip("transformers")
    llama = load_llama(mini, CPU, torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(mini, dtype=torch.float32)
    prompt = random_tokens(9, seed=3).tolist()
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False,
                               eos_token_id=[-1], pad_token_id=0, repetition_penalty=penalty)
    expected = expected[0, 9:].tolist()
    assert list(generate(llama, prompt, 30, set(), repetition_penalty=penalty)) == expected
    assert expected != list(generate(llama, prompt, 30, set()))


def test_generation_ends_with_the_context(mini):
    llama = load_llama(mini, CPU, torch.float32)
    tokens = list(generate(llama, [5] * 500, 100, set()))
    # the last one is predicted from the last place, and not read
    assert len(tokens) == 512 - 500 + 1


def test_nucleus_keeps_the_smallest_set_that_holds_top_p():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(2000, 1)
    seen = sample_token(logits, 1.0, 0.7, torch.Generator().manual_seed(0))
    # 0.5 alone is too little, 0.5 + 0.3 is enough
    assert set(seen.tolist()) == {0, 1}
    # 0.5 / 0.8
    assert abs((seen == 0).float().mean() - 0.625) < 0.04


@pytest.mark.parametrize("temperature", [0, 1e-40, 1e-4])
def test_very_cold_is_greedy(temperature):
    logits = torch.tensor([[1.0, 1.2, -3.0]]).repeat(200, 1)
    seen = sample_token(logits, temperature, 1.0, torch.Generator().manual_seed(0))
    assert set(seen.tolist()) == {1}


@pytest.mark.parametrize("temperature", [0, 0.7])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_overflow_are_said(temperature, bad):
    with pytest.raises(UserError, match="not finite: in fp16 .*--dtype bf16"):
        sample_token(torch.tensor([[1.0, bad, 0.0]]), temperature, 1.0, torch.Generator())


# -------------------------------------------------------------------------------- loading

def test_16_bit_weights_load_as_they_are_and_as_32(tmp_path):
    tokens = torch.arange(20)[None]
    for dtype in (torch.bfloat16, torch.float16):
        folder = make_model(tmp_path / str(dtype), dtype=dtype)
        as_they_are = load_llama(folder, CPU, dtype)
        as_32 = load_llama(folder, CPU, torch.float32)
        assert as_they_are.norm.weight.dtype == dtype
        assert as_32.norm.weight.dtype == torch.float32
        with torch.no_grad():
            near = torch.cosine_similarity(as_they_are(tokens).float(), as_32(tokens), dim=-1)
        assert near.min() > 0.999


def test_tensors_that_are_not_needed_are_ignored(mini, tmp_path):
    folder = shutil.copytree(mini, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    # a tied model's copy of the head, and what old versions of transformers saved
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, folder / "model.safetensors")
    tokens = torch.arange(9)[None]
    with_more = load_llama(folder, CPU, torch.float32)
    without = load_llama(mini, CPU, torch.float32)
    assert torch.equal(with_more(tokens), without(tokens))
    assert torch.equal(with_more.logits(with_more(tokens)), without.logits(without(tokens)))


@pytest.mark.parametrize("change, word", [
    ({"model_type": "mixtral"}, "mixtral"),
    ({"hidden_act": "gelu"}, "gelu"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ({"use_sliding_window": True}, "sliding window"),
    ({"quantization_config": {"bits": 4}}, "quantized"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"vocab_size": None}, "vocab_size"),
])
def test_a_config_we_cannot_run_is_refused_by_name(change, word, tmp_path):
    config = {key: value for key, value in (MINI | change).items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=word):
        Config.from_folder(tmp_path)


def test_broken_folders_end_in_one_line(mini, tmp_path):
    def ask(folder):
        return program("sample.py", "hello", "--route", "none", "--base", folder)

    assert fails_in_one_line(ask(tmp_path), "config.json")
    folder = shutil.copytree(mini, tmp_path / "no_weights")
    (folder / "model.safetensors").unlink()
    assert fails_in_one_line(ask(folder), "model.safetensors")
    folder = shutil.copytree(mini, tmp_path / "cut_short")
    whole = (mini / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-500])
    assert fails_in_one_line(ask(folder), folder / "model.safetensors", "cut short")
    folder = shutil.copytree(mini, tmp_path / "no_tokenizer")
    (folder / "tokenizer.json").unlink()
    assert fails_in_one_line(ask(folder), "tokenizer.json")


def test_wrong_tensors_are_named(mini, tmp_path):
    tensors = load_file(mini / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    folder = shutil.copytree(mini, tmp_path / "missing")
    without = {key: t for key, t in tensors.items() if key != name}
    save_file(without, folder / "model.safetensors")
    with pytest.raises(UserError, match="layers.1.mlp.up_proj.weight is missing"):
        load_llama(folder, CPU, torch.float32)
    save_file(tensors | {name: torch.ones(3, 32)}, folder / "model.safetensors")
    shapes = r"layers.1.mlp.up_proj.weight.*\[3, 32\].*\[64, 32\]"
    with pytest.raises(UserError, match=shapes):
        load_llama(folder, CPU, torch.float32)


def test_a_missing_shard_and_a_foreign_tokenizer_are_named(tmp_path):
    folder = make_model(tmp_path / "m", shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00002.safetensors"):
        load_llama(folder, CPU, torch.float32)
    with pytest.raises(UserError, match="400 tokens.* 300"):
        ChatTokenizer(folder).check_against(torch.ones(300, 32))


def test_too_little_memory_is_said_before_loading(mini, monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1000, "SC_PHYS_PAGES": 50}.get)
    monkeypatch.setattr(personafuse, "read_tensors", None)
    with pytest.raises(UserError, match="needs .* GiB .* has"):
        load_llama(mini, CPU, torch.float32)
