"""Checkpoints as people publish them.

Each odd one loads here as it does in transformers, or is refused by name.
"""

import json

import pytest
import torch
from conftest import LLAMA3, MINI, fails_in_one_line, make_model, program
from safetensors.torch import load_file, save_file

from personafuse import Config, load_llama
from plumbing.chat import ChatTokenizer
from plumbing.files import UserError, read_json

CPU = torch.device("cpu")


def change_config(folder, drop=(), **changes):
    """Change keys of the folder's config.json, and drop some."""
    config = read_json(folder / "config.json", "") | changes
    config = {key: value for key, value in config.items() if key not in drop}
    (folder / "config.json").write_text(json.dumps(config))


def change_tensors(folder, change):
    """Rewrite model.safetensors with what `change` makes of its dict of tensors."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def our_logits(folder, dtype=torch.float32):
    tokens = torch.arange(60)[None]
    llama = load_llama(folder, CPU, dtype)
    with torch.no_grad():
        return llama.logits(llama(tokens)).float()


def their_logits(folder):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(60)[None]).logits


def agrees_with_transformers(folder):
    return (our_logits(folder) - their_logits(folder)).abs().max() < 1e-4


# ----------------------------------------------------------------------------------------- weights

def test_a_tied_checkpoint_may_hold_the_head_instead_of_the_embeddings(tmp_path):
    folder = make_model(tmp_path / "m")
    before = our_logits(folder)

    def keep_head(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
        return tensors

    change_tensors(folder, keep_head)
    assert torch.equal(our_logits(folder), before)
    assert agrees_with_transformers(folder)


def test_a_head_of_its_own_is_used_though_the_config_ties_it(tmp_path):
    folder = make_model(tmp_path / "m")
    before = our_logits(folder)
    generator = torch.Generator().manual_seed(1)
    head = 0.1 * torch.randn(400, 32, generator=generator)
    change_tensors(folder, lambda tensors: tensors | {"lm_head.weight": head})
    assert agrees_with_transformers(folder)
    assert (our_logits(folder) - before).abs().max() > 0.1


def test_an_untied_checkpoint_needs_both(tmp_path):
    folder = make_model(tmp_path / "m", tie_word_embeddings=False)

    def drop_embeddings(tensors):
        return {name: t for name, t in tensors.items() if "embed" not in name}

    change_tensors(folder, drop_embeddings)
    with pytest.raises(UserError, match="embed_tokens.weight is missing"):
        load_llama(folder, CPU, torch.float32)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_may_lack_the_prefix_model(tied, tmp_path):
    """As LlamaModel.save_pretrained, without the head's class around it, writes them."""
    folder = make_model(tmp_path / "m", tie_word_embeddings=tied)
    before = our_logits(folder)

    def bare_names(tensors):
        return {name.removeprefix("model."): t for name, t in tensors.items()}

    change_tensors(folder, bare_names)
    assert torch.equal(our_logits(folder), before)
    assert agrees_with_transformers(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_files_say_what_transformers_says(dtype, tmp_path):
    folder = make_model(tmp_path / "m", dtype=dtype)
    assert agrees_with_transformers(folder)
    near = torch.cosine_similarity(our_logits(folder, torch.bfloat16), our_logits(folder), dim=-1)
    assert near.min() > 0.999


def test_one_whole_file_goes_before_an_index_of_shards(tmp_path):
    """A folder may keep the index of shards that it no longer has."""
    folder = make_model(tmp_path / "m")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert agrees_with_transformers(folder)


def test_a_pickled_checkpoint_is_refused_by_name(tmp_path):
    folder = make_model(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert fails_in_one_line(program("sample.py", "hi", "--route", "none", "--base", folder),
                             "no model.safetensors", "pytorch_model.bin")


# ------------------------------------------------------------------------------------ config.json

ROPES = {
    # transformers 4 and 5, and the key `type` of before 4.43
    "at the top": dict(rope_theta=500000.0),
    "scaling is null": dict(rope_theta=500000.0, rope_scaling=None),
    "parameters are null": dict(rope_theta=500000.0, rope_parameters=None),
    "parameters": dict(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
    "old key, default": dict(rope_theta=500000.0, rope_scaling={"type": "default"}),
    "llama3": dict(rope_theta=500000.0, rope_scaling=LLAMA3),
    "llama3, both keys": dict(rope_theta=500000.0, rope_scaling=LLAMA3 | {"type": "llama3"}),
    "llama3, parameters": dict(rope_parameters=LLAMA3 | {"rope_theta": 500000.0}),
}


@pytest.mark.parametrize("spelling", ROPES)
def test_every_spelling_of_the_rope_is_read(spelling, tmp_path):
    folder = make_model(tmp_path / "m")
    change_config(folder, drop=["rope_theta"])
    without = our_logits(folder)
    change_config(folder, **ROPES[spelling])
    assert agrees_with_transformers(folder)
    assert (our_logits(folder) - without).abs().max() > 1e-3


@pytest.mark.parametrize("rope, word", [
    ({"type": "linear", "factor": 2.0}, "linear"),
    ({"rope_type": "dynamic", "factor": 2.0}, "dynamic"),
    ({"rope_type": "llama3", "factor": 8.0}, "high_freq_factor"),
    ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
])
def test_a_rope_that_is_not_ours_is_refused_by_name(rope, word, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MINI | {"rope_scaling": rope}))
    with pytest.raises(UserError, match=word):
        Config.from_folder(tmp_path)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_type_that_the_config_names_changes_nothing(key, tmp_path):
    """--dtype and the file decide; transformers 4 wrote torch_dtype, 5 writes dtype."""
    folder = make_model(tmp_path / "m")
    before = our_logits(folder)
    change_config(folder, **{key: "bfloat16"})
    assert torch.equal(our_logits(folder), before)


@pytest.mark.parametrize("key", ["num_key_value_heads", "head_dim", "attention_bias", "mlp_bias",
                                 "rope_scaling"])
def test_null_is_as_good_as_nothing(key, tmp_path):
    folder = make_model(tmp_path / "m", num_key_value_heads=4)
    change_config(folder, **{key: None})
    nothing = Config.from_folder(folder)
    change_config(folder, drop=[key])
    assert Config.from_folder(folder) == nothing


# ---------------------------------------------------------------------------------------- tokens

def stops(folder, **generation):
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return ChatTokenizer(folder).stop


def test_end_tokens_are_one_or_several_and_padding_is_none(tmp_path):
    folder = make_model(tmp_path / "m", special=("<|endoftext|>", "<|end|>", "<|pad|>"))
    assert stops(folder, eos_token_id=[0, 1], pad_token_id=2) == {0, 1}
    assert stops(folder, eos_token_id=1) == {0, 1}              # and config.json's own, 0
    assert stops(folder, eos_token_id=None, pad_token_id=2) == {0}
    change_config(folder, eos_token_id=[1], pad_token_id=2)
    assert ChatTokenizer(folder).end == 1


def test_a_model_without_any_end_token_is_refused(tmp_path):
    folder = make_model(tmp_path / "m")
    change_config(folder, eos_token_id=None)
    with pytest.raises(UserError, match="end token"):
        ChatTokenizer(folder)


def test_tokens_that_only_tokenizer_json_knows(tmp_path):
    """Tokens added after training: they are control tokens of the chat format."""
    folder = make_model(tmp_path / "m", vocab_size=403)
    tokenizer = read_json(folder / "tokenizer.json", "")
    first = len(tokenizer["model"]["vocab"])
    for number, text in enumerate(("<|im_start|>", "<|im_end|>")):
        tokenizer["added_tokens"].append({
            "id": first + number, "content": text, "special": True, "single_word": False,
            "lstrip": False, "rstrip": False, "normalized": False})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    chat = ChatTokenizer(folder)
    assert chat.encode_prompt("hello")[0] == first              # <|im_start|>, one token
    assert chat.end == first + 1 and chat.end in chat.stop
    assert chat.decode(chat.encode_answer("hello")) == "hello"
    assert first not in chat.encode("<|im_start|>")             # typed by a user it is text


@pytest.mark.parametrize("key, value", [("hidden_size", "64"), ("num_attention_heads", 0),
                                        ("max_position_embeddings", None), ("num_hidden_layers", -1)])
def test_a_config_without_a_meaning_is_named(tmp_path, key, value):
    base = make_model(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {key: value}))
    result = program("sample.py", "hi", "--base", base, "--route", "none")
    assert fails_in_one_line(result, "config.json", key)
