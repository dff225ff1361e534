"""A GGUF file, the format of llama.cpp -> a folder in the Hugging Face layout. For models.py.

A GGUF file holds all of a model in one: its figures and its tokenizer as named fields, its weights
as tensors, most of them in few bits.
"""

import os
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers, processors

from plumbing.files import UserError, write_json

FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
FIGURES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# a number's digits go by three
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace("{1,3}", "")
# how a text is cut into words before BPE, by tokenizer.ggml.pre
WORDS = {
    "smollm": pre_tokenizers.Digits(individual_digits=True),
    "llama-bpe": pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
    "qwen2": pre_tokenizers.Split(Regex(QWEN2), "isolated"),
}


def convert_gguf(path, folder):
    """Make `folder` from a GGUF file, whole or not at all, unless it is there already -> folder."""
    if folder.is_dir():
        return folder
    try:
        # here, for this import takes half a second
        from gguf import GGUFReader, dequantize
    except ImportError:
        raise UserError("the package gguf reads GGUF files: `pip install gguf`")
    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        config = read_config(fields, {t.name: t for t in reader.tensors})
        tokenizer = read_tokenizer(fields)
        chat = {"chat_template": fields.get("tokenizer.chat_template")}
        for end in ("bos", "eos"):                      # a template may name them
            id = fields.get(f"tokenizer.ggml.{end}_token_id")
            if id is not None:
                chat[f"{end}_token"] = tokenizer.id_to_token(id)
        weights = read_weights(reader.tensors, dequantize, config)
    except Exception as error:          # KeyError: a field that lacks; a cut file: numpy's errors
        raise UserError(f"cannot read {path}: {type(error).__name__} {error} "
                        "(if it was cut short, download it again)")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as tmp:
            save_file(weights, f"{tmp}/model.safetensors", {"format": "pt"})
            tokenizer.save(f"{tmp}/tokenizer.json")
            write_json(f"{tmp}/tokenizer_config.json", chat)
            write_json(f"{tmp}/config.json", config)
            os.rename(tmp, folder)
    except Exception as error:                          # of the disk, by three libraries' names
        # another process may have been faster: its folder is the same
        if not folder.is_dir():
            raise UserError(f"cannot write {folder}: {error}")
    return folder


def read_config(fields, tensors):
    """config.json; ValueError for what the Llama of personafuse.py would run wrongly."""
    family = fields["general.architecture"]
    if family not in FAMILIES:
        raise ValueError(f"architecture {family} is not supported")
    for key in ("split.count", f"{family}.rope.scaling.type"):
        if fields.get(key) not in (None, 1, "none"):
            raise ValueError(f"{key} {fields[key]} is not supported")
    config = {name: fields[f"{family}.{key}"] for name, key in FIGURES.items()}
    # a tensor's shape is the reverse of torch's
    rows = {name: int(t.shape[-1]) for name, t in tensors.items()}
    config |= {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "torch_dtype": "bfloat16",
        "head_dim": rows["blk.0.attn_q.weight"] // config["num_attention_heads"],
        "vocab_size": rows["token_embd.weight"],
        "tie_word_embeddings": "output.weight" not in rows,
        "attention_bias": "blk.0.attn_q.bias" in rows,
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
    }
    if "rope_freqs.weight" in tensors:
        slower = tensors["rope_freqs.weight"].data
        config["rope_scaling"] = llama3_rope(slower, config["rope_theta"])
    return config


def llama3_rope(slower, theta):
    """Llama 3's rope_scaling from `slower` (c/2,), by which the turning of each pair is divided."""
    factor = float(slower.max())
    turns = 8192 / (2 * np.pi) * theta ** -np.linspace(0, 1, len(slower), endpoint=False)
    keep = ((turns - 1) / 3).clip(0, 1)
    # the file has not the figures; these are those of all Llama 3, and are checked
    if not np.allclose(1 / slower, keep + (1 - keep) / factor, rtol=1e-3):
        raise ValueError("rope_freqs.weight is not Llama 3's and is not supported")
    return {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_tokenizer(fields):
    """tokenizer.json, as a Tokenizer of the library that will read it."""
    kind = fields["tokenizer.ggml.model"]
    pre = fields["tokenizer.ggml.pre"]
    if kind != "gpt2" or pre not in WORDS:
        raise ValueError(f"tokenizer {kind} {pre} is not supported")
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocab = {token: id for id, token in enumerate(tokens)}
    is_llama = pre == "llama-bpe"
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=is_llama))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre == "smollm")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([WORDS[pre], in_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"]):
        if kind in (3, 4):                              # control tokens, and others that were added
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind == 3)])
    if fields.get("tokenizer.ggml.add_bos_token", is_llama):
        bos = fields["tokenizer.ggml.bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)])
    return tokenizer


def read_weights(tensors, dequantize, config):
    """All tensors in bf16, in which these families are trained, by Hugging Face's names."""
    heads = {}
    if config["model_type"] == "llama":
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for t in tensors:
        # "output.weight", "blk.7.attn_q.weight"
        *block, part, last = t.name.split(".")
        if part == "rope_freqs":                        # is in config.json
            continue
        if part not in TENSORS:
            raise ValueError(f"{t.name} is not supported")
        w = torch.tensor(dequantize(t.data, t.tensor_type), dtype=torch.bfloat16)
        if part in heads:
            # llama.cpp rotates neighbours, Hugging Face numbers half a head apart
            w = w.unflatten(0, (heads[part], -1, 2)).transpose(1, 2).flatten(0, 2)
        layer = f"model.layers.{block[1]}." if block else ""
        weights[f"{layer}{TENSORS[part]}.{last}"] = w
    return weights
