"""Ten LoRA experts in every linear layer, stacked so that mixing all of them is one pair of matrix products.

    python lora.py --run out/tiny --traits "high agreeableness=0.7, low neuroticism=0.3" --export merged/

An expert i at a weight W (d x k) is ΔW_i = B_i A_i · alpha/rank, with A_i (rank x k) and B_i (d x rank). Side by side,
A = [A_1; ...; A_E] is (E·rank x k), B = [B_1, ..., B_E] is (d x E·rank), and as w_i scales expert i's rows of A x,

    y = W x + Σ_i w_i ΔW_i x = W x + B (w ⊙ (A x)) · alpha/rank.
"""

import argparse
import json
import math
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from data import UserError, parse_traits, replacing, run_program, write_json

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LoRALinear(nn.Module):
    """A linear layer W with `experts` LoRAs of the given rank beside it (none for a plain layer)."""

    def __init__(self, d_in, d_out, bias=False, experts=0, rank=0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None
        if experts:
            self.A = nn.Parameter(torch.empty(experts * rank, d_in))        # the ten A_i, one below the other
            self.B = nn.Parameter(torch.empty(d_out, experts * rank))       # the ten B_i, side by side

    def forward(self, x, w=None):
        """x (B, T, k), w (B, 1, E·rank) from `spread`, or None for the plain layer -> y (B, T, d).

        Weights are cast to x's type where they are used: experts stay fp32 beside bf16 activations.
        """
        y = F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        if w is None:
            return y
        return y + F.linear(w * F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))


def spread(w, rank, alpha, dtype):
    """Mixing weights w (B, E) -> (B, 1, E·rank): each expert's weight, times alpha/rank, for each of its rank rows."""
    return (w * (alpha / rank)).repeat_interleave(rank, dim=1)[:, None].to(dtype)


def lora_layers(model):
    """(name, layer) of every layer of `model` that carries experts."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear) and hasattr(m, "A")]


def init_experts(model, seed, device):
    """Fresh experts: A_i uniform in ±1/√k (LoRA's and peft's start), B = 0, so an untrained expert changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in lora_layers(model):
        bound = 1 / math.sqrt(layer.A.shape[1])
        A = torch.empty(layer.A.shape).uniform_(-bound, bound, generator=generator)
        layer.A = nn.Parameter(A.to(device))
        layer.B = nn.Parameter(torch.zeros(layer.B.shape, device=device))


@torch.no_grad()
def merge(model, w):
    """Put W + Σ_i w_i B_i A_i · alpha/rank in place of every W; w (E,). Generation then costs what the plain model does.

    Returns the untouched W's by name, for `unmerge`: adding and subtracting again would leave rounding behind.
    """
    originals, scaled = {}, spread(w[None], model.rank, model.alpha, torch.float32)[0]        # (1, E·rank)
    for name, layer in lora_layers(model):
        originals[name] = layer.weight
        delta = (layer.B * scaled) @ layer.A                                                   # (d, k), fp32
        layer.weight = nn.Parameter(delta.add_(layer.weight).to(layer.weight.dtype), requires_grad=False)
    return originals


def unmerge(model, originals):
    """Put back, to the bit, the weights that `merge` returned."""
    for name, layer in lora_layers(model):
        layer.weight = originals[name]


@torch.no_grad()
def clip_experts(model, experts, clip):
    """Scale each expert's gradient to norm `clip` at most, as if it were trained alone; returns the norms (E,)."""
    layers = [layer for _, layer in lora_layers(model)]
    square = sum(layer.A.grad.view(experts, -1).square().sum(dim=1) +
                 layer.B.grad.view(layer.B.shape[0], experts, -1).square().sum(dim=(0, 2)) for layer in layers)
    norms = square.sqrt()                                                                      # (E,)
    scale = (clip / (norms + 1e-6)).clamp(max=1)
    for layer in layers:
        layer.A.grad.view(experts, -1).mul_(scale[:, None])
        layer.B.grad.view(layer.B.shape[0], experts, -1).mul_(scale[:, None])
    return norms


