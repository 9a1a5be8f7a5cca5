"""Idefics1 (idefics-9b), the paper's second model: its decoder looks at pictures by cross-attention.

A picture is one <image> token, an ordinary word, and before every 4th layer the states go through a gated
block that attends to the latest picture at or before the token:

    x ← x + tanh(α) · CrossAttention(RMS(x), picture)          0 where there is no picture yet
    x ← x + tanh(α') · SwiGLU(RMS(x))                          for every token

Shifts see the decoder's layers, not these blocks. Letters as in model.py, M pictures, n latents each.
Laurençon et al. 2023, after Alayrac et al. 2022 (Flamingo); judge: transformers' IdeficsForVisionText2Text.
"""

import re
from dataclasses import dataclass, field, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from data import OFFICIAL_TEMPLATES, TEMPLATES, Processor
from model import (
    Config,
    Idefics2,
    PerceiverConfig,
    RMSNorm,
    SwiGLU,
    TextConfig,
    TextModel,
    VisionConfig,
    VisionModel,
    merge_heads,
    split_heads,
)
from support.checkpoint import entry, read_config, sizes
from support.kernels import Embedding, Linear, sdpa
from support.pictures import pixels


# --- Sizes: what a file leaves out is what idefics-9b has ---------------------------------------------------
@dataclass
class ClipConfig(VisionConfig):
    """CLIP ViT-H/14 (laion2B) at 224 pixels. hidden_size is the file's embed_dim."""
    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 32
    image_size: int = 224
    layer_norm_eps: float = 1e-5
    gelu = "none"


@dataclass
class ResamplerConfig(PerceiverConfig):
    """As many keys as heads, layer norms: num_key_value_heads and rms_norm_eps are not read."""
    resampler_depth: int = 6


@dataclass
class LlamaConfig(TextConfig):
    """LLaMA-7B with two more tokens and the cross-attention blocks."""
    intermediate_size: int = 11008
    num_key_value_heads: int = 32     # as many as heads
    vocab_size: int = 32002           # the additional ones included (the file's vocab_size is without them)
    rms_norm_eps: float = 1e-6
    sliding_window: int = 0
    additional_vocab_size: int = 2
    cross_layer_interval: int = 4     # a block before the layers 0, 4, 8 …


@dataclass
class Idefics1Config(Config):
    vision: ClipConfig = field(default_factory=ClipConfig)
    perceiver: ResamplerConfig = field(default_factory=ResamplerConfig)
    text: LlamaConfig = field(default_factory=LlamaConfig)
    tokens_per_image = 1

    @classmethod
    def from_file(cls, path):
        """config.json as published or as transformers saves it."""
        with read_config(path, "idefics") as raw:
            vision = raw.get("vision_config") or {}
            n_words = entry(raw, "vocab_size", 32000)
            text = {**raw, "vocab_size": n_words + entry(raw, "additional_vocab_size", 2),
                    "num_key_value_heads": raw.get("num_attention_heads")}
            return cls(sizes(ClipConfig, {**vision, "hidden_size": vision.get("embed_dim")}, "gelu"),
                       sizes(ResamplerConfig, raw.get("perceiver_config"), "relu"),
                       sizes(LlamaConfig, text, "silu"),
                       entry(raw, "image_token_id", n_words + 1))


# --- Vision tower (CLIP): a class token, learnt positions, no layer norm behind the last layer --------------
class ClipModel(VisionModel):
    def __init__(self, c):
        super().__init__(c)                       # its post_layernorm is in the file, too, but never used
        d = c.hidden_size
        patches = nn.Conv2d(c.num_channels, d, c.patch_size, c.patch_size, bias=False)
        self.embeddings["patch_embedding"] = patches
        self.embeddings["position_embedding"] = Embedding(self.side ** 2 + 1, d)
        self.embeddings.class_embedding = nn.Parameter(torch.zeros(d))
        self.pre_layrnorm = nn.LayerNorm(d, c.layer_norm_eps)                    # the published spelling

    def forward(self, pixel_values):
        """(N,3,H,W) → (N,1+P,d), the class token first."""
        x = self.embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)        # (N,P,d)
        x = torch.cat([self.embeddings.class_embedding.expand(len(x), 1, -1), x], 1)
        x = self.pre_layrnorm(x + self.embeddings.position_embedding.weight)
        for layer in self.encoder.layers:
            x = layer(x, None)
        return x


