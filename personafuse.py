"""The Llama, written out by hand, and PersonaFuse: a frozen Llama with ten experts and a router.

One Llama covers every model of the paper (Llama 3.1, SmolLM2, Qwen2.5, Falcon3): they differ in
their config.json only.

Shapes: B rows, T tokens, d hidden_size, H query heads, K key/value heads, c head_dim, V words in
the vocabulary, E experts.
"""

import math
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from data import TRAITS, ChatTokenizer, make_examples, parse_traits
from lora import LoRALinear, expert_scales, init_experts, linear, load_experts, save_experts
from plumbing.files import UserError, atomic_write, read_json, write_json
from plumbing.models import find_model, model_sha256, published_name
from plumbing.processes import settle_math
from router import LEAD_IN, ROUTES, Router, random_weights


# ------------------------------------------------------------------------------------------ config

@dataclass
class Config:
    """What config.json says, by its own names."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope_theta: float
    rope_scaling: dict | None           # None, or the figures of "llama3" scaling
    qkv_bias: bool
    o_bias: bool

    @classmethod
    def from_folder(cls, folder):
        """Read folder/config.json; UserError for what this Llama would run wrongly."""
        path = Path(folder) / "config.json"
        c = read_json(path, f"{folder} is not a model folder: it has no config.json")
        # transformers 5 nests the rope's figures in rope_parameters, 4 has rope_scaling, and
        # before 4.43 its rope_type was called type
        rope = c.get("rope_parameters") or {}
        rope = rope | (c.get("rope_scaling") or {})
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        check_supported(path, c, rope, rope_type)
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                    "num_attention_heads", "max_position_embeddings"):
            if key in c and not (isinstance(c[key], int) and c[key] > 0):
                raise UserError(f"{path}: {key} is {c[key]!r}, no positive number")
        # some files have null for false
        attention_bias = bool(c.get("attention_bias"))
        try:
            return cls(
                vocab_size=c["vocab_size"],
                hidden_size=c["hidden_size"],
                intermediate_size=c["intermediate_size"],
                num_hidden_layers=c["num_hidden_layers"],
                num_attention_heads=c["num_attention_heads"],
                num_key_value_heads=c.get("num_key_value_heads") or c["num_attention_heads"],
                head_dim=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
                rms_norm_eps=c["rms_norm_eps"],
                max_position_embeddings=c["max_position_embeddings"],
                tie_word_embeddings=bool(c.get("tie_word_embeddings")),
                rope_theta=rope.get("rope_theta") or c.get("rope_theta") or 10000.0,
                rope_scaling=rope if rope_type == "llama3" else None,
                qkv_bias=c["model_type"] == "qwen2" or attention_bias,
                o_bias=c["model_type"] == "llama" and attention_bias,
            )
        except KeyError as error:
            raise UserError(f"{path} does not name {error}")


LLAMA3_ROPE = {"factor", "low_freq_factor", "high_freq_factor",
               "original_max_position_embeddings"}


def check_supported(path, c, rope, rope_type):
    """UserError that names the first thing in config.json that this Llama does not have."""
    problem = None
    if c.get("model_type") not in ("llama", "qwen2"):
        problem = f"model_type {c.get('model_type')!r}"
    elif c.get("hidden_act", "silu") != "silu":
        problem = f"hidden_act {c.get('hidden_act')!r}"
    elif rope_type not in ("default", "llama3"):
        problem = f"rope type {rope_type!r}"
    elif rope_type == "llama3" and not LLAMA3_ROPE <= rope.keys():
        problem = f"a llama3 rope without {min(LLAMA3_ROPE - rope.keys())}"
    elif rope.get("partial_rotary_factor", c.get("partial_rotary_factor", 1)) != 1:
        problem = "a partial_rotary_factor"
    elif c.get("use_sliding_window") or "sliding_attention" in (c.get("layer_types") or []):
        problem = "sliding window attention"
    elif c.get("mlp_bias"):
        problem = "mlp_bias"
    elif c.get("quantization_config"):
        problem = "quantized weights"
    if problem:
        raise UserError(f"{path}: {problem} is not supported "
                        "(llama and qwen2 with silu, default or llama3 rope, are)")


# ------------------------------------------------------------------------------------------- Llama

def rope(config, positions):
    """Rotary embeddings: positions (B, T) -> cos, sin (B, 1, T, c), fp32.

    Pair i of a head turns by position · freq_i; see `rotate`.
    """
    # the first pairs turn fast and tell neighbours apart, the last ones turn once in a long text
    exponent = torch.arange(0, config.head_dim, 2, device=positions.device) / config.head_dim
    freq = 1.0 / config.rope_theta ** exponent                  # (c/2,) radians a token
    if scaling := config.rope_scaling:
        # "llama3": slow the pairs that turn less than a few times in the old context
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freq = keep * freq + (1 - keep) * freq / scaling["factor"]
    angle = positions[:, None, :, None] * freq                  # (B, 1, T, c/2)
    # a pair (a, b) becomes (a cos - b sin, b cos + a sin): the minus is the first one's
    angle = torch.cat([-angle, angle], dim=-1)                  # (B, 1, T, c)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn the pairs (x_i, x_{i + c/2}) of every head, as Hugging Face does. x (B, heads, T, c)."""
    # in the place of each number the other one of its pair
    other = x.roll(x.shape[-1] // 2, dims=-1)
    return x * cos + other * sin


class RMSNorm(nn.Module):
    def __init__(self, d, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Cache:
    """Keys and values of the tokens read so far: `rows` sequences with room for `capacity` tokens,
    read in step.
    """

    def __init__(self, llama, capacity, rows=1):
        c = llama.config
        shape = (c.num_hidden_layers, rows, c.num_key_value_heads, capacity, c.head_dim)
        # not empty: what a mask hides still must not be NaN
        self.k = torch.zeros(shape, dtype=llama.dtype, device=llama.device)
        self.v = torch.zeros_like(self.k)
        self.length = 0

    def update(self, layer, k, v):
        """Add k, v (B, K, T, c) of new tokens -> all so far (B, K, length + T, c), as views."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length:end] = k
        self.v[layer, :, :, self.length:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


class Attention(nn.Module):
    """Grouped-query attention: H/K query heads share a key/value head."""

    def __init__(self, config, layer, **lora):
        super().__init__()
        d = config.hidden_size
        q_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.layer = layer                      # which of the cache's layers is ours
        self.head_dim = config.head_dim
        self.q_proj = LoRALinear(d, q_width, config.qkv_bias, **lora)
        self.k_proj = LoRALinear(d, kv_width, config.qkv_bias, **lora)
        self.v_proj = LoRALinear(d, kv_width, config.qkv_bias, **lora)
        self.o_proj = LoRALinear(q_width, d, config.o_bias, **lora)

    def forward(self, x, cos, sin, scales=None, cache=None, mask=None):
        """x (B, T, d) -> (B, T, d)."""
        B, T, _ = x.shape
        heads = (B, T, -1, self.head_dim)
        q = self.q_proj(x, scales).view(heads).transpose(1, 2)          # (B, H, T, c)
        k = self.k_proj(x, scales).view(heads).transpose(1, 2)          # (B, K, T, c)
        v = self.v_proj(x, scales).view(heads).transpose(1, 2)          # (B, K, T, c)
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        if cache:
            k, v = cache.update(self.layer, k, v)                       # (B, K, length + T, c)
        # enable_gqa lets H/K query heads share a key/value head without copying it;
        # several tokens are always the first ones: each sees itself and those before it;
        # a single one sees all there is
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=T > 1,
                                           enable_gqa=q.shape[1] != k.shape[1])
        y = y.transpose(1, 2).reshape(B, T, -1)                         # (B, T, H·c)
        return self.o_proj(y, scales)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) ⊙ up x)."""

    def __init__(self, config, **lora):
        super().__init__()
        self.gate_proj = LoRALinear(config.hidden_size, config.intermediate_size, **lora)
        self.up_proj = LoRALinear(config.hidden_size, config.intermediate_size, **lora)
        self.down_proj = LoRALinear(config.intermediate_size, config.hidden_size, **lora)

    def forward(self, x, scales=None):
        # the gate says how much of each of the inner features passes
        inner = F.silu(self.gate_proj(x, scales)) * self.up_proj(x, scales)
        return self.down_proj(inner, scales)


class Block(nn.Module):
    def __init__(self, config, layer, **lora):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer, **lora)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, **lora)

    def forward(self, x, cos, sin, scales=None, cache=None, mask=None):
        # each half adds to the residual stream x what it has to say about it
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, scales, cache, mask)
        return x + self.mlp(self.post_attention_layernorm(x), scales)


