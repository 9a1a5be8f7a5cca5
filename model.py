"""Idefics2 from scratch: vision tower, connector, Mistral decoder, generation, loading of the published safetensors.

    model = Idefics2.from_pretrained("idefics2-8b-base", dtype=torch.bfloat16, device="cuda")
    image_features = model.encode_images(pixel_values, pixel_mask)           # once per image, then reused
    logits = model(input_ids, attention_mask, image_features)                # with shifts=…: see class Shifts
    ids = model.generate(input_ids, attention_mask, image_features, max_new_tokens=10, num_beams=3)

Letters: B batch, T tokens, S keys (past + T), L layers, H heads, Hkv key/value heads, D head_dim, d hidden size, N images,
P patches. Modules carry the names of the published checkpoint, so that loading is a strict comparison of names and shapes.
References: Laurençon et al. 2024 (Idefics2), Jiang et al. 2023 (Mistral), Dehghani et al. 2023 (NaViT); the published
behaviour is that of transformers' Idefics2ForConditionalGeneration, which the tests take as the judge.
"""

import contextlib
import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

if torch.__version__ < "2.9":         # the CPU's kernel that gives lse reads foreign memory there if heads share their keys
    raise ImportError(f"expected torch 2.9 or later, found {torch.__version__}")


class InputError(ValueError):
    """A mistake in what the user gave us: one line with the file, what was expected and what was found."""


def read_json(path):
    """The parsed file. Raises InputError if it is missing or is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: expected a JSON file, found nothing") from None
    except OSError as e:
        raise InputError(f"{path}: expected a readable JSON file, found: {e.strerror}") from None
    except (ValueError, RecursionError) as e:             # of json, of the encoding, or of a number of thousands of digits
        raise InputError(f"{path}: expected complete JSON, found: {e}") from None


@contextlib.contextmanager
def written_whole(path):
    """→ a temporary name to write to, which becomes `path` once all of it is on the disk: a crash leaves the older file whole.
    Raises InputError, and leaves nothing behind, if the disk is full or the folder not to be written to."""
    temporary = Path(f"{path}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as e:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: expected a file that can be written, found: {getattr(e, 'strerror', None) or e}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Sizes. Published configs are partial: what a file leaves out is what Idefics2-8b-base has.
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class VisionConfig:
    """SigLIP-SO400M at 980 pixels."""
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    image_size: int = 980          # pixels; image_size // patch_size rows and columns of position embeddings
    patch_size: int = 14           # pixels
    num_channels: int = 3
    layer_norm_eps: float = 1e-6
    gelu = "tanh"                  # F.gelu's approximate; no field: no config.json sets it


@dataclass
class PerceiverConfig:
    """The resampler that makes n_latents visual tokens of an image's patches."""
    resampler_n_latents: int = 64
    resampler_depth: int = 3
    resampler_n_heads: int = 16
    resampler_head_dim: int = 96
    num_key_value_heads: int = 4
    rms_norm_eps: float = 0.0      # 0 = as the text model


@dataclass
class TextConfig:
    """Mistral-7B-v0.1 with two more tokens."""
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 0              # 0 = hidden_size // num_attention_heads
    vocab_size: int = 32002
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    sliding_window: int = 4096     # keys a token sees, itself included; 0 = all of them (null in the file)
    pad_token_id: int = 0
    eos_token_id: int = 2


@dataclass
class Config:
    vision: VisionConfig = field(default_factory=VisionConfig)
    perceiver: PerceiverConfig = field(default_factory=PerceiverConfig)
    text: TextConfig = field(default_factory=TextConfig)
    image_token_id: int = 32001

    @property
    def tokens_per_image(self):
        """How many <image> tokens of a prompt are one picture."""
        return self.perceiver.resampler_n_latents

    def __post_init__(self):
        self.text.head_dim = self.text.head_dim or self.text.hidden_size // self.text.num_attention_heads
        self.perceiver.rms_norm_eps = self.perceiver.rms_norm_eps or self.text.rms_norm_eps

    @classmethod
    def from_file(cls, path):
        """config.json as published or as transformers saves it. Raises InputError for what this model is not."""
        raw = read_config(path, "idefics2")
        vision, perceiver, text = (section(raw, f"{name}_config", path) for name in ("vision", "perceiver", "text"))
        for part, act in (vision, "gelu_pytorch_tanh"), (perceiver, "silu"), (text, "silu"):
            expect(part, "hidden_act", act, path)
        config = cls(fill(VisionConfig, vision, path, "vision_config "),
                     fill(PerceiverConfig, perceiver, path, "perceiver_config "),
                     fill(TextConfig, decoder_section(text, path), path, "text_config "),
                     whole_number(raw, "image_token_id", cls.image_token_id, path))
        if config.vision.hidden_size % (heads := config.vision.num_attention_heads):
            refuse(path, "vision_config hidden_size", f"to be a multiple of the {heads} heads", config.vision.hidden_size)
        for q, kv in ((config.text.num_attention_heads, config.text.num_key_value_heads),
                      (config.perceiver.resampler_n_heads, config.perceiver.num_key_value_heads)):
            if q % kv:
                refuse(path, "the number of heads", f"to be a multiple of the {kv} key/value heads", q)
        return config


