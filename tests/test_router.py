"""Equation 1, the poolings, both starts, and the two figures of how well the weights rank."""

import re
import math

import numpy as np
import pytest
import torch

from data import TRAITS
from personafuse import build, load_llama, pad
from router import Router, average_precision, random_weights

CPU = torch.device("cpu")
QUERIES = [[7, 8, 9], [5], list(range(1, 60))]


@pytest.fixture(scope="module")
def encoder(mini):
    return load_llama(mini, CPU, torch.float32)


def equation_1(h, e, tau):
    """The weights of one query, written out: h (d,), e (E, d) -> ten numbers."""
    powers = []
    for e_j in e.detach():
        s = float(h @ e_j / (h.norm() * e_j.norm()))
        powers.append(math.exp(s / tau))
    return [power / sum(powers) for power in powers]


def test_equation_1_written_out(encoder):
    generator = torch.Generator().manual_seed(0)
    router = Router(encoder, tau=0.5)
    router.e.data = torch.randn(10, 32, generator=generator)
    h = torch.randn(3, 32, generator=generator)
    w = router.weights(h)
    for i in range(3):
        assert w[i].tolist() == pytest.approx(equation_1(h[i], router.e, 0.5), rel=1e-4)


def test_a_remark_multiplies_a_weight_by_e_squared(encoder):
    generator = torch.Generator().manual_seed(0)
    router = Router(encoder, tau=0.3)
    router.e.data = torch.randn(10, 32, generator=generator)
    h = torch.randn(2, 32, generator=generator)
    remarks = torch.tensor([0, 1, 0, -2, 0, 0, 0, 0, 0, 0])
    w = router.weights(h, remarks)
    for i in range(2):
        grown = equation_1(h[i], router.e, 0.3)
        grown[1] *= math.e ** 2
        grown[3] /= math.e ** 4
        expected = [x / sum(grown) for x in grown]
        assert w[i].tolist() == pytest.approx(expected, rel=1e-4)


def test_no_weight_passes_045_at_tau_1(encoder):
    router = Router(encoder, tau=1.0)
    axis = torch.eye(1, 32)
    router.e.data[:] = -axis
    router.e.data[0] = axis
    largest = router.weights(axis)[0, 0].item()
    assert largest == pytest.approx(math.e / (math.e + 9 / math.e))


# ---------------------------------------------------------------------------------- embeddings

def embedded_alone(encoder, query, pooling):
    """h of one query without any padding."""
    if pooling == "words":
        return encoder.embed_tokens.weight[query].mean(dim=0)
    hidden = encoder(torch.tensor([query]))[0]                  # (T, d)
    both = [hidden[-1], hidden.mean(dim=0)]
    if pooling == "both":
        return torch.cat(both)
    return both[0] if pooling == "last" else both[1]


@pytest.mark.parametrize("pooling", ["last", "mean", "both", "words"])
def test_padding_does_not_change_an_embedding(encoder, pooling):
    router = Router(encoder, pooling=pooling)
    with torch.no_grad():
        together = router.embed(*pad(QUERIES, "cpu"))
        # whatever the padding is
        noisy = router.embed(*pad(QUERIES, "cpu", fill=123))
        for i, query in enumerate(QUERIES):
            alone = embedded_alone(encoder, query, pooling)
            assert (together[i] - alone).abs().max() < 1e-5
            assert (noisy[i] - alone).abs().max() < 1e-5


def test_the_first_layers_alone_are_the_first_block_and_the_norm(mini, encoder):
    """Against what transformers has after its first block, and the norm by hand."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(mini, dtype=torch.float32)
    first = load_llama(mini, CPU, torch.float32, layers=1)
    with torch.no_grad():
        for query in QUERIES:
            tokens = torch.tensor([query])
            x = theirs(tokens, output_hidden_states=True).hidden_states[1]
            mean_square = x.square().mean(dim=-1, keepdim=True)
            by_hand = x / (mean_square + 1e-5).sqrt() * encoder.norm.weight
            assert (first(tokens) - by_hand).abs().max() < 1e-5
            assert (first(tokens) - encoder(tokens)).abs().max() > 0.1


@pytest.mark.parametrize("query_format, read", [
    ("raw", "I feel anxious"),
    ("chat", "User: I feel anxious\nAssistant:"),
    ("lead-in", "User: I feel anxious\nAssistant: I want to sound"),
])
def test_what_the_encoder_reads_of_a_query(mini, query_format, read):
    settings = dict(base_folder=mini, encoder_folder=mini, names=TRAITS, rank=2, lora_alpha=4,
                    encoder_layers=1, train_encoder=True, pooling="both", start="means", tau=0.5,
                    query_format=query_format, seed=0)
    model = build(settings, CPU, torch.float32)
    generator = torch.Generator().manual_seed(0)
    model.router.e.data = torch.randn(10, 64, generator=generator)
    ids = model.encode_queries(["I feel anxious"])[0]
    assert model.encoder_tokenizer.decode(ids) == read
    h = embedded_alone(model.router.encoder, ids, "both")
    w = model.mixing_weights(["I feel anxious"])[0]
    assert w.tolist() == pytest.approx(equation_1(h, model.router.e, 0.5), rel=1e-4)
    # one that is too long loses its own end, and nothing of what stands around it
    [long] = model.encode_queries(["anxious " * 600])
    assert len(long) <= 512
    before, after = read.split("I feel anxious")
    assert re.fullmatch(f"{before}[anxious ]+{after}", model.encoder_tokenizer.decode(long).strip())


# -------------------------------------------------------------------------------------- the start

def test_embeddings_start_at_the_class_means_less_the_mean_of_all(encoder):
    router = Router(encoder)
    h = torch.zeros(3, 32)
    h[0, 0] = 2.0                                               # directions a, b, b
    h[1, 1] = 3.0
    h[2, 1] = 1.0
    p = torch.zeros(3, 10)
    p[0, 4] = 1
    p[1, 4] = 1
    p[2, 7] = 1
    router.start_at(h, p)
    assert router.e[4, :2].tolist() == pytest.approx([1 / 2 - 1 / 3, 1 / 2 - 2 / 3])
    assert router.e[7, :2].tolist() == pytest.approx([0 - 1 / 3, 1 - 2 / 3])


def test_the_map_starts_as_ridge_regression(encoder):
    """Against numpy, which solves the same as least squares with the penalty as further rows."""
    n = 50
    rng = np.random.default_rng(0)
    h = rng.normal(size=(n, 64)) * np.linspace(0.1, 3, 64) + 5
    p = (rng.random((n, 10)) < 0.3).astype(float)

    # minimise |p - mean p - (h - mean h) M|² / n + λ |M|²
    centred = h - h.mean(axis=0)
    mean_variance = centred.var(axis=0).mean()
    rows = np.concatenate([centred / n ** 0.5, mean_variance ** 0.5 * np.eye(64)])
    wanted = np.concatenate([(p - p.mean(axis=0)) / n ** 0.5, np.zeros((64, 10))])
    M = np.linalg.lstsq(rows, wanted, rcond=None)[0]            # (64, 10)
    predicted = p.mean(axis=0) + centred @ M                    # (n, 10)

    router = Router(encoder, tau=0.5, pooling="both", start="ridge")
    router.start_at(torch.tensor(h, dtype=torch.float32), torch.tensor(p))
    ours = router.map(torch.tensor(h, dtype=torch.float32))
    assert np.abs(ours.detach().numpy() - predicted).max() < 1e-4
    # the expert embeddings are the axes: the cosine to one is its share of the ten numbers
    w = router.weights(ours)
    for i in range(5):
        powers = np.exp(predicted[i] / np.linalg.norm(predicted[i]) / 0.5)
        assert w[i].tolist() == pytest.approx(list(powers / powers.sum()), rel=1e-3)


def test_both_starts_rank_the_experts_before_a_step_of_training(encoder):
    """Queries whose p shows in h, plus a large part that all of them share."""
    generator = torch.Generator().manual_seed(0)
    p = (torch.rand(200, 10, generator=generator) < 0.3).float()
    p[p.sum(dim=1) == 0, 0] = 1
    voices = torch.randn(10, 32, generator=generator)
    h = p @ voices + 0.3 * torch.randn(200, 32, generator=generator) + 20
    for start in ("means", "ridge"):
        router = Router(encoder, start=start)
        router.start_at(h, p)
        w = router.weights(h if router.map is None else router.map(h)).detach().numpy()
        chance = average_precision(np.tile(p.mean(dim=0).numpy(), (200, 1)), p.numpy()).mean()
        assert average_precision(w, p.numpy()).mean() > max(0.8, chance + 0.2), start


# ------------------------------------------------------------------------- other ways to mix

def test_random_route_is_k_experts_at_one_kth():
    for k in (1, 2, 5):
        w = random_weights(20, 10, k, seed=1)
        for row in w.tolist():
            assert sorted(row) == pytest.approx([0.0] * (10 - k) + [1 / k] * k)
    assert torch.equal(random_weights(20, 10, 2, seed=1), random_weights(20, 10, 2, seed=1))
    assert not torch.equal(random_weights(20, 10, 2, seed=1), random_weights(20, 10, 2, seed=2))


# --------------------------------------------------------------------------------------- ranking

def test_average_precision_by_hand():
    w = np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]])
    p = np.array([[1, 0, 1, 0], [1, 0, 0, 0]])
    # first query: hits at ranks 1 and 3, (1/1 + 2/3) / 2; second: its only one comes last, 1/4
    assert average_precision(w, p).tolist() == pytest.approx([5 / 6, 0.25])
