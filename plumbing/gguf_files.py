"""A GGUF file, the format of llama.cpp -> a folder in the Hugging Face layout. For models.py.

A GGUF file holds all of a model in one: its figures and its tokenizer as named fields, its weights
as tensors, most of them in few bits.
"""

import os
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from plumbing.files import UserError, write_json

# fields that say what the tokenizer and the Llama of personafuse.py must know
KNOWN = {
    "general.architecture": ["llama", "qwen2"],
    "tokenizer.ggml.model": ["gpt2"],
    "tokenizer.ggml.pre": ["smollm", "qwen2"],
    "split.count": [None, 1],
    "llama.rope.scaling.type": [None, "none"],
    "qwen2.rope.scaling.type": [None, "none"],
}
# config.json's name -> GGUF's
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
# what is turned by the rotary embeddings, and how many heads it has; qwen2 has other fields, for
# llama.cpp leaves it as it is
ROTATED = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
# how Qwen2 cuts a text into words
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
         r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def convert_gguf(path, folder):
    """Make `folder` from a GGUF file, whole or not at all, unless it is there already -> folder."""
    if folder.is_dir():
        return folder
    try:
        from gguf import GGUFReader, dequantize
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        for key, known in KNOWN.items():
            if fields.get(key) not in known:
                raise ValueError(f"{key} {fields.get(key)} is not supported")
        tokenizer = read_tokenizer(fields)
        weights = read_weights(reader.tensors, dequantize, fields)
        config = read_config(fields, weights)
    except ImportError:
        raise UserError("a GGUF file is read by another package: `pip install gguf`")
    except Exception as error:          # a field that lacks, a cut file: numpy's errors
        raise UserError(f"cannot read {path} as a GGUF file: {type(error).__name__} {error} "
                        "(if it was cut short, download it again)")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as tmp:
            save_file(weights, f"{tmp}/model.safetensors", {"format": "pt"})
            tokenizer.save(f"{tmp}/tokenizer.json")
            template = fields.get("tokenizer.chat_template")
            write_json(f"{tmp}/tokenizer_config.json", {"chat_template": template})
            write_json(f"{tmp}/config.json", config)
            os.rename(tmp, folder)
    except Exception as error:          # of the disk, by three libraries' names
        # another process may have been faster: its folder is the same
        if not folder.is_dir():
            raise UserError(f"cannot write {folder}: {error}")
    return folder


def read_config(fields, weights):
    """config.json."""
    family = fields["general.architecture"]
    config = {name: fields[f"{family}.{key}"] for name, key in FIGURES.items()}
    q = weights["model.layers.0.self_attn.q_proj.weight"]
    return config | {
        "model_type": family,
        "architectures": [f"{family.title()}ForCausalLM"],
        "torch_dtype": "bfloat16",
        "head_dim": len(q) // config["num_attention_heads"],
        "vocab_size": len(weights["model.embed_tokens.weight"]),
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in weights,
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
    }


def read_tokenizer(fields):
    """tokenizer.json, as a Tokenizer of the library that will read it."""
    tokens = fields["tokenizer.ggml.tokens"]
    vocab = {token: id for id, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    is_smollm = fields["tokenizer.ggml.pre"] == "smollm"
    if is_smollm:
        split = pre_tokenizers.Digits(individual_digits=True)
    else:
        split = pre_tokenizers.Split(Regex(WORDS), "isolated")
        tokenizer.normalizer = normalizers.NFC()
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=is_smollm)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, in_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"]):
        if kind in (3, 4):              # control tokens, and others that were added
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind == 3)])
    return tokenizer


def read_weights(tensors, dequantize, fields):
    """All tensors by Hugging Face's names, in bf16, in which these families are trained."""
    weights = {}
    for t in tensors:
        # "output.weight", "blk.7.attn_q.weight"
        *block, part, last = t.name.split(".")
        if part not in TENSORS:
            raise ValueError(f"{t.name} is not supported")
        w = torch.tensor(dequantize(t.data, t.tensor_type), dtype=torch.bfloat16)
        heads = fields.get(ROTATED.get(part))
        if heads:
            # llama.cpp rotates neighbours, Hugging Face numbers half a head apart
            w = w.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        layer = f"model.layers.{block[1]}." if block else ""
        weights[f"{layer}{TENSORS[part]}.{last}"] = w
    return weights
