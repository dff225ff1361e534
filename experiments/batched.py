"""Generating from many prompts at a time, side by side in one cache.

n rows, E experts, K key/value heads, c head_dim, T tokens.
"""

import torch

from personafuse import Cache, like_lengths, penalize_repetition, sample_token


@torch.inference_mode()
def generate_batch(llama, prompts, max_new_tokens, stop, w=None, temperature=0.0, top_p=1.0,
                   seed=0, repetition_penalty=1.0, rows=32):
    """Yield (i, the ids that continue prompts[i]), in the order in which they end: at a `stop`
    token, after max_new_tokens, or at the end of the model's context.

    prompts: lists of token ids; w (len(prompts), E), or None for the bare base. Prompts of like
    lengths run side by side, `rows` at a time; one that ends leaves its row to nobody.
    """
    context = llama.config.max_position_embeddings
    generator = torch.Generator(llama.device).manual_seed(seed)
    for active in like_lengths([len(prompt) for prompt in prompts], rows):
        mixing = None if w is None else w[active]
        # the shortest goes on for longest, to the end of the context at most
        room = min(max_new_tokens, context - len(prompts[active[0]]))
        cache, hidden = read_prompts(llama, [prompts[i] for i in active], mixing, room)
        # on the left of the shorter ones the cache is empty
        empty = torch.tensor([cache.length - len(prompts[i]) for i in active])[:, None]
        empty = empty.to(llama.device)                                          # (n, 1)
        ids = {i: list(prompts[i]) for i in active}
        while True:
            logits = llama.logits(hidden[:, -1])                                # (n, V)
            if repetition_penalty != 1:
                for row, i in zip(logits, active):
                    penalize_repetition(row, ids[i], repetition_penalty)
            tokens = sample_token(logits, temperature, top_p, generator)        # (n,)
            going_on = []                       # these rows
            for row, (i, token) in enumerate(zip(active, tokens.tolist())):
                if token not in stop:
                    ids[i].append(token)
                # the last token is never read, so it needs no place in the context
                if token in stop or len(ids[i]) == min(len(prompts[i]) + max_new_tokens,
                                                       context + 1):
                    yield i, ids[i][len(prompts[i]):]
                else:
                    going_on.append(row)
            if not going_on:
                break
            if len(going_on) < len(active):
                active = [active[row] for row in going_on]
                mixing = None if w is None else w[active]
                cache.k = cache.k[:, going_on]
                cache.v = cache.v[:, going_on]
                empty = empty[going_on]
            # each row sees its own tokens only, which end at the same place
            places = torch.arange(cache.length + 1, device=llama.device)
            mask = (places >= empty)[:, None, None]                             # (n, 1, 1, T)
            hidden = llama(tokens[going_on, None], mixing, cache, cache.length - empty, mask)


def read_prompts(llama, prompts, w, room):
    """Read prompts (token ids) into a Cache with room for so many more tokens -> the cache, and the
    hidden state of each one's last token (n, 1, d).
    """
    longest = max(len(prompt) for prompt in prompts)
    cache = Cache(llama, longest + room, len(prompts))
    cache.length = longest
    hidden = []
    for row, prompt in enumerate(prompts):
        # each alone, so that nothing is padded, and then to the right end of its row
        alone = Cache(llama, len(prompt))
        tokens = torch.tensor([prompt], device=llama.device)
        hidden.append(llama(tokens, None if w is None else w[[row]], alone)[:, -1:])
        place = slice(longest - len(prompt), longest)
        cache.k[:, row, :, place] = alone.k[:, 0]
        cache.v[:, row, :, place] = alone.v[:, 0]
    return cache, torch.cat(hidden)
