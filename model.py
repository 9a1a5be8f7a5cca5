"""Idefics2 from scratch: vision tower, connector, Mistral decoder, generation, loading of published weights.

    model = Idefics2.from_pretrained("idefics2-8b-base", dtype=torch.bfloat16, device="cuda")
    image_features = model.encode_images(pixel_values, pixel_mask)         # once per image, then reused
    logits = model(input_ids, attention_mask, image_features)              # with shifts=…: see class Shifts
    ids = model.generate(input_ids, attention_mask, image_features, max_new_tokens=10, num_beams=3)

Letters: B batch, T tokens, S keys (past + T), H heads, Hkv key/value heads, D head_dim, d hidden size, N
images, P patches. Modules have the names of the published checkpoint, so that loading compares names and
shapes. Reading a folder and the search are in support/checkpoint.py and support/search.py.
References: Laurençon et al. 2024 (Idefics2), Jiang et al. 2023 (Mistral), Dehghani et al. 2023 (NaViT); the
tests judge by transformers' Idefics2ForConditionalGeneration.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from support.files import InputError, reading
from support.kernels import Embedding, Linear, attention_with_lse, sdpa


# --- Sizes. Published configs are partial: what a file leaves out is what Idefics2-8b-base has --------------
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

    def __post_init__(self):
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads


@dataclass
class Config:
    vision: VisionConfig = field(default_factory=VisionConfig)
    perceiver: PerceiverConfig = field(default_factory=PerceiverConfig)
    text: TextConfig = field(default_factory=TextConfig)
    image_token_id: int = 32001

    def __post_init__(self):
        self.perceiver.rms_norm_eps = self.perceiver.rms_norm_eps or self.text.rms_norm_eps

    @property
    def tokens_per_image(self):
        """How many <image> tokens of a prompt are one picture."""
        return self.perceiver.resampler_n_latents

    @classmethod
    def from_file(cls, path):
        """config.json as published or as transformers saves it. Raises InputError for what we do not have."""
        from support.checkpoint import entry, read_config, sizes
        with read_config(path, "idefics2") as raw:
            return cls(sizes(VisionConfig, raw.get("vision_config"), "gelu_pytorch_tanh"),
                       sizes(PerceiverConfig, raw.get("perceiver_config"), "silu"),
                       sizes(TextConfig, raw.get("text_config"), "silu"),
                       entry(raw, "image_token_id", cls.image_token_id))


# --- Attention, and the seam --------------------------------------------------------------------------------
def attention(q, k, v, mask=None):
    """Softmax attention that also says how much it normalised by:  out = Σ_s exp(q·k_s/√D − lse) v_s.

    q (B,H,T,D), k and v (B,Hkv,S,D), H a multiple of Hkv, mask (B,1,T,S) bool, True = may attend (None: all
    may) → out (B,H,T,D) in q's dtype, lse (B,H,T) = log Z2 = log Σ_s exp(q·k_s/√D) over the allowed keys,
    fp32 (fp64 for fp64). A row with no allowed key gives out = 0 and lse = −inf, and no gradient. Raises
    ValueError if H % Hkv. Paper, section 3.1."""
    B, H, T, D = q.shape
    Hkv = k.shape[1]
    if H % Hkv:
        raise ValueError(f"{H} query heads are no multiple of {Hkv} key/value heads")
    q = q.view(B, Hkv, H // Hkv, T, D) * D ** -0.5
    scores = q @ k.unsqueeze(2).transpose(-1, -2)                                         # (B,Hkv,H/Hkv,T,S)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    if mask is not None:      # finite, so that rows without a key have no inf − inf, forwards or backwards
        scores = scores.masked_fill(~mask.unsqueeze(2), torch.finfo(scores.dtype).min)
    lse = torch.logsumexp(scores, -1)
    weights = (scores - lse.unsqueeze(-1)).exp().to(v.dtype)
    out = (weights @ v.unsqueeze(2)).reshape(B, H, T, -1)
    lse = lse.reshape(B, H, T)
    if mask is not None:
        nothing = ~mask.any(-1)                                                           # (B,1,T)
        out = out.masked_fill(nothing.unsqueeze(-1), 0)
        lse = lse.masked_fill(nothing, -torch.inf)
    return out, lse


class Shifts:
    """What may be changed inside the decoder, at four places; each method returns its input by default.

    after_embedding(input_ids (B,T), x (B,T,d)) → x   after_attention(layer, q, k, out, lse) → out, before W_o
    after_ffn(layer, ffn_out (B,T,d)) → ffn_out       after_layer(layer, hidden_states (B,T,d)) → …
    q, out (B,H,T,D); k (B,Hkv,S,D), rotated, past keys included; lse (B,H,T): see `attention`. layer from 0.

    Whoever runs the model with shifts asks them before: student(model) → the model that runs with them, and
    template(template) → the prompt that it reads; those given, by default."""

    changes_vision = False        # whether `student(model)` has another vision tower or connector

    @property
    def reads_attention(self):
        """Whether lse has to be computed: only an after_attention of a subclass can look at it."""
        return type(self).after_attention is not Shifts.after_attention

    @property
    def while_decoding(self):
        """The shifts of a pass over one generated token, its prompt in the cache: the same, by default."""
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
        self.k = [None] * n_layers
        self.v = [None] * n_layers
        self.lengths = [0] * n_layers     # how many of a layer's columns are there
        self.capacity = capacity
        self.pictures = {}                # layer → tensors (B,…) of a model that looks at pictures there

    @property
    def length(self):
        return self.lengths[0]

    def append(self, layer, k, v):
        """Adds k, v (B,Hkv,T,D) behind what the layer has → its keys and values so far."""
        start = self.lengths[layer]
        end = self.lengths[layer] = start + k.shape[2]
        if start == 0:
            self.k[layer] = k.new_empty(*k.shape[:2], self.capacity, k.shape[3])
            self.v[layer] = torch.empty_like(self.k[layer])
        self.k[layer][:, :, start:end] = k
        self.v[layer][:, :, start:end] = v
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]

    def repeat(self, n):
        """Every row n times in a row, for n beams."""
        self.k = [x.repeat_interleave(n, 0) for x in self.k]
        self.v = [x.repeat_interleave(n, 0) for x in self.v]
        for layer, kept in self.pictures.items():
            self.pictures[layer] = [x.repeat_interleave(n, 0) for x in kept]

    def reorder(self, rows, start):
        """Row i becomes row rows[i], from column `start` on: beams of one prompt share its keys."""
        for x in self.k + self.v:
            x[:, :, start:self.length] = x[rows, :, start:self.length]


# --- Blocks -------------------------------------------------------------------------------------------------
class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm, but rounded before the weight as in the published code: shows in bfloat16."""
    def forward(self, x):
        return self.weight * F.rms_norm(x, self.normalized_shape, None, self.eps)


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


