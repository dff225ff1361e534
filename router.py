"""The situation-aware router (section 4.1): a small language model reads the query, ten embeddings
vote, and Eq. 1 mixes. Below it, how well its weights rank the experts.

B queries, T tokens, E experts, d the encoder's width.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from losses import cosine

# the beginning of an answer, for the encoder to read behind the query: what it expects next tells
# what an answer should be like
LEAD_IN = "I want to sound"
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
    `start` says where training begins, see `start_at`:
      "means"  h is what the pooling gives, and e_i the mean of the queries that call for expert i
      "ridge"  an affine map at the end of f_θ makes ten numbers of it, how much of each pole, and
               e_i is the axis of pole i; the map is trained from there like the rest
    """

    def __init__(self, encoder, num_experts=10, tau=1.0, pooling="last", start="means",
                 frozen_encoder=False):
        super().__init__()
        self.encoder = encoder
        self.frozen_encoder = frozen_encoder    # then only e and the map are trained and saved
        self.tau = tau
        self.pooling = pooling
        d = encoder.config.hidden_size * (2 if pooling == "both" else 1)
        self.map = nn.Linear(d, num_experts) if start == "ridge" else None
        # `start_at` gives them values
        self.e = nn.Parameter(torch.zeros(num_experts, num_experts if start == "ridge" else d))

    def forward(self, tokens, lengths):
        """Eq. 1: queries (B, T), right-padded, and lengths (B,) -> mixing weights w (B, E)."""
        h = self.embed(tokens, lengths)                         # (B, d)
        return self.weights(h)                                  # (B, E)

    def weights(self, h, remarks=None):
        """Eq. 1: h (B, d) -> mixing weights w (B, E), each row summing to 1.

        remarks (E,): how often a reader asked for more of each pole, less what they asked for less
        of it. One adds 2τ to its cosine: beside the others, its weight grows e² = 7.4 times.
        """
        similarity = cosine(h, self.e)                          # Eq. 4, (B, E)
        if remarks is not None:
            similarity = similarity + 2 * self.tau * remarks
        return torch.softmax(similarity / self.tau, dim=-1)

    def embed(self, tokens, lengths, checkpointing=False):
        """f_θ: tokens (B, T), lengths (B,) -> persona embeddings h (B, d), in fp32."""
        h = self.pool(tokens, lengths, checkpointing)           # (B, d)
        return h if self.map is None else self.map(h)

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
        """Set e, and the map where there is one, by the training queries: what `pool` makes of
        them, h (n, d), and the traits that they call for, p (n, E).

        The h of an encoder share a large common part. Less that, both starts tell the poles apart
        before a step of training.
        """
        p = p.to(h)
        if self.map is None:
            # a nearest-mean classifier
            h = F.normalize(h, dim=-1)
            count = p.sum(dim=0)[:, None].clamp(min=1)          # (E, 1)
            self.e.copy_(p.T @ h / count - h.mean(dim=0))
            return
        # ridge regression of p on h: M = C⁻¹ cov(h, p), where C is cov(h) with the mean variance
        # added on its diagonal: n queries say little of directions in which h hardly varies
        centred = h - h.mean(dim=0)
        C = centred.T @ centred / len(h)                        # (d, d)
        C += C.trace() / len(C) * torch.eye(len(C), device=h.device)
        M = torch.linalg.solve(C, centred.T @ p / len(h))       # (d, E)
        self.map.weight.copy_(M.T)
        self.map.bias.copy_(p.mean(dim=0) - h.mean(dim=0) @ M)
        self.e.copy_(torch.eye(len(self.e)))


def random_weights(n, experts, k, seed=0):
    """The paper's Random Route: for each of n queries k random experts at 1/k -> w (n, experts)."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.zeros(n, experts)
    for row in w:
        row[torch.randperm(experts, generator=generator)[:k]] = 1 / k
    return w


def average_precision(w, p):
    """How well weights rank the right experts. w, p (B, E) numpy arrays -> (B,).

    1 where all the experts with p = 1 come first.
    """
    order = np.argsort(-w, axis=1, kind="stable")
    hits = np.take_along_axis(p, order, axis=1)                 # p in the order of the weights
    precision = hits.cumsum(axis=1) / np.arange(1, p.shape[1] + 1)
    return (precision * hits).sum(axis=1) / hits.sum(axis=1)
