"""Ten LoRA experts in every linear layer, stacked so that mixing all of them is one pair of matrix
products.

An expert i at a weight W (d x k) is ΔW_i = B_i A_i · alpha/rank, with A_i (rank x k) and B_i
(d x rank). Side by side, A = [A_1; ...; A_E] is (E·rank x k) and B = [B_1, ..., B_E] is
(d x E·rank), and as w_i scales expert i's rows of A x,

    y = W x + Σ_i w_i ΔW_i x = W x + B (w ⊙ (A x)) · alpha/rank.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from plumbing.files import UserError, atomic_write, write_json

# every projection of attention and feed-forward, by the names that peft knows too
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# on CPUs with AMX a product of two matrices first rearranges W; one of matrix and vector reads it
# as it is, at the speed of memory
AMX = torch.cpu._is_amx_tile_supported()


def linear(x, weight, bias=None):
    """y = W x + b, with W (d, k) and b (d,) cast to x's type where they are used; x (..., k)."""
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if AMX and x.numel() == x.shape[-1] and not torch.is_grad_enabled():
        # one token alone, in generation
        vector = x.reshape(-1)                                  # (k,)
        y = torch.mv(weight, vector) if bias is None else torch.addmv(bias, weight, vector)
        return y.view(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


class LoRALinear(nn.Module):
    """A linear layer W with `experts` LoRAs of the given rank beside it (0: a plain layer)."""

    def __init__(self, d_in, d_out, bias=False, experts=0, rank=0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None
        if experts:
            # the ten A_i one below the other, the ten B_i side by side
            self.A = nn.Parameter(torch.empty(experts * rank, d_in))
            self.B = nn.Parameter(torch.empty(d_out, experts * rank))

    def forward(self, x, scales=None):
        """x (B, T, k), scales (B, 1, E·rank) from `expert_scales` -> y (B, T, d).

        Without scales this is the plain layer. Experts stay fp32 beside bf16 activations.
        """
        if scales is None:
            return linear(x, self.weight, self.bias)            # W x, (B, T, d)
        # all ten experts in two products: A x holds ten times `rank` numbers, and an expert is
        # silent when its own are multiplied by 0
        low = scales * linear(x, self.A)                        # w ⊙ (A x), (B, T, E·rank)
        # positions in one row of rows, as `add_product` wants them
        y = linear(x.flatten(0, 1), self.weight, self.bias)     # W x, (B·T, d)
        y = add_product(y, low.flatten(0, 1), self.B)           # W x + B (w ⊙ (A x))
        return y.view(*x.shape[:-1], -1)                        # (B, T, d)


def add_product(y, low, B):
    """y + B low, written into y: y (n, d), low (n, E·rank), B (d, E·rank).

    `y + linear(low, B)` is the same, but reads and writes y once more: a twentieth of a step.
    """
    return y.addmm_(low, B.to(y.dtype).T)


def expert_scales(w, rank, alpha, dtype):
    """Mixing weights w (B, E) -> (B, 1, E·rank): each expert's w_i · alpha/rank, for each of its
    rank rows of A x.
    """
    # alpha/rank keeps the size of ΔW when the rank changes
    scaled = w * (alpha / rank)
    return scaled.repeat_interleave(rank, dim=1)[:, None].to(dtype)


def lora_layers(model):
    """(name, layer) of every layer of `model` that carries experts."""
    return [(name, module) for name, module in model.named_modules()
            if isinstance(module, LoRALinear) and hasattr(module, "A")]


def init_experts(model, seed, device):
    """Fresh experts: A uniform in ±1/√k, as LoRA and peft start, and B = 0.

    So an untrained expert changes nothing.
    """
    # drawn on the CPU: the same seed gives the same experts on every device
    generator = torch.Generator().manual_seed(seed)
    for _, layer in lora_layers(model):
        bound = 1 / math.sqrt(layer.A.shape[1])
        A = torch.empty(layer.A.shape).uniform_(-bound, bound, generator=generator)
        layer.A = nn.Parameter(A.to(device))
        layer.B = nn.Parameter(torch.zeros(layer.B.shape, device=device))


# ----------------------------------------------------------------------------------------- merging

@torch.no_grad()
def merge(model, w):
    """Put W + Σ_i w_i B_i A_i · alpha/rank in place of every W; w (E,).

    Generation then costs what the plain model does. Returns the untouched W's by name, for
    `unmerge`: adding and subtracting again would leave rounding behind.
    """
    originals = {}
    scales = expert_scales(w[None], model.rank, model.alpha, torch.float32)[0]      # (1, E·rank)
    for name, layer in lora_layers(model):
        originals[name] = layer.weight
        # summed in fp32: ten small products would drown in bf16's rounding
        delta = (layer.B * scales) @ layer.A                                        # (d, k), fp32
        merged = delta.add_(layer.weight).to(layer.weight.dtype)
        layer.weight = nn.Parameter(merged, requires_grad=False)
    return originals


def unmerge(model, originals):
    """Put back, to the bit, the weights that `merge` returned."""
    for name, layer in lora_layers(model):
        if name in originals:
            layer.weight = originals[name]


# ---------------------------------------------------------------------------------------- training

@torch.no_grad()
def clip_experts(model, experts, clip):
    """Scale each expert's gradient to norm `clip` at most, as if it were trained alone.

    Returns the norms before that, (E,).
    """
    # one expert's gradient lies in every layer, so the norms need all of them first
    gradients = []
    for _, layer in lora_layers(model):
        d = layer.B.shape[0]
        gradient_A = layer.A.grad.view(experts, -1)             # (E, rank·k), a view
        gradient_B = layer.B.grad.view(d, experts, -1)          # (d, E, rank)
        gradients.append((gradient_A, gradient_B))

    square = 0
    for gradient_A, gradient_B in gradients:
        square = square + gradient_A.square().sum(dim=1)
        square = square + gradient_B.square().sum(dim=(0, 2))
    norms = square.sqrt()                                       # (E,)

    # 1e-6 as in torch's own clipping: no division by a norm of 0
    scale = (clip / (norms + 1e-6)).clamp(max=1)[:, None]       # (E, 1)
    for gradient_A, gradient_B in gradients:
        gradient_A.mul_(scale)
        gradient_B.mul_(scale)
    return norms


# ------------------------------------------------------------------------------------------- files

def expert_tensors(model, i):
    """peft's name -> the rows of A and columns of B that are expert i's, as views."""
    rows = slice(i * model.rank, (i + 1) * model.rank)
    tensors = {}
    for name, layer in lora_layers(model):
        key = f"base_model.model.model.{name}.lora_"
        tensors[key + "A.weight"] = layer.A.detach()[rows]      # (rank, k)
        tensors[key + "B.weight"] = layer.B.detach()[:, rows]   # (d, rank)
    return tensors


def save_experts(model, names, folder, base):
    """One folder a pole (high_openness, ...) as peft loads it: adapter_config.json, safetensors."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": model.rank,
        "lora_alpha": model.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": TARGETS,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    for i, expert in enumerate(names):
        tensors = {}
        for key, t in expert_tensors(model, i).items():
            tensors[key] = t.cpu().contiguous()
        out = Path(folder) / expert.replace(" ", "_")
        out.mkdir(parents=True, exist_ok=True)
        with atomic_write(out / "adapter_model.safetensors") as tmp:
            save_file(tensors, tmp, metadata={"format": "pt"})
        write_json(out / "adapter_config.json", config)


@torch.no_grad()
def load_experts(model, names, folder):
    """Read what `save_experts` wrote into the model's stacked A's and B's."""
    for i, expert in enumerate(names):
        path = Path(folder) / expert.replace(" ", "_") / "adapter_model.safetensors"
        try:
            saved = load_file(path)
        except Exception as error:      # safetensors has its own type, and OSError
            raise UserError(f"cannot read the expert {path}: {error}")
        # the targets are views: copying into them fills the stacked A and B
        for key, target in expert_tensors(model, i).items():
            if key not in saved or saved[key].shape != target.shape:
                found = tuple(saved[key].shape) if key in saved else "missing"
                raise UserError(f"{path}: {key} is {found}, this base needs "
                                f"{tuple(target.shape)}; the run was made for another base")
            target.copy_(saved[key])
