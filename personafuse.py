"""The Llama, written out by hand, and PersonaFuse: a frozen Llama with ten experts and a router in front of it.

One Llama covers every model of the paper (Llama 3.1, SmolLM2, Qwen2.5, Falcon3): they differ in their config.json only.
Shapes: B rows, T tokens, d hidden_size, H query heads, K key/value heads, c head_dim, V words in the vocabulary.
"""

import math
import os
from collections import deque
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint

from data import Chat, UserError, read_json
from lora import LoRALinear, init_experts, load_experts, spread
from router import Router, keep_top, random_weights

HERE = Path(__file__).parent

# --base and --encoder: our name -> (hub name or folder, the encoder that goes with it, what it is)
MODELS = {
    "tiny": (HERE / "tiny", "tiny", "in this repository: a model to step through, poor English"),
    "smollm2": ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m", "the quick run"),
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M", "smollm2-135m", "the encoder of the small bases"),
    "smollm2-360m": ("HuggingFaceTB/SmolLM2-360M-Instruct", "smollm2-135m", ""),
    "smollm2-1.7b": ("HuggingFaceTB/SmolLM2-1.7B", "qwen2.5-0.5b", "Table 7 of the paper"),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B", "qwen2.5-0.5b", "the main experiment (gated: ask for access first)"),
    "qwen2.5-0.5b": ("Qwen/Qwen2.5-0.5B", "qwen2.5-0.5b", "the paper's persona encoder"),
    "falcon3-10b": ("tiiuae/Falcon3-10B-Instruct", "qwen2.5-0.5b", "wrote the paper's Persona-CoT data"),
}


def model_table():
    """MODELS as text, for --help."""
    lines = [f"  {name:14} {source if isinstance(source, str) else 'tiny/':36} {encoder:14} {what}"
             for name, (source, encoder, what) in MODELS.items()]
    return "\n".join([f"  {'name':14} {'model':36} {'encoder':14}", *lines])


def default_encoder(base):
    """The paper's encoder for any base that the table does not know."""
    return MODELS[base][1] if base in MODELS else "qwen2.5-0.5b"


def absolute(name):
    """A folder's full path, so that a run finds its base again from anywhere; other names as they are."""
    return str(Path(name).resolve()) if name and name not in MODELS and Path(name).is_dir() else name


# ------------------------------------------------------------------------------------------------------------ config

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
        """Read folder/config.json; UserError for what this Llama cannot run, by name, rather than run it wrongly."""
        path = Path(folder) / "config.json"
        c = read_json(path, f"{folder} is not a model folder: it has no config.json")
        rope = {**c.get("rope_parameters", {}), **(c.get("rope_scaling") or {})}     # transformers 5 nests, 4 does not
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        sliding = c.get("use_sliding_window") or "sliding_attention" in (c.get("layer_types") or [])
        for refused, what in ((c.get("model_type") not in ("llama", "qwen2"), f"model_type {c.get('model_type')!r}"),
                              (c.get("hidden_act", "silu") != "silu", f"hidden_act {c.get('hidden_act')!r}"),
                              (rope_type not in ("default", "llama3"), f"rope type {rope_type!r}"),
                              (sliding, "sliding window attention"),
                              (c.get("mlp_bias"), "mlp_bias"),
                              (c.get("quantization_config"), "quantized weights")):
            if refused:
                raise UserError(f"{path}: {what} is not supported (llama and qwen2 with silu, default or llama3 rope, are)")
        try:
            return cls(
                head_dim=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
                num_key_value_heads=c.get("num_key_value_heads") or c["num_attention_heads"],
                tie_word_embeddings=c.get("tie_word_embeddings", False),
                rope_theta=rope.get("rope_theta", c.get("rope_theta", 10000.0)),
                rope_scaling=rope if rope_type == "llama3" else None,
                qkv_bias=c["model_type"] == "qwen2" or c.get("attention_bias", False),
                o_bias=c["model_type"] == "llama" and c.get("attention_bias", False),
                **{f.name: c[f.name] for f in fields(cls) if f.name in (
                    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                    "rms_norm_eps", "max_position_embeddings")})
        except KeyError as e:
            raise UserError(f"{path} does not name {e}")


