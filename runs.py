"""What a run is: its settings, and the folder in which it is opened, logged, saved and resumed.

    out/<base>/high_openness/, ...      the ten experts, as peft loads them
    out/<base>/router.safetensors       the router
    out/<base>/personafuse.json         every setting
    out/<base>/examples.safetensors     the data as token ids
    out/<base>/metrics.jsonl            every step, and every evaluation on the held-out records
    out/<base>/stage1.safetensors, ...  what each stage trains and where it stands
"""

import argparse
import json
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from data import TRAITS, ChatTokenizer, Example, by_hash, make_examples, split
from plumbing import (HERE, UserError, absolute, atomic_write, default_encoder, file_sha256,
                      find_model, model_table, read_json, read_lines, write_json)

# "tiny" is tuned on the embedded base, "quick" is for real ones on a laptop, "paper" is section 4.3
# and appendix A
PRESETS = {
    "tiny": dict(
        steps1=60, batch1=4, lr1=4e-3,
        steps2=200, batch2=64, group=4, lr2=2e-3, lr_e=1e-2,
        steps3=20, batch3=32, lr3=1e-3,
        pooling="words", tau=0.05, margin=0.0, beta=0.1, max_length=512, micro_batch=5),
    "quick": dict(
        steps1=40, batch1=2, lr1=5e-4,
        steps2=60, batch2=32, group=4, lr2=1e-4, lr_e=1e-2,
        steps3=10, batch3=16, lr3=5e-5,
        pooling="last", tau=0.05, margin=0.0, beta=1.0, max_length=512, micro_batch=4),
    "paper": dict(
        steps1=1000, batch1=256, lr1=1e-4,
        steps2=1500, batch2=64, group=64, lr2=1e-4, lr_e=1e-4,
        steps3=300, batch3=32, lr3=1e-5,
        pooling="last", tau=1.0, margin=0.0, beta=1.0, max_length=2048, micro_batch=32),
}

# what is trained -> the key of the answer that it is trained on; all but the first are baselines
VARIANTS = {"personafuse": "response", "direct": "naive_response",
            "human-like": "human_like_response", "cot-finetuned": "response"}


# ---------------------------------------------------------------------------------------- settings

