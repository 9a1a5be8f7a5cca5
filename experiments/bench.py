"""Seconds, side by side with transformers. What was found so far: BENCHMARKS.md.

    python -m experiments.bench --pictures FOLDER              # ten minutes on two cores
    python -m experiments.bench --size full --only latency     # Idefics2-8b-base's exact shape

train     5 MimIC steps on 8 demonstrations, pictures encoded once; beside 5 as the official code does them
generate  9 pictures encoded; 10 tokens behind prompts whose pictures are encoded
latency   a token, that is the prefill, and 10 tokens under MimIC; beside no shifts

Weights are random (they change no time), questions the toy's. Ours and the peer's alternate in one process;
seconds are medians of --repeats, behind a first call of each.
"""

import statistics
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from PIL import Image

from data import TEMPLATES, Processor, collate, load, prompts
from mimic import MimIC
from model import Config, Idefics2, PerceiverConfig, TextConfig, VisionConfig
from support.files import InputError, chunks, read_tokenizer, run_command
from support.kernels import clock
from support.options import Parser, number
from support.pictures import encode_images
from train import losses

MID = Config(VisionConfig(192, 768, 7, 3), PerceiverConfig(64, 3, 8, 64, 4), TextConfig(512, 1408, 8, 8, 4))
SIZES = {"mid": (MID, torch.float32), "full": (Config(), torch.bfloat16)}
COCO_SIZES = (640, 480), (480, 640), (640, 427), (640, 480)        # width and height, pixels
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH, SHOTS, EPOCHS = 2, 8, 5         # of a training
NEW_TOKENS = 10
TEMPLATE = TEMPLATES["toy"]


# ---- What is measured: a random model, prompts of the toy world about larger pictures
def random_model(config, dtype=torch.float32):
    """→ the model, and a processor of its sizes."""
    tokenizer = read_tokenizer("checkpoints/tiny/tokenizer.json")
    config = replace(config, image_token_id=tokenizer.token_to_id("<image>"))
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with DEVICE:
        model = Idefics2(config)
    torch.set_default_dtype(torch.float32)
    side = config.vision.image_size
    processor = Processor(tokenizer, config, longest_edge=side, shortest_edge=min(side, 378))
    return model.requires_grad_(False).eval(), processor


def some_samples(folder, n):
    """Of the toy world, but with the folder's JPEGs, or noise."""
    found = [Image.effect_noise(size, 99) for size in COCO_SIZES]
    if folder:
        found = sorted(Path(folder).rglob("*.jpg"))[:n]
    if not found:
        raise InputError(f"--pictures {folder}: expected JPEGs, found none")
    samples = load("toy", "data", "train")[:n]
    return [replace(s, image_id=i, image=found[i % len(found)]) for i, s in enumerate(samples)]


def pixels(processor, samples, B=1):
    """The peer's pictures, B rows of them, padded to one size: values (B,N,3,H,W), mask (B,N,H,W)."""
    values, mask = processor.images([s.picture() for s in samples])
    return [x.unflatten(0, (B, -1)).to(DEVICE) for x in (values, mask)]


# ---- The peer: transformers' Idefics2, and a MimIC step on it as the official code does it
def theirs(model, attention):
    """transformers' Idefics2 around the very tensors of our model. attention: "eager" or "sdpa"."""
    import transformers
    from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
    transformers.logging.set_verbosity_error()
    c = model.config
    perceiver = asdict(c.perceiver) | {"hidden_size": c.text.hidden_size}
    config = transformers.Idefics2Config(text_config=asdict(c.text), perceiver_config=perceiver,
                                         vision_config=asdict(c.vision), image_token_id=c.image_token_id)
    config._attn_implementation = attention
    with torch.device("meta"):
        peer = transformers.Idefics2ForConditionalGeneration(config)
    peer.load_state_dict(model.state_dict(), assign=True)
    peer.model.text_model.rotary_emb = MistralRotaryEmbedding(peer.config.text_config).to(DEVICE)
    peer.generation_config.update(eos_token_id=2, pad_token_id=0, bos_token_id=1)
    return peer.requires_grad_(False).eval()


