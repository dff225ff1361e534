"""Equation 1, the pooling, and the two figures of how well the weights rank."""

import math

import numpy as np
import pytest
import torch

from personafuse import load_llama, pad
from router import Router, average_precision, pole_auc


@pytest.fixture(scope="module")
def encoder(mini):
    return load_llama(mini, torch.device("cpu"), torch.float32)


def test_equation_1_written_out(encoder):
    router = Router(encoder, tau=0.5)
    h = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    w = router.weights(h)
    for i in range(3):
        s = [float(h[i] @ e / (h[i].norm() * e.norm())) for e in router.e.detach()]
        for j in range(10):
            assert w[i, j].item() == pytest.approx(math.exp(s[j] / 0.5) / sum(math.exp(x / 0.5) for x in s), rel=1e-4)


def test_no_weight_passes_045_at_tau_1(encoder):
    router = Router(encoder, tau=1.0)
    router.e.data[:] = torch.eye(1, 32) * -1
    router.e.data[0] = torch.eye(1, 32)
    assert router.weights(torch.eye(1, 32))[0, 0].item() == pytest.approx(math.e / (math.e + 9 / math.e))


@pytest.mark.parametrize("pooling", ["last", "mean", "words"])
def test_padding_does_not_change_an_embedding(encoder, pooling):
    router = Router(encoder, pooling=pooling)
    queries = [[7, 8, 9], [5], list(range(1, 60))]
    with torch.no_grad():
        together = router.embed(*pad(queries, "cpu"))
        noisy_tokens, lengths = pad(queries, "cpu", fill=123)           # whatever the padding is
        noisy = router.embed(noisy_tokens, lengths)
        for i, q in enumerate(queries):
            hidden = encoder(torch.tensor([q]))[0] if pooling != "words" else encoder.embed_tokens.weight[q]
            alone = hidden[-1] if pooling == "last" else hidden.mean(dim=0)
            assert (together[i] - alone).abs().max() < 1e-5 and (noisy[i] - alone).abs().max() < 1e-5


def test_embeddings_start_at_the_class_means_less_the_mean_of_all(encoder):
    router = Router(encoder)
    h, p = torch.zeros(3, 32), torch.zeros(3, 10)
    h[0, 0], h[1, 1], h[2, 1] = 2.0, 3.0, 1.0                       # directions a, b, b
    p[0, 4] = p[1, 4] = p[2, 7] = 1
    router.init_embeddings(h, p)
    assert router.e[4, :2].tolist() == pytest.approx([1 / 2 - 1 / 3, 1 / 2 - 2 / 3])
    assert router.e[7, :2].tolist() == pytest.approx([0 - 1 / 3, 1 - 2 / 3])


def test_average_precision_by_hand():
    w = np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]])
    p = np.array([[1, 0, 1, 0], [1, 0, 0, 0]])
    # first query: hits at ranks 1 and 3, (1/1 + 2/3) / 2; second: its only one comes last, 1/4
    assert average_precision(w, p).tolist() == pytest.approx([5 / 6, 0.25])


def test_auc_by_hand():
    w, p = np.array([[0.9, 0.1], [0.5, 0.1], [0.5, 0.2], [0.1, 0.3]]), np.array([[1, 1], [0, 1], [1, 1], [0, 1]])
    # pole 0: pairs (0.9 > 0.5), (0.9 > 0.1), (0.5 = 0.5), (0.5 > 0.1): 3.5 of 4. Pole 1 has no negative.
    auc = pole_auc(w, p)
    assert auc[0] == pytest.approx(3.5 / 4) and math.isnan(auc[1])