def option(default, help, choices=None):
    """A setting that is an option of train.py. Default None: the preset says."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Settings:
    """Every setting of a run; a resumed run must have the same, but for FREE_ON_RESUME."""
    stage: str = option("all", "which stages to run", ["1", "2", "3", "all"])
    base: str = option("tiny", "a name of the table below, owner/model on the hub, or a folder")
    encoder: str = option(None, "the router's language model (default: as the table says)")
    data: str = option(str(HERE / "persona_cot.jsonl"), "Persona-CoT records (default: ours)")
    out: str = option(None, "the run's folder (default: out/<base>)")
    variant: str = option("personafuse", "or a baseline: one LoRA as large as the ten", VARIANTS)
    preset: str = option(None, "defaults for what follows (default: tiny for --base tiny, "
                               "else quick)", PRESETS)
    # stage 1, the experts
    steps1: int = option(None, "steps of stage 1")
    batch1: int = option(None, "records for each expert in a step of stage 1")
    lr1: float = option(None, "peak learning rate of stage 1")
    # stage 2, the router
    steps2: int = option(None, "steps of stage 2")
    batch2: int = option(None, "queries in a step of stage 2")
    group: int = option(None, "queries of a batch that share one p, at most")
    lr2: float = option(None, "peak learning rate of the encoder in stage 2")
    lr_e: float = option(None, "peak learning rate of the expert embeddings in stage 2")
    # stage 3, all together
    steps3: int = option(None, "steps of stage 3")
    batch3: int = option(None, "records in a step of stage 3")
    lr3: float = option(None, "peak learning rate of stage 3")
    # the method
    rank: int = option(8, "r of each expert")
    lora_alpha: float = option(16, "alpha of each expert; ΔW is scaled by alpha/rank")
    pooling: str = option(None, "what of the encoder's output is h", ["last", "mean", "words"])
    tau: float = option(None, "τ of Eq. 1")
    margin: float = option(None, "m of Eq. 3")
    loss_alpha: float = option(1.0, "α of Eq. 6, the weight of L_contrastive")
    beta: float = option(None, "β of Eq. 6, the weight of L_trait")
    gamma: float = option(0.2, "γ of Eq. 2, the weight of L_router")
    clip: float = option(1.0, "largest gradient norm, in stage 1 of each expert")
    # the machine
    max_length: int = option(None, "tokens of prompt and response; longer responses are cut")
    micro_batch: int = option(None, "rows that go through the base at a time")
    checkpointing: bool = option(False, "recompute activations in the backward pass")
    shard: bool = option(False, "share the frozen base among the processes of torchrun, for one "
                                "that does not fit a GPU")
    held_out: int = option(512, "held-out records to evaluate on; 0: all")
    device: str = option("auto", "cuda, mps or cpu (auto: the first of these that is here; "
                                 "cpu for --base tiny)")
    dtype: str = option("auto", "of the frozen base", ["auto", "fp32", "bf16", "fp16"])
    seed: int = option(0, "of the experts' start and of the batches")
    save_every: int = option(100, "steps between saved states")
    resume: bool = option(False, "go on from the last saved step")
    # what follows from the above
    names: list = field(default_factory=list)           # the experts'
    data_sha256: str = ""                               # of the data file


NOT_SAVED = {"stage", "resume", "preset", "shard"}
FREE_ON_RESUME = {"device", "micro_batch", "checkpointing", "save_every", "out"}
AT_LEAST_ONE = ("batch1", "batch2", "batch3", "group", "rank", "micro_batch", "save_every")
AT_LEAST_ZERO = ("steps1", "steps2", "steps3", "held_out")


def parse_arguments(description):
    """The command line -> Settings: an option for each, then the preset, then what follows."""
    parser = argparse.ArgumentParser(description=description, epilog=model_table(),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Settings):
        if f.metadata:
            add_option(parser, f)
    settings = Settings(**vars(parser.parse_args()))

    preset = settings.preset or ("tiny" if settings.base == "tiny" else "quick")
    for key, value in PRESETS[preset].items():
        if getattr(settings, key) is None:
            setattr(settings, key, value)
    for key in AT_LEAST_ONE + AT_LEAST_ZERO:
        if getattr(settings, key) < (1 if key in AT_LEAST_ONE else 0):
            parser.error(f"--{key.replace('_', '-')} is {getattr(settings, key)}, too small")

    settings.base = absolute(settings.base)
    folder = Path(settings.base).name.lower()
    if settings.variant == "personafuse":
        settings.names = TRAITS
        settings.encoder = absolute(settings.encoder or default_encoder(settings.base))
    else:
        single_lora_settings(settings)
        folder += "-" + settings.variant
    settings.out = settings.out or f"out/{folder}"
    settings.data_sha256 = file_sha256(settings.data)
    return settings


def add_option(parser, f):
    """Settings' field f as an option of the parser."""
    name = "--" + f.name.replace("_", "-")
    help = f.metadata["help"]
    if f.type is bool:
        parser.add_argument(name, action="store_true", help=help)
        return
    if f.default is None and f.name in PRESETS["tiny"]:
        values = ", ".join(f"{preset} {values[f.name]}" for preset, values in PRESETS.items())
        help += f" ({values})"
    elif f.default is not None and "default" not in help:
        help += f" (default: {f.default})"
    parser.add_argument(name, type=f.type, default=f.default, choices=f.metadata["choices"],
                        help=help)


def single_lora_settings(settings):
    """A baseline is one LoRA, without a router, of the size of the ten experts together."""
    settings.names = ["lora"]
    settings.encoder = None
    settings.rank *= len(TRAITS)
    settings.lora_alpha *= len(TRAITS)          # alpha/rank, the scale of ΔW, stays


def saved_settings(settings):
    """The settings as the run's files hold them."""
    return {key: value for key, value in asdict(settings).items() if key not in NOT_SAVED}


def refuse_difference(settings, saved, folder, keys=None):
    """UserError naming the first setting that differs from those saved in the run's folder."""
    for key, value in saved_settings(settings).items():
        if key in FREE_ON_RESUME or (keys and key not in keys):
            continue
        if saved.get(key) != value:
            raise UserError(f"{folder} was made with {key} = {saved.get(key)!r}, this command says "
                            f"{value!r}: give the same settings, or another --out")


# ------------------------------------------------------------------------------------ opening a run

# in these a stage and the ones that it builds on must agree
SHARED_BY_STAGES = {"base", "encoder", "variant", "rank", "lora_alpha", "pooling", "data_sha256",
                    "seed"}


def state_file(settings, stage):
    return Path(settings.out) / f"stage{stage}.safetensors"


