"""Generating from many prompts at a time, by continuous batching: a sequence that ends leaves its
row to the next prompt, so that no row waits for the longest answer.

n active rows, E experts, K key/value heads, c head_dim, T tokens.
"""

from collections import deque
from dataclasses import dataclass

import torch

from personafuse import Cache, penalize_repetition, sample_token


class BatchedCache:
    """Keys and values of several sequences, each in a row of its own, with room for `capacity`
    tokens. The active rows are always the first ones.
    """

    def __init__(self, llama, rows, capacity):
        config = llama.config
        heads = config.num_key_value_heads
        shape = (config.num_hidden_layers, rows, heads, capacity, config.head_dim)
        # not empty: what the mask hides still must not be NaN
        self.k = torch.zeros(shape, dtype=llama.dtype, device=llama.device)
        self.v = torch.zeros_like(self.k)
        self.lengths = []                       # tokens read so far, of each active row

    def add(self, cache):
        """Let the one sequence of a Cache go on in the next free row."""
        row = len(self.lengths)
        length = cache.length
        self.k[:, row, :, :length] = cache.k[:, 0, :, :length]
        self.v[:, row, :, :length] = cache.v[:, 0, :, :length]
        self.lengths.append(length)

    def remove(self, row):
        """A sequence has ended: the one in the last active row moves into its place."""
        last = len(self.lengths) - 1
        if row < last:
            self.k[:, row] = self.k[:, last]
            self.v[:, row] = self.v[:, last]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def begin_step(self):
        """Before a further token of every active row is read -> positions (n, 1) and mask
        (n, 1, 1, length of the longest row).
        """
        device = self.k.device
        self.end = max(self.lengths) + 1
        self.positions = torch.tensor(self.lengths, device=device)[:, None]     # (n, 1)
        self.rows = torch.arange(len(self.lengths), device=device)[:, None]     # (n, 1)
        # each row sees its own tokens only, not what an earlier sequence left behind
        mask = torch.arange(self.end, device=device) <= self.positions          # (n, end)
        return self.positions, mask[:, None, None]

    def update(self, layer, k, v):
        """Add k, v (n, K, 1, c) of a token of every active row -> all so far (n, K, end, c)."""
        n = len(self.lengths)
        all_k = self.k[layer, :n, :, :self.end]
        all_v = self.v[layer, :n, :, :self.end]
        all_k[self.rows, :, self.positions] = k.transpose(1, 2)
        all_v[self.rows, :, self.positions] = v.transpose(1, 2)
        return all_k, all_v

    def advance(self, tokens):
        self.lengths = [length + tokens for length in self.lengths]


@dataclass
class Sequence:
    """A prompt on its way through the model."""
    index: int          # which of the prompts it is
    ids: list           # the prompt and what came after it; the last one is drawn, but not read
    end: int            # how long it may become


@torch.inference_mode()
def generate_batch(llama, prompts, max_new_tokens, stop, w=None, temperature=0.0, top_p=1.0,
                   seed=0, repetition_penalty=1.0, rows=32):
    """Yield (i, the ids that continue prompts[i]), in the order in which they end: at a `stop`
    token, after max_new_tokens, or at the end of the model's context.

    prompts: lists of token ids; w (len(prompts), E), or None for the bare base. `rows` sequences
    run at a time.
    """
    context = llama.config.max_position_embeddings
    longest = max(len(prompt) for prompt in prompts)
    cache = BatchedCache(llama, min(rows, len(prompts)), min(context, longest + max_new_tokens))
    generator = torch.Generator(llama.device).manual_seed(seed)
    waiting = deque(range(len(prompts)))
    active = []                                 # the Sequence in each active row of the cache

    while waiting or active:
        if waiting and len(active) < rows:
            # a free row: read the next prompt into it, alone, so that nothing is padded
            i = waiting.popleft()
            # the last token is never read, so it needs no place in the context
            end = min(len(prompts[i]) + max_new_tokens, context + 1)
            active.append(Sequence(i, list(prompts[i]), end))
            first = len(active) - 1
            hidden = read_prompt(llama, prompts[i], None if w is None else w[[i]], cache)
        else:
            # one more token for every active row
            first = 0
            mixing = None if w is None else w[[sequence.index for sequence in active]]
            tokens = torch.tensor([sequence.ids[-1:] for sequence in active], device=llama.device)
            hidden = llama(tokens, mixing, cache, *cache.begin_step())          # (n, 1, d)
        logits = llama.logits(hidden[:, -1])                                    # (n, V)
        if repetition_penalty != 1:
            for row, sequence in zip(logits, active[first:]):
                penalize_repetition(row, sequence.ids, repetition_penalty)
        new = sample_token(logits, temperature, top_p, generator).tolist()

        # from the last to the first, as only rows that were looked at move into a hole
        for row in reversed(range(first, len(active))):
            sequence = active[row]
            token = new[row - first]
            if token not in stop:
                sequence.ids.append(token)
            if token in stop or len(sequence.ids) == sequence.end:
                yield sequence.index, sequence.ids[len(prompts[sequence.index]):]
                cache.remove(row)
                active[row] = active[-1]
                active.pop()


def read_prompt(llama, prompt, w, cache):
    """Read a prompt (token ids) into the next free row of a BatchedCache -> hidden (1, T, d)."""
    alone = Cache(llama, len(prompt))
    tokens = torch.tensor([prompt], device=llama.device)
    hidden = llama(tokens, w, alone)
    cache.add(alone)
    return hidden
