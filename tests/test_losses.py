"""Equations 2 to 8, by hand and as the paper's sums written out in loops."""

import math

import pytest
import torch

from losses import contrastive_loss, cosine, joint_loss, lm_loss, router_loss, trait_loss


def test_equation_8_by_hand():
    # two tokens over a vocabulary of two: probabilities 3/4 and 1/5 for the right ones
    logits = torch.tensor([[0.75, 0.25], [0.8, 0.2]]).log()
    targets = torch.tensor([0, 1])
    total = -math.log(0.75) - math.log(0.2)
    assert lm_loss(logits, targets, torch.tensor([1.0, 1.0])).item() == pytest.approx(total)
    assert lm_loss(logits, targets, torch.tensor([0.5, 0.5])).item() == pytest.approx(total / 2)


def test_equation_4_by_hand():
    h = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    e = torch.tensor([[1.0, 0.0], [-4.0, 3.0]])
    s = cosine(h, e)
    assert s[0].tolist() == pytest.approx([0.6, 0.0])
    assert s[1].tolist() == pytest.approx([0.0, 0.6])


def test_equation_3_by_hand():
    s = torch.tensor([[0.5, 0.4, -0.9], [0.1, 1.0, 0.2]])
    p = torch.tensor([[1, 0, 0], [0, 1, 1]])
    # m = 0.1. Row 1: (1 - 0.5)² + (0.4 - 0.1)² + 0 = 0.34
    # row 2: 0 + 0 + (1 - 0.2)² = 0.64; and their mean
    assert contrastive_loss(s, p, 0.1).item() == pytest.approx(0.49)


def test_equation_3_as_loops():
    generator = torch.Generator().manual_seed(0)
    s = torch.rand(7, 10, generator=generator) * 2 - 1
    p = torch.randint(0, 2, (7, 10), generator=generator)
    total = 0.0
    for i in range(7):
        for j in range(10):
            if p[i, j] == 1:
                total += (1 - s[i, j]) ** 2
            else:
                total += max(0.0, s[i, j] - 0.3) ** 2
    assert contrastive_loss(s, p, 0.3).item() == pytest.approx(float(total) / 7)


def test_equation_5_as_loops():
    B = 6
    h = torch.randn(B, 5, generator=torch.Generator().manual_seed(0))
    total = 0.0
    for i in range(B):
        for j in range(i + 1, B):
            total += 1 - float(h[i] @ h[j] / (h[i].norm() * h[j].norm()))
    expected = 2 / (B * (B - 1)) * total
    assert trait_loss(h, torch.ones(B, 10)).item() == pytest.approx(expected, rel=1e-5)


def test_equation_5_counts_only_pairs_that_share_p():
    h = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]])
    p = torch.tensor([[1, 0], [1, 0], [0, 1], [0, 1]])
    # pairs (0, 1) and (2, 3): 1 - 0 and 1 + 1/√2
    assert trait_loss(h, p).item() == pytest.approx((1 + 1 + 1 / math.sqrt(2)) / 2)
    # one query has no pair
    assert trait_loss(h[:1], p[:1]).item() == 0


def test_equations_6_and_2():
    two = torch.tensor(2.0)
    three = torch.tensor(3.0)
    assert router_loss(two, three, alpha=0.5, beta=0.1).item() == pytest.approx(1.3)
    assert joint_loss(two, three, gamma=0.2).item() == pytest.approx(2.6)