def open_run(settings, stages):
    """Make the run's folder ready for these stages -> the stage and the step to start at.

    A run that stands there already is resumed if asked, else moved aside: nothing is overwritten.
    """
    out = Path(settings.out)
    begun = [stage for stage in (1, 2, 3) if state_file(settings, stage).exists()]
    if settings.resume:
        if not begun:
            raise UserError(f"there is nothing to resume in {out}: start without --resume")
        header = read_header(state_file(settings, begun[-1]))
        refuse_difference(settings, header["settings"], out)
        forget_later_metrics(out, header)
        return header["stage"], header["step"]

    # a stage started alone builds on what the earlier ones wrote; a baseline has no stage 2
    earlier = [stage for stage in (1, 2) if stage < stages[0]]
    if settings.variant != "personafuse":
        earlier = earlier[:1]
    for stage in earlier:
        header = read_header(state_file(settings, stage)) if stage in begun else None
        if not header or not header["done"]:
            raise UserError(f"stage {stages[0]} starts from what stage {stage} wrote, and {out} "
                            f"has no finished stage {stage}: run --stage {stage} first, or "
                            "--stage all")
        refuse_difference(settings, header["settings"], out, SHARED_BY_STAGES)
    run_again = not earlier or begun[-1] >= stages[0]
    if run_again and out.exists() and any(out.iterdir()):
        old = move_aside(out)
        out.mkdir(parents=True)
        for stage in earlier:
            shutil.copy2(old / state_file(settings, stage).name, state_file(settings, stage))
    check_writable(out)
    return stages[0], 0


def forget_later_metrics(out, header):
    """Drop what was logged after the state that a run is resumed from."""
    path = out / "metrics.jsonl"
    if not path.exists():
        return
    kept = []
    for _, line in read_lines(path):
        logged = json.loads(line)
        moment = (logged["stage"], logged["step"], "held_out" in logged)
        if moment <= (header["stage"], header["step"], False):
            kept.append(line)
    with atomic_write(path) as tmp:
        tmp.write_text("".join(kept))


def move_aside(folder):
    """out/tiny becomes out/tiny.1, or the next free number."""
    number = 1
    while Path(f"{folder}.{number}").exists():
        number += 1
    aside = Path(f"{folder}.{number}")
    folder.rename(aside)
    print(f"{folder} holds a run already; it is now {aside}")
    return aside


def check_writable(out):
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write into {out}: {error.strerror}")


# ---------------------------------------------------------------------------------------- examples

COLUMNS = ("prompt", "answer", "query")


def examples_file(settings):
    return Path(settings.out) / "examples.safetensors"


def examples_key(settings):
    """What the examples depend on; with another key they are made again."""
    folders = [find_model(settings.base)]
    if settings.encoder:
        folders.append(find_model(settings.encoder, "--encoder"))
    tokenizers = [file_sha256(folder / "tokenizer.json") for folder in folders]
    return json.dumps([settings.data_sha256, VARIANTS[settings.variant], settings.max_length,
                       settings.held_out, *tokenizers])


def write_examples(settings, records):
    """Tokenize the records once, for all processes and for a resumed run, into the run's folder."""
    from safetensors import safe_open
    path = examples_file(settings)
    key = examples_key(settings)
    try:
        with safe_open(path, "np") as file:
            if file.metadata()["key"] == key:
                return
        print(f"{path} is of other data or another tokenizer: made again")
    except FileNotFoundError:
        pass
    except Exception:                           # safetensors' own type, KeyError, OSError
        print(f"{path} cannot be read (cut short?): made again")

    tokenizer = ChatTokenizer(find_model(settings.base))
    encoder_tokenizer = None
    if settings.encoder:
        encoder_tokenizer = ChatTokenizer(find_model(settings.encoder, "--encoder"))
    training, held_out = split(records)
    held_out = sorted(held_out, key=by_hash)[:settings.held_out or None]
    tensors = {}
    kept = 0
    for side, chosen in (("training", training), ("held_out", held_out)):
        # a thousand at a time, for as Python's numbers all of them would take gigabytes
        parts = []
        for start in range(0, max(len(chosen), 1), 1000):
            examples = make_examples(chosen[start:start + 1000], tokenizer, encoder_tokenizer,
                                     settings.max_length, VARIANTS[settings.variant])
            parts.append(to_columns(examples))
        for name in parts[0]:
            tensors[f"{side}.{name}"] = np.concatenate([part[name] for part in parts])
        kept += len(tensors[f"{side}.p"])
    left_out = len(training) + len(held_out) - kept
    if left_out:
        print(f"{left_out} of {len(records)} records left out: prompts of --max-length tokens "
              "or more")
    from safetensors.numpy import save_file
    if file_sha256(settings.data) != settings.data_sha256:
        raise UserError(f"{settings.data} has changed while it was read: start again")
    with atomic_write(path) as tmp:
        save_file(tensors, tmp, metadata={"key": key})


def to_columns(examples):
    """Examples -> arrays: the ids of each column end to end, their lengths, and p (n, E)."""
    p = np.array([example.p for example in examples], np.uint8)
    arrays = {"p": p.reshape(-1, len(TRAITS))}
    for column in COLUMNS:
        rows = [getattr(example, column) for example in examples]
        arrays[f"{column}.lengths"] = np.array([len(row) for row in rows], np.int32)
        arrays[column] = np.array([i for row in rows for i in row], np.int32)
    return arrays


