"""Five functions of the method, for you to write. docs/exercises.md has the order and the hints.

    python -m pytest --mine -k equation_3           the tests of one of them
    python -m pytest --mine                         all tests, with yours in the place of ours

Each docstring says all that is needed: shapes in, shapes out, the equation.
Ours stand in losses.py, lora.py and router.py; look there afterwards.
"""

import torch
import torch.nn.functional as F  # noqa: F401  (you may want it)
from torch import nn  # noqa: F401

from lora import expert_scales, lora_layers  # noqa: F401
from losses import cosine  # noqa: F401


def contrastive_loss(s, p, margin):
    """Eq. 3:

    L_contrastive = 1/B Σ_i [ Σ_{j in P_i} (1 - s_ij)² + Σ_{j in N_i} max(0, s_ij - m)² ].

    P_i holds the experts with p_ij = 1, N_i the others; m is the margin.
    s (B, E) cosine similarities, p (B, E) of zeros and ones -> a scalar.
    """
    raise NotImplementedError


def trait_loss(h, p):
    """Eq. 5: the mean of 1 - cos(h_i, h_j) over the pairs i < j whose rows of p are equal.

    h (B, d), p (B, E) -> a scalar; 0 where no two rows of p are equal.
    """
    raise NotImplementedError


class LoRALinear:
    """Only its forward is yours; the layer has these already:

    self.weight (d, k), self.bias (d,) or None, self.A (E·rank, k), self.B (d, E·rank).
    """

    def forward(self, x, scales=None):
        """y = W x + bias + B (scales ⊙ (A x)).

        x (B, T, k), scales (B, 1, E·rank) -> y (B, T, d).
        scales holds w_i · alpha/rank, once for each of expert i's rank rows of A.
        Without scales it is a plain linear layer.
        Weights are cast to x's type where they are used: x may be bf16 beside fp32 experts.
        """
        raise NotImplementedError


class Router:
    """Only its weights are yours; the router has these already: self.e (E, d), self.tau."""

    def weights(self, h):
        """Eq. 1: w_i = exp(cos(h, e_i) / τ) / Σ_j exp(cos(h, e_j) / τ).

        h (B, d) -> w (B, E), each row summing to 1.
        """
        raise NotImplementedError


@torch.no_grad()
def merge(model, w):
    """Put W + Σ_i w_i B_i A_i · alpha/rank in place of the weight W of every layer with experts.

    w (E,). `lora_layers(model)` lists (name, layer); model.rank and model.alpha are the figures.
    Returns {name: the layer's weight as it was}. A new weight is an nn.Parameter without gradient,
    of the old one's type; the sum is made in fp32.
    """
    raise NotImplementedError