# --- Resampler: patches → n latents in the tower's width ----------------------------------------------------
class ResamplerAttention(nn.Module):
    def __init__(self, c, d):
        super().__init__()
        D = c.resampler_head_dim
        self.n_heads = c.resampler_n_heads
        self.context_layer_norm = nn.LayerNorm(d)
        self.latents_layer_norm = nn.LayerNorm(d)
        self.q_layer_norm = nn.LayerNorm(D)
        self.k_layer_norm = nn.LayerNorm(D)
        self.q_proj = Linear(d, self.n_heads * D, bias=False)
        self.k_proj = Linear(d, self.n_heads * D, bias=False)
        self.v_proj = Linear(d, self.n_heads * D, bias=False)
        self.output_proj = Linear(self.n_heads * D, d, bias=False)

    def forward(self, latents, context):
        latents = self.latents_layer_norm(latents)
        both = torch.cat([self.context_layer_norm(context), latents], 1)
        q = self.q_layer_norm(split_heads(self.q_proj(latents), self.n_heads))
        k = self.k_layer_norm(split_heads(self.k_proj(both), self.n_heads))
        v = split_heads(self.v_proj(both), self.n_heads)
        return self.output_proj(merge_heads(sdpa(q, k, v, None)))


class Resampler(nn.Module):
    def __init__(self, c, d):
        super().__init__()
        self.latents = Embedding(c.resampler_n_latents, d).weight
        self.blocks = nn.ModuleList()
        for _ in range(c.resampler_depth):
            self.blocks.append(nn.ModuleList([ResamplerAttention(c, d), nn.ModuleDict({
                "ln": nn.LayerNorm(d),
                "fc": Linear(d, 4 * d, bias=False),
                "c_proj": Linear(4 * d, d, bias=False)})]))
        self.layer_norm = nn.LayerNorm(d)

    def forward(self, context):
        """context (N,P,d) → (N,n,d). The latents attend to the context and to themselves."""
        latents = self.latents.expand(len(context), -1, -1)
        for attend, mlp in self.blocks:
            latents = latents + attend(latents, context)
            latents = latents + mlp.c_proj(F.relu(mlp.fc(mlp.ln(latents))))
        return self.layer_norm(latents)


# --- Decoder: LLaMA with cross-attention between its layers -------------------------------------------------
class WordEmbedding(Embedding):
    """Two tables: the words of LLaMA, and the ids behind them."""
    def __init__(self, c):
        super().__init__(c.vocab_size - c.additional_vocab_size, c.hidden_size)
        self.additional_embedding = Embedding(c.additional_vocab_size, c.hidden_size)

    def forward(self, ids):
        n = self.num_embeddings
        x = super().forward(ids.clamp(max=n - 1))
        more = self.additional_embedding((ids - n).clamp(min=0))
        return torch.where((ids >= n).unsqueeze(-1), more, x)


class WordLogits(Linear):
    """d → logits of the words of LLaMA, then of the ids behind them."""
    def __init__(self, c):
        super().__init__(c.hidden_size, c.vocab_size - c.additional_vocab_size, bias=False)
        self.additional_fc = Linear(c.hidden_size, c.additional_vocab_size, bias=False)

    def forward(self, x):
        return torch.cat([super().forward(x), self.additional_fc(x)], -1)


