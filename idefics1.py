"""Idefics1 (idefics-9b) from scratch, the paper's second model: the decoder looks at pictures by cross-attention.

    model = Idefics1.from_pretrained("idefics-9b", dtype=torch.bfloat16, device="cuda")      # the calls are those of Idefics2:
    image_features = model.encode_images(pixel_values, pixel_mask)                           # (N,n_latents,d_vision)
    logits = model(input_ids, attention_mask, image_features, shifts=…)                      # one <image> token a picture

An Idefics2 has its pictures among the tokens. Here a prompt has one <image> token for each, an ordinary word; before every 4th
layer the states go through a gated block that attends to the latest picture at or before the token:

    x ← x + tanh(α) · CrossAttention(RMS(x), picture)          0 where there is no picture yet
    x ← x + tanh(α') · SwiGLU(RMS(x))                          for every token

Shifts see the layers of the decoder alone, not these blocks. What is not here is imported from model.py and data.py; letters as
there, M pictures of a prompt, n latents of a picture. Reference: Laurençon et al. 2023 (OBELICS), after Alayrac et al. 2022
(Flamingo); the published behaviour is that of transformers' IdeficsForVisionText2Text, which the tests take as the judge.
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
    InputError,
    Linear,
    RMSNorm,
    SwiGLU,
    TextConfig,
    TextModel,
    VisionConfig,
    VisionLayer,
    decoder_section,
    expect,
    fill,
    merge_heads,
    read_config,
    refuse,
    sdpa,
    section,
    split_heads,
    whole_number,
)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes: what a file leaves out is what idefics-9b has
# ---------------------------------------------------------------------------------------------------------------------
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
class ResamplerConfig:
    resampler_n_latents: int = 64
    resampler_depth: int = 6
    resampler_n_heads: int = 16
    resampler_head_dim: int = 96
    qk_layer_norms_perceiver: bool = True


@dataclass
class LlamaConfig(TextConfig):
    """LLaMA-7B with two more tokens and the cross-attention blocks."""
    intermediate_size: int = 11008
    num_key_value_heads: int = 0      # 0 = as many as heads
    vocab_size: int = 32002           # the additional ones included (the file's vocab_size is without them)
    rms_norm_eps: float = 1e-6
    sliding_window: int = 0
    additional_vocab_size: int = 2
    cross_layer_interval: int = 4     # a block before the layers 0, 4, 8 …
    qk_layer_norms: bool = True       # of the blocks' queries and keys
    vector_gates: bool = False        # α for every dimension ("alpha_type": "vector"), not one for all


@dataclass
class Idefics1Config(Config):
    vision: ClipConfig = field(default_factory=ClipConfig)
    perceiver: ResamplerConfig = field(default_factory=ResamplerConfig)
    text: LlamaConfig = field(default_factory=LlamaConfig)
    use_resampler: bool = True        # without: a picture is its patches, class token first

    @property
    def tokens_per_image(self):
        return 1

    def __post_init__(self):
        self.text.head_dim = self.text.head_dim or self.text.hidden_size // self.text.num_attention_heads
        self.text.num_key_value_heads = self.text.num_key_value_heads or self.text.num_attention_heads

    @classmethod
    def from_file(cls, path):
        """config.json as published or as transformers saves it. Raises InputError for what this model is not."""
        raw = read_config(path, "idefics")
        vision, perceiver = section(raw, "vision_config", path), section(raw, "perceiver_config", path)
        for part, name, value in (vision, "hidden_act", "gelu"), (raw, "hidden_act", "silu"):
            expect(part, name, value, path)
        if raw.get("alpha_type", "float") not in ("float", "vector"):
            refuse(path, "alpha_type", "'float' or 'vector'", raw["alpha_type"])
        if not isinstance(raw.get("use_resampler", True), bool):
            refuse(path, "use_resampler", "to be bool", raw["use_resampler"])
        words, additional = whole_number(raw, "vocab_size", 32000, path), whole_number(raw, "additional_vocab_size", 2, path)
        text = {**decoder_section(raw, path), "vocab_size": words + additional, "additional_vocab_size": None,
                "vector_gates": raw.get("alpha_type") == "vector"}
        config = cls(fill(ClipConfig, {**vision, "hidden_size": vision.get("embed_dim")}, path, "vision_config "),
                     fill(ResamplerConfig, perceiver, path, "perceiver_config "), fill(LlamaConfig, text, path),
                     whole_number(raw, "image_token_id", words + 1, path), raw.get("use_resampler", True))
        config.text.additional_vocab_size = additional
        for what, size, parts in (("vision_config embed_dim", config.vision.hidden_size, config.vision.num_attention_heads),
                                  ("hidden_size", config.text.hidden_size, config.text.num_attention_heads),
                                  ("num_hidden_layers", config.text.num_hidden_layers, config.text.cross_layer_interval)):
            if size % parts:
                refuse(path, what, f"to be a multiple of {parts}", size)
        return config


# ---------------------------------------------------------------------------------------------------------------------
# Vision tower (CLIP): a class token, learnt positions, no layer norm behind the last layer
# ---------------------------------------------------------------------------------------------------------------------
class ClipEmbeddings(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(c.hidden_size))
        self.patch_embedding = nn.Conv2d(c.num_channels, c.hidden_size, c.patch_size, c.patch_size, bias=False)
        self.position_embedding = nn.Embedding((c.image_size // c.patch_size) ** 2 + 1, c.hidden_size)

    def forward(self, pixel_values):
        x = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)                         # (N,P,d)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        return x + self.position_embedding.weight


class ClipModel(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embeddings = ClipEmbeddings(c)
        self.pre_layrnorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)                         # the published spelling
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(VisionLayer(c) for _ in range(c.num_hidden_layers))})
        self.post_layernorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)                       # in the file, never used

    def forward(self, pixel_values):
        """(N,3,H,W) → (N,1+P,d), the class token first."""
        x = self.pre_layrnorm(self.embeddings(pixel_values))
        for layer in self.encoder["layers"]:
            x = layer(x, None)
        return x


# ---------------------------------------------------------------------------------------------------------------------
# Resampler: patches → n latents in the tower's width
# ---------------------------------------------------------------------------------------------------------------------
class ResamplerAttention(nn.Module):
    def __init__(self, c, d):
        super().__init__()
        self.n_heads, inner = c.resampler_n_heads, c.resampler_n_heads * c.resampler_head_dim
        self.context_layer_norm, self.latents_layer_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.q_layer_norm, self.k_layer_norm = (
            nn.LayerNorm(c.resampler_head_dim) if c.qk_layer_norms_perceiver else nn.Identity() for _ in range(2))
        self.q_proj, self.k_proj, self.v_proj = (Linear(d, inner, bias=False) for _ in range(3))
        self.output_proj = Linear(inner, d, bias=False)

    def forward(self, latents, context):
        latents = self.latents_layer_norm(latents)
        both = torch.cat([self.context_layer_norm(context), latents], 1)
        q, k, v = (split_heads(x, self.n_heads) for x in (self.q_proj(latents), self.k_proj(both), self.v_proj(both)))
        return self.output_proj(merge_heads(sdpa(self.q_layer_norm(q), self.k_layer_norm(k), v, None)))


class ResamplerMLP(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.ln, self.fc, self.c_proj = nn.LayerNorm(d), Linear(d, 4 * d, bias=False), Linear(4 * d, d, bias=False)

    def forward(self, x):
        return self.c_proj(F.relu(self.fc(self.ln(x))))


class Resampler(nn.Module):
    def __init__(self, c, d):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(c.resampler_n_latents, d))
        self.blocks = nn.ModuleList(
            nn.ModuleList([ResamplerAttention(c, d), ResamplerMLP(d)]) for _ in range(c.resampler_depth))
        self.layer_norm = nn.LayerNorm(d)

    def forward(self, context):
        """context (N,P,d) → (N,n,d). The latents attend to the context and to themselves."""
        latents = self.latents.expand(len(context), -1, -1)
        for attention, mlp in self.blocks:
            latents = latents + attention(latents, context)
            latents = latents + mlp(latents)
        return self.layer_norm(latents)


# ---------------------------------------------------------------------------------------------------------------------
# Decoder: LLaMA with cross-attention between its layers
# ---------------------------------------------------------------------------------------------------------------------
class WordEmbedding(nn.Embedding):
    """Two tables: the words of LLaMA, and the ids behind them."""

    def __init__(self, n_words, n_more, d):
        super().__init__(n_words, d)
        self.additional_embedding = nn.Embedding(n_more, d) if n_more else None

    def forward(self, ids):
        x, last = F.embedding(ids.clamp(max=self.num_embeddings - 1), self.weight), self.num_embeddings - 1
        if self.additional_embedding is None:
            return x
        more = self.additional_embedding((ids - self.num_embeddings).clamp(min=0))
        return torch.where((ids > last).unsqueeze(-1), more, x)


class WordLogits(Linear):
    """d → logits of the words of LLaMA, then of the ids behind them."""

    def __init__(self, d, n_words, n_more):
        super().__init__(d, n_words, bias=False)
        self.additional_fc = Linear(d, n_more, bias=False) if n_more else None

    def forward(self, x):
        logits = super().forward(x)
        return logits if self.additional_fc is None else torch.cat([logits, self.additional_fc(x)], -1)


class CrossAttention(nn.Module):
    def __init__(self, c, d_vision):
        super().__init__()
        self.n_heads, d = c.num_attention_heads, c.hidden_size
        self.q_proj, self.o_proj = (Linear(d, d, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (Linear(d_vision, d, bias=False) for _ in range(2))
        self.q_layer_norm, self.k_layer_norm = (
            RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_layer_norms else nn.Identity() for _ in range(2))

    def keys_values(self, features):
        """(B,S,d_vision) → (B,H,S,D) each. No rotation: a picture has no position."""
        k, v = (split_heads(proj(features), self.n_heads) for proj in (self.k_proj, self.v_proj))
        return self.k_layer_norm(k), v

    def forward(self, x, k, v, mask):
        q = self.q_layer_norm(split_heads(self.q_proj(x), self.n_heads))
        return self.o_proj(merge_heads(sdpa(q, k, v, mask)))


class GatedBlock(nn.Module):
    def __init__(self, c, d_vision):
        super().__init__()
        d, gate = c.hidden_size, (1, 1, c.hidden_size) if c.vector_gates else (1,)
        self.cross_attn, self.mlp = CrossAttention(c, d_vision), SwiGLU(d, c.intermediate_size, d)
        self.input_layernorm, self.post_attention_layernorm = (RMSNorm(d, c.rms_norm_eps) for _ in range(2))
        self.alpha_cross_attn, self.alpha_dense = (nn.Parameter(torch.zeros(gate)) for _ in range(2))

    def forward(self, x, k=None, v=None, mask=None, seen=None):
        """x (B,T,d); k, v (B,H,S,D), mask (B,1,T,S) bool, seen (B,T,1) bool: which tokens have a picture. No k: none has."""
        if k is not None:
            found = self.cross_attn(self.input_layernorm(x), k, v, mask)
            x = x + torch.tanh(self.alpha_cross_attn) * found.masked_fill(~seen, 0)
        return x + torch.tanh(self.alpha_dense) * self.mlp(self.post_attention_layernorm(x))


def latest_picture(input_ids, image_id, end_id):
    """The number of the picture that a token looks at, (B,T) → (B,T): the latest at or before it in its row, −1 = none.

    None before the first one, and none behind an end token until the next one."""
    column = torch.arange(input_ids.shape[1], device=input_ids.device)
    image_at, end_at = (torch.where(input_ids == i, column, -1).cummax(1).values for i in (image_id, end_id))
    ended = F.pad(end_at[:, :-1], (1, 0), value=-1) > image_at
    return ((input_ids == image_id).cumsum(1) - 1).masked_fill(ended, -1)


class Pictures:
    """The pictures of B prompts as the blocks read them: .features (B,M·n,d_vision), M those of the row that has most, zeros
    behind the others' own; .mask (B,1,T,S·n) bool, a token sees the latest; .seen (B,T,1) bool, False = no picture yet.

    kept (B,1,1) bool: the rows of which an earlier pass has left a picture. It stands before the new ones: S = 1 + M, else M."""

    def __init__(self, which, counts, image_features, kept=None):
        numbers, self.n = torch.arange(int(counts.max()), device=which.device), image_features.shape[1]
        features = image_features.new_zeros(len(counts), len(numbers), *image_features.shape[1:])
        features[numbers < counts[:, None]] = image_features
        self.features, self.seen = features.flatten(1, 2), (which >= 0).unsqueeze(-1)
        if kept is not None:
            which, self.seen, numbers = which + 1, self.seen | kept, F.pad(numbers + 1, (1, 0))
        sees = (which.unsqueeze(-1) == numbers) | ~self.seen          # without a picture a token looks at all, and what it finds
        self.mask = sees.repeat_interleave(self.n, -1).unsqueeze(1)   # is dropped: a softmax over nothing has no good gradient
        self.at_last = which[:, -1].clamp(min=0)

    def last(self, x):
        """Of keys or values x (B,H,S·n,D) those of the picture that the last column looks at, (B,H,n,D)."""
        return x.unflatten(2, (-1, self.n))[torch.arange(len(x), device=x.device), :, self.at_last]


class CrossDecoder(TextModel):
    """Everything but the logits, under the published names; as a text_model it is the decoder with its blocks."""

    def __init__(self, c):
        super().__init__(c.text)
        t, d_vision = c.text, c.vision.hidden_size
        self.embed_tokens = WordEmbedding(t.vocab_size - t.additional_vocab_size, t.additional_vocab_size, t.hidden_size)
        self.crossed = range(0, t.num_hidden_layers, t.cross_layer_interval)
        self.gated_cross_attn_layers = nn.ModuleList(GatedBlock(t, d_vision) for _ in self.crossed)
        self.vision_model = ClipModel(c.vision)
        self.perceiver_resampler = Resampler(c.perceiver, d_vision) if c.use_resampler else nn.Identity()

    def enter(self, layer, x, pictures, cache=None):
        """The block before a layer.  x (B,T,d) → (B,T,d). pictures: of `Idefics1.pictures`. Each pass leaves keys and values of
        every row's last picture in the cache: what the next tokens look at."""
        block = self.gated_cross_attn_layers[self.crossed.index(layer)]
        k, v, seen = cache.pictures.get(layer, (None,) * 3) if cache is not None else (None,) * 3
        if pictures is None:
            return block(x, k, v, None, seen)
        new_k, new_v = block.cross_attn.keys_values(pictures.features.to(x.dtype))
        k, v = (new_k, new_v) if k is None else (torch.cat([k, new_k], 2), torch.cat([v, new_v], 2))
        if cache is not None:
            cache.pictures[layer] = pictures.last(k), pictures.last(v), pictures.seen[:, -1:]
        return block(x, k, v, pictures.mask, pictures.seen)