# ------------------------------------------------------------------------------------------------------------- Llama

def rope(config, positions):
    """Rotary embeddings: positions (B, T) -> cos, sin (B, 1, T, c/2), fp32. Pair i of a head turns by position · freq_i."""
    exponent = torch.arange(0, config.head_dim, 2, device=positions.device) / config.head_dim
    freq = 1.0 / config.rope_theta ** exponent                                          # (c/2,) radians a token
    if s := config.rope_scaling:        # "llama3": slow the pairs that turn less than a few times in the old context
        turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)
        keep = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
        freq = keep * freq + (1 - keep) * freq / s["factor"]
    angle = positions[:, None, :, None] * freq                                          # (B, 1, T, c/2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn the pairs (x_i, x_{i + c/2}) of every head, the Hugging Face layout. x (B, heads, T, c)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class RMSNorm(nn.Module):
    def __init__(self, d, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(d)), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Cache:
    """Preallocated keys and values of the tokens read so far, for `rows` sequences of up to `capacity` tokens each."""

    def __init__(self, llama, rows, capacity):
        c = llama.config
        weight = llama.embed_tokens.weight
        shape = (c.num_hidden_layers, rows, c.num_key_value_heads, capacity, c.head_dim)
        self.k, self.v = (torch.zeros(shape, dtype=llama.dtype, device=weight.device) for _ in "kv")     # masked, not NaN
        self.lengths = [0] * rows

    def move(self, source, target):
        """Let the sequence in row `source` continue in row `target`."""
        n = self.lengths[source]
        for t in (self.k, self.v):
            t[:, target, :, :n] = t[:, source, :, :n]
        self.lengths[target] = n