class GroupedAttention(nn.Module):
    """The linear maps of an attention whose n_heads share n_kv_heads keys and values."""
    def __init__(self, d, n_heads, n_kv_heads, D):
        super().__init__()
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        self.q_proj = Linear(d, n_heads * D, bias=False)
        self.k_proj = Linear(d, n_kv_heads * D, bias=False)
        self.v_proj = Linear(d, n_kv_heads * D, bias=False)
        self.o_proj = Linear(n_heads * D, d, bias=False)


# --- Vision tower (SigLIP at the image's own resolution, as NaViT) ------------------------------------------
def patch_position_ids(mask, side):
    """Which of the side² position embeddings each patch takes, by its place in its image: (N,h,w) → (N,h·w).

    fp32 on purpose: the published model bucketises rounded fractions, from which the exact integer formula
    differs for some sizes. Patches that are not valid get id 0."""
    boundaries = torch.arange(1 / side, 1.0, 1 / side).to(mask.device)  # of the CPU: others round otherwise

    def buckets(n_valid, length):
        place = torch.arange(length, device=mask.device, dtype=torch.float32)
        fractions = place * (1.0 / n_valid)[:, None]
        return torch.bucketize(fractions.clamp(max=1.0 - 1e-6), boundaries, right=True)

    rows = buckets(mask[:, :, 0].sum(1), mask.shape[1])
    columns = buckets(mask[:, 0, :].sum(1), mask.shape[2])
    return (rows[:, :, None] * side + columns[:, None, :]).where(mask, 0).flatten(1)


class VisionLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        d = c.hidden_size
        self.n_heads = c.num_attention_heads
        self.gelu = c.gelu
        self.layer_norm1 = nn.LayerNorm(d, c.layer_norm_eps)
        self.layer_norm2 = nn.LayerNorm(d, c.layer_norm_eps)
        self.self_attn = nn.ModuleDict({f"{name}_proj": Linear(d, d) for name in ("q", "k", "v", "out")})
        self.mlp = nn.ModuleDict({
            "fc1": Linear(d, c.intermediate_size),
            "fc2": Linear(c.intermediate_size, d)})

    def forward(self, x, mask):
        """x (N,P,d), mask (N,1,1,P) of the patches that are keys, None = all."""
        h = self.layer_norm1(x)
        q = split_heads(self.self_attn.q_proj(h), self.n_heads)
        k = split_heads(self.self_attn.k_proj(h), self.n_heads)
        v = split_heads(self.self_attn.v_proj(h), self.n_heads)
        x = x + self.self_attn.out_proj(merge_heads(sdpa(q, k, v, mask)))
        h = self.mlp.fc1(self.layer_norm2(x))
        return x + self.mlp.fc2(F.gelu(h, approximate=self.gelu))


class VisionModel(nn.Module):
    def __init__(self, c):
        super().__init__()
        d = c.hidden_size
        self.side = c.image_size // c.patch_size
        self.embeddings = nn.ModuleDict({
            "patch_embedding": nn.Conv2d(c.num_channels, d, c.patch_size, c.patch_size),
            "position_embedding": Embedding(self.side ** 2, d)})
        layers = nn.ModuleList(VisionLayer(c) for _ in range(c.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.post_layernorm = nn.LayerNorm(d, c.layer_norm_eps)

    def forward(self, pixel_values, mask):
        """(N,3,H,W), patch mask (N,h,w) → (N,P,d). Patches that are not valid are no keys."""
        x = self.embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)            # (N,P,d)
        x = x + self.embeddings.position_embedding(patch_position_ids(mask, self.side))
        keys = None if mask.all() else mask.flatten(1)[:, None, None]                              # (N,1,1,P)
        for layer in self.encoder.layers:
            x = layer(x, keys)
        return self.post_layernorm(x)


# --- Connector: patches → n_latents visual tokens in the decoder's width ------------------------------------
class PerceiverLayer(nn.Module):
    def __init__(self, c, d):
        super().__init__()
        self.input_latents_norm = RMSNorm(d, c.rms_norm_eps)
        self.input_context_norm = RMSNorm(d, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(d, c.rms_norm_eps)
        self.self_attn = GroupedAttention(d, c.resampler_n_heads, c.num_key_value_heads, c.resampler_head_dim)
        self.mlp = SwiGLU(d, 4 * d, d)

    def forward(self, latents, context, mask):
        """The latents (N,n_latents,d) attend to the context (N,P,d) and to themselves."""
        a = self.self_attn
        h = self.input_latents_norm(latents)
        both = torch.cat([self.input_context_norm(context), h], 1)
        q = split_heads(a.q_proj(h), a.n_heads)
        k = split_heads(a.k_proj(both), a.n_kv_heads)
        v = split_heads(a.v_proj(both), a.n_kv_heads)
        latents = latents + a.o_proj(merge_heads(sdpa(q, k, v, mask)))
        return latents + self.mlp(self.post_attention_layernorm(latents))


class PerceiverResampler(nn.Module):
    def __init__(self, c, d):
        super().__init__()
        self.latents = Embedding(c.resampler_n_latents, d).weight
        self.layers = nn.ModuleList(PerceiverLayer(c, d) for _ in range(c.resampler_depth))
        self.norm = RMSNorm(d, c.rms_norm_eps)

    def forward(self, context, keys):
        """context (N,P,d), keys (N,P) bool → (N,n_latents,d)."""
        latents = self.latents.expand(len(context), -1, -1)
        mask = F.pad(keys, (0, latents.shape[1]), value=True)[:, None, None]             # (N,1,1,P+n_latents)
        for layer in self.layers:
            latents = layer(latents, context, mask)
        return self.norm(latents)


class Connector(nn.Module):
    def __init__(self, c):
        super().__init__()
        d = c.text.hidden_size
        self.modality_projection = SwiGLU(c.vision.hidden_size, c.text.intermediate_size, d)
        self.perceiver_resampler = PerceiverResampler(c.perceiver, d)

    def forward(self, x, keys):
        """Patches x (N,P,d_vision), those that are picture (N,P) bool → features (N,n_latents,d)."""
        return self.perceiver_resampler(self.modality_projection(x), keys)


# --- Decoder (Mistral) --------------------------------------------------------------------------------------
def rope(position_ids, D, theta, dtype):
    """cos and sin (B,1,T,D) for `rotate`, the first half of the sines negated; angles are fp32 or fp64."""
    exact = torch.promote_types(dtype, torch.float32)
    inv_freq = 1.0 / theta ** (torch.arange(0, D, 2, device=position_ids.device, dtype=exact) / D)
    angles = position_ids[:, None, :, None].to(exact) * inv_freq
    cos = angles.cos().to(dtype)
    sin = angles.sin().to(dtype)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x, cos, sin):
    """Rotates the pairs (x_i, x_{i+D/2}) of x (B,H,T,D) by their angles."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def causal_mask(attention_mask, T, window):
    """Who may attend to whom: (B,S) key mask → (B,1,T,S) bool for the last T of S slots.

    Key s is seen from slot t if it is no padding, s ≤ t, and t − s < window (0 = none; padding counts)."""
    slots = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    back = slots[-T:, None] - slots
    seen = (back >= 0) & (back < window) if window else back >= 0
    return seen & attention_mask.bool()[:, None, None]


class DecoderAttention(GroupedAttention):
    def keys_values(self, x, cos, sin):
        """x (B,T,d) → its keys, rotated, and values, (B,Hkv,T,D) each."""
        k = split_heads(self.k_proj(x), self.n_kv_heads)
        v = split_heads(self.v_proj(x), self.n_kv_heads)
        return rotate(k, cos, sin), v

    def forward(self, layer, x, cos, sin, mask, shifts, cache):
        q = rotate(split_heads(self.q_proj(x[:]), self.n_heads), cos, sin)      # [:]: as in DecoderLayer
        k, v = self.keys_values(x, cos, sin)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        if shifts.reads_attention:
            out, lse = attention_with_lse(q, k, v, mask) or attention(q, k, v, mask)
            out = shifts.after_attention(layer, q, k, out, lse)
        else:
            out = sdpa(q, k, v, mask)
        return self.o_proj(merge_heads(out))


class DecoderLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        d = c.hidden_size
        self.self_attn = DecoderAttention(d, c.num_attention_heads, c.num_key_value_heads, c.head_dim)
        self.mlp = SwiGLU(d, c.intermediate_size, d)
        self.input_layernorm = RMSNorm(d, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(d, c.rms_norm_eps)

    def forward(self, layer, x, cos, sin, mask, shifts, cache):
        residual = x[:]           # an alias: keeps the order in which gradients are summed
        x = residual + self.self_attn(layer, self.input_layernorm(x), cos, sin, mask, shifts, cache)
        x = x + shifts.after_ffn(layer, self.mlp(self.post_attention_layernorm(x)))
        return shifts.after_layer(layer, x)


class TextModel(nn.Module):
    crossed = ()                  # layers before which the states look at pictures, see `enter`: none

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, attention_mask, position_ids, shifts, cache, pictures=None, last=None):
        """Embeddings x (B,T,d), attention_mask (B,S), position_ids (B,T) → normed hidden states (B,T,d), or
        those of the last columns alone (B,last,d). pictures: of `enter`."""
        cos, sin = rope(position_ids, self.config.head_dim, self.config.rope_theta, x.dtype)
        mask = causal_mask(attention_mask, x.shape[1], self.config.sliding_window)
        top = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            if i in self.crossed:
                x = self.enter(i, x, pictures, cache)
            if i == top and last and last < x.shape[1]:    # of the others only keys and values are read
                cache = cache or KVCache(top + 1, x.shape[1])
                early = layer.input_layernorm(x[:, :-last])
                k, v = layer.self_attn.keys_values(early, cos[:, :, :-last], sin[:, :, :-last])
                cache.append(top, k, v)
                x = x[:, -last:]
                cos, sin = cos[:, :, -last:], sin[:, :, -last:]
                mask = mask[:, :, -last:]
            x = layer(i, x, cos, sin, mask, shifts, cache)
        return self.norm(x)


# --- The whole model ----------------------------------------------------------------------------------------
class Idefics2(nn.Module):
    config_class = Config
    shots = 8                     # the paper's: demonstrations of a prompt,
    epochs = 5                    # and passes over 1,000 training samples

    def __init__(self, config, end_ids=(), banned_ids=()):
        """Random weights. end_ids (default: the config's eos) end an answer, banned_ids are never made."""
        super().__init__()
        self.config = config
        self.end_ids = set(end_ids) or {config.text.eos_token_id}
        self.banned_ids = set(banned_ids)
        self.pad_id = config.text.pad_token_id
        self.build(config)

    def build(self, config):
        self.model = nn.ModuleDict({
            "vision_model": VisionModel(config.vision),
            "connector": Connector(config),
            "text_model": TextModel(config.text)})
        self.lm_head = Linear(config.text.hidden_size, config.text.vocab_size, bias=False)

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu"):
        """The model in a folder as published, built without memory and filled from memory-mapped files.

        Raises InputError, with names, unless every tensor is there once, with the right shape."""
        from support.checkpoint import generation_ids, read_weights
        folder = Path(folder)
        config = cls.config_class.from_file(folder / "config.json")
        ends, banned, config.text.pad_token_id = generation_ids(folder, config.text.pad_token_id)
        tensors = read_weights(folder)
        with reading(folder, "the tensors of its config.json"), torch.device("meta"):
            model = cls(config, ends, banned).requires_grad_(False).eval()
            model.load_state_dict(tensors, assign=True)
        return model.to(device, dtype)

    @property
    def device(self):
        return self.lm_head.weight.device

    @property
    def dtype(self):
        return self.lm_head.weight.dtype

    @property
    def text_model(self):
        """The decoder: embed_tokens, layers, norm."""
        return self.model.text_model

    def patches(self, pixel_values, pixel_mask):
        """→ the vision tower's last states (N,P,d_vision), and which are picture, not padding (N,P) bool."""
        side = self.config.vision.patch_size
        pixels = pixel_mask.unfold(1, side, side).unfold(2, side, side)                  # (N,h,w,side,side)
        mask = pixels.flatten(3).all(-1)
        return self.model.vision_model(pixel_values.to(self.dtype), mask), mask.flatten(1)

    def encode_images(self, pixel_values, pixel_mask):
        """pixel_values (N,3,H,W), pixel_mask (N,H,W) bool, False = padding → features (N,n_latents,d).

        Padding changes nothing, and images know nothing of each other: each is encoded once."""
        return self.model.connector(*self.patches(pixel_values, pixel_mask))

    def words(self, input_ids, image_features):
        """Token embeddings (B,T,d). Raises InputError for ids that the model does not have, and for another
        number of <image> tokens than the features need."""
        smallest, largest = int(input_ids.min()), int(input_ids.max())
        n_words, each = self.config.text.vocab_size, self.config.tokens_per_image
        if smallest < 0 or largest >= n_words:
            raise InputError(f"expected token ids in 0 … {n_words - 1}, found {smallest} … {largest}")
        n_tokens = int((input_ids == self.config.image_token_id).sum())
        n_images = 0 if image_features is None else len(image_features)
        if n_tokens != n_images * each:
            raise InputError(f"{n_tokens} image tokens in the prompts, but {n_images} images of {each} each")
        return self.text_model.embed_tokens(input_ids)

    def embed(self, input_ids, image_features):
        """`words`, but the <image> tokens are replaced, in reading order, by the rows of image_features."""
        x = self.words(input_ids, image_features)
        if image_features is None:
            return x
        slots = (input_ids == self.config.image_token_id).unsqueeze(-1)
        return x.masked_scatter(slots, image_features.to(x.device, x.dtype))

    def pictures(self, input_ids, image_features, cache=None):
        """What the decoder's layers see of the pictures beside the embeddings: nothing."""
        return None

    def hidden_states(self, input_ids, attention_mask, image_features=None, shifts=None, position_ids=None,
                      cache=None, last=None):
        """The decoder's normed output states (B,T,d), or of the last columns (B,last,d): lm_head reads them.

        input_ids (B,T); attention_mask (B,S), 1 or True = token, S = T + the cache's length; image_features
        (N,n_latents,d) or None; position_ids (B,T), by default cumsum(attention_mask) − 1, of padding 1."""
        if position_ids is None:
            present = attention_mask.long()
            position_ids = (present.cumsum(-1) - 1).masked_fill(present == 0, 1)
            position_ids = position_ids[:, -input_ids.shape[1]:]
        if cache is not None and cache.length > 0 and image_features is None:   # a made <image> is a word
            x = self.text_model.embed_tokens(input_ids)
            pictures = None
        else:
            x = self.embed(input_ids, image_features)
            pictures = self.pictures(input_ids, image_features, cache)
        shifts = Shifts() if shifts is None else shifts
        x = shifts.after_embedding(input_ids, x)
        return self.text_model(x, attention_mask, position_ids, shifts, cache, pictures, last)

    def forward(self, input_ids, attention_mask, image_features=None, shifts=None, position_ids=None):
        """Logits (B,T,vocab) of every column; arguments as `hidden_states`."""
        states = self.hidden_states(input_ids, attention_mask, image_features, shifts, position_ids)
        return self.lm_head(states)

    @torch.no_grad()
    def generate(self, input_ids, attention_mask, image_features, max_new_tokens, num_beams=1,
                 length_penalty=1.0, shifts=None, end_ids=(), banned_ids=()):
        """New token ids (B, ≤ max_new_tokens) for left-padded prompts, pad_id after the end.

        Arguments as `hidden_states`; num_beams 1 is greedy; end_ids and banned_ids are added to the model's
        own. A hypothesis scores Σ log p / length ** length_penalty, the end token counted; see BeamSearch."""
        from support.search import BeamSearch
        B, T = input_ids.shape
        if max_new_tokens < 1:
            return input_ids.new_empty(B, 0)
        words = torch.arange(self.config.text.vocab_size, device=self.device)
        ends = words[torch.isin(words, words.new_tensor([*self.end_ids, *end_ids]))]
        banned = words[torch.isin(words, words.new_tensor([*self.banned_ids, *banned_ids]))]
        search = BeamSearch(B, num_beams, max_new_tokens, length_penalty, ends, banned, self.pad_id)
        cache = KVCache(self.config.text.num_hidden_layers, T + max_new_tokens)
        states = self.hidden_states(input_ids, attention_mask, image_features, shifts, cache=cache, last=1)
        logits = self.lm_head(states[:, -1]).float()
        if not logits.isfinite().all():
            bad = [name for name, p in self.named_parameters() if not p.isfinite().all()]
            raise InputError(f"expected finite logits, found others; not finite are the weights {bad}")
        if num_beams > 1:
            cache.repeat(num_beams)
            attention_mask = attention_mask.repeat_interleave(num_beams, 0)
        shifts = None if shifts is None else shifts.while_decoding
        tokens, parents = search.step(logits)
        while not search.done:
            if num_beams > 1:
                cache.reorder(parents, T)
            attention_mask = F.pad(attention_mask, (0, 1), value=1)
            states = self.hidden_states(tokens[:, None], attention_mask, None, shifts, cache=cache)
            tokens, parents = search.step(self.lm_head(states[:, -1]).float())
        return search.result()