# ---------------------------------------------------------------------------------------------------------------------
# The whole model
# ---------------------------------------------------------------------------------------------------------------------
class Idefics1(Idefics2):
    """from_pretrained, forward, hidden_states and generate are those of Idefics2."""
    config_class = Idefics1Config
    shots, epochs = 32, 10

    def build(self, config):
        t = config.text
        self.model = CrossDecoder(config)
        self.lm_head = WordLogits(t.hidden_size, t.vocab_size - t.additional_vocab_size, t.additional_vocab_size)

    @property
    def text_model(self):
        return self.model

    @property
    def eyes(self):
        return self.model.vision_model, self.model.perceiver_resampler

    def patches(self, pixel_values, pixel_mask):
        """The vision tower's last states (N,P,d_vision) without the class token, and which of them are picture (N,P): all."""
        states = self.tower(pixel_values, pixel_mask)[:, 1:]
        return states, torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)

    def tower(self, pixel_values, pixel_mask):
        side = self.config.vision.image_size
        if pixel_values.shape[-2:] != (side, side) or not pixel_mask.all():
            raise InputError(f"expected pictures of {side} x {side} pixels without padding, found "
                             f"{' x '.join(map(str, pixel_values.shape[-2:]))}, {int(pixel_mask.sum())} of "
                             f"{pixel_mask.numel()} pixels not padding")
        return self.model.vision_model(pixel_values.to(self.dtype))

    def encode_images(self, pixel_values, pixel_mask):
        """pixel_values (N,3,H,W), all of the one size, pixel_mask (N,H,W) all True → features (N,n_latents,d_vision)."""
        return self.model.perceiver_resampler(self.tower(pixel_values, pixel_mask))

    def embed(self, input_ids, image_features):
        """Token embeddings (B,T,d); of pictures they hold nothing but that there is one."""
        x = self.words(input_ids)
        n_tokens = int((input_ids == self.config.image_token_id).sum())
        n_images = 0 if image_features is None else len(image_features)
        if n_tokens != n_images:
            raise InputError(f"{n_tokens} image tokens in the prompts, but features of {n_images} images")
        return x

    def pictures(self, input_ids, image_features, cache=None):
        """What the blocks look at → Pictures, None if the prompts have none (or none that is not in the cache already)."""
        counts = (input_ids == self.config.image_token_id).sum(1)
        if not counts.any():
            return None
        which = latest_picture(input_ids, self.config.image_token_id, self.config.text.eos_token_id)
        kept = cache.pictures.get(0) if cache is not None else None
        return Pictures(which, counts, image_features.to(which.device), kept[2] if kept else None)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts and image transform
# ---------------------------------------------------------------------------------------------------------------------
def one_line(templates):
    """The templates with question and answer on the picture's line, and without the misspelt token: as the official code's."""
    cues = {"vqa": "Image:<image> Question: {question} Answer:", "caption": "Image:<image> Caption:"}
    instructions = {task: template.instruction.replace("<end_of_outterance>", "") for task, template in templates.items()}
    return {task: replace(template, query=cues.get(task, template.query), instruction=instructions[task], end="\n")
            for task, template in templates.items()}


class Idefics1Processor(Processor):
    """Text → ids, PIL images → pixels: one <image> token a picture, every picture a square of one size."""
    config_class = Idefics1Config
    templates, official_templates = one_line(TEMPLATES), one_line(OFFICIAL_TEMPLATES)
    counts_separators = False

    def __init__(self, tokenizer, config, image_size=0, mean=(0.48145466, 0.4578275, 0.40821073),
                 std=(0.26862954, 0.26130258, 0.27577711), rescale=1 / 255, resample=Image.Resampling.BICUBIC):
        super().__init__(tokenizer, config, mean=mean, std=std, rescale=rescale, resample=resample)
        self.side = image_size or config.vision.image_size

    @staticmethod
    def options(raw):
        """What preprocessor_config.json says, in the words of __init__."""
        size = raw.get("size")
        return {"image_size": raw.get("image_size") or (size.get("height") if isinstance(size, dict) else size)}

    def resized(self, width, height):
        """Width and height in pixels after the resize: a square, whatever the picture."""
        return self.side, self.side

    def expand(self, text):
        """<image> → fake token + <image> + fake token (<fake_token_around_image>); neighbours share one, spaces beside go."""
        return super().expand(re.sub(" *<image> *", "<image>", text))