class Attention(nn.Module):
    """Grouped-query attention: H/K query heads share a key/value head."""

    def __init__(self, config, **lora):
        super().__init__()
        c = self.config = config
        self.q_proj = LoRALinear(c.hidden_size, c.num_attention_heads * c.head_dim, c.qkv_bias, **lora)
        self.k_proj = LoRALinear(c.hidden_size, c.num_key_value_heads * c.head_dim, c.qkv_bias, **lora)
        self.v_proj = LoRALinear(c.hidden_size, c.num_key_value_heads * c.head_dim, c.qkv_bias, **lora)
        self.o_proj = LoRALinear(c.num_attention_heads * c.head_dim, c.hidden_size, c.o_bias, **lora)

    def forward(self, x, cos, sin, w=None, past=None):
        """x (B, T, d) -> (B, T, d). `past` is what Llama.forward made of the cache: see there."""
        B, T, _ = x.shape
        heads = (B, T, -1, self.config.head_dim)
        q = rotate(self.q_proj(x, w).view(heads).transpose(1, 2), cos, sin)             # (B, H, T, c)
        k = rotate(self.k_proj(x, w).view(heads).transpose(1, 2), cos, sin)             # (B, K, T, c)
        v = self.v_proj(x, w).view(heads).transpose(1, 2)
        mask = None
        if past is not None:
            k_past, v_past, rows, positions, mask = past                                # k_past (B, K, seen, c), a view
            k_past[rows, :, positions], v_past[rows, :, positions] = k.transpose(1, 2), v.transpose(1, 2)
            k, v = k_past, v_past
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=T > 1, enable_gqa=q.shape[1] != k.shape[1])
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1), w)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) ⊙ up x)."""

    def __init__(self, config, **lora):
        super().__init__()
        self.gate_proj = LoRALinear(config.hidden_size, config.intermediate_size, **lora)
        self.up_proj = LoRALinear(config.hidden_size, config.intermediate_size, **lora)
        self.down_proj = LoRALinear(config.intermediate_size, config.hidden_size, **lora)

    def forward(self, x, w=None):
        return self.down_proj(F.silu(self.gate_proj(x, w)) * self.up_proj(x, w), w)


class Block(nn.Module):
    def __init__(self, config, **lora):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, **lora)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, **lora)

    def forward(self, x, cos, sin, w=None, past=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, w, past)
        return x + self.mlp(self.post_attention_layernorm(x), w)


class Llama(nn.Module):
    """The decoder. Its parameters have the names of a Hugging Face checkpoint, less the leading "model.".

    With `experts` > 0 every linear layer carries that many LoRAs of rank `rank`, scaled by alpha/rank.
    `dtype` is what it computes in; the weights may be kept in another type (an encoder in training stays fp32).
    """

    def __init__(self, config, experts=0, rank=0, alpha=0, dtype=torch.float32):
        super().__init__()
        self.config, self.rank, self.alpha, self.dtype = config, rank, alpha, dtype
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, experts=experts, rank=rank) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens, w=None, cache=None, row=0, checkpointing=False):
        """tokens (B, T) -> hidden states (B, T, d); see `logits`. w (B, E) mixes the experts; None is the bare base.

        With a `cache`, tokens are either the beginning of the sequences in rows row..row+B (which must be empty), or one
        further token for each of them. `checkpointing` recomputes each block in the backward pass instead of keeping it.
        """
        B, T = tokens.shape
        start = torch.tensor(cache.lengths[row:row + B] if cache else [0], device=tokens.device)
        positions = start[:, None] + torch.arange(T, device=tokens.device)              # (B or 1, T)
        cos, sin = (t.to(self.dtype) for t in rope(self.config, positions))
        if cache:
            cache.lengths[row:row + B] = lengths = [n + T for n in cache.lengths[row:row + B]]
            seen, mask = max(lengths), None
            rows = torch.arange(B, device=tokens.device)[:, None]                       # (B, 1)
            if T == 1 and min(lengths) < seen:              # rows of different length: each sees its own tokens only
                mask = (torch.arange(seen, device=tokens.device) <= positions)[:, None, None]        # (B, 1, 1, seen)
        w = None if w is None else spread(w, self.rank, self.alpha, self.dtype)         # (B, 1, E·rank)
        x = self.embed_tokens(tokens).to(self.dtype)                                    # (B, T, d)
        for i, block in enumerate(self.layers):
            past = None
            if cache:
                past = *(t[i, row:row + B, :, :seen] for t in (cache.k, cache.v)), rows, positions, mask
            x = checkpoint(block, x, cos, sin, w, use_reentrant=False) if checkpointing else block(x, cos, sin, w, past)
        return self.norm(x)

    def logits(self, hidden):
        """hidden (..., d) -> (..., V). Apart from `forward`, so that only the positions that are needed pay for it."""
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return F.linear(hidden, head.weight.to(hidden.dtype))


# ----------------------------------------------------------------------------------------------------------- loading

def pick_device(name="auto"):
    """"auto" is cuda, then mps, then cpu: the first that is here."""
    if name == "auto":
        name = next((d for d in ("cuda", "mps") if getattr(torch, d).is_available()), "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"device {name!r} cannot be used: {str(e).splitlines()[0]}")


def pick_dtype(name, device):
    """"auto" is bf16 where the hardware computes in it (newer GPUs, CPUs with AVX-512 bf16 or AMX), fp32 elsewhere."""
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    if device.type == "cpu":
        has_bf16 = torch.cpu._is_avx512_bf16_supported()
    else:
        has_bf16 = device.type == "mps" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float32


def memory_of(device):
    """Bytes of memory that the device has in all, or None where there is no telling."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None


def find_model(name, option="--base"):
    """One of MODELS, a folder, or a hub name owner/model -> a folder in the Hugging Face layout, downloaded if need be."""
    source = MODELS.get(str(name), (str(name),))[0]
    if Path(source).is_dir():
        return Path(source)
    if source.count("/") != 1:
        raise UserError(f"no model {name!r}: not a folder, not owner/model on the hub, and none of {', '.join(MODELS)}")
    from huggingface_hub import errors, snapshot_download
    try:
        return Path(snapshot_download(source, allow_patterns=[
            "config.json", "generation_config.json", "tokenizer.json", "model*.safetensors", "model*.index.json"]))
    except errors.GatedRepoError:
        raise UserError(f"{source} is gated: ask for access on huggingface.co/{source}, then log in (`hf auth login`)")
    except errors.RepositoryNotFoundError:
        raise UserError(f"the hub has no model {source} (or it is private: log in with `hf auth login`)")
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as e:
        raise UserError(f"{source} is not in the cache and the hub was not reached ({type(e).__name__}): give a folder "
                        f"that holds the model with {option} DIR, or use {option} tiny, which needs no download")