def refuse(path, what, expected, found):
    raise InputError(f"{path}: expected {what} {expected}, found {found!r}")


def read_config(path, model_type):
    """The object in config.json, its model_type checked."""
    raw = read_json(path)
    if not isinstance(raw, dict) or raw.get("model_type") != model_type:
        refuse(path, "model_type", repr(model_type), raw.get("model_type") if isinstance(raw, dict) else raw)
    if raw.get("tie_word_embeddings"):
        refuse(path, "tie_word_embeddings", "false", True)
    return raw


def section(raw, name, path):
    """The object under `name`, {} if there is none."""
    part = raw.get(name) or {}
    return part if isinstance(part, dict) else refuse(path, name, "to be an object", part)


def expect(part, name, value, path):
    if part.get(name, value) != value:
        refuse(path, name, repr(value), part[name])


def whole_number(raw, name, default, path):
    value = raw.get(name, default)
    return value if type(value) is int and value >= 0 else refuse(path, name, "to be int", value)


def decoder_section(text, path):
    """What a config says of a decoder, with rope_theta and eos_token_id where `fill` looks for them."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
        refuse(path, "rope_type", "'default'", rope)
    text = {"rope_theta": rope.get("rope_theta"), **text}
    if isinstance(text.get("eos_token_id"), list):      # generation_config.json says what ends an answer
        text["eos_token_id"] = (text["eos_token_id"] or [None])[0]
    return text


def fill(kind, part, path, prefix=""):
    """Known keys over our defaults; null means the default, but for sliding_window, where it means none."""
    values = {}
    for f in fields(kind):
        value = part.get(f.name)
        if f.name == "sliding_window" and f.name in part and value is None:
            value = 0
        if value is None:
            continue
        number = isinstance(value, (int, float)) and abs(value) < 2**31 and isinstance(value, bool) == (f.type is bool)
        if not number or (f.type is int and value != int(value)):
            refuse(path, f"{prefix}{f.name}", f"to be {f.type.__name__}", value)
        zero = f.default == 0 or "token_id" in f.name or f.name == "sliding_window" or f.type is bool
        if value < 0 or (value == 0 and not zero):
            refuse(path, f"{prefix}{f.name}", "to be positive", value)
        if value > 1000 and f.name.endswith(("_layers", "_depth")):
            refuse(path, f"{prefix}{f.name}", "to be 1000 at most", value)
        values[f.name] = f.type(value)
    return kind(**values)


# ---------------------------------------------------------------------------------------------------------------------
# Attention, and the seam
# ---------------------------------------------------------------------------------------------------------------------
def attention(q, k, v, mask=None):
    """Softmax attention that also says how much it normalised by:  out = Σ_s exp(q·k_s/√D − lse) v_s,  lse = log Z2.

    q (B,H,T,D), k and v (B,Hkv,S,D) with H a multiple of Hkv, mask (B,1,T,S) bool, True = may attend (None: all may)
    → out (B,H,T,D) in q's dtype, lse (B,H,T) fp32 (fp64 for fp64) = log Σ_s exp(q·k_s/√D) over the keys the mask allows.
    A row with no allowed key gives out = 0 and lse = −inf, and no gradient. Raises ValueError if H % Hkv. Paper, section 3.1."""
    B, H, T, D = q.shape
    Hkv, S = k.shape[1:3]
    if H % Hkv:
        raise ValueError(f"{H} query heads are no multiple of {Hkv} key/value heads")
    scores = (q.view(B, Hkv, H // Hkv, T, D) * D ** -0.5) @ k.unsqueeze(2).transpose(-1, -2)     # (B,Hkv,H/Hkv,T,S)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    if mask is not None:      # finite, so that exp(scores − lse) has no inf − inf in rows without a key, forwards or backwards
        scores = scores.masked_fill(~mask.unsqueeze(2), torch.finfo(scores.dtype).min)
    lse = torch.logsumexp(scores, -1)
    out = ((scores - lse.unsqueeze(-1)).exp().to(v.dtype) @ v.unsqueeze(2)).reshape(B, H, T, v.shape[-1])
    lse = lse.reshape(B, H, T)
    if mask is not None:
        nothing = ~mask.any(-1)                                                                   # (B,1,T)
        out, lse = out.masked_fill(nothing.unsqueeze(-1), 0), lse.masked_fill(nothing, -torch.inf)
    return out, lse


def additive(mask, dtype):
    """A mask as the CPU's fused kernel adds it to the scores: 0 where True, else −inf."""
    return torch.where(mask, 0.0, -torch.inf).to(dtype)


