"""The hand-written Llama against transformers, its cache against the full pass, and loading with everything wrong."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES, MINI, fails_in_one_line, make_model, program
from safetensors.torch import load_file, save_file

import personafuse
from plumbing.chat import ChatTokenizer
from personafuse import Cache, Config, Llama, generate, load_llama
from plumbing import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_agree_with_transformers(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = make_model(tmp_path / family, shards=2 if family == "llama31" else 1, **FAMILIES[family])
    ours = load_llama(folder, CPU, torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.randint(0, MINI["vocab_size"], (2, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (ours.logits(ours(tokens)) - theirs(tokens).logits).abs().max() < 1e-4


def test_a_large_vocabularys_logits_come_in_parts_and_are_the_same(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MINI | dict(vocab_size=2**20, hidden_size=4, num_hidden_layers=0)))
    llama = Llama(Config.from_folder(tmp_path)).requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    llama.embed_tokens.weight.data = torch.randn(2**20, 4, generator=g)
    hidden = torch.randn(20, 4, generator=g, requires_grad=True)
    targets = torch.randint(0, 2**20, (20,), generator=g)
    whole = hidden @ llama.embed_tokens.weight.T
    wanted, = torch.autograd.grad(F.cross_entropy(whole, targets, reduction="sum"), hidden)
    parts = list(llama.logits_in_parts(hidden))
    assert [(some.start, some.stop) for some, _ in parts] == [(0, 6), (6, 12), (12, 18), (18, 20)]     # 6 * 2**20 numbers
    assert (torch.cat([logits for _, logits in parts]) - whole).abs().max() < 1e-4
    found, = torch.autograd.grad(sum(F.cross_entropy(logits, targets[some], reduction="sum") for some, logits in parts), hidden)
    assert (found - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [
    dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
         vocab_size=49152, rope_theta=100000),
    dict(model_type="qwen2", hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
         num_key_value_heads=2, vocab_size=151936, rope_theta=1000000.0, rms_norm_eps=1e-6)], ids=["smollm2-135m", "qwen2.5-0.5b"])
def test_true_shapes_agree_with_transformers(shape, tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(MINI | shape))
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(tmp_path), dtype=torch.float32)
    theirs.save_pretrained(tmp_path)
    ours = load_llama(tmp_path, CPU, torch.float32)
    tokens = torch.randint(0, shape["vocab_size"], (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (ours.logits(ours(tokens)) - theirs(tokens).logits).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_token_by_token_agrees_with_the_full_pass(family, tmp_path):
    llama = load_llama(make_model(tmp_path / family, **FAMILIES[family]), CPU, torch.float32)
    tokens = torch.randint(0, MINI["vocab_size"], (1, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        full = llama(tokens)
        cache = Cache(llama, capacity=60)
        parts = [llama(tokens[:, :20], cache=cache)] + [llama(tokens[:, i:i + 1], cache=cache) for i in range(20, 60)]
    assert (torch.cat(parts, dim=1) - full).abs().max() < 1e-4


def plain_greedy(llama, prompt, count, stop):
    """The whole sequence again for every token: what `generate` must agree with."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count:
        token = int(llama.logits(llama(torch.tensor([ids]))[0, -1]).argmax())
        if token in stop:
            break
        ids.append(token)
    return ids[len(prompt):]


