"""Small models in the Hugging Face layout, made on the spot: true in every particular but size.

And a user at the command line, played by `program`.
"""

import importlib
import io
import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import lru_cache
from pathlib import Path

# before anything imports huggingface_hub: no test reaches the hub, and only test_smollm2.py the
# package index
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PIP_NO_INDEX"] = "1"
# the models are small; threads would only wait for one another
os.environ["OMP_NUM_THREADS"] = "1"
if os.environ.get("ATEN_CPU_CAPABILITY") == "default":
    # as on a CPU without AVX-512: torch's bf16 attention asks oneDNN what the CPU has, and both
    # must say the same
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402

from personafuse import Config, Llama  # noqa: E402
from plumbing.files import run_program  # noqa: E402

torch.set_num_threads(1)
# a background shell ignores Ctrl-C, and programs started here would
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--mine", action="store_true",
                     help="test the functions of tests/mine.py in the place of ours")


def pytest_configure(config):
    """--mine: a student's functions take the place of ours (docs/exercises.md).

    Before any test is imported.
    """
    if config.getoption("--mine"):
        import lora
        import losses
        import mine
        import router
        losses.contrastive_loss = mine.contrastive_loss
        losses.trait_loss = mine.trait_loss
        lora.merge = mine.merge
        lora.LoRALinear.forward = mine.LoRALinear.forward
        router.Router.weights = mine.Router.weights


# ----------------------------------------------------------------------------------------- models

MINI = dict(
    model_type="llama", hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, vocab_size=400, rms_norm_eps=1e-5,
    rope_theta=10000.0, max_position_embeddings=512, hidden_act="silu", tie_word_embeddings=True,
    bos_token_id=0, eos_token_id=0)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
# what sets each family's config.json apart
FAMILIES = {
    "llama31": dict(rope_scaling=LLAMA3, rope_theta=500000.0, tie_word_embeddings=False),
    "smollm2": dict(rope_theta=100000),
    "smollm2-1.7b": dict(num_key_value_heads=4, rope_theta=130000),
    "qwen25": dict(model_type="qwen2", rope_theta=1000000.0, rms_norm_eps=1e-6),
    "falcon3": dict(head_dim=16, num_attention_heads=2, num_key_value_heads=1,
                    tie_word_embeddings=False),
}


@lru_cache
def bundled_lines():
    """The lines of the bundled records, as text."""
    text = (ROOT / "persona_cot.jsonl").read_text(encoding="utf-8")
    return text.splitlines(keepends=True)


@lru_cache
def trained_tokenizer(special, texts, size):
    """A byte-level BPE tokenizer. Made once for each, as training one takes a third of a second."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(special),
                                  initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def make_tokenizer(path, special=("<|endoftext|>",), texts=None, size=400):
    """Write a tokenizer.json, trained on `texts` (default: the bundled queries)."""
    if texts is None:
        texts = [json.loads(line)["query"] for line in bundled_lines()[:200]]
    trained_tokenizer(tuple(special), tuple(texts), size).save(str(path))


def make_model(folder, shards=1, dtype=torch.float32, seed=0, special=("<|endoftext|>",),
               **changes):
    """A model folder with random weights: config.json, tokenizer.json, and safetensors in one or
    several shards.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {**MINI, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    make_tokenizer(folder / "tokenizer.json", special, size=config["vocab_size"])
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, t in Llama(Config.from_folder(folder)).named_parameters():
        key = name if name.startswith("lm_head") else "model." + name
        tensors[key] = random_tensor(name, t.shape, generator).to(dtype)
    save_shards(tensors, folder, shards)
    return folder


def random_tensor(name, shape, generator):
    """Matrices and biases around 0, the weights of the norms around 1."""
    if len(shape) > 1:
        return 0.1 * torch.randn(shape, generator=generator)
    centre = 0 if "bias" in name else 1
    return centre + 0.2 * torch.randn(shape, generator=generator)


def save_shards(tensors, folder, shards):
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    files = {}
    for k, name in enumerate(sorted(tensors)):
        files[name] = f"model-{k % shards + 1:05d}-of-{shards:05d}.safetensors"
    for file in set(files.values()):
        part = {name: t for name, t in tensors.items() if files[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="session")
def mini(tmp_path_factory):
    """The folder of a very small Llama, base and encoder of the training tests."""
    return make_model(tmp_path_factory.mktemp("mini") / "mini")


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """The first 120 bundled records, as a data file."""
    path = tmp_path_factory.mktemp("data") / "small.jsonl"
    path.write_text("".join(bundled_lines()[:120]), encoding="utf-8")
    return path


# --------------------------------------------------------------------------------------- programs

def program(script, *arguments, cwd=None, env=None):
    """Run a program of the project (a file, or experiments.NAME) as a user does.

    Returns a CompletedProcess with text output. In this process, which has imported torch already,
    unless the program needs a folder or an environment of its own.
    """
    command = [str(script), *map(str, arguments)]
    in_package = str(script).startswith("experiments.")
    if cwd or env:
        python = [sys.executable, "-m"] if in_package else [sys.executable]
        return subprocess.run([*python, *command], cwd=cwd or ROOT, env=env, capture_output=True,
                              text=True, timeout=240)
    module = importlib.import_module(str(script) if in_package else Path(script).stem)
    argv = sys.argv
    here = os.getcwd()
    sys.argv = command
    os.chdir(ROOT)
    code = 0
    try:
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            run_program(module.main)
    except SystemExit as error:
        code = error.code
    finally:
        sys.argv = argv
        os.chdir(here)
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


def evaluated(*arguments):
    """The tables of experiments.evaluate with these arguments, {title: rows}, as its --json has them.
    """
    from experiments import evaluate
    argv = sys.argv
    options = ["--json", "--device", "cpu", "--dtype", "fp32"]
    sys.argv = ["experiments.evaluate", *options, *map(str, arguments)]
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            evaluate.main()
        return json.loads(printed.getvalue())
    finally:
        sys.argv = argv


def fails_in_one_line(result, *words):
    """Exit code 2, one line on standard error that holds all the words, no traceback."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr and len(lines) == 1, result.stderr
    for word in words:
        assert str(word) in lines[0], (word, lines[0])
    return True


def succeeds(*command):
    """A program's result, which was a success."""
    result = program(*command)
    assert result.returncode == 0, result.stderr
    return result


# ------------------------------------------------------------------------------------------- runs

# three stages in a second, with the paper's router
FAST = ["--steps1", 3, "--batch1", 2, "--steps2", 3, "--batch2", 8, "--steps3", 2, "--batch3", 6,
        "--lr1", 3e-3, "--lr2", 1e-3, "--lr3", 3e-4, "--lr3-router", 3e-4, "--max-length", 160,
        "--dtype", "fp32", "--train-encoder", "--pooling", "last", "--query-format", "raw",
        "--router-start", "means"]
# and with the router of the preset for bases such as smollm2
QUICK_ROUTER = ["--no-train-encoder", "--pooling", "both", "--query-format", "lead-in",
                "--router-start", "ridge", "--encoder-layers", 1]
GREEDY = ["--temperature", 0, "--repetition-penalty", 1, "--dtype", "fp32"]


def train_arguments(mini, data, out, *more):
    return ["train.py", "--base", mini, "--encoder", mini, "--data", data, "--out", out, *FAST,
            *more]


@pytest.fixture(scope="session")
def run(mini, small_data, tmp_path_factory):
    """A finished run on the mini base: its folder."""
    out = tmp_path_factory.mktemp("runs") / "mini"
    succeeds(*train_arguments(mini, small_data, out))
    return out