def fused_attention(q, k, v, mask):
    """`attention` by the library's fused kernel, which knows lse but passes no gradient on to it: for passes without gradients.

    Arguments and results as `attention`, but rows with no allowed key have lse = 0 and mean nothing; mask: `additive` too."""
    if q.device.type != "cpu":                # the kernels of other devices want each their own form of mask, and keys repeated
        return attention(q, k, v, mask)
    mask = additive(mask, q.dtype) if mask.dtype == torch.bool else mask
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)


class Shifts:
    """What may be changed inside the decoder, at four places; each method returns its input by default.

    after_embedding(input_ids (B,T), x (B,T,d)) → x       after_attention(layer, q, k, out, lse) → out   (before W_o)
    after_ffn(layer, ffn_out (B,T,d)) → ffn_out           after_layer(layer, hidden_states (B,T,d)) → hidden_states
    q, out (B,H,T,D); k (B,Hkv,S,D), rotated, past keys included; lse (B,H,T): see `attention`. layer counts from 0.

    Whoever runs the model with shifts asks them before: student(model) → the model that runs with them, and template(template)
    → the prompt that it reads; those given, by default."""

    @property
    def reads_attention(self):
        """Whether lse has to be computed: only a subclass with an after_attention of its own can look at it."""
        return type(self).after_attention is not Shifts.after_attention

    @property
    def while_decoding(self):
        """The shifts of a pass over one generated token, its prompt in the cache: the same, unless a subclass says otherwise."""
        return self

    def student(self, model):
        return model

    def template(self, template):
        return template

    def after_embedding(self, input_ids, x):
        return x

    def after_attention(self, layer, q, k, out, lse):
        return out

    def after_ffn(self, layer, ffn_out):
        return ffn_out

    def after_layer(self, layer, hidden_states):
        return hidden_states


class KVCache:
    """Rotated keys and values of every decoder layer, written in place: two lists of (B,Hkv,capacity,D)."""

    def __init__(self, n_layers, capacity):
        self.k, self.v, self.capacity, self.length = [None] * n_layers, [None] * n_layers, capacity, 0
        self.pictures = {}        # layer → tensors (B,…), what a model that looks at pictures there keeps of them

    def append(self, layer, k, v):
        """Adds k, v (B,Hkv,T,D) behind the `length` keys that are there → all keys and values so far."""
        end = self.length + k.shape[2]
        if self.k[layer] is None:
            self.k[layer], self.v[layer] = (x.new_empty(*x.shape[:2], self.capacity, x.shape[3]) for x in (k, v))
        self.k[layer][:, :, self.length:end], self.v[layer][:, :, self.length:end] = k, v
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]

    def repeat(self, n):
        """Every row n times in a row, for n beams."""
        self.k, self.v = ([x.repeat_interleave(n, 0) for x in side] for side in (self.k, self.v))
        self.pictures = {layer: [x.repeat_interleave(n, 0) for x in kept] for layer, kept in self.pictures.items()}

    def reorder(self, rows, start):
        """Row i becomes row rows[i]. Beams of one prompt share its keys, so only columns from `start` on are moved."""
        for side in self.k, self.v:
            for x in side:
                x[:, :, start:self.length] = x[rows, :, start:self.length]


# ---------------------------------------------------------------------------------------------------------------------
# Blocks
# ---------------------------------------------------------------------------------------------------------------------
class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm, but rounded before the weight as in the published code: torch's rounds once less, which shows in bfloat16."""

    def forward(self, x):
        return self.weight * F.rms_norm(x, self.normalized_shape, None, self.eps)


class Linear(nn.Linear):
    """nn.Linear; without gradients, large fp32 weights on a CPU are multiplied by oneDNN, which for the few rows of a decoding
    step is up to six times as fast as the library that torch takes (BENCHMARKS.md)."""

    LARGE = 2 ** 17 if torch.backends.mkldnn.is_available() else torch.inf      # numbers; fewer do not repay the longer call

    def forward(self, x):
        w = self.weight
        if torch.is_grad_enabled() or w.dtype != torch.float32 or w.device.type != "cpu" or w.numel() < self.LARGE:
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, w, self.bias, "none", [], "")


class SwiGLU(nn.Module):
    def __init__(self, d_in, d_hidden, d_out):
        super().__init__()
        self.gate_proj = Linear(d_in, d_hidden, bias=False)
        self.up_proj = Linear(d_in, d_hidden, bias=False)
        self.down_proj = Linear(d_hidden, d_out, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def split_heads(x, n_heads):
    """(B,T,H·D) → (B,H,T,D)."""
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)