def test_generating_is_the_whole_pass_again_for_every_token(mini):
    llama = load_llama(mini, CPU, torch.float32)
    prompt = torch.randint(1, 400, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    with torch.no_grad():
        plain = plain_greedy(llama, prompt, 12, set())
        assert list(generate(llama, prompt, 12, set())) == plain
        stop = {plain[4]}                                   # an end token that comes up ends it
        expected = plain_greedy(llama, prompt, 12, stop)
        assert list(generate(llama, prompt, 12, stop)) == expected and len(expected) <= 4


@pytest.mark.parametrize("penalty", [1.3, 5.0])
def test_the_repetition_penalty_is_that_of_transformers(mini, penalty):
    transformers = pytest.importorskip("transformers")
    llama = load_llama(mini, CPU, torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(mini, dtype=torch.float32)
    prompt = torch.randint(1, 400, (9,), generator=torch.Generator().manual_seed(3)).tolist()
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=[-1],
                               pad_token_id=0, repetition_penalty=penalty)[0, 9:].tolist()
    assert list(generate(llama, prompt, 30, set(), repetition_penalty=penalty)) == expected
    assert expected != list(generate(llama, prompt, 30, set()))


def test_generation_ends_with_the_context(mini):
    llama = load_llama(mini, CPU, torch.float32)
    tokens = list(generate(llama, [5] * 500, 100, set()))
    assert len(tokens) == 512 - 500 + 1                     # the last one is predicted from the last place, and not read


def test_nucleus_keeps_the_smallest_set_that_holds_top_p():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(2000, 1)
    seen = personafuse.sample_token(logits, 1.0, 0.7, torch.Generator().manual_seed(0))
    assert set(seen.tolist()) == {0, 1}                     # 0.5 alone is too little, 0.5 + 0.3 is enough
    assert abs((seen == 0).float().mean() - 0.625) < 0.04   # 0.5 / 0.8


def test_16_bit_weights_load_as_they_are_and_as_32(tmp_path):
    for dtype in (torch.bfloat16, torch.float16):
        folder = make_model(tmp_path / str(dtype), dtype=dtype)
        as_they_are, as_32 = load_llama(folder, CPU, dtype), load_llama(folder, CPU, torch.float32)
        assert as_they_are.norm.weight.dtype == dtype and as_32.norm.weight.dtype == torch.float32
        tokens = torch.arange(20)[None]
        with torch.no_grad():
            near = torch.cosine_similarity(as_they_are(tokens).float(), as_32(tokens), dim=-1)
        assert near.min() > 0.999


def test_tensors_that_are_not_needed_are_ignored(mini, tmp_path):
    folder = shutil.copytree(mini, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "lm_head.weight": torch.ones(400, 32)}
    save_file(tensors | extra, folder / "model.safetensors")            # a tied model's copy of the head is not read either
    tokens = torch.arange(9)[None]
    assert torch.equal(load_llama(folder, CPU, torch.float32)(tokens), load_llama(mini, CPU, torch.float32)(tokens))


@pytest.mark.parametrize("change, word", [
    ({"model_type": "mixtral"}, "mixtral"), ({"hidden_act": "gelu"}, "gelu"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"), ({"use_sliding_window": True}, "sliding window"),
    ({"quantization_config": {"bits": 4}}, "quantized"), ({"mlp_bias": True}, "mlp_bias"), ({"vocab_size": None}, "vocab_size")])
def test_a_config_we_cannot_run_is_refused_by_name(change, word, tmp_path):
    config = {k: v for k, v in (MINI | change).items() if v is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=word):
        Config.from_folder(tmp_path)


def test_broken_folders_end_in_one_line(mini, tmp_path, monkeypatch):
    def ask(folder):
        return program("sample.py", "hello", "--route", "none", "--base", folder)

    assert fails_in_one_line(ask(tmp_path), "config.json")
    folder = shutil.copytree(mini, tmp_path / "no_weights")
    (folder / "model.safetensors").unlink()
    assert fails_in_one_line(ask(folder), "model.safetensors")
    folder = shutil.copytree(mini, tmp_path / "cut_short")
    (folder / "model.safetensors").write_bytes((mini / "model.safetensors").read_bytes()[:-500])
    assert fails_in_one_line(ask(folder), folder / "model.safetensors", "cut short")
    folder = shutil.copytree(mini, tmp_path / "no_tokenizer")
    (folder / "tokenizer.json").unlink()
    assert fails_in_one_line(ask(folder), "tokenizer.json")


def test_wrong_tensors_are_named(mini, tmp_path):
    tensors = load_file(mini / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    folder = shutil.copytree(mini, tmp_path / "missing")
    save_file({k: v for k, v in tensors.items() if k != name}, folder / "model.safetensors")
    with pytest.raises(UserError, match="layers.1.mlp.up_proj.weight is missing"):
        load_llama(folder, CPU, torch.float32)
    save_file(tensors | {name: torch.ones(3, 32)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"layers.1.mlp.up_proj.weight has shape \(3, 32\), .* \(64, 32\)"):
        load_llama(folder, CPU, torch.float32)


def test_a_missing_shard_and_a_foreign_tokenizer_are_named(tmp_path):
    folder = make_model(tmp_path / "m", shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00002.safetensors"):
        load_llama(folder, CPU, torch.float32)
    folder = make_model(tmp_path / "v")
    llama = load_llama(folder, CPU, torch.float32)
    llama.config.vocab_size = 300
    with pytest.raises(UserError, match="400 tokens.*300"):
        personafuse.check_vocabulary(ChatTokenizer(folder), llama, folder)


def test_too_little_memory_is_said_before_loading(mini, monkeypatch):
    monkeypatch.setattr(personafuse, "memory_of", lambda device: 50_000)
    with pytest.raises(UserError, match="needs .* GiB .* has"):
        load_llama(mini, CPU, torch.float32)