class CrossAttention(nn.Module):
    def __init__(self, c, d_vision):
        super().__init__()
        d = c.hidden_size
        self.n_heads = c.num_attention_heads
        self.q_proj = Linear(d, d, bias=False)
        self.o_proj = Linear(d, d, bias=False)
        self.k_proj = Linear(d_vision, d, bias=False)
        self.v_proj = Linear(d_vision, d, bias=False)
        self.q_layer_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
        self.k_layer_norm = RMSNorm(c.head_dim, c.rms_norm_eps)

    def keys_values(self, features):
        """(B,S,d_vision) → (B,H,S,D) each. No rotation: a picture has no position."""
        k = split_heads(self.k_proj(features), self.n_heads)
        v = split_heads(self.v_proj(features), self.n_heads)
        return self.k_layer_norm(k), v

    def forward(self, x, k, v, mask):
        q = self.q_layer_norm(split_heads(self.q_proj(x), self.n_heads))
        return self.o_proj(merge_heads(sdpa(q, k, v, mask)))


class GatedBlock(nn.Module):
    def __init__(self, c, d_vision):
        super().__init__()
        d = c.hidden_size
        self.cross_attn = CrossAttention(c, d_vision)
        self.mlp = SwiGLU(d, c.intermediate_size, d)
        self.input_layernorm = RMSNorm(d, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(d, c.rms_norm_eps)
        self.alpha_cross_attn = nn.Parameter(torch.zeros(1))
        self.alpha_dense = nn.Parameter(torch.zeros(1))

    def forward(self, x, k=None, v=None, mask=None, seen=None):
        """x (B,T,d); k, v (B,H,S,D), mask (B,1,T,S) bool, seen (B,T,1) bool. No k: no picture."""
        if k is not None:
            found = self.cross_attn(self.input_layernorm(x), k, v, mask)
            x = x + torch.tanh(self.alpha_cross_attn) * found.masked_fill(~seen, 0)
        return x + torch.tanh(self.alpha_dense) * self.mlp(self.post_attention_layernorm(x))


def latest_picture(input_ids, image_id, end_id):
    """Number of the latest picture, (B,T); −1 before the first, and behind an end token until the next."""
    column = torch.arange(input_ids.shape[1], device=input_ids.device)
    image_at = torch.where(input_ids == image_id, column, -1).cummax(1).values
    end_at = torch.where(input_ids == end_id, column, -1).cummax(1).values
    ended = F.pad(end_at[:, :-1], (1, 0), value=-1) > image_at
    return ((input_ids == image_id).cumsum(1) - 1).masked_fill(ended, -1)


class Pictures:
    """The pictures of B prompts as the blocks read them: .features (B,M·n,d_vision), zeros where a row has
    fewer than M; .mask (B,1,T,S·n) bool, a token sees the latest; .seen (B,T,1) bool, False = none yet.
    kept (B,1,1) bool: rows whose earlier pass has left a picture before the new ones: S = 1 + M, else M."""
    def __init__(self, which, counts, image_features, kept=None):
        self.n = image_features.shape[1]
        numbers = torch.arange(int(counts.max()), device=which.device)
        features = image_features.new_zeros(len(counts), len(numbers), *image_features.shape[1:])
        features[numbers < counts[:, None]] = image_features
        self.features = features.flatten(1, 2)
        self.seen = (which >= 0).unsqueeze(-1)
        if kept is not None:
            which = which + 1
            numbers = F.pad(numbers + 1, (1, 0))
            self.seen = self.seen | kept
        # without a picture a token looks at all, and what it finds is dropped: no softmax of nothing
        sees = (which.unsqueeze(-1) == numbers) | ~self.seen
        self.mask = sees.repeat_interleave(self.n, -1).unsqueeze(1)
        self.at_last = which[:, -1].clamp(min=0)

    def last(self, x):
        """Of keys or values x (B,H,S·n,D) those of the picture that the last column looks at, (B,H,n,D)."""
        return x.unflatten(2, (-1, self.n))[torch.arange(len(x), device=x.device), :, self.at_last]


class CrossDecoder(TextModel):
    """Everything but the logits, under the published names; as a text_model, the decoder with its blocks."""
    def __init__(self, c):
        super().__init__(c.text)
        t = c.text
        d_vision = c.vision.hidden_size
        self.embed_tokens = WordEmbedding(t)
        self.crossed = range(0, t.num_hidden_layers, t.cross_layer_interval)
        self.gated_cross_attn_layers = nn.ModuleList(GatedBlock(t, d_vision) for _ in self.crossed)
        self.vision_model = ClipModel(c.vision)
        self.perceiver_resampler = Resampler(c.perceiver, d_vision)

    def enter(self, layer, x, pictures, cache=None):
        """(B,T,d) → (B,T,d) by the block before a layer; each row's last picture stays in the cache."""
        block = self.gated_cross_attn_layers[self.crossed.index(layer)]
        k, v, seen = cache and cache.pictures.get(layer) or (None, None, None)
        if pictures is None:
            return block(x, k, v, None, seen)
        new_k, new_v = block.cross_attn.keys_values(pictures.features.to(x.dtype))
        k = new_k if k is None else torch.cat([k, new_k], 2)
        v = new_v if v is None else torch.cat([v, new_v], 2)
        if cache is not None:
            cache.pictures[layer] = pictures.last(k), pictures.last(v), pictures.seen[:, -1:]
        return block(x, k, v, pictures.mask, pictures.seen)


# --- The whole model ----------------------------------------------------------------------------------------
class Idefics1(Idefics2):
    """from_pretrained, forward, hidden_states and generate are those of Idefics2."""
    config_class = Idefics1Config
    shots = 32
    epochs = 10
    embed = Idefics2.words            # of pictures the embeddings hold nothing but that there is one

    def build(self, config):
        self.model = CrossDecoder(config)
        self.lm_head = WordLogits(config.text)

    @property
    def text_model(self):
        return self.model

    def patches(self, pixel_values, pixel_mask):
        """→ the tower's states without the class token (N,P,d_vision), and which are picture (N,P): all."""
        states = self.model.vision_model(pixel_values.to(self.dtype))[:, 1:]
        return states, torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)

    def encode_images(self, pixel_values, pixel_mask):
        """pixel_values (N,3,H,W) of the config's size, pixel_mask all True → (N,n_latents,d_vision)."""
        states = self.model.vision_model(pixel_values.to(self.dtype))
        return self.model.perceiver_resampler(states)

    def pictures(self, input_ids, image_features, cache=None):
        """What the blocks look at; None: no pictures but those in the cache."""
        counts = (input_ids == self.config.image_token_id).sum(1)
        if not counts.any():
            return None
        which = latest_picture(input_ids, self.config.image_token_id, self.config.text.eos_token_id)
        kept = cache and cache.pictures.get(0)
        return Pictures(which, counts, image_features.to(which.device), kept and kept[2])