def merge_heads(x):
    """(B,H,T,D) → (B,T,H·D)."""
    return x.transpose(1, 2).flatten(2)


def sdpa(q, k, v, mask):
    """The library's fused attention, for wherever nobody asks for lse."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


# ---------------------------------------------------------------------------------------------------------------------
# Vision tower (SigLIP at the image's own resolution, as NaViT)
# ---------------------------------------------------------------------------------------------------------------------
def patch_mask(pixel_mask, patch):
    """(N,H,W) → (N,h,w) bool: a patch is valid if all of its pixels are. A strip narrower than a patch is cut off."""
    return pixel_mask.unfold(1, patch, patch).unfold(2, patch, patch).all(-1).all(-1)


def patch_position_ids(mask, side):
    """Where in the side × side grid of position embeddings each patch lies, as a fraction of its image: (N,h,w) → (N,h·w).

    fp32 on purpose: the published model bucketises rounded fractions, and the exact integer formula differs from it for some
    sizes. Patches that are not valid get id 0."""
    boundaries = torch.arange(1 / side, 1.0, 1 / side).to(mask.device)          # on the CPU: other devices round differently

    def buckets(n_valid, length):
        fractions = torch.arange(length, device=mask.device, dtype=torch.float32) * (1.0 / n_valid)[:, None]
        return torch.bucketize(fractions.clamp(max=1.0 - 1e-6), boundaries, right=True)

    rows, columns = buckets(mask[:, :, 0].sum(1), mask.shape[1]), buckets(mask[:, 0, :].sum(1), mask.shape[2])
    return (rows[:, :, None] * side + columns[:, None, :]).where(mask, 0).flatten(1)


class VisionEmbeddings(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.side = c.image_size // c.patch_size
        self.patch_embedding = nn.Conv2d(c.num_channels, c.hidden_size, c.patch_size, c.patch_size)
        self.position_embedding = nn.Embedding(self.side ** 2, c.hidden_size)

    def forward(self, pixel_values, mask):
        x = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)                         # (N,P,d)
        return x + self.position_embedding(patch_position_ids(mask, self.side))


class VisionAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_heads = c.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(c.hidden_size, c.hidden_size) for _ in range(4))

    def forward(self, x, mask):
        q, k, v = (split_heads(proj(x), self.n_heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(merge_heads(sdpa(q, k, v, mask)))


class VisionMLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc1, self.fc2 = Linear(c.hidden_size, c.intermediate_size), Linear(c.intermediate_size, c.hidden_size)
        self.gelu = c.gelu

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate=self.gelu))


class VisionLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(c.hidden_size, c.layer_norm_eps) for _ in range(2))
        self.self_attn, self.mlp = VisionAttention(c), VisionMLP(c)

    def forward(self, x, mask):
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class VisionModel(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embeddings = VisionEmbeddings(c)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(VisionLayer(c) for _ in range(c.num_hidden_layers))})
        self.post_layernorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)

    def forward(self, pixel_values, mask):
        """(N,3,H,W), patch mask (N,h,w) → (N,P,d). Patches that are not valid are no keys; their own rows mean nothing."""
        x, keys = self.embeddings(pixel_values, mask), None if mask.all() else mask.flatten(1)[:, None, None]       # (N,1,1,P)
        for layer in self.encoder["layers"]:
            x = layer(x, keys)
        return self.post_layernorm(x)


# ---------------------------------------------------------------------------------------------------------------------
# Connector: patches → n_latents visual tokens in the decoder's width
# ---------------------------------------------------------------------------------------------------------------------
class PerceiverAttention(nn.Module):
    def __init__(self, c, d):
        super().__init__()
        self.n_heads, self.n_kv_heads = c.resampler_n_heads, c.num_key_value_heads
        self.q_proj = Linear(d, self.n_heads * c.resampler_head_dim, bias=False)
        self.k_proj = Linear(d, self.n_kv_heads * c.resampler_head_dim, bias=False)
        self.v_proj = Linear(d, self.n_kv_heads * c.resampler_head_dim, bias=False)
        self.o_proj = Linear(self.n_heads * c.resampler_head_dim, d, bias=False)

    def forward(self, latents, context, mask):
        q, both = split_heads(self.q_proj(latents), self.n_heads), torch.cat([context, latents], 1)
        k, v = (split_heads(proj(both), self.n_kv_heads) for proj in (self.k_proj, self.v_proj))
        return self.o_proj(merge_heads(sdpa(q, k, v, mask)))


class PerceiverLayer(nn.Module):
    def __init__(self, c, d):
        super().__init__()
        self.input_latents_norm, self.input_context_norm, self.post_attention_layernorm = (
            RMSNorm(d, c.rms_norm_eps) for _ in range(3))
        self.self_attn, self.mlp = PerceiverAttention(c, d), SwiGLU(d, 4 * d, d)

    def forward(self, latents, context, mask):
        latents = latents + self.self_attn(self.input_latents_norm(latents), self.input_context_norm(context), mask)
        return latents + self.mlp(self.post_attention_layernorm(latents))


class PerceiverResampler(nn.Module):
    def __init__(self, c, d):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(c.resampler_n_latents, d))
        self.layers = nn.ModuleList(PerceiverLayer(c, d) for _ in range(c.resampler_depth))
        self.norm = RMSNorm(d, c.rms_norm_eps)

    def forward(self, context, keys):
        """context (N,P,d), keys (N,P) bool → (N,n_latents,d). The latents attend to the context and to themselves."""
        latents = self.latents.expand(len(context), -1, -1)
        mask = F.pad(keys, (0, latents.shape[1]), value=True)[:, None, None]                      # (N,1,1,P+n_latents)
        for layer in self.layers:
            latents = layer(latents, context, mask)
        return self.norm(latents)


class Connector(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.modality_projection = SwiGLU(c.vision.hidden_size, c.text.intermediate_size, c.text.hidden_size)
        self.perceiver_resampler = PerceiverResampler(c.perceiver, c.text.hidden_size)

    def forward(self, x, keys):
        return self.perceiver_resampler(self.modality_projection(x), keys)


# ---------------------------------------------------------------------------------------------------------------------
# Decoder (Mistral)
# ---------------------------------------------------------------------------------------------------------------------
def rope(position_ids, D, theta, dtype):
    """cos and sin (B,1,T,D) of the rotary angles, as `rotate` wants them: the first half of the sines negated. Computed in fp32
    (fp64 for fp64), then cast."""
    exact = torch.promote_types(dtype, torch.float32)
    inv_freq = 1.0 / theta ** (torch.arange(0, D, 2, device=position_ids.device, dtype=exact) / D)
    angles = position_ids[:, None, :, None].to(exact) * inv_freq
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x, cos, sin):
    """Rotates the pairs (x_i, x_{i+D/2}) of x (B,H,T,D) by their angles."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def causal_mask(attention_mask, T, window):
    """Who may attend to whom: (B,S) key mask → (B,1,T,S) bool for the last T of S slots.

    Key s is seen from slot t if it is no padding, s ≤ t, and t − s < window (0 = no window; slots, padding included)."""
    S = attention_mask.shape[1]
    back = torch.arange(S - T, S, device=attention_mask.device)[:, None] - torch.arange(S, device=attention_mask.device)
    seen = (back >= 0) & (back < window) if window else back >= 0
    return seen & attention_mask.bool()[:, None, None]


class DecoderAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_heads, self.n_kv_heads = c.num_attention_heads, c.num_key_value_heads
        self.q_proj = Linear(c.hidden_size, self.n_heads * c.head_dim, bias=False)
        self.k_proj = Linear(c.hidden_size, self.n_kv_heads * c.head_dim, bias=False)
        self.v_proj = Linear(c.hidden_size, self.n_kv_heads * c.head_dim, bias=False)
        self.o_proj = Linear(self.n_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, layer, x, cos, sin, mask, shifts, cache, last=None):
        """last: queries of so many last columns only; keys and values of all."""
        at = slice(-last if last else 0, None)
        q, mask = rotate(split_heads(self.q_proj(x[:, at]), self.n_heads), cos[:, :, at], sin[:, :, at]), mask[:, :, at]
        k = rotate(split_heads(self.k_proj(x), self.n_kv_heads), cos, sin)
        v = split_heads(self.v_proj(x), self.n_kv_heads)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        if shifts.reads_attention:
            out, lse = (attention if torch.is_grad_enabled() else fused_attention)(q, k, v, mask)
            out = shifts.after_attention(layer, q, k, out, lse)
        else:
            out = sdpa(q, k, v, mask)
        return self.o_proj(merge_heads(out))


class DecoderLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = DecoderAttention(c), SwiGLU(c.hidden_size, c.intermediate_size, c.hidden_size)
        self.input_layernorm, self.post_attention_layernorm = (RMSNorm(c.hidden_size, c.rms_norm_eps) for _ in range(2))

    def forward(self, layer, x, cos, sin, mask, shifts, cache, last=None):
        """(B,T,d) → (B,T,d), or (B,last,d)."""
        x = x[:, -last if last else 0:] + self.self_attn(layer, self.input_layernorm(x), cos, sin, mask, shifts, cache, last)
        x = x + shifts.after_ffn(layer, self.mlp(self.post_attention_layernorm(x)))
        return shifts.after_layer(layer, x)


