"""The situation-aware router (section 4.1): a small language model reads the query, ten embeddings
vote, and Eq. 1 mixes. Below it, how well its weights rank the experts.

B queries, T tokens, E experts, d the encoder's width.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from losses import cosine

# how the experts may be mixed without weights by hand
ROUTES = ["learned", "uniform", "none", "random1", "random2", "random5"]

class Router(nn.Module):
    """h = f_θ(q), then w_i = softmax_i(cos(h, e_i) / τ).

    `encoder` is any of our Llamas (the persona encoder f_θ); `e` (E, d) are the expert embeddings.
    `pooling` says what of the encoder is h:
      "last"   its output at the last real token, as decoder encoders do (the paper does not say)
      "mean"   the mean of its outputs
      "both"   these two side by side
      "words"  the mean of its token embeddings: a bag of words that skips its blocks
    `start` says where training begins:
      "means"     e_i is the mean of the queries that call for expert i, less the mean of all
      "whitened"  the same, after an affine map at the end of f_θ that centres h and evens out its
                  directions; the map is trained from there
    """

    def __init__(self, encoder, num_experts=10, tau=1.0, pooling="last", start="means"):
        super().__init__()
        self.encoder = encoder
        self.tau = tau
        self.pooling = pooling
        d = encoder.config.hidden_size * (2 if pooling == "both" else 1)
        self.map = None
        if start == "whitened":
            self.map = nn.Linear(d, d)
            nn.init.eye_(self.map.weight)                       # until `start_at`
            nn.init.zeros_(self.map.bias)
        self.e = nn.Parameter(torch.empty(num_experts, d))      # `start_at` gives them values

    def forward(self, tokens, lengths):
        """Eq. 1: queries (B, T), right-padded, and lengths (B,) -> mixing weights w (B, E)."""
        h = self.embed(tokens, lengths)                         # (B, d)
        return self.weights(h)                                  # (B, E)

    def weights(self, h):
        """Eq. 1: h (B, d) -> mixing weights w (B, E), each row summing to 1."""
        return torch.softmax(cosine(h, self.e) / self.tau, dim=-1)

    def embed(self, tokens, lengths, checkpointing=False):
        """f_θ: tokens (B, T), lengths (B,) -> persona embeddings h (B, d), in fp32."""
        h = self.pool(tokens, lengths, checkpointing)           # (B, d)
        if self.map is None:
            return h
        return self.map(F.normalize(h, dim=-1))

    def pool(self, tokens, lengths, checkpointing=False):
        """What `pooling` takes of the encoder: tokens (B, T), lengths (B,) -> (B, d), in fp32.

        Padding stands to the right of a causal model, so no real token ever sees it.
        """
        if self.pooling == "words":
            # not normalised: how much a token weighs is learned with the length of its embedding
            hidden = self.encoder.embed_tokens(tokens)                          # (B, T, d)
        else:
            hidden = self.encoder(tokens, checkpointing=checkpointing)          # (B, T, d)
        rows = torch.arange(len(tokens), device=tokens.device)
        last = hidden[rows, lengths - 1].float()                                # (B, d)
        if self.pooling == "last":
            return last
        places = torch.arange(tokens.shape[1], device=tokens.device)
        real = places < lengths[:, None]                                        # (B, T)
        total = (hidden.float() * real[..., None]).sum(dim=1)                   # (B, d)
        mean = total / lengths[:, None]
        return torch.cat([last, mean], dim=1) if self.pooling == "both" else mean

    @torch.no_grad()
    def start_at(self, h, p):
        """Set e, and the map where there is one, by what `pool` makes of the training queries.

        h (n, d), p (n, E). The h of an encoder share a large common part: without it the ten class
        means differ, and the router starts as a nearest-mean classifier instead of at random.
        """
        h = F.normalize(h, dim=-1)
        mean = h.mean(dim=0)                                    # (d,)
        if self.map is not None:
            centred = h - mean
            # C = U diag(v) Uᵀ, and (C + λ)^(-1/2) makes all directions about equally long; λ is
            # their mean variance: without it the directions in which h hardly varies, and which
            # the queries at hand tell badly, would count most
            C = centred.T @ centred / len(h)                    # (d, d)
            v, U = torch.linalg.eigh(C.double())
            M = (U * (v + v.mean()) ** -0.5 @ U.T).to(h)
            self.map.weight.copy_(M)
            self.map.bias.copy_(-M @ mean)
            h = self.map(h)
            mean = h.mean(dim=0)
        p = p.to(h)
        count = p.sum(dim=0)[:, None].clamp(min=1)              # (E, 1)
        class_means = p.T @ h / count                           # (E, d)
        self.e.copy_(class_means - mean)


def random_weights(n, experts, k, seed=0):
    """The paper's Random Route: for each of n queries k random experts at 1/k -> w (n, experts)."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.zeros(n, experts)
    for row in w:
        row[torch.randperm(experts, generator=generator)[:k]] = 1 / k
    return w


def keep_top(w, k):
    """Only the k largest weights of each row, scaled to sum to 1 again; w (n, E) -> (n, E)."""
    top = w.topk(k, dim=1).indices
    kept = w * torch.zeros_like(w).scatter(1, top, 1)
    return kept / kept.sum(dim=1, keepdim=True)


def average_precision(w, p):
    """How well weights rank the right experts. w, p (B, E) numpy arrays -> (B,).

    1 where all the experts with p = 1 come first.
    """
    order = np.argsort(-w, axis=1, kind="stable")
    hits = np.take_along_axis(p, order, axis=1)                 # p in the order of the weights
    precision = hits.cumsum(axis=1) / np.arange(1, p.shape[1] + 1)
    return (precision * hits).sum(axis=1) / hits.sum(axis=1)


def pole_auc(w, p):
    """ROC AUC of each expert's weight as a detector of its pole. w, p (B, E) -> (E,).

    The share of (activated, not activated) pairs of queries in which the activated one has the
    larger weight; NaN where all p are equal.
    """
    auc = np.full(p.shape[1], np.nan)
    for i in range(p.shape[1]):
        active = w[p[:, i] == 1, i]
        inactive = w[p[:, i] == 0, i]
        if len(active) and len(inactive):
            wins = (active[:, None] > inactive).mean()
            ties = (active[:, None] == inactive).mean()
            auc[i] = wins + 0.5 * ties
    return auc
