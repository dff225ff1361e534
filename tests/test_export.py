"""An export, loaded with transformers alone: the prompt, the greedy answer and its end are ours."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import LLAMA3, fails_in_one_line, make_model, program, train_arguments
from safetensors import safe_open
from tokenizers import Tokenizer, processors

from plumbing.chat import ChatTokenizer
from lora import lora_layers
from personafuse import generate, load_run

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
TRAITS = "high agreeableness=0.7, low neuroticism=0.3"
CHATML = ("{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\n"
          "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
          "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
OTHER = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
         "{% if add_generation_prompt %}<assistant>{% endif %}")
CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>",
                 "<|end_header_id|>", "<|eot_id|>")


def plain(folder):
    """No chat tokens, no template, no tokenizer_config.json, no "architectures"."""
    make_model(folder)


def untied(folder):
    make_model(folder, tie_word_embeddings=False, dtype=torch.bfloat16, torch_dtype="float16")


def chat(folder):
    """The end of a chat turn differs from the one that config.json names."""
    make_model(folder, special=CHAT_TOKENS)
    (folder / "chat_template.jinja").write_text(CHATML)
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}))
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}')


def own_template(folder):
    """A format of its own, in tokenizer_config.json."""
    make_model(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>",
         "chat_template": OTHER}))


def dated(folder):
    """A template that tells the date: in training it was the same every day."""
    own_template(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace("{% for", "{{ strftime_now('%d %b %Y') }}{% for", 1))


def llama3(folder):
    """A BOS that the tokenizer puts in front by itself, and two end tokens in one file."""
    make_model(folder, special=LLAMA3_TOKENS, rope_scaling=LLAMA3, bos_token_id=0, eos_token_id=1,
               tie_word_embeddings=False)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text(
        '{"eos_token_id": [1, 2], "max_length": 4096, "_from_model_config": true}')


def qwen2(folder):
    make_model(folder, model_type="qwen2", special=CHAT_TOKENS)


BASES = [plain, untied, chat, own_template, dated, llama3, qwen2]


@pytest.fixture(scope="module", params=BASES, ids=lambda make: make.__name__)
def exported(request, small_data, tmp_path_factory):
    """A run on one kind of base, with experts that change a lot, and its export -> (the base's
    folder, the run, the export's folder, what was printed).
    """
    folder = tmp_path_factory.mktemp(request.param.__name__)
    request.param(folder / "base")
    result = program(*train_arguments(folder / "base", small_data, folder / "run", "--stage", 1))
    assert result.returncode == 0, result.stderr
    result = program("experiments.export", "--traits", TRAITS, folder / "out", "--run",
                     folder / "run", "--dtype", "fp32")
    assert result.returncode == 0, result.stderr
    return folder / "base", folder / "run", folder / "out", result.stdout


def read(path):
    return json.loads(path.read_text())


def template_of(folder):
    return transformers.AutoTokenizer.from_pretrained(folder).chat_template


def test_transformers_alone_answers_as_we_do(exported):
    _, run, out, _ = exported
    model, _ = load_run(run, CPU, "fp32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    w = model.mixing_weights([""], TRAITS)
    for query in ("I feel anxious", "Two lines\nand an é?", "Who are you? {query} 'quoted'"):
        asked = [{"role": "user", "content": query}]
        prompt = model.tokenizer.encode_prompt(query)
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt",
                                            return_dict=True)
        assert ids["input_ids"][0].tolist() == prompt
        answer = list(generate(model.base, prompt, 60, model.tokenizer.stop, w))
        found = theirs.generate(**ids, do_sample=False, max_new_tokens=60)[0, len(prompt):].tolist()
        assert found[:len(answer)] == answer
        # an answer that ends before the limit ends there too, with one of our end tokens
        assert found[len(answer):] == [] or found[len(answer)] in model.tokenizer.stop
        assert len(found) == min(len(answer) + 1, 60)


def test_each_end_token_ends_an_answer_in_transformers(exported):
    """Random weights seldom end by themselves: the head is bent until each end token comes first."""
    _, run, out, _ = exported
    model, _ = load_run(run, CPU, "fp32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    prompt = torch.tensor([model.tokenizer.encode_prompt("I feel anxious")])
    for end in model.tokenizer.stop:
        bias = torch.zeros(theirs.config.vocab_size)
        bias[end] = 1e4
        hook = theirs.lm_head.register_forward_hook(lambda module, x, y: y + bias)
        found = theirs.generate(prompt, do_sample=False, max_new_tokens=5)[0, prompt.shape[1]:]
        hook.remove()
        assert found.tolist() == [end]


def test_a_conversation_is_written_as_ours(exported):
    _, _, out, printed = exported
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ours = ChatTokenizer(out)
    turns = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello."},
             {"role": "user", "content": "How are you?"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert ids == ours.encode_prompt("How are you?", [("Hi there", "Hello.")])


def test_the_configs_say_what_the_file_holds(exported):
    base, run, out, _ = exported
    model, _ = load_run(run, CPU, "fp32")
    config = read(out / "config.json")
    with safe_open(out / "model.safetensors", "pt") as file:
        names = set(file.keys())
        dtypes = {str(file.get_tensor(name).dtype) for name in names}
    assert dtypes == {f"torch.{config['torch_dtype']}"} == {"torch.float32"}
    assert ("lm_head.weight" in names) is (not config["tie_word_embeddings"])
    family = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[config["model_type"]]
    assert config["architectures"] == [family]
    for name in ("config.json", "generation_config.json"):
        ids = read(out / name)["eos_token_id"]
        assert set([ids] if isinstance(ids, int) else ids) == model.tokenizer.stop
    # all else in the configs stays
    changed = {"architectures", "tie_word_embeddings", "torch_dtype", "dtype",
               "eos_token_id"}
    for key, value in read(base / "config.json").items():
        assert key in changed or config[key] == value
    for name in ("tokenizer.json", "special_tokens_map.json"):
        if (base / name).exists():
            assert (out / name).read_bytes() == (base / name).read_bytes()
    assert {"tokenizer.json", "tokenizer_config.json"} <= {path.name for path in out.iterdir()}
    # and whoever may read the configs may read the weights
    modes = {path.stat().st_mode for path in out.iterdir()}
    assert len(modes) == 1


def test_a_base_template_comes_along_where_it_writes_our_prompt(exported):
    base, _, out, _ = exported
    if base.parent.name.startswith("chat"):
        assert template_of(out) == CHATML
    if base.parent.name.startswith("own_template"):
        assert read(out / "tokenizer_config.json")["chat_template"] == OTHER
        assert not (out / "chat_template.jinja").exists()
    if base.parent.name.startswith("dated"):
        assert "strftime_now" not in template_of(out)


def test_the_merged_weights_are_the_sum(exported):
    """W + Σ w_i B_i A_i alpha/rank, expert by expert."""
    _, run, out, _ = exported
    model, settings = load_run(run, CPU, "fp32")
    w = model.mixing_weights([""], TRAITS)[0]
    rank = settings["rank"]
    with safe_open(out / "model.safetensors", "pt") as file:
        for name, layer in lora_layers(model.base):
            expected = layer.weight.double()
            for i, weight in enumerate(w.tolist()):
                rows = slice(i * rank, (i + 1) * rank)
                delta = layer.B[:, rows].double() @ layer.A[rows].double()
                expected = expected + weight * settings["lora_alpha"] / rank * delta
            merged = file.get_tensor(f"model.{name}.weight").double()
            assert (merged - expected).abs().max() < 1e-5
            assert (merged - layer.weight).abs().max() > 0


def test_the_weights_of_a_query(run, tmp_path):
    result = program("experiments.export", "I feel anxious", "--run", run, "--dtype", "fp32",
                     tmp_path / "out")
    assert result.returncode == 0, result.stderr
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model, _ = load_run(run, CPU, "fp32")
    w = model.mixing_weights(["I feel anxious"])
    prompt = torch.tensor([model.tokenizer.encode_prompt("I feel anxious")])
    with torch.no_grad():
        ours = model.base.logits(model.base(prompt, w))
        assert (ours - theirs(prompt).logits).abs().max() < 1e-4


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(run, tmp_path):
    out = tmp_path / "out"

    def refused(*arguments):
        return program("experiments.export", *arguments, out, "--dtype", "fp32")

    assert fails_in_one_line(refused("hi", "--run", tmp_path), "personafuse.json")
    assert fails_in_one_line(refused("--run", run, "--traits", "high ego=1"), "high ego")
    assert fails_in_one_line(refused(" ", "--run", run), "empty")
    assert not out.exists()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert fails_in_one_line(refused("hi", "--run", run), "exists already")
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    nowhere = run / "personafuse.json" / "x"
    assert fails_in_one_line(program("experiments.export", "hi", nowhere, "--run", run), "cannot")
    assert not list(tmp_path.glob("*.tmp"))


def test_an_export_that_fails_in_the_middle_leaves_nothing(run, tmp_path, monkeypatch):
    from experiments import export

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_configs", full)
    result = program("experiments.export", "hi", tmp_path / "out", "--run", run)
    assert fails_in_one_line(result, "No space left")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_finds_its_base_from_another_folder(run, mini, tmp_path):
    pytest.importorskip("peft")
    folder = run / "high_openness"
    assert read(folder / "adapter_config.json")["base_model_name_or_path"] == str(mini.resolve())
    script = ("import sys; from peft import AutoPeftModelForCausalLM; "
              "AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])")
    result = subprocess.run([sys.executable, "-c", script, folder], cwd=tmp_path, text=True,
                            capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr
