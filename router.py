"""The situation-aware router (section 4.1): a small language model reads the query, ten embeddings vote, Eq. 1 mixes."""

import numpy as np
import torch
from torch import nn

from losses import cosine


class Router(nn.Module):
    """h = f_θ(q), then w_i = softmax_i(cos(h, e_i) / τ).

    `encoder` is any of our Llamas (the persona encoder f_θ, trained whole); `e` (E, d) are the expert embeddings.
    `pooling` says what of the encoder is h: "last", its output at the last real token (as decoder encoders do), "mean", the
    mean of its outputs, or "words", the mean of its normalised token embeddings, a bag of words that skips its blocks.
    """

    def __init__(self, encoder, num_experts=10, tau=1.0, pooling="last", seed=0):
        super().__init__()
        self.encoder, self.tau, self.pooling = encoder, tau, pooling
        generator = torch.Generator().manual_seed(seed)
        self.e = nn.Parameter(torch.randn(num_experts, encoder.config.hidden_size, generator=generator))

    def embed(self, tokens, lengths, checkpointing=False):
        """tokens (B, T) right-padded, lengths (B,) -> h (B, d). Padding stands to the right of a causal model, so no
        real token ever sees it."""
        if self.pooling == "words":
            hidden = self.encoder.norm(self.encoder.embed_tokens(tokens))       # (B, T, d)
        else:
            hidden = self.encoder(tokens, checkpointing=checkpointing)          # (B, T, d)
        if self.pooling == "last":
            return hidden[torch.arange(len(tokens), device=tokens.device), lengths - 1].float()
        real = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]      # (B, T)
        return (hidden.float() * real[..., None]).sum(dim=1) / lengths[:, None]

    @torch.no_grad()
    def init_embeddings(self, h, p):
        """Start e_i at the mean direction of the queries that activate expert i, less that of all queries.

        h (n, d) and p (n, E) are of the training queries. The h of an encoder share a large common part; without it the
        ten means differ, and the router starts as a nearest-mean classifier instead of at random.
        """
        h, p = torch.nn.functional.normalize(h, dim=-1), p.to(h)
        self.e.copy_(p.T @ h / p.sum(dim=0)[:, None].clamp(min=1) - h.mean(dim=0))

    def weights(self, h):
        """Eq. 1: h (B, d) -> mixing weights w (B, E), each row summing to 1."""
        return torch.softmax(cosine(h, self.e) / self.tau, dim=-1)


def random_weights(n, experts, k, seed=0):
    """The paper's Random Route: for each of n queries k experts, drawn at random, at weight 1/k -> w (n, experts)."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.zeros(n, experts)
    for row in w:
        row[torch.randperm(experts, generator=generator)[:k]] = 1 / k
    return w


def keep_top(w, k):
    """Only the k largest weights of each row, scaled so that they sum to 1 again; w (n, E) -> (n, E)."""
    kept = torch.zeros_like(w).scatter(1, w.topk(k, dim=1).indices, 1) * w
    return kept / kept.sum(dim=1, keepdim=True)


def average_precision(w, p):
    """How well weights rank the right experts. w, p (B, E) numpy arrays -> (B,), 1 where all p = 1 come first."""
    order = np.argsort(-w, axis=1, kind="stable")
    hits = np.take_along_axis(p, order, axis=1)                         # p in the order of the weights
    precision = hits.cumsum(axis=1) / np.arange(1, p.shape[1] + 1)
    return (precision * hits).sum(axis=1) / hits.sum(axis=1)


def pole_auc(w, p):
    """ROC AUC of each expert's weight as a detector of its pole. w, p (B, E) -> (E,), NaN where all p are equal.

    The share of (activated, not activated) pairs of queries in which the activated one has the larger weight.
    """
    auc = np.full(p.shape[1], np.nan)
    for i in range(p.shape[1]):
        yes, no = w[p[:, i] == 1, i], w[p[:, i] == 0, i]
        if len(yes) and len(no):
            auc[i] = ((yes[:, None] > no).mean() + 0.5 * (yes[:, None] == no).mean())
    return auc