class TextModel(nn.Module):
    crossed = ()                  # layers before which the states look at pictures (`enter`): none, they stand among the tokens

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, attention_mask, position_ids, shifts, cache, pictures=None, last=None):
        """Embeddings x (B,T,d), attention_mask (B,S), position_ids (B,T) → normed hidden states (B,T,d), or (B,last,d): nobody
        reads the others, so the top layer does not make them. pictures: of `enter`."""
        cos, sin = rope(position_ids, self.config.head_dim, self.config.rope_theta, x.dtype)
        mask = causal_mask(attention_mask, x.shape[1], self.config.sliding_window)
        if x.device.type == "cpu" and not torch.is_grad_enabled():
            mask = additive(mask, x.dtype)                        # here once, or in every layer's kernel
        for i, layer in enumerate(self.layers):
            if i in self.crossed:
                x = self.enter(i, x, pictures, cache)
            x = layer(i, x, cos, sin, mask, shifts, cache, last if i == len(self.layers) - 1 else None)
        return self.norm(x)


# ---------------------------------------------------------------------------------------------------------------------
# The whole model
# ---------------------------------------------------------------------------------------------------------------------
class Idefics2(nn.Module):
    config_class = Config
    shots, epochs = 8, 5          # the paper's: demonstrations of a prompt, passes over 1,000 training samples

    def __init__(self, config, end_ids=(), banned_ids=()):
        """A randomly initialised model. end_ids (default: the text config's eos) end an answer, banned_ids are never made."""
        super().__init__()
        self.config = config
        self.end_ids, self.banned_ids, self.pad_id = (
            set(end_ids) or {config.text.eos_token_id}, set(banned_ids), config.text.pad_token_id)
        self.build(config)

    def build(self, config):
        self.model = nn.ModuleDict({
            "vision_model": VisionModel(config.vision), "connector": Connector(config), "text_model": TextModel(config.text)})
        self.lm_head = Linear(config.text.hidden_size, config.text.vocab_size, bias=False)

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu"):
        """The model in a folder as published: config.json, generation_config.json (optional), model.safetensors or its shards.

        Built without memory and filled from memory-mapped files, tensor by tensor. Every tensor must be there once, with the
        right shape; else InputError lists what is missing, unexpected or misshapen."""
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"{folder}: expected a model folder with config.json and safetensors, found no such folder")
        config = cls.config_class.from_file(folder / "config.json")
        ends, banned = [], []
        if (path := folder / "generation_config.json").exists():
            generation = read_json(path)
            if not isinstance(generation, dict):
                raise InputError(f"{path}: expected an object, found {generation!r}")
            ends = generation.get("eos_token_id")
            ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
            if any(type(i) is not int for i in ends):
                raise InputError(f"{path}: expected eos_token_id to be a token id or a list of them, found {ends}")
            banned = generation.get("bad_words_ids") or []
            if any(not isinstance(word, list) or len(word) != 1 or type(word[0]) is not int for word in banned):
                raise InputError(f"{path}: expected bad_words_ids of one token each, found {banned}")
            banned = [word[0] for word in banned]
            if generation.get("pad_token_id") is not None:
                config.text.pad_token_id = whole_number(generation, "pad_token_id", 0, path)
        with torch.device("meta"):
            model = cls(config, ends, banned)
        model.load_state_dict(read_tensors(folder, model.state_dict(), dtype, device), assign=True)
        return model.requires_grad_(False).eval()

    @property
    def device(self):
        return self.lm_head.weight.device

    @property
    def dtype(self):
        return self.lm_head.weight.dtype

    @property
    def text_model(self):
        """The decoder: embed_tokens, layers, norm."""
        return self.model["text_model"]

    @property
    def eyes(self):
        """The modules that make image features: vision tower first."""
        return self.model["vision_model"], self.model["connector"]

    def patches(self, pixel_values, pixel_mask):
        """The vision tower's last states (N,P,d_vision), and which of them are picture, not padding (N,P) bool."""
        mask = patch_mask(pixel_mask, self.config.vision.patch_size)
        return self.model["vision_model"](pixel_values.to(self.dtype), mask), mask.flatten(1)

    def encode_images(self, pixel_values, pixel_mask):
        """pixel_values (N,3,H,W), pixel_mask (N,H,W) bool, True = picture, False = padding → features (N,n_latents,d).

        Padding changes nothing, and images know nothing of each other: encode each distinct image once and keep the features."""
        return self.model["connector"](*self.patches(pixel_values, pixel_mask))

    def words(self, input_ids):
        """Token embeddings (B,T,d). Raises InputError for an id that the model does not have."""
        smallest, largest = int(input_ids.min()), int(input_ids.max())
        if smallest < 0 or largest >= self.config.text.vocab_size:
            raise InputError(f"expected token ids in 0 … {self.config.text.vocab_size - 1}, found {smallest} … {largest}")
        return self.text_model.embed_tokens(input_ids)

    def embed(self, input_ids, image_features):
        """Token embeddings (B,T,d); the <image> tokens are replaced, in reading order, by the rows of image_features."""
        x = self.words(input_ids)
        slots = input_ids == self.config.image_token_id
        n_slots, n_rows = int(slots.sum()), 0 if image_features is None else image_features.shape[0] * image_features.shape[1]
        if n_slots != n_rows:
            raise InputError(f"{n_slots} image tokens in the prompts, but {n_rows} rows of image features "
                             f"({self.config.perceiver.resampler_n_latents} an image)")
        return x.masked_scatter(slots.unsqueeze(-1), image_features.to(x.device, x.dtype)) if n_slots else x

    def pictures(self, input_ids, image_features, cache=None):
        """What the decoder's layers see of the pictures beside the embeddings: nothing."""
        return None

    def hidden_states(self, input_ids, attention_mask, image_features=None, shifts=None, position_ids=None, cache=None,
                      last=None):
        """The decoder's normed output states (B,T,d), or of the last columns (B,last,d); `lm_head` makes logits of those that
        somebody reads.

        input_ids (B,T); attention_mask (B,S), 1 or True = token, S = T + the cache's length; image_features (N,n_latents,d) or
        None; position_ids (B,T) default to cumsum(attention_mask) − 1 (1 for padding), so that padding never moves a token."""
        shifts = shifts if shifts is not None else Shifts()
        if position_ids is None:
            present = attention_mask.long()
            position_ids = (present.cumsum(-1) - 1).masked_fill(present == 0, 1)[:, -input_ids.shape[1]:]
        if cache is not None and cache.length > 0 and image_features is None:      # a generated <image> is an ordinary token
            x, pictures = self.text_model.embed_tokens(input_ids), None
        else:
            x, pictures = self.embed(input_ids, image_features), self.pictures(input_ids, image_features, cache)
        x = self.text_model(shifts.after_embedding(input_ids, x), attention_mask, position_ids, shifts, cache, pictures, last)
        if cache is not None:
            cache.length += input_ids.shape[1]
        return x

    def forward(self, input_ids, attention_mask, image_features=None, shifts=None, position_ids=None):
        """Logits (B,T,vocab) of every column; arguments as `hidden_states`."""
        return self.lm_head(self.hidden_states(input_ids, attention_mask, image_features, shifts, position_ids))

    @torch.no_grad()
    def generate(self, input_ids, attention_mask, image_features, max_new_tokens, num_beams=1, length_penalty=1.0, shifts=None,
                 end_ids=(), banned_ids=()):
        """New token ids (B, ≤ max_new_tokens) for left-padded prompts, pad_id after the end; arguments as `hidden_states`.

        num_beams 1 is greedy. end_ids and banned_ids are added to the model's own. A hypothesis scores
        Σ log p / length ** length_penalty, the end token counted; see BeamSearch."""
        if max_new_tokens < 1:
            return input_ids.new_empty(len(input_ids), 0)
        prompt = input_ids.shape[1]
        cache = KVCache(self.config.text.num_hidden_layers, prompt + max_new_tokens)
        vocab = self.config.text.vocab_size
        ends, banned = (torch.tensor(sorted(i for i in {*own, *more} if i < vocab), dtype=torch.long, device=self.device)
                        for own, more in ((self.end_ids, end_ids), (self.banned_ids, banned_ids)))

        def next_logits(ids, features=None):
            """fp32 logits (rows,vocab) of the token after `ids`; everything before them is in the cache."""
            states = self.hidden_states(ids, attention_mask, features, shifts, cache=cache, last=1)
            return self.lm_head(states[:, -1]).float()

        logits = next_logits(input_ids, image_features)
        if not logits.isfinite().all():
            raise InputError(f"expected finite logits, found others; {not_finite(self)}")
        shifts = None if shifts is None else shifts.while_decoding
        if num_beams > 1:
            cache.repeat(num_beams)
            attention_mask = attention_mask.repeat_interleave(num_beams, 0)
        search = BeamSearch(len(input_ids), num_beams, max_new_tokens, length_penalty, ends, banned, self.pad_id)
        while True:
            tokens, parents = search.step(logits)
            if search.done:
                return search.result()
            if num_beams > 1:
                cache.reorder(parents, prompt)
            attention_mask = F.pad(attention_mask, (0, 1), value=1)
            logits = next_logits(tokens[:, None])


