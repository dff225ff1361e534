"""The paper's losses, Equations 2 to 8, one function each. Tensors in, a scalar out.

B queries, E = 10 experts, d the width of the embedding space, N response tokens, V words in the
vocabulary.
"""

import torch.nn.functional as F


def lm_loss(logits, targets, token_weight):
    """Eq. 8, L_lm = -Σ_t token_weight_t · log p(r_t | q, r_<t), over response tokens only.

    logits (N, V), targets (N,) token ids, token_weight (N,) what each token counts: 1/N gives the
    mean over a batch. Because the weights are passed in, the losses of a batch's parts add up to
    exactly the loss of the whole.
    """
    per_token = F.cross_entropy(logits.float(), targets, reduction="none")      # (N,)
    return (token_weight * per_token).sum()


def cosine(h, e):
    """Eq. 4, s_ij = cos(h_i, e_j). h (B, d), e (E, d) -> s (B, E)."""
    h = F.normalize(h.float(), dim=-1)
    e = F.normalize(e.float(), dim=-1)
    return h @ e.T


def contrastive_loss(s, p, margin):
    """Eq. 3: pull activated experts (p = 1) to similarity 1, push the others below the margin m.

    s (B, E) cosine similarities, p (B, E) of zeros and ones.
    """
    positive = p * (1 - s) ** 2
    negative = (1 - p) * (s - margin).clamp(min=0) ** 2
    return (positive + negative).sum(dim=1).mean()


def trait_loss(h, p):
    """Eq. 5: the mean of 1 - cos(h_i, h_j) over the pairs i < j of queries that share their traits.

    h (B, d), p (B, E). A batch that shares one p, as in the paper, has B(B-1)/2 pairs; one with
    several p counts only the pairs that share theirs, and without any such pair the loss is 0.
    """
    s = cosine(h, h)                                            # (B, B)
    same = (p[:, None] == p[None]).all(dim=-1)                  # (B, B)
    pairs = same.triu(diagonal=1)                               # each pair once, nobody with itself
    total = ((1 - s) * pairs).sum()
    return total / pairs.sum().clamp(min=1)


def router_loss(contrastive, trait, alpha=1.0, beta=1.0):
    """Eq. 6, L_router = α L_contrastive + β L_trait. α: 1 in section 4.3, 0.5 in appendix A."""
    return alpha * contrastive + beta * trait


def joint_loss(lm, router, gamma=0.2):
    """Eq. 2, L_joint = L_lm + γ L_router."""
    return lm + gamma * router