def checkpoint_files(folder):
    """The safetensors files of a model folder: those that the index names, or model.safetensors."""
    index = Path(folder) / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = sorted(set(read_json(index, "").get("weight_map", {}).values()))
    for name in names:
        if not (Path(folder) / name).exists():
            raise UserError(f"{folder} has no {name}" + (f", which {index.name} names" if index.exists() else ""))
    return [Path(folder) / name for name in names]


def load_llama(folder, device, dtype, experts=0, rank=8, alpha=16, seed=0, weight_dtype=None, files=None):
    """A Llama with the weights of a folder in the Hugging Face layout, frozen, and fresh experts if asked for.

    Weights of the wanted type are mapped from the file, not copied; `weight_dtype` (default: dtype) keeps them in another.
    """
    weight_dtype = weight_dtype or dtype
    with torch.device("meta"):                                      # shapes only: no memory is touched yet
        llama = Llama(Config.from_folder(folder), experts, rank, alpha, dtype)
    wanted = {name: t.shape for name, t in llama.named_parameters() if not name.endswith((".A", ".B"))}
    need = sum(t.numel() * (weight_dtype.itemsize if name in wanted else 4) for name, t in llama.named_parameters())
    has = memory_of(device)
    if has is not None and need > has:
        raise UserError(f"{folder} needs {need / 2**30:.1f} GiB for its weights as {weight_dtype}, {device} has "
                        f"{has / 2**30:.1f} GiB" + ("; try --dtype bf16" if weight_dtype == torch.float32 else ""))
    found = {}
    for path in files or checkpoint_files(folder):
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                for key in file.keys():
                    name = key.removeprefix("model.").removeprefix("encoder.")
                    if name in wanted:
                        shape = torch.Size(file.get_slice(key).get_shape())
                        if shape != wanted[name]:
                            raise UserError(f"{path}: {key} has shape {tuple(shape)}, "
                                            f"config.json asks for {tuple(wanted[name])}")
                        found[name] = file.get_tensor(key).to(weight_dtype)
        except UserError:
            raise
        except Exception as e:                                      # safetensors has its own type, and OSError
            raise UserError(f"cannot read {path}: {e} (cut short? download or copy it again)")
    if missing := sorted(wanted.keys() - found.keys()):
        raise UserError(f"{folder}: tensor model.{missing[0]} is missing" +
                        (f", and {len(missing) - 1} more" if len(missing) > 1 else ""))
    llama.load_state_dict(found, strict=False, assign=True)
    if experts:
        init_experts(llama, seed, device)
    return llama.requires_grad_(False)


def check_vocabulary(chat, llama, folder):
    size = chat.tokenizer.get_vocab_size()
    if size > llama.config.vocab_size:
        raise UserError(f"{folder}: tokenizer.json has {size} tokens, the model's vocabulary {llama.config.vocab_size}: "
                        "they are not of one model")


# -------------------------------------------------------------------------------------------------------- generation