def save_experts(model, names, folder, base):
    """One folder a pole (high_openness, ...) in the format that peft loads: adapter_config.json and a safetensors."""
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": model.rank,
              "lora_alpha": model.alpha, "lora_dropout": 0.0, "bias": "none", "target_modules": TARGETS,
              "fan_in_fan_out": False, "inference_mode": True}
    for i, expert in enumerate(names):
        rows = slice(i * model.rank, (i + 1) * model.rank)
        tensors = {}
        for name, layer in lora_layers(model):
            key = f"base_model.model.model.{name}.lora_"
            tensors[key + "A.weight"] = layer.A.detach()[rows].cpu().contiguous()              # (rank, k)
            tensors[key + "B.weight"] = layer.B.detach()[:, rows].cpu().contiguous()           # (d, rank)
        out = Path(folder) / expert.replace(" ", "_")
        out.mkdir(parents=True, exist_ok=True)
        with replacing(out / "adapter_model.safetensors") as tmp:
            save_file(tensors, tmp, metadata={"format": "pt"})
        write_json(out / "adapter_config.json", config)


@torch.no_grad()
def load_experts(model, names, folder):
    """Read what `save_experts` wrote into the model's stacked A's and B's."""
    for i, expert in enumerate(names):
        path = Path(folder) / expert.replace(" ", "_") / "adapter_model.safetensors"
        rows = slice(i * model.rank, (i + 1) * model.rank)
        try:
            with safe_open(path, "pt") as file:
                for name, layer in lora_layers(model):
                    key = f"base_model.model.model.{name}.lora_"
                    for target, tensor in ((layer.A[rows], file.get_tensor(key + "A.weight")),
                                           (layer.B[:, rows], file.get_tensor(key + "B.weight"))):
                        if target.shape != tensor.shape:
                            raise UserError(f"{path}: {key}* is {tuple(tensor.shape)}, this base needs "
                                            f"{tuple(target.shape)}; the run was made for another base")
                        target.copy_(tensor)
        except UserError:
            raise
        except Exception as e:           # safetensors raises its own type, FileNotFoundError or OSError
            raise UserError(f"cannot read the expert {path}: {e}")


def export(model, w, folder, out):
    """Write the base in `folder` with the experts merged at weights w (E,) as an ordinary Hugging Face checkpoint."""
    from huggingface_hub import save_torch_state_dict
    if Path(out).exists():
        raise UserError(f"{out} exists already: name a new folder")
    originals = merge(model.base, w)
    tensors = {name if name.startswith("lm_head") else f"model.{name}": t.detach()
               for name, t in model.base.named_parameters() if not name.endswith((".A", ".B"))}
    tmp = Path(f"{out}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        tmp.mkdir(parents=True)
        save_torch_state_dict(tensors, tmp)                             # shards of 5 GB, and their index
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            if (Path(folder) / name).exists():
                shutil.copy(Path(folder) / name, tmp)
        config = json.loads((Path(folder) / "config.json").read_text())
        write_json(tmp / "config.json", config | {"torch_dtype": str(model.base.dtype).removeprefix("torch.")})
        tmp.rename(out)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(tmp, ignore_errors=True)
        raise UserError(f"cannot write {out}: {getattr(e, 'strerror', None) or e}")
    finally:
        unmerge(model.base, originals)


def main():
    from personafuse import find_model, load_run, pick_device, pick_dtype
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="a folder that train.py wrote")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--traits", help='weights by hand, as in "high agreeableness=0.7, low neuroticism=0.3"')
    which.add_argument("--query", help="the weights that the router gives this query")
    parser.add_argument("--export", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    s = parser.parse_args()
    device = pick_device("cpu")                                         # merging is one pass over the weights
    model, settings = load_run(s.run, device, pick_dtype(s.dtype, device))
    if s.traits:
        w = torch.tensor(parse_traits(s.traits))
    elif model.router:
        w = model.route([model.encoder_chat.query(s.query)])[0]
    else:
        raise UserError(f"{s.run} has no router: give the weights with --traits")
    export(model, w, find_model(settings["base"]), s.export)
    print(f"wrote {s.export}: load it with transformers, vLLM, or any engine that reads Hugging Face checkpoints")


if __name__ == "__main__":
    import lora                     # not this file's second self, __main__, whose LoRALinear is another class
    run_program(lora.main)