def read_examples(settings):
    """(training, held-out) Examples as `write_examples` left them."""
    from safetensors.numpy import load_file
    arrays = load_file(examples_file(settings))
    sides = []
    for side in ("training", "held_out"):
        columns = []
        for column in COLUMNS:
            ends = np.cumsum(arrays[f"{side}.{column}.lengths"])
            columns.append(np.split(arrays[f"{side}.{column}"], ends[:-1]))
        p = [tuple(row) for row in arrays[f"{side}.p"].tolist()]
        sides.append([Example(*row) for row in zip(*columns, p)])
    return sides


# ------------------------------------------------------------------------------------------- state

def trainable(model, stage):
    """(name, parameter) of what a stage trains, in a fixed order."""
    chosen = []
    for name, t in model.named_parameters():
        expert = name.endswith((".A", ".B"))
        router = name.startswith("router.")
        if (expert and stage != 2) or (router and stage != 1):
            chosen.append((name, t))
    return chosen


def save_state(path, model, optimizer, stage, step, done, settings):
    """One file holds a stage: what it trains, AdamW's two moments, and where it stands."""
    from safetensors.torch import save_file
    tensors = {}
    for name, t in trainable(model, stage):
        tensors[name] = t.detach()
        if not done and t in optimizer.state:
            tensors["exp_avg " + name] = optimizer.state[t]["exp_avg"]
            tensors["exp_avg_sq " + name] = optimizer.state[t]["exp_avg_sq"]
    tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
    header = {"stage": stage, "step": step, "done": done, "settings": saved_settings(settings)}
    with atomic_write(path) as tmp:
        save_file(tensors, tmp, metadata={"personafuse": json.dumps(header)})


def read_header(path):
    """Where a state file stands, without its tensors: stage, step, done, settings."""
    from safetensors import safe_open
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["personafuse"])
    except Exception as error:          # safetensors' own type, KeyError, OSError, ...
        raise UserError(f"cannot read the saved state {path}: {error}; "
                        "remove that file and the stage starts again")


def load_state(path, model, optimizer=None):
    """Read what `save_state` wrote into the model, and the optimizer where there is one."""
    import torch
    from safetensors.torch import load_file
    header = read_header(path)
    saved = load_file(path)
    for name, t in trainable(model, header["stage"]):
        t.data.copy_(saved[name])
        if optimizer and "exp_avg " + name in saved:
            optimizer.state[t] = {
                "step": torch.tensor(float(header["step"]), device=t.device),
                "exp_avg": saved["exp_avg " + name].to(t.device),
                "exp_avg_sq": saved["exp_avg_sq " + name].to(t.device),
            }


def save_run(model, settings, with_router):
    """What others read: every expert in peft's format, the router, and the settings."""
    from lora import save_experts
    from safetensors.torch import save_file
    out = Path(settings.out)
    save_experts(model.base, settings.names, out, settings.base)
    if with_router:
        tensors = {name: t.detach().cpu().contiguous()
                   for name, t in model.router.named_parameters()}
        with atomic_write(out / "router.safetensors") as tmp:
            save_file(tensors, tmp)
    write_json(out / "personafuse.json", saved_settings(settings))


def export_merged(model, w, folder, out):
    """Write the base of `folder` with the experts merged at w (E,) as a Hugging Face checkpoint."""
    from huggingface_hub import save_torch_state_dict
    from lora import merge, unmerge
    from safetensors import SafetensorError
    if Path(out).exists():
        raise UserError(f"{out} exists already: name a new folder")
    originals = merge(model.base, w)
    tensors = {}
    for name, t in model.base.named_parameters():
        if not name.endswith((".A", ".B")):
            tensors[name if name.startswith("lm_head") else f"model.{name}"] = t.detach()
    unmerge(model.base, originals)                      # `tensors` still holds the merged ones

    tmp = Path(f"{out}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        tmp.mkdir(parents=True)
        save_torch_state_dict(tensors, tmp)             # shards of 5 GB, and their index
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            if (folder / name).exists():
                shutil.copy(folder / name, tmp)
        config = read_json(folder / "config.json", "")
        config["torch_dtype"] = str(model.base.dtype).removeprefix("torch.")
        write_json(tmp / "config.json", config)
        tmp.rename(out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {out}: {getattr(error, 'strerror', None) or error}")
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def log(settings, line):
    """Append a dict to the run's metrics.jsonl."""
    path = Path(settings.out) / "metrics.jsonl"
    try:
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; "
                        "--resume goes on from the last saved step")