def sample_token(logits, temperature, top_p, generator):
    """logits (n, V) -> token ids (n,): the likeliest at temperature 0, else drawn from the smallest set of tokens that
    holds probability top_p (nucleus sampling)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs, ids = torch.softmax(logits.float() / temperature, dim=-1).sort(dim=-1, descending=True)
    probs[probs.cumsum(dim=-1) - probs >= top_p] = 0                # the first token always stays
    return ids.gather(1, torch.multinomial(probs, 1, generator=generator))[:, 0]


@torch.inference_mode()
def generate(llama, prompts, max_new_tokens, stop, w=None, temperature=0.0, top_p=1.0, seed=0, rows=16, finished=()):
    """Yield (i, token) as prompts[i] is continued, and (i, None) when it has ended: at a `stop` token, after
    max_new_tokens, or at the end of the model's context.

    prompts: lists of token ids; w (len(prompts), E) or None. `rows` sequences run at a time. Each prompt is read alone,
    so nothing is padded; a sequence that ends leaves its row to the next prompt. Whoever reads the tokens may end
    prompts[i] early by putting i into the set `finished`.
    """
    device = llama.embed_tokens.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    capacity = min(llama.config.max_position_embeddings, max(map(len, prompts)) + max_new_tokens)
    cache = Cache(llama, min(rows, len(prompts)), capacity)
    waiting = deque(range(len(prompts)))
    active, last, left = [], [], []                 # by row: which prompt, its last token, how many tokens it may still add
    while waiting or active:
        if waiting and len(active) < len(cache.lengths):            # a free row: read the next prompt into it
            i, first = waiting.popleft(), len(active)
            active, last, left = active + [i], last + [0], left + [max_new_tokens]
            cache.lengths[first] = 0
            tokens = torch.tensor([prompts[i]], device=device)                          # (1, T)
        else:                                                       # one more token for every active row
            first, tokens = 0, torch.tensor(last, device=device)[:, None]               # (n, 1)
        mix = None if w is None else w[active[first:]]
        hidden = llama(tokens, mix, cache, row=first)
        new = sample_token(llama.logits(hidden[:, -1]), temperature, top_p, generator).tolist()
        for row in reversed(range(first, len(active))):
            last[row], left[row] = new[row - first], left[row] - 1
            if last[row] not in stop:
                yield active[row], last[row]
            if last[row] in stop or left[row] == 0 or cache.lengths[row] == capacity or active[row] in finished:
                yield active[row], None
                if row < len(active) - 1:                           # the last row moves into the hole
                    cache.move(len(active) - 1, row)
                    active[row], last[row], left[row] = active[-1], last[-1], left[-1]
                active.pop(), last.pop(), left.pop()


# ------------------------------------------------------------------------------------------------------- PersonaFuse

class PersonaFuse(nn.Module):
    """The base with its experts, the router, and the tokenizer of each."""

    def __init__(self, base, chat, router, encoder_chat):
        super().__init__()
        self.base, self.chat, self.router, self.encoder_chat = base, chat, router, encoder_chat

    @property
    def experts(self):
        return self.base.layers[0].self_attn.q_proj.A.shape[0] // self.base.rank

    @property
    def device(self):
        return self.base.embed_tokens.weight.device

    def response_hidden(self, tokens, targets, w=None, checkpointing=False):
        """Hidden states (N, d) at the positions that predict a response token, from which the loss makes its logits.

        tokens (B, T) right-padded; targets (B, T) the token that follows each, or -1 where that is no response token.
        """
        return self.base(tokens, w, checkpointing=checkpointing)[targets >= 0]

    @torch.inference_mode()
    def response_nll(self, examples, w=None, rows=16):
        """Eq. 8 record by record, for evaluation: examples (of data.tokenize), w (n, E) or None for the bare base ->
        summed negative log-likelihoods (n,), numbers of response tokens (n,), and whether each response is what greedy
        decoding would write (n,); like lengths together."""
        order = sorted(range(len(examples)), key=lambda i: len(examples[i]["prompt"]) + len(examples[i]["answer"]))
        nll = torch.zeros(len(examples), device=self.device)
        counts = torch.tensor([len(r["answer"]) for r in examples], device=self.device)
        greedy = torch.ones(len(examples), dtype=torch.bool, device=self.device)
        for part in (order[i:i + rows] for i in range(0, len(order), rows)):
            tokens, targets = response_batch([examples[i] for i in part], self.device)
            logits = self.base.logits(self.response_hidden(tokens, targets, None if w is None else w[part]))
            losses = F.cross_entropy(logits.float(), targets[targets >= 0], reduction="none")
            row = (targets >= 0).nonzero()[:, 0]                                    # whose each loss is
            nll[part] = torch.zeros(len(part), device=self.device).index_add(0, row, losses)
            unlike = (logits.argmax(dim=-1) != targets[targets >= 0]).nonzero()[:, 0]
            greedy[torch.tensor(part, device=self.device)[row[unlike]]] = False
        return nll, counts, greedy

    @torch.no_grad()
    def embed(self, queries, rows=32):
        """Queries (token ids of encoder_chat.query) -> persona embeddings h (n, d), like lengths together."""
        order = sorted(range(len(queries)), key=lambda i: len(queries[i]))
        h = torch.empty(len(queries), self.router.e.shape[1], device=self.device)
        for part in (order[i:i + rows] for i in range(0, len(order), rows)):
            h[part] = self.router.embed(*pad([queries[i] for i in part], self.device))
        return h

    @torch.no_grad()
    def route(self, queries):
        """Queries (token ids of encoder_chat.query) -> mixing weights w (n, E), Eq. 1."""
        return self.router.weights(self.embed(queries))

    def mixing_weights(self, queries, route="learned", top_k=None, seed=0):
        """Queries (strings) -> w (n, E), or None for the bare base (route "none"). "random2" is the paper's Random Route 2.

        A baseline's one LoRA has weight 1 whatever the route. `top_k` keeps the largest of the router's weights only.
        """
        if route == "none":
            return None
        n, E = len(queries), self.experts
        if E == 1:
            return torch.ones(n, 1, device=self.device)
        if route == "uniform":
            return torch.full((n, E), 1 / E, device=self.device)
        if route.startswith("random"):
            return random_weights(n, E, int(route.removeprefix("random")), seed).to(self.device)
        if self.router is None:
            raise UserError("this run has no router yet: run `python train.py --stage 2`, or choose another --route")
        context = self.router.encoder.config.max_position_embeddings
        w = self.route([self.encoder_chat.query(q)[:context] for q in queries])
        return keep_top(w, top_k) if top_k else w


def build(settings, device, dtype, run=None):
    """The whole model. settings: a dict with base, encoder, names, rank, alpha, tau, pooling and seed, as train.py writes
    to personafuse.json. Experts and router are fresh, or read from the folder `run` where it has them."""
    folder, names = find_model(settings["base"]), settings["names"]
    base = load_llama(folder, device, dtype, len(names), settings["rank"], settings["alpha"], settings["seed"])
    chat, router, encoder_chat = Chat(folder), None, None
    check_vocabulary(chat, base, folder)
    if run:
        load_experts(base, names, run)
    trained = run and Path(run) / "router.safetensors"
    if settings["encoder"] and (not run or trained.exists()):
        folder = find_model(settings["encoder"], "--encoder")
        encoder = load_llama(folder, device, dtype, weight_dtype=torch.float32, files=[trained] if run else None)
        encoder_chat = Chat(folder)
        check_vocabulary(encoder_chat, encoder, folder)
        router = Router(encoder, len(names), settings["tau"], settings["pooling"], settings["seed"]).to(device)
        if run:
            with safe_open(trained, "pt", device=str(device)) as file:
                router.e.data.copy_(file.get_tensor("e"))
    return PersonaFuse(base, chat, router, encoder_chat).requires_grad_(False)


def read_settings(run, base=None):
    """What train.py was told, from the folder that it wrote. `base`, if given, must be the run's."""
    path = Path(run) / "personafuse.json"
    settings = read_json(path, f"{run} holds no finished stage (no personafuse.json): train with train.py first")
    if base and absolute(base) != settings["base"]:
        raise UserError(f"the run {run} was made for the base {settings['base']}, not for {base}")
    return settings


def load_run(run, device, dtype, base=None):
    """A trained model from the folder that train.py wrote -> (PersonaFuse, its settings). `base`, if given, must be its."""
    settings = read_settings(run, base)
    return build(settings, device, dtype, run), settings


def pad(rows, device, fill=0):
    """Lists of ids -> tokens (B, T), padded on the right, and lengths (B,)."""
    lengths = torch.tensor([len(r) for r in rows])
    tokens = torch.full((len(rows), int(lengths.max())), fill)
    for i, r in enumerate(rows):
        tokens[i, :len(r)] = torch.tensor(r)
    return tokens.to(device), lengths.to(device)


def response_batch(rows, device):
    """Examples -> tokens (B, T) and targets (B, T): the response token that follows, or -1 where none does."""
    ids = [r["prompt"] + r["answer"] for r in rows]
    tokens, _ = pad([i[:-1] for i in ids], device)                      # the last token predicts nothing
    targets, _ = pad([[-1] * (len(r["prompt"]) - 1) + r["answer"] for r in rows], device, fill=-1)
    return tokens, targets
