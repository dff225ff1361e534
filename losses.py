"""The paper's losses, Equations 2 to 8, one function each. Tensors in, a scalar out; nothing else is known here.

B queries, E = 10 experts, d the width of the embedding space, N response tokens, V words in the vocabulary.
"""

import torch.nn.functional as F


def lm_loss(logits, targets, share):
    """Eq. 8, L_lm = -Σ_t share_t · log p(r_t | q, r_<t), over response tokens only.

    logits (N, V), targets (N,) token ids, share (N,) what each token counts: 1/N gives the mean over a batch.
    Passing the share in lets a batch be cut into parts whose losses add up to exactly the loss of the whole.
    """
    return (share * F.cross_entropy(logits.float(), targets, reduction="none")).sum()


def cosine(h, e):
    """Eq. 4, s_ij = cos(h_i, e_j). h (B, d), e (E, d) -> s (B, E)."""
    return F.normalize(h.float(), dim=-1) @ F.normalize(e.float(), dim=-1).T


def contrastive_loss(s, p, margin):
    """Eq. 3: pull the activated experts (p = 1) to similarity 1, push the others (p = 0) below the margin m.

    s (B, E) cosine similarities, p (B, E) of zeros and ones.
    """
    positive = p * (1 - s) ** 2
    negative = (1 - p) * (s - margin).clamp(min=0) ** 2
    return (positive + negative).sum(dim=1).mean()


def trait_loss(h, p):
    """Eq. 5: the mean of 1 - cos(h_i, h_j) over the pairs i < j of queries that ask for the same traits.

    h (B, d), p (B, E). Where the whole batch shares one p, as in the paper, there are B(B-1)/2 pairs; a batch with
    several p counts only the pairs that share theirs, and one without any such pair has loss 0.
    """
    s = cosine(h, h)                                                    # (B, B)
    same = (p[:, None] == p[None]).all(dim=-1).triu(diagonal=1)         # (B, B), each pair once
    return ((1 - s) * same).sum() / same.sum().clamp(min=1)


def router_loss(contrastive, trait, alpha=1.0, beta=1.0):
    """Eq. 6, L_router = α L_contrastive + β L_trait. α is 1 in section 4.3 and 0.5 in appendix A."""
    return alpha * contrastive + beta * trait


def joint_loss(lm, router, gamma=0.2):
    """Eq. 2, L_joint = L_lm + γ L_router."""
    return lm + gamma * router