def update(align, ce, mimic, optimiser):
    (align + 0.5 * ce).backward()
    torch.nn.utils.clip_grad_norm_(mimic.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad()


class OfficialStep:
    """A training step as the official code does it, on transformers' Idefics2: eager attention and the shift,
    log Z2 by a second q·k over all keys, FFN outputs by hooks, pictures in both passes, all tokens' loss."""

    def __init__(self, model, mimic):
        self.model = theirs(model, "eager")
        self.mimic = mimic
        self.optimiser = torch.optim.AdamW(mimic.parameters(), lr=1e-3)
        for layer in self.model.model.text_model.layers:
            layer.mlp.register_forward_hook(lambda _module, _inputs, out: self.ffn.append(out))

    def attention(self, module, q, k, v, mask, scaling, **more):
        """transformers' attention, and the shift."""
        out, weights = self.eager(module, q, k, v, mask, scaling, **more)
        layer = module.layer_idx
        keys = k.repeat_interleave(module.num_key_value_groups, 1)
        log_z2 = (q @ keys.transpose(2, 3) * scaling).float().logsumexp(-1).transpose(1, 2)      # (B,T,H)
        log_z1 = torch.einsum("bhtd,hd->bth", q.float(), self.mimic.f_weight[layer])
        log_z1 = log_z1 + self.mimic.f_bias[layer]
        mu = (log_z1 - torch.logaddexp(log_z1, log_z2)).exp().unsqueeze(-1)
        return out + (mu * self.mimic.vector[layer]).to(out.dtype), weights

    def run(self, rows, pictures, labels=None):
        """One pass → transformers' output, and the FFNs' outputs."""
        self.ffn = []
        values, mask = pictures
        out = self.model(input_ids=rows.input_ids.to(DEVICE), labels=labels, pixel_values=values,
                         pixel_attention_mask=mask, attention_mask=rows.attention_mask.to(DEVICE).long())
        return out, self.ffn

    def __call__(self, batch, teacher_pixels, student_pixels):
        from transformers.models.mistral import modeling_mistral as mistral
        self.eager = mistral.eager_attention_forward
        with torch.no_grad():
            _, teacher = self.run(batch.teacher, teacher_pixels)
        with mock.patch.object(mistral, "eager_attention_forward", self.attention):
            out, student = self.run(batch.student, student_pixels, batch.student.input_ids.to(DEVICE))
        errors = [F.mse_loss(s[:, -batch.T_q:].float(), t[:, -batch.T_q:].float())
                  for s, t in zip(student, teacher, strict=True)]
        update(sum(errors) / len(errors), out.loss, self.mimic, self.optimiser)


# ---- The benches: (model, processor, folder of pictures) → rows of what, batch, our call, the peer's call
def bench_train(model, processor, folder):
    samples = some_samples(folder, BATCH * (SHOTS + 1))
    batch = collate(samples[:BATCH], chunks(samples[BATCH:], SHOTS), processor, TEMPLATE)
    features = encode_images(model, processor, samples, {})
    mimic = MimIC.for_model(model)
    optimiser = torch.optim.AdamW(mimic.parameters(), lr=1e-3)
    official_step = OfficialStep(model, MimIC.for_model(model))
    passes = [pixels(processor, rows.samples, BATCH) for rows in (batch.teacher, batch.student)]

    def ours():
        features.update(encode_images(model, processor, batch.student.samples, {}))
        for _ in range(EPOCHS):
            align, ce = losses(model, mimic, batch, features)
            update(align, ce, mimic, optimiser)

    def peer():
        for _ in range(EPOCHS):
            official_step(batch, *passes)

    yield f"{EPOCHS} steps", BATCH, ours, peer


def bench_generate(model, processor, folder):
    other = theirs(model, "sdpa")
    samples = some_samples(folder, SHOTS + 1)
    yield ("pictures", len(samples), lambda: encode_images(model, processor, samples, {}),
           lambda: other.model.get_image_features(*pixels(processor, samples)))
    features = encode_images(model, processor, samples, {})
    for B, beams in (1, 1), (1, 3), (16, 1), (16, 3):
        prompt = prompts(samples[:1] * B, [[]] * B, processor, TEMPLATE).inputs(model, features)
        options = {"max_new_tokens": NEW_TOKENS, "num_beams": beams, "length_penalty": 0.0}
        ours = partial(model.generate, **prompt, **options, banned_ids=[2])
        embeds = model.embed(prompt["input_ids"], prompt["image_features"])
        peer = partial(other.generate, inputs_embeds=embeds, attention_mask=prompt["attention_mask"].long(),
                       min_new_tokens=NEW_TOKENS, **options)
        yield f"{NEW_TOKENS} tokens, beams: {beams}", B, ours, peer


def bench_latency(model, processor, folder):
    samples = some_samples(folder, 1)
    features = encode_images(model, processor, samples, {})
    mimic = MimIC.for_model(model)
    for B in 1, 3, 16:
        prompt = prompts(samples * B, [[]] * B, processor, TEMPLATE).inputs(model, features)
        for n in 1, NEW_TOKENS:
            peer = partial(model.generate, **prompt, max_new_tokens=n, banned_ids=[2])
            yield f"{n} tokens, MimIC", B, partial(peer, shifts=mimic), peer


def seconds(call):
    began = clock(DEVICE)
    call()
    return clock(DEVICE) - began


BENCHES = {"train": bench_train, "generate": bench_generate, "latency": bench_latency}


def main(argv=None):
    parser = Parser(__doc__, "python -m experiments.bench")
    add = parser.add_argument
    add("--only", nargs="+", choices=BENCHES, default=BENCHES, help="(default: all)")
    add("--size", choices=SIZES, default="mid", help="(default %(default)s)")
    add("--repeats", type=number(int, 1), default=3, help="(default %(default)s)")
    add("--pictures", metavar="FOLDER", help="JPEGs to encode (default: noise)")
    args = parser.parse(argv)
    print(f"{args.size:<18}{'batch':>6}{'ours, s':>10}{'peer, s':>10}{'ratio':>8}")
    for name in args.only:
        for what, batch, *calls in BENCHES[name](*random_model(*SIZES[args.size]), args.pictures):
            runs = [[seconds(call) for call in calls] for _ in range(args.repeats + 1)]
            ours, peer = map(statistics.median, zip(*runs[1:], strict=True))
            print(f"{what:<18}{batch:>6}{ours:>10.3g}{peer:>10.3g}{peer / ours:>8.2f}", flush=True)


if __name__ == "__main__":
    run_command(main)
