import hashlib
from pathlib import Path
from functools import lru_cache
from plumbing.files import HERE, UserError, file_sha256
# ------------------------------------------------------------------------------------------ models

# our name -> (hub name or folder, the encoder that goes with it, what it is)
MODELS = {
    "tiny": (HERE / "tiny", "tiny", "in this repository: small enough to step through"),
    "smollm2": ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m", "the quick run"),
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M", "smollm2-135m", "encoder of the small bases"),
    "smollm2-360m": ("HuggingFaceTB/SmolLM2-360M-Instruct", "smollm2-135m", ""),
    "smollm2-1.7b": ("HuggingFaceTB/SmolLM2-1.7B", "qwen2.5-0.5b", "Table 7 of the paper"),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B", "qwen2.5-0.5b",
                     "the main experiment (gated: ask for access first)"),
    "qwen2.5-0.5b": ("Qwen/Qwen2.5-0.5B", "qwen2.5-0.5b", "the paper's persona encoder"),
    "falcon3-10b": ("tiiuae/Falcon3-10B-Instruct", "qwen2.5-0.5b",
                    "wrote the paper's Persona-CoT data"),
}
MODEL_FILES = ["config.json", "generation_config.json", "tokenizer.json", "model*.safetensors",
               "model*.index.json"]


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


def absolute(name):
    """A folder's full path, so that a run finds its base from anywhere; other names as they are."""
    if name and name not in MODELS and Path(name).is_dir():
        return str(Path(name).resolve())
    return name


def find_model(name, option="--base"):
    """One of MODELS, a folder, or owner/model on the hub -> a folder, downloaded if need be."""
    source = MODELS[name][0] if name in MODELS else str(name)
    if Path(source).is_dir():
        return Path(source)
    if source.count("/") != 1:
        raise UserError(f"no model {name!r}: not a folder, not owner/model on the hub, and none of "
                        f"{', '.join(MODELS)}")
    from huggingface_hub import errors, snapshot_download
    try:
        return Path(snapshot_download(source, allow_patterns=MODEL_FILES))
    except errors.GatedRepoError:
        raise UserError(f"{source} is gated: ask for access on huggingface.co/{source}, "
                        "then log in (`hf auth login`)")
    except errors.RepositoryNotFoundError:
        raise UserError(f"the hub has no model {source} "
                        "(or it is private: log in with `hf auth login`)")
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled,
            OSError) as error:
        raise UserError(f"{source} is not in the cache and the hub was not reached "
                        f"({type(error).__name__}): give a folder that holds the model with "
                        f"{option} DIR, or use {option} tiny, which needs no download")

def published_name(name):
    source = MODELS[name][0] if name in MODELS else name
    return str(Path(source).resolve()) if Path(source).is_dir() else str(source)
@lru_cache
def model_sha256(folder):
    d = hashlib.sha256()
    for p in sorted(Path(folder).glob("*.safetensors")) + [Path(folder) / "config.json", Path(folder) / "tokenizer.json"]:
        d.update(file_sha256(p).encode())
    return d.hexdigest()