class Llama(nn.Module):
    """The decoder. Its parameters have the names of a Hugging Face checkpoint, less "model.".

    With `experts` > 0 every linear layer carries that many LoRAs of rank `rank`, scaled by
    alpha/rank. `dtype` is what it computes in; the weights may be kept in another type (an encoder
    in training stays fp32).
    """

    def __init__(self, config, experts=0, rank=0, alpha=0, dtype=torch.float32):
        super().__init__()
        self.config = config
        self.experts = experts
        self.rank = rank
        self.alpha = alpha
        self.dtype = dtype
        # nn.Embedding alone would draw random weights, only for them to be replaced
        empty = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(empty, freeze=False)
        self.layers = nn.ModuleList(Block(config, layer, experts=experts, rank=rank)
                                    for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = LoRALinear(config.hidden_size, config.vocab_size)

    @property
    def device(self):
        return self.embed_tokens.weight.device

    def forward(self, tokens, w=None, cache=None, positions=None, mask=None, checkpointing=False):
        """tokens (B, T) -> hidden states (B, T, d); see `logits`.

        w (B, E) mixes the experts; None is the bare base. With a `cache`, tokens are either the
        beginning of a sequence or one further token. `positions` (B, T) and `mask` are for
        sequences of several lengths in a cache. `checkpointing` recomputes each block in the
        backward pass instead of keeping what it computed.
        """
        T = tokens.shape[1]
        if positions is None:
            start = cache.length if cache else 0
            positions = torch.arange(start, start + T, device=tokens.device)[None]      # (1, T)
        # angles in fp32: far into a text, bf16 could not tell neighbouring positions apart
        cos, sin = rope(self.config, positions)                         # (1, 1, T, c)
        cos = cos.to(self.dtype)
        sin = sin.to(self.dtype)
        # the weights belong to the query: the same at every layer and every position
        scales = None
        if w is not None:
            scales = expert_scales(w, self.rank, self.alpha, self.dtype)        # (B, 1, E·rank)

        x = self.embed_tokens(tokens).to(self.dtype)                    # (B, T, d)
        for block in self.layers:
            if checkpointing:
                x = checkpoint(block, x, cos, sin, scales, use_reentrant=False)
            else:
                x = block(x, cos, sin, scales, cache, mask)             # (B, T, d)
        if cache:
            # every layer has added its keys and values: now they count
            cache.length += T
        return self.norm(x)

    def logits(self, hidden):
        """hidden (..., d) -> (..., V). Apart from `forward`: only positions needed pay for it."""
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return linear(hidden, head.weight)

    def logits_in_parts(self, hidden):
        """`logits` of hidden (N, d), some positions at a time: yields a slice of N and its logits.

        Where the vocabulary is large, the logits of all would be the largest tensor of a step.
        """
        # 24 MB in fp32: memory of up to 32 MB is used again (files.keep_freed_memory)
        n = max(1, 6 * 2**20 // self.config.vocab_size)
        for start in range(0, len(hidden), n):
            some = slice(start, start + n)
            yield some, self.logits(hidden[some])                       # (n, V)


# -------------------------------------------------------------------------------------- generation

OVERFLOW = "the model's numbers are not finite: in fp16 they overflow, try --dtype bf16 or fp32"


def sample_token(logits, temperature, top_p, generator):
    """logits (n, V) -> token ids (n,): the likeliest at temperature 0, else drawn from the smallest
    set of tokens that holds probability top_p (nucleus sampling).
    """
    if not logits.isfinite().all():
        raise UserError(OVERFLOW)
    # the limit: what is much colder than this would overflow
    if temperature < 1e-3:
        return logits.argmax(dim=-1)
    probs = torch.softmax(logits.float() / temperature, dim=-1)         # (n, V)
    probs, ids = probs.sort(dim=-1, descending=True)
    # a token goes when those before it hold top_p already
    before = probs.cumsum(dim=-1) - probs
    probs[before >= top_p] = 0                                          # the first always stays
    drawn = torch.multinomial(probs, 1, generator=generator)            # (n, 1)
    return ids.gather(1, drawn)[:, 0]


def penalize_repetition(logits, ids, penalty):
    """Make the tokens `ids` that were there before less likely, in place; logits (V,).

    As in CTRL and transformers: a positive score is divided by the penalty, a negative multiplied.
    """
    ids = torch.tensor(sorted(set(ids)), device=logits.device)
    scores = logits[ids]
    logits[ids] = torch.where(scores > 0, scores / penalty, scores * penalty)


@torch.inference_mode()
def generate(llama, prompt, max_new_tokens, stop, w=None, temperature=0.0, top_p=1.0, seed=0,
             repetition_penalty=1.0):
    """Continue one prompt (token ids), w (1, E) or None: yields token ids until one of `stop`,
    max_new_tokens, or the end of the model's context.
    """
    context = llama.config.max_position_embeddings
    # the keys and values of a token never change: each is computed once
    cache = Cache(llama, min(context, len(prompt) + max_new_tokens))
    generator = torch.Generator(llama.device).manual_seed(seed)
    tokens = torch.tensor([prompt], device=llama.device)                # (1, T), then (1, 1)
    ids = list(prompt)
    # the last token is never read, so it needs no place in the context
    for _ in range(min(max_new_tokens, context - len(prompt) + 1)):
        hidden = llama(tokens, w, cache)                                # (1, T, d)
        logits = llama.logits(hidden[:, -1])                            # (1, V)
        if repetition_penalty != 1:
            penalize_repetition(logits[0], ids, repetition_penalty)
        token = sample_token(logits, temperature, top_p, generator)     # (1,)
        if token.item() in stop:
            return
        yield token.item()
        ids.append(token.item())
        tokens = token[:, None]


# ------------------------------------------------------------------------------------- PersonaFuse

class PersonaFuse(nn.Module):
    """The base with its experts, the router, and the tokenizer of each.

    query_format says what the router's encoder reads: "raw", the bare query, "chat", the prompt up
    to where the answer starts, or "lead-in", the prompt and LEAD_IN.
    """

    def __init__(self, base, tokenizer, router=None, encoder_tokenizer=None, query_format="raw"):
        super().__init__()
        self.base = base
        self.tokenizer = tokenizer
        self.router = router
        self.encoder_tokenizer = encoder_tokenizer
        self.query_format = query_format

    @property
    def experts(self):
        return self.base.experts                # 0: the bare base

    @property
    def device(self):
        return self.base.device

    def encode_queries(self, queries):
        """Queries (strings) -> token ids as the router's encoder reads them, a list for each."""
        context = self.router.encoder.config.max_position_embeddings
        format = self.query_format
        lead_in = []
        if format == "lead-in":
            format = "chat"
            # an answer without its end token
            lead_in = self.encoder_tokenizer.encode_answer(LEAD_IN)[:-1]
        rows = encode_within(self.encoder_tokenizer, queries, format, context - len(lead_in),
                             "what the router's encoder can read")
        return [row + lead_in for row in rows]

    def encode_prompts(self, queries, max_new_tokens):
        """Queries (strings) -> prompts (token ids) that leave room for an answer in the context."""
        context = self.base.config.max_position_embeddings
        room = context - min(max_new_tokens, context // 4)
        return encode_within(self.tokenizer, queries, "chat", room,
                             f"the base's context of {context} and the answer")

    def examples(self, records, max_length, answer="response"):
        """Records -> the Examples of this model, within the contexts of base and encoder."""
        limit = min(max_length, self.base.config.max_position_embeddings)
        encode = self.encode_queries if self.router else None
        return make_examples(records, self.tokenizer, encode, limit, answer)

    def embed(self, queries, rows=32, checkpointing=False, read=None):
        """Queries (token ids of encode_queries) -> persona embeddings h (n, d).

        The encoder reads like lengths together, so that little is padded. `read`: the router's
        `pool` in place of its `embed`.
        """
        read = read or self.router.embed
        parts = like_lengths([len(query) for query in queries], rows)
        h = []
        for part in parts:
            tokens, lengths = pad([queries[i] for i in part], self.device)
            h.append(read(tokens, lengths, checkpointing))                      # (rows, d)
        # row k of all of them is query order[k]
        order = torch.tensor(sum(parts, []), device=self.device)
        return torch.cat(h)[order.argsort()]

    @torch.no_grad()
    def route(self, queries, remarks=None):
        """Queries (token ids of encode_queries) -> mixing weights w (n, E), Eq. 1.

        remarks: a reader's, a number for each pole; see Router.weights.
        """
        if remarks is not None:
            remarks = torch.tensor(remarks, device=self.device)
        return self.router.weights(self.embed(queries), remarks)

    def mixing_weights(self, queries, setting="learned", seed=0, remarks=None):
        """Queries (strings) -> w (n, E), or None for the bare base (setting "none").

        setting: one of ROUTES ("random2" is the paper's Random Route 2), or weights by hand as
        `parse_traits` reads them. A baseline's one LoRA has weight 1 whatever the route. `remarks`
        shift the router's weights, see Router.weights.
        """
        if setting == "none":
            return None
        n = len(queries)
        E = self.experts
        if E == 0:
            raise UserError("the bare base has no experts: name a run with --run DIR")
        if setting not in ROUTES:
            if E != len(TRAITS):
                raise UserError("this run has a single LoRA: weights by hand need the ten experts "
                                "of --variant personafuse")
            return torch.tensor([parse_traits(setting)], device=self.device).expand(n, E)
        if E == 1:
            return torch.ones(n, 1, device=self.device)
        if setting == "uniform":
            return torch.full((n, E), 1 / E, device=self.device)
        if setting.startswith("random"):
            k = int(setting.removeprefix("random"))
            return random_weights(n, E, k, seed).to(self.device)
        if self.router is None:
            raise UserError("this run has no router yet: run `python train.py --stage 2`, "
                            "or choose another --route")
        return self.route(self.encode_queries(queries), remarks)


def encode_within(tokenizer, queries, format, limit, why):
    """Queries -> token ids of each, `limit` at most: longer ones are cut, and that is said."""
    rows = [tokenizer.encode_query(query, format) for query in queries]
    cut = sum(len(row) > limit for row in rows)
    if not cut:
        return rows
    print(f"{cut} of {len(rows)} queries are cut to {limit} tokens: {why}", file=sys.stderr)
    return [tokenizer.encode_query(query, format, limit) for query in queries]


def like_lengths(lengths, rows):
    """Indices of the lengths by `rows`, like lengths together, so that little is padded.

    like_lengths([5, 9, 4], rows=2) -> [[2, 0], [1]]
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[i:i + rows] for i in range(0, len(order), rows)]


def pad(rows, device, fill=0):
    """Rows of ids -> tokens (B, T), padded on the right, and lengths (B,).

    T of several rows is a multiple of 16: the library under bf16 products on a CPU keeps buffers
    for every shape that it has seen. A causal model does not look to the right.
    """
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    if len(rows) > 1:
        width = math.ceil(width / 16) * 16
    tokens = torch.full((len(rows), width), fill)
    for i, row in enumerate(rows):
        tokens[i, :len(row)] = torch.tensor(row)
    return tokens.to(device), lengths.to(device)


def response_batch(examples, device):
    """Examples -> tokens (B, T), right-padded, and targets (B, T): the response token that follows
    each, or -1 where no response token does.

    prompt [5, 6], answer [7, 8] -> tokens [5, 6, 7], targets [-1, 7, 8]
    """
    tokens = []
    targets = []
    for example in examples:
        ids = np.concatenate([example.prompt, example.answer])
        tokens.append(ids[:-1])                                         # the last predicts nothing
        ignored = np.full(len(example.prompt) - 1, -1)
        targets.append(np.concatenate([ignored, example.answer]))
    return pad(tokens, device)[0], pad(targets, device, fill=-1)[0]


# ----------------------------------------------------------------------------------------- loading

def pick_device(name="auto", base=None):
    """"auto" is cuda, then mps, then cpu, the first that is here; for the tiny base the CPU."""
    if name == "auto":
        # where no other is here, or for a base that is too small to gain from one
        name = "cpu"
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.mps.is_available():
            name = "mps"
        if base == "tiny":
            name = "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}")


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_dtype(name, device, parameters):
    """"fp32", "bf16", "fp16" or a torch.dtype -> torch.dtype.

    "auto" is bf16 where that saves time: newer GPUs, and CPUs with AVX-512 bf16 for models
    of more than thirty million parameters. Elsewhere it is fp32.
    """
    if name != "auto":
        return DTYPES.get(name, name)
    if device.type == "cpu":
        bf16 = torch.cpu._is_avx512_bf16_supported() and parameters > 3e7
    else:
        bf16 = device.type == "mps" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if bf16 else torch.float32


def load_llama(folder, device, dtype, experts=0, rank=8, alpha=16, seed=0, weight_dtype=None,
               layers=None):
    """A Llama with the weights of a folder in the Hugging Face layout, frozen, and fresh experts.

    dtype: see pick_dtype. Weights of that type are mapped from the file, not copied; `weight_dtype`
    keeps them in another. Of its blocks the first `layers`, or all. UserError for a folder that is
    incomplete, broken or too large.
    """
    settle_math()
    config = Config.from_folder(folder)
    if layers:
        config = replace(config, num_hidden_layers=min(layers, config.num_hidden_layers))
    with torch.device("meta"):                  # shapes only: no memory is touched yet
        llama = Llama(config, experts, rank, alpha)
    parameters = sum(t.numel() for t in llama.parameters())
    llama.dtype = pick_dtype(dtype, device, parameters)
    weight_dtype = weight_dtype or llama.dtype
    check_fits(llama, folder, device, weight_dtype)
    wanted = {*llama.state_dict(), "lm_head.weight"}
    tensors = read_tensors(folder, wanted, device, weight_dtype)
    if config.tie_word_embeddings:
        untie(llama, tensors)
    try:
        # assign: the tensors become the parameters; not strict, for the experts come next
        missing = llama.load_state_dict(tensors, strict=False, assign=True).missing_keys
    except RuntimeError as error:               # it names the tensor and both shapes
        raise UserError(f"{folder}: {' '.join(str(error).split())}")
    missing = [name for name in missing if not name.endswith((".A", ".B"))]
    if missing:
        others = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{folder}: tensor model.{missing[0]} is missing{others}")
    if experts:
        init_experts(llama, seed, device)
    return llama.requires_grad_(False)


def untie(llama, tensors):
    """A config that ties embeddings and head, and a file with a second matrix, or the head alone.

    As transformers has it: two that differ are two, and a head alone is also the embeddings.
    """
    head = tensors.get("lm_head.weight")
    if head is None:
        return
    embeddings = tensors.setdefault("embed_tokens.weight", head)
    if torch.equal(embeddings, head):
        del tensors["lm_head.weight"]
        return
    llama.config.tie_word_embeddings = False
    with torch.device("meta"):
        llama.lm_head = LoRALinear(llama.config.hidden_size, llama.config.vocab_size)


def read_tensors(folder, wanted, device, dtype):
    """The tensors of a model folder whose names, less "model.", are among `wanted` -> by name."""
    folder = Path(folder)
    names = ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.exists() and not (folder / names[0]).exists():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
    tensors = {}
    for path in (folder / name for name in names):
        if not path.exists():
            hint = ""
            if (folder / "pytorch_model.bin").exists():
                hint = " (pytorch_model.bin is not read, for a pickle may run code: save it again)"
            raise UserError(f"{folder} has no {path.name}{hint}")
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                for key in file.keys():
                    # LlamaModel alone is saved without "model."
                    name = key.removeprefix("model.")
                    if name in wanted:
                        tensors[name] = file.get_tensor(key).to(dtype)
        except Exception as error:              # safetensors has its own type, and OSError
            raise UserError(f"cannot read {path}: {error} (cut short? download or copy it again)")
    return tensors


def base_sampling(folder):
    """How the makers of a base have its answers drawn, where its generation_config.json says it."""
    path = Path(folder) / "generation_config.json"
    said = read_json(path)
    values = {}
    for name in ("temperature", "top_p", "repetition_penalty"):
        value = said.get(name)
        if value is None:
            continue
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise UserError(f"{path}: {name} is {value!r}, no positive number")
        values[name] = value
    return values


def check_fits(llama, folder, device, weight_dtype):
    """UserError where the weights alone need more memory than the device has."""
    if device.type == "cuda":
        has = torch.cuda.mem_get_info(device)[1]
    elif hasattr(os, "sysconf"):
        has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        return                                  # Windows does not say
    need = 0
    for name, t in llama.named_parameters():
        expert = name.endswith((".A", ".B"))
        need += t.numel() * (4 if expert else weight_dtype.itemsize)            # experts are fp32
    if need > has:
        hint = "; try --dtype bf16" if weight_dtype == torch.float32 else ""
        raise UserError(f"{folder} needs {need / 2**30:.1f} GiB for its weights as {weight_dtype}, "
                        f"{device} has {has / 2**30:.1f} GiB{hint}")


# ------------------------------------------------------------------------------------ a run's model

def build(settings, device, dtype):
    """The whole model, with fresh experts and a fresh router, from the settings of a run, a dict:
    base_folder, encoder_folder (None: no router), names, rank, lora_alpha, encoder_layers,
    train_encoder, pooling, query_format, start, tau, seed.
    """
    folder = settings["base_folder"]
    # a base that processes.shard spreads is mapped on the CPU until then
    at = torch.device("cpu") if settings.get("shard") else device
    base = load_llama(folder, at, dtype, len(settings["names"]), settings["rank"],
                      settings["lora_alpha"], settings["seed"])
    tokenizer = ChatTokenizer(folder, base.embed_tokens.weight)
    folder = settings["encoder_folder"]
    if folder is None:
        return PersonaFuse(base, tokenizer)
    # an encoder that is trained whole is kept in fp32: its steps are too small for bf16
    frozen = not settings["train_encoder"]
    encoder = load_llama(folder, device, dtype, weight_dtype=None if frozen else torch.float32,
                         layers=settings["encoder_layers"])
    encoder_tokenizer = ChatTokenizer(folder, encoder.embed_tokens.weight)
    router = Router(encoder, len(settings["names"]), settings["tau"], settings["pooling"],
                    settings["start"], frozen)
    return PersonaFuse(base, tokenizer, router.to(device), encoder_tokenizer,
                       settings["query_format"]).requires_grad_(False)


def save_run(model, out, settings, with_router):
    """What others read, into the folder `out`: every expert in peft's format, the router, and the
    settings.
    """
    out = Path(out)
    save_experts(model.base, settings["names"], out, published_name(settings["base"]))
    if with_router:
        tensors = {}
        for name, t in model.router.state_dict().items():
            if not (name.startswith("encoder.") and model.router.frozen_encoder):
                tensors[name] = t.cpu().contiguous()
        with atomic_write(out / "router.safetensors") as tmp:
            save_file(tensors, tmp)
    write_json(out / "personafuse.json", settings)


def read_settings(run, base=None):
    """The settings of a run, from its folder, with base and encoder found again.

    `base`, if given, is where the base is now. UserError where their contents are not those that
    the run was trained on.
    """
    path = Path(run) / "personafuse.json"
    settings = read_json(path, f"{run} holds no finished stage (no personafuse.json): "
                               "train with train.py first")
    for key in ("base", "base_folder", "base_sha256", "encoder", "encoder_folder", "names"):
        if key not in settings:
            raise UserError(f"{path} is no run's: it does not name {key}")
    for what in ("base", "encoder"):
        name = settings[what]
        if name is None:                        # a baseline has no encoder
            continue
        folder = Path(settings[f"{what}_folder"])
        if what == "encoder" and settings["encoder_sha256"] == settings["base_sha256"]:
            folder = Path(settings["base_folder"])      # found just before
        elif what == "base" and base:
            folder = find_model(base)
        elif not folder.is_dir():
            folder = find_model(name, f"--{what}")
        if model_sha256(folder) != settings[f"{what}_sha256"]:
            raise UserError(f"the run {run} was made on other weights than those of {folder}: "
                            f"its {what} was {name}, in {settings[f'{what}_folder']}")
        settings[f"{what}_folder"] = str(folder)
    return settings


def load_run(run, device, dtype, base=None):
    """A trained model from the folder that train.py wrote -> (PersonaFuse, its settings)."""
    settings = read_settings(run, base)
    trained = Path(run) / "router.safetensors"
    if not trained.exists():
        settings["encoder_folder"] = None       # stage 2 has not ended yet
    model = build(settings, device, dtype)
    load_experts(model.base, settings["names"], run)
    if model.router:
        try:
            tensors = load_file(trained, device=str(device))
            if model.router.frozen_encoder:     # it is that of its folder
                tensors |= {name: t for name, t in model.router.state_dict().items()
                            if name.startswith("encoder.")}
            model.router.load_state_dict(tensors)
        except Exception as error:              # safetensors has its own type, and OSError
            raise UserError(f"cannot read {trained}: {' '.join(str(error).split())}")
    return model.requires_grad_(False), settings