# --- Prompts and image transform ----------------------------------------------------------------------------
def one_line(templates):
    """The templates with all on the picture's line, without the misspelt token, as in the official code."""
    cues = {"vqa": "Image:<image> Question: {question} Answer:", "caption": "Image:<image> Caption:"}
    return {task: replace(template, query=cues.get(task, template.query), end="\n",
                          instruction=template.instruction.replace("<end_of_outterance>", ""))
            for task, template in templates.items()}


class Idefics1Processor(Processor):
    """Text → ids, PIL images → pixels: one <image> token a picture, every picture a square of one size."""
    config_class = Idefics1Config
    templates = one_line(TEMPLATES)
    official_templates = one_line(OFFICIAL_TEMPLATES)
    counts_separators = False

    def __init__(self, tokenizer, config, image_size=0, mean=(0.48145466, 0.4578275, 0.40821073),
                 std=(0.26862954, 0.26130258, 0.27577711), rescale=1 / 255,
                 resample=Image.Resampling.BICUBIC):
        super().__init__(tokenizer, config, mean=mean, std=std, rescale=rescale, resample=resample)
        self.side = image_size or config.vision.image_size                                 # pixels

    @staticmethod
    def sizes(raw):
        size = raw.get("size")
        side = size.get("height") if isinstance(size, dict) else size
        return {"image_size": pixels(raw.get("image_size") or side)}

    def resized(self, width, height):
        return self.side, self.side           # whatever the picture

    def expand(self, text):
        """As Idefics2's, but spaces beside a picture go."""
        return super().expand(re.sub(" *<image> *", "<image>", text))