class BeamSearch:
    """Beam search over B prompts with K beams, as transformers does it with early_stopping=False; K = 1 is greedy search.

    Every step takes the 2K (or more, if there are more end tokens) best continuations of a prompt. Those that end are finished
    hypotheses if they are among the best K; the best K others go on. A prompt is settled when its best running beam, at its
    present length, scores no more than its worst finished hypothesis."""

    NONE = -1e9                                       # score of a beam or hypothesis that is not there

    def __init__(self, B, K, max_new_tokens, length_penalty, ends, banned, pad_id):
        self.B, self.K, self.max, self.penalty, self.ends, self.banned = B, K, max_new_tokens, length_penalty, ends, banned
        device, self.t = ends.device, 0               # t: tokens generated so far
        self.score = torch.full((B, K), self.NONE, device=device)                       # Σ log p of the running beams
        self.score[:, 0] = 0                          # at first all beams of a prompt are equal: only one counts
        self.ids = torch.full((B, K, max_new_tokens), pad_id, device=device)
        self.best = torch.full((B, K), self.NONE, device=device)                        # finished: Σ log p / length^penalty
        self.best_ids = self.ids.clone()
        self.settled = torch.zeros(B, dtype=torch.bool, device=device)
        self.done = False

    def step(self, logits):
        """logits (B,vocab) at first, then (B·K,vocab) → the beams' new tokens and the rows they continue, (B·K,) each."""
        B, K = self.B, self.K
        logp = logits.log_softmax(-1).index_fill(1, self.banned, -torch.inf)      # the other scores are as without the ban
        rows = logp.shape[0] // B                     # beams of a prompt that came in: 1 at first, then K
        total = (self.score[:, :rows, None] + logp.view(B, rows, -1)).flatten(1)
        top, at = total.topk(min(K * max(2, 1 + len(self.ends)), total.shape[1]))
        parent, token = at // logp.shape[1], at % logp.shape[1]
        ids = self.ids.gather(1, parent[:, :, None].expand(-1, -1, self.max))
        ids[:, :, self.t] = token
        self.t += 1
        ended = torch.isin(token, self.ends) | (self.t == self.max)

        finished = top / self.t ** self.penalty
        finished[:, K:] = self.NONE
        finished = finished.masked_fill(~ended | self.settled[:, None], self.NONE)
        self.best, keep = torch.cat([self.best, finished], 1).topk(K)
        self.best_ids = torch.cat([self.best_ids, ids], 1).gather(1, keep[:, :, None].expand(-1, -1, self.max))

        self.score, keep = top.masked_fill(ended, self.NONE).topk(K)
        self.ids = ids.gather(1, keep[:, :, None].expand(-1, -1, self.max))
        self.settled |= self.score[:, 0] / self.t ** self.penalty <= self.best[:, -1]
        self.done = bool(self.settled.all()) or self.t == self.max
        first_rows = torch.arange(B, device=parent.device)[:, None] * rows
        return token.gather(1, keep).flatten(), (first_rows + parent.gather(1, keep)).flatten()

    def result(self):
        """The best hypothesis of every prompt (B, longest), pad_id behind its end."""
        return self.best_ids[:, 0, :self.t]


def not_finite(model):
    """Which of the weights to blame for a number that is none."""
    bad = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    return f"not finite are the weights {', '.join(bad)}" if bad else "the model's weights are all finite"


def read_tensors(folder, expected, dtype, device):
    """The tensors of model.safetensors, or of the shards its index names, as `expected` (name → tensor) wants them."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = content.get("weight_map") if isinstance(content := read_json(index), dict) else None
        if not isinstance(weight_map, dict) or not all(
                isinstance(name, str) and name == Path(name).name != ".." for name in weight_map.values()):
            raise InputError(f"{index}: expected a weight_map of tensor names to file names, found none")
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        files = [folder / "model.safetensors"]
    tensors, found, misshapen, unexpected = {}, {}, [], []
    for file in files:
        if not file.exists():
            raise InputError(f"{file}: expected a safetensors file, found nothing")
        try:
            with safe_open(file, "pt") as f:
                for name in f.keys():
                    if name.endswith(("inv_freq", "position_ids")) or name.startswith("model.vision_model.head."):
                        continue                      # in some published files; computed or unused here
                    shape = tuple(f.get_slice(name).get_shape())
                    if name in found:
                        raise InputError(f"{file}: expected {name} once, found it in {found[name]} too")
                    found[name] = file.name
                    if name not in expected:
                        unexpected.append(name)
                    elif shape != tuple(expected[name].shape):
                        misshapen.append(f"{name} {list(shape)} instead of {list(expected[name].shape)}")
                    elif not (x := f.get_tensor(name)).is_floating_point():
                        raise InputError(f"{file}: expected {name} of floating point, found {x.dtype}")
                    else:
                        tensors[name] = x.to(device, dtype)
        except (SafetensorError, OSError) as e:
            raise InputError(f"{file}: expected a complete safetensors file, found: {e}") from None
    missing = sorted(expected.keys() - found.keys())
    if missing or unexpected or misshapen:
        what = [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in
                (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)) if names]
        raise InputError(f"{folder}: expected the {len(expected)} tensors of this config.json, found " + "; ".join(what))
    return tensors
