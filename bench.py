"""Seconds and memory, side by side with a peer.

    python bench.py                                       # every bench at toy and mid size
    python bench.py --size full --out bench.json          # Idefics2-8b-base's exact shape, random weights
    python bench.py --only train --size mid --repeats 5
    python bench.py --model idefics-9b                    # the shape in a folder's config.json, of either model; weights random

train     train_step: a MimIC step on 8 demonstrations, encoding of the pictures included as often as 5 epochs over 1,000 samples
          need it, beside the step as the official code does it: transformers' Idefics2, hooks on its FFNs, both passes over all
          pictures with eager attention, logits and LM loss of every token, log Z2 by a second q·k. train_step_shared: the same
          with --share-icds
generate  encode: 9 pictures; generate: 10 tokens behind 1 and 16 prompts with encoded pictures, 1 and 3 beams; both beside
          transformers
okvqa_run (after train and generate) the paper's OK-VQA run, projected: 1,000 samples x 5 epochs, then 5,046 answers of 3 beams
latency   prefill and decoding of one token under MimIC and LIVE, beside the model without shifts (ratio 1 = costs nothing; batch
          3 = the beams of one prompt); mimic_prefill_8 …: MimIC's prompt beside that of ICL with as many demonstrations
load      from_pretrained, and one pass that reads every weight, beside transformers (the files are in the system's cache)
fit       fit_layerwise: `--fit layerwise` beside end-to-end training, both on 8 demonstrations. At full size one layer and one
          batch are measured and the rest extrapolated; states that would lie on disk are not part of it
cider     ours beside pycocoevalcap (to be installed, with Java): of each picture of --captions the first caption is scored
          against the others

Weights and tokens are random (they change no time), pictures those of --pictures or noise of COCO's usual sizes. Ours and the
peer's alternate in one process (load and fit: a process each), and the median of --repeats counts. peak GiB is what a call needs
beside the weights, at load and fit that of the process. `ceiling`: share of what this machine can do at best, by the larger of
FLOPs / its fastest matrix product and bytes of weights / its fastest read, both measured first. At full size on a CPU the model
is a generated checkpoint of 16.8 GB in a temporary folder and has no peer. Prints a table; --out FILE writes JSON rows {what,
size, device, dtype, batch, ours_s, peer_s, ratio = peer/ours, peak_gib, peer_peak_gib, gflop, ceiling, about}.
"""

import argparse
import contextlib
import ctypes
import gc
import importlib.util
import json
import math
import multiprocessing
import resource
import statistics
import tempfile
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from baselines.live import LIVE
from data import Batch, Rows
from eval import classes_of, clock, run_command
from features import PIXELS_AT_ONCE, gather
from fit import advance, fit, fit_layer, is_demonstration, plan, student, teacher
from memory import keep_freed
from metrics import cider
from mimic import MimIC
from model import Config, Idefics2, InputError, KVCache, PerceiverConfig, TextConfig, VisionConfig, read_json
from results import write_atomically
from train import losses, parse

SIZES = {                              # shape, text tokens of an example (the last 3 are the answer), class
    "toy": (Config(VisionConfig(96, 192, 3, 4, 40, 8), PerceiverConfig(4, 1, 4, 32, 2),
                   TextConfig(128, 352, 6, 8, 4, vocab_size=130), image_token_id=4), 6, Idefics2),
    "mid": (Config(VisionConfig(192, 768, 7, 3), PerceiverConfig(64, 3, 8, 64, 4), TextConfig(512, 1408, 8, 8, 4)), 20, Idefics2),
    "full": (Config(), 20, Idefics2),
}
COCO_SIZES = (640, 480), (480, 640), (640, 427), (640, 480)        # pixels
SHOTS, EPOCHS, SAMPLES = 8, 5, 1000    # of the training whose step is measured
QUESTIONS = 5046                       # of OK-VQA's validation split
NEW_TOKENS = 10
MEMORY_GB = 0.12                       # of the layer-wise fit
FLOPS = {}                             # of operations that the counter does not know, by shapes
if torch.backends.mkldnn.is_available():
    FLOPS[torch.ops.mkldnn._linear_pointwise] = lambda x, w, *_, **__: 2 * math.prod(x) * w[0]                   # model.Linear's


# ---------------------------------------------------------------------------------------------------------------------
# What is measured: a random model, pictures, prompts
# ---------------------------------------------------------------------------------------------------------------------
def random_model(size, device, dtype, n_layers=None):
    """A model of that size with random weights; n_layers: of the decoder and of the vision tower, for a part of it."""
    config, _, kind = SIZES[size]
    if n_layers:
        config = replace(config, vision=replace(config.vision, num_hidden_layers=n_layers),
                         text=replace(config.text, num_hidden_layers=n_layers))
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = kind(config)
        torch.set_default_dtype(torch.float32)
    return model.requires_grad_(False).eval()


def write_checkpoint(folder, config, dtype=torch.bfloat16, shard_bytes=4e9):
    """A checkpoint as published, config.json, shards and their index, of random weights (one block of numbers, repeated)."""
    text = {**asdict(config.text), "model_type": "mistral", "sliding_window": config.text.sliding_window or None}
    (folder / "config.json").write_text(json.dumps({
        "model_type": "idefics2", "image_token_id": config.image_token_id, "vision_config": asdict(config.vision),
        "perceiver_config": asdict(config.perceiver) | {"hidden_size": config.text.hidden_size}, "text_config": text,
        "architectures": ["Idefics2ForConditionalGeneration"], "torch_dtype": str(dtype)[6:]}))
    (folder / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}')
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Idefics2(config).named_parameters()}
    block = torch.randn(max(s.numel() for s in shapes.values())).mul_(0.02).to(dtype)
    weight_map, shard, held = {}, {}, 0

    def flush():
        name = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape in shapes.items():
        x = block[:shape.numel()].view(shape)
        shard[name] = torch.ones(shape, dtype=dtype) if name.endswith("norm.weight") or "layer_norm" in name else x.clone()
        held += shape.numel() * dtype.itemsize
        if held > shard_bytes:
            flush()
            held = 0
    if shard:
        flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def random_batch(config, n_text, B, seed=0, shots=SHOTS, shared=False):
    """B queries behind `shots` demonstrations, random tokens, one picture an example, all examples of one length.

    Picture n of row b has image_id b·(shots+1) + n, the query's being the last; shared: the demonstrations of row 0 serve all."""
    g, one, images = torch.Generator().manual_seed(seed), config.tokens_per_image + n_text, shots + 1
    picture = [[SimpleNamespace(image_id=b * images + n) for n in range(images)] for b in range(B)]
    examples = torch.cat([torch.full((B, images, config.tokens_per_image), config.image_token_id),
                          torch.randint(5, 100, (B, images, n_text), generator=g)], 2)
    if shared:
        examples[:, :-1] = examples[:1, :-1]
        picture = [picture[0][:-1] + row[-1:] for row in picture]
    teacher = torch.cat([torch.ones(B, 1, dtype=torch.long), examples.flatten(1)], 1)
    student = torch.cat([teacher[:, :1], teacher[:, -one:]], 1)
    whole = torch.ones_like(student, dtype=torch.bool)
    answer, sequence = whole.clone(), whole.clone()
    answer[:, :-3], sequence[:, 0] = False, False
    n_shared = teacher.shape[1] - one if shared else 0
    return Batch(Rows(teacher, torch.ones_like(teacher, dtype=torch.bool), [s for row in picture for s in row]),
                 Rows(student, whole, [row[-1] for row in picture]), whole[:, 1:], answer, sequence, n_shared)


def pictures(args, config, n):
    """n pictures, as many of each size as COCO has of them → [(pixel_values (3,H,W))], normalised."""
    if config.vision.image_size < 378:                            # of one size: the toy's, and CLIP's
        return [torch.randn(3, config.vision.image_size, config.vision.image_size) for _ in range(n)]
    if args.pictures:
        from PIL import Image

        from data import Processor
        files = sorted(Path(args.pictures).rglob("*.jpg"))
        if not files:
            raise InputError(f"{args.pictures}: expected JPEGs, found none")
        stub = SimpleNamespace(token_to_id=lambda token: 0)
        processor = Processor(stub, config)
        return [processor.images([Image.open(files[i % len(files)])])[0][0] for i in range(n)]
    return [torch.randn(3, *COCO_SIZES[i % len(COCO_SIZES)][::-1]) for i in range(n)]


def padded_together(images):
    """Pictures as the published processor batches them: (1,N,3,H,W) of the largest sizes and the mask of their pixels."""
    H, W = (max(x.shape[i] for x in images) for i in (1, 2))
    mask = torch.stack([F.pad(torch.ones(x.shape[1:], dtype=torch.bool), (0, W - x.shape[2], 0, H - x.shape[1])) for x in images])
    return torch.stack([F.pad(x, (0, W - x.shape[2], 0, H - x.shape[1])) for x in images])[None], mask[None]


def encoded(model, images):
    """Features of the pictures, those of one size together, as features.encode_images does it (N,n_latents,d)."""
    by_size, features = {}, [None] * len(images)
    for i, x in enumerate(images):
        by_size.setdefault(x.shape, []).append(i)
    for (_, H, W), group in by_size.items():
        step = max(1, PIXELS_AT_ONCE // (H * W))
        for at in range(0, len(group), step):
            chunk = group[at:at + step]
            values = torch.stack([images[i] for i in chunk]).to(model.device)
            for i, x in zip(chunk, model.encode_images(values, torch.ones_like(values[:, 0], dtype=torch.bool)), strict=True):
                features[i] = x
    return torch.stack(features)


# ---------------------------------------------------------------------------------------------------------------------
# The peer: transformers' Idefics2, and a MimIC step on it as the official code does it
# ---------------------------------------------------------------------------------------------------------------------
def theirs(model, attention):
    """transformers' Idefics2 around the very tensors of our model. attention: "eager" or "sdpa"."""
    import transformers
    from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
    transformers.logging.set_verbosity_error()
    c = model.config
    text = {**asdict(c.text), "model_type": "mistral", "sliding_window": c.text.sliding_window or None,
            "rope_parameters": {"rope_type": "default", "rope_theta": c.text.rope_theta}}
    config = transformers.Idefics2Config(
        text_config=text, vision_config=asdict(c.vision), image_token_id=c.image_token_id,
        perceiver_config=asdict(c.perceiver) | {"hidden_size": c.text.hidden_size})
    config._attn_implementation = attention
    with torch.device("meta"):
        peer = transformers.Idefics2ForConditionalGeneration(config).eval()
    peer.load_state_dict(model.state_dict(), assign=True)
    peer.model.text_model.rotary_emb = MistralRotaryEmbedding(peer.config.text_config).to(model.device)
    peer.generation_config.update(eos_token_id=2, pad_token_id=0, bos_token_id=1)
    return peer.requires_grad_(False)


class OfficialStep:
    """One training step written the way the official code is, on transformers' Idefics2 with eager attention.

    The decoder's attention is replaced by one that adds the shift, log Z2 from a second q·k over all keys; hooks keep each FFN's
    output; both passes encode all their pictures; the student's makes logits and a loss of every token."""

    def __init__(self, model, mimic):
        self.model, self.mimic, self.shifting, self.ffn = theirs(model, "eager"), mimic, False, []
        for layer in self.model.model.text_model.layers:
            layer.mlp.register_forward_hook(lambda _module, _inputs, out: self.ffn.append(out))
        self.optimiser = torch.optim.AdamW(mimic.parameters(), lr=1e-3)

    def attention(self, module, q, k, v, mask, scaling, **more):
        from transformers.models.mistral.modeling_mistral import repeat_kv
        out, weights = self.eager(module, q, k, v, mask, scaling, **more)
        if self.shifting:
            layer, mimic = module.layer_idx, self.mimic
            log_z2 = ((q @ repeat_kv(k, module.num_key_value_groups).transpose(2, 3)) * scaling).float().logsumexp(-1)
            log_z1 = torch.einsum("bhtd,hd->bth", q.float(), mimic.f_weight[layer]) + mimic.f_bias[layer]
            mu = (log_z1 - torch.logaddexp(log_z1, log_z2.transpose(1, 2))).exp()
            out = out + (mu.unsqueeze(-1) * mimic.vector[layer]).to(out.dtype)
        return out, weights

    def run(self, rows, images, shifting, labels=None):
        from transformers.models.mistral import modeling_mistral
        self.eager, self.shifting, self.ffn = modeling_mistral.eager_attention_forward, shifting, []
        B, device = len(rows.input_ids), self.model.device
        values, mask = padded_together(images)
        values, mask = (x.view(B, -1, *x.shape[2:]).to(device) for x in (values.to(self.model.dtype), mask))
        with mock.patch.object(modeling_mistral, "eager_attention_forward", self.attention):
            out = self.model(input_ids=rows.input_ids.to(device), attention_mask=rows.attention_mask.to(device).long(),
                             pixel_values=values, pixel_attention_mask=mask, labels=labels)
        return out, self.ffn

    def __call__(self, batch, images):
        T = batch.align.shape[1]
        with torch.no_grad():
            _, teacher = self.run(batch.teacher, [images[s.image_id] for s in batch.teacher.samples], False)
        out, student = self.run(batch.student, [images[s.image_id] for s in batch.student.samples], True,
                                batch.student.input_ids.to(self.model.device))
        errors = [F.mse_loss(s[:, -T:].float(), t[:, -T:].float()) for s, t in zip(student, teacher, strict=True)]
        align = sum(errors) / len(errors)
        (align + 0.5 * out.loss).backward()
        torch.nn.utils.clip_grad_norm_(self.mimic.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------
class Peak:
    """Peak memory of what runs inside, in GiB above what was there before: .gib, None where the machine does not say."""

    def __init__(self, device):
        self.cuda, self.status = device.startswith("cuda"), Path("/proc/self/status")

    def rss(self, name):
        return next(int(line.split()[1]) for line in self.status.read_text().splitlines() if line.startswith(name)) / 2**20

    def __enter__(self):
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        elif self.status.exists():
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)                  # or the allocator answers with what it kept of earlier calls
            Path("/proc/self/clear_refs").write_text("5")         # VmHWM starts anew
            self.before = self.rss("VmRSS")
        return self

    def __exit__(self, *_):
        self.gib = None
        if self.cuda:
            self.gib = (torch.cuda.max_memory_allocated() - self.before) / 2**30
        elif self.status.exists():
            self.gib = self.rss("VmHWM") - self.before


def seconds_of(run, device):
    began = clock(device)
    run()
    return clock(device) - began


def side_by_side(args, ours, peer, n_bytes=0, repeats=None, **more):
    """ours {what: call} and the peer's call (None: there is none) → a row for each: seconds are medians of `repeats` (default
    args.repeats), alternating, after a first call of each that says its peak of memory and its FLOPs; 0: seconds of the first.

    n_bytes: of the weights that a call reads, for its share of the ceiling."""
    device, calls, firsts = torch.device(args.device), {**ours, **({None: peer} if peer else {})}, {}
    for what, call in calls.items():
        with Peak(args.device) as peak, FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
            seconds = seconds_of(call, device)
        firsts[what] = seconds, peak.gib, counter.get_total_flops()
    runs = {what: [] for what in calls}
    for _ in range(args.repeats if repeats is None else repeats):
        for what, call in calls.items():
            runs[what].append(seconds_of(call, device))
    seconds = {what: statistics.median(r or [firsts[what][0]]) for what, r in runs.items()}
    return [row(what, seconds[what], seconds.get(None), firsts[what][1], firsts[None][1] if peer else None,
                gflop=firsts[what][2] / 1e9, ceiling=share_of_ceiling(args, seconds[what], firsts[what][2], n_bytes), **more)
            for what in ours]


def row(what, ours_s, peer_s, peak, peer_peak, size="-", batch=1, about="", **more):
    return {"what": what, "size": size, "batch": batch, "ours_s": ours_s, "peer_s": peer_s,
            "ratio": peer_s / ours_s if peer_s else None, "peak_gib": peak, "peer_peak_gib": peer_peak, **more, "about": about}


def ceilings(device, dtype):
    """This machine's fastest matrix product (FLOP/s) and read of memory (bytes/s), best of five."""
    n, m = (8192, 2**16) if device.startswith("cuda") else (2048, 2**14)
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(m, 8192, device=device, dtype=dtype)
    x = torch.randn(8192, device=device, dtype=dtype)

    def best(run):
        run()
        return min(seconds_of(run, torch.device(device)) for _ in range(5))

    read = min(best(lambda: b @ x), best(lambda: F.linear(x[None], b)))           # which is faster depends on dtype and machine
    return 2 * n**3 / best(lambda: a @ a), b.numel() * dtype.itemsize / read


def share_of_ceiling(args, seconds, flops, n_bytes):
    """Of what the machine can do at best; None where its best was not measured."""
    if not args.ceilings:
        return None
    return max(flops / args.ceilings[0], n_bytes / args.ceilings[1]) / seconds


def weight_bytes(module):
    return sum(p.numel() * p.element_size() for p in module.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Training steps
# ---------------------------------------------------------------------------------------------------------------------
def bench_train(args, size):
    model, n_text, B = args.models(size), SIZES[size][1], args.batch_size or {"toy": 4, "full": 1}.get(size, 2)
    if size == "full" and args.device.startswith("cuda"):
        B = args.batch_size or 8
    mimic, images = MimIC.for_model(model), pictures(args, model.config, B * (SHOTS + 1))
    images = [x.to(model.dtype) for x in images]
    features, repeats = {}, 0 if args.slow(size) else args.repeats

    @torch.no_grad()
    def encode():
        features.update(enumerate(encoded(model, images)))

    one = statistics.median(seconds_of(encode, model.device) for _ in range(repeats + 1)) / len(images)
    settings, optimiser = parse([]), torch.optim.AdamW(mimic.parameters(), lr=1e-3)

    def step(batch):
        align, ce = losses(model, mimic, batch, features, settings)
        (align + 0.5 * ce).backward()
        torch.nn.utils.clip_grad_norm_(mimic.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    peer = None if args.alone(size) else OfficialStep(model, MimIC.for_model(model))
    batches = {what: random_batch(model.config, n_text, B, shared=shared)
               for what, shared in (("train_step", False), ("train_step_shared", True))}
    for found in side_by_side(args, {what: partial(step, batch) for what, batch in batches.items()},
                              peer and partial(peer, batches["train_step"], images),
                              3 * weight_bytes(model.text_model), repeats, size=size, batch=B):         # teacher, student, back
        found["about"] = (f"step {found['ours_s']:.3g} s + {B / EPOCHS:g} pictures of {one:.3g} s; "
                          f"{1000 * (found['ours_s'] / B + one / EPOCHS):.3g} ms a sample")
        found["ours_s"] += one * B / EPOCHS
        yield found | ({"ratio": found["peer_s"] / found["ours_s"]} if peer else {})


# ---------------------------------------------------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def bench_generate(args, size):
    model, n_text, small = args.models(size), SIZES[size][1], args.slow(size)
    head, repeats = weight_bytes(model.text_model) + weight_bytes(model.lm_head), 0 if small else args.repeats
    peer, images = None if args.alone(size) else theirs(model, "sdpa"), pictures(args, model.config, 2 if small else SHOTS + 1)
    images = [x.to(model.dtype) for x in images]
    values, mask = (x.to(model.device) for x in padded_together(images))
    found, = side_by_side(args, {"encode": lambda: encoded(model, images)},
                          peer and (lambda: peer.model.get_image_features(values, mask)),
                          sum(map(weight_bytes, model.eyes)), repeats, size=size, batch=len(images))
    yield found | {"about": "pictures of several sizes; peer: padded to one"}
    for B, beams in [(1, 1), (1, 3)] + [(16, 1), (16, 3)] * (not small) + [(64, 3)] * args.device.startswith("cuda"):
        rows = random_batch(model.config, n_text, B, shots=0).student
        ids, mask, said = rows.input_ids[:, :-3].to(model.device), rows.attention_mask[:, :-3].to(model.device), {}
        features = encoded(model, images[:1]).expand(B, -1, -1)
        embedded = model.embed(ids, features)

        def ours(ids=ids, mask=mask, features=features, beams=beams, said=said):
            said["ours"] = model.generate(ids, mask, features, NEW_TOKENS, beams, 0.0, banned_ids=[2])

        def other(embedded=embedded, mask=mask, beams=beams, said=said):
            said["peer"] = peer.generate(
                inputs_embeds=embedded, attention_mask=mask.long(), do_sample=False, max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS, num_beams=beams, length_penalty=0.0)[:, -NEW_TOKENS:]

        found, = side_by_side(args, {"generate": ours}, peer and other, NEW_TOKENS * head, repeats, size=size, batch=B,
                              beams=beams)
        alike = f"; {int((said['ours'] == said['peer']).all(1).sum())} of {B} answers equal" if peer else ""
        yield found | {"about": f"{beams} beams, {NEW_TOKENS} tokens; {B / found['ours_s']:.3g} answers a second{alike}"}


def okvqa_run(rows, size):
    """The paper's OK-VQA run, projected from what was measured of that size: 1,000 samples x 5 epochs with 8 demonstrations, then
    an answer to every question, with 3 beams in the largest batch, its picture encoded."""
    found = {r["what"]: r for r in rows if r["size"] == size and (r["what"] != "generate" or r["beams"] == 3)}
    if not {"train_step", "encode", "generate"} <= found.keys():
        return

    def minutes(side):
        """(training, answering); None if something was not measured."""
        if any(found[what][side] is None for what in ("train_step", "encode", "generate")):
            return None
        step, encode, answer = (found[what][side] / found[what]["batch"] for what in ("train_step", "encode", "generate"))
        return SAMPLES * EPOCHS * step / 60, QUESTIONS * (encode + answer) / 60

    ours, peer = minutes("ours_s"), minutes("peer_s")
    yield row("okvqa_run", 60 * sum(ours), peer and 60 * sum(peer), None, None, size=size, batch=found["train_step"]["batch"],
              about="projected: minutes of training + answering " + "; peer ".join(f"{a:.3g} + {b:.3g}" for a, b in filter(
                  None, (ours, peer))))


@torch.no_grad()
def bench_latency(args, size):
    model, n_text = args.models(size), SIZES[size][1]
    c, repeats, n_bytes = model.config, 1 if args.slow(size) else 20 * args.repeats, weight_bytes(model.text_model)
    torch.manual_seed(0)
    live, mimic, picture = LIVE.for_model(model), MimIC.for_model(model), encoded(model, [
        x.to(model.dtype) for x in pictures(args, c, 1)])

    def prompt(B, shots):
        rows = random_batch(c, n_text, B, shots=shots).teacher
        return (rows.input_ids[:, :-3].to(model.device), rows.attention_mask[:, :-3].to(model.device),
                picture.expand(len(rows.samples), -1, -1))

    def prefill(ids, mask, features, shifts=None):
        cache = KVCache(c.text.num_hidden_layers, ids.shape[1] + 1)
        model.lm_head(model.hidden_states(ids, mask, features, shifts, cache=cache)[:, -1])
        return cache

    def decode(ids, mask, cache, shifts=None):
        cache.length = ids.shape[1]
        model.lm_head(model.hidden_states(ids[:, -1:], F.pad(mask, (0, 1), value=True), None, shifts, cache=cache)[:, -1])

    for B in (1, 3) if args.slow(size) else (1, 3, 16):
        given = prompt(B, 0)
        cache = prefill(*given)
        for name, shifts in ("mimic", mimic), ("live", live):
            for what, run in ("prefill", partial(prefill, *given)), ("decode", partial(decode, *given[:2], cache)):
                if (what, B) == ("prefill", 3):                       # 3 rows are the beams of one prompt
                    continue
                found, = side_by_side(args, {f"{name}_{what}": partial(run, shifts)}, run, n_bytes, repeats, size=size, batch=B)
                yield found | {"about": f"{given[0].shape[1]} tokens; peer: no shifts"}
    one = prompt(1, 0)
    for shots in (4, 8) if args.slow(size) else (4, 8, 32):
        many = prompt(1, shots)
        found, = side_by_side(args, {f"mimic_prefill_{shots}": partial(prefill, *one, mimic)}, partial(prefill, *many), n_bytes,
                              1 if args.slow(size) else args.repeats, size=size)
        yield found | {"about": f"{one[0].shape[1]} tokens; peer: {shots}-shot ICL, {many[0].shape[1]} tokens"}


# ---------------------------------------------------------------------------------------------------------------------
# Loading, in processes of their own
# ---------------------------------------------------------------------------------------------------------------------
def alone(function, queue, threads, *arguments):
    """In a process of its own: what the function returns, and its peak memory in GiB, the model's own weights included."""
    torch.set_num_threads(threads)
    keep_freed()
    found, cuda = function(*arguments), arguments[1].startswith("cuda")
    peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    queue.put((found, peak / 2**30))


def measured(function, *arguments):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=alone, args=(function, queue, torch.get_num_threads(), *arguments))
    process.start()
    process.join()
    if process.exitcode:
        raise InputError(f"{function.__name__} {arguments}: expected exit status 0, found {process.exitcode}")
    return queue.get()


def pass_over_everything(model, device):
    """Our model on a short prompt with a small picture: reads every weight once."""
    size = 28 if model.config.vision.image_size < 378 else 378
    ids = torch.tensor([[1] + [model.config.image_token_id] * model.config.perceiver.resampler_n_latents + [5]], device=device)
    values = torch.randn(1, 3, size, size).to(device, model.dtype)
    model(ids, torch.ones_like(ids), model.encode_images(values, torch.ones_like(values[:, 0], dtype=torch.bool)))


def load_ours(folder, device, dtype):
    began = clock(torch.device(device))
    model = Idefics2.from_pretrained(folder, dtype, device)
    loaded = clock(model.device)
    with torch.no_grad():
        pass_over_everything(model, device)
    return loaded - began, clock(model.device) - began


def load_theirs(folder, device, dtype):
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    began = clock(torch.device(device))
    model = transformers.Idefics2ForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device)
    loaded, c = clock(model.device), model.config
    size = 28 if c.vision_config.image_size < 378 else 378
    ids = torch.tensor([[1] + [c.image_token_id] * c.perceiver_config.resampler_n_latents + [5]], device=device)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.randn(1, 1, 3, size, size).to(device, dtype))
    return loaded - began, clock(model.device) - began


def bench_load(args, size):
    folder = args.checkpoint(size)
    words = str(folder), args.device, getattr(torch, args.dtype_of(size))
    sides = [load_ours] if args.alone(size) else [load_ours, load_theirs]
    runs = [[measured(side, *words) for side in sides] for _ in tqdm(range(1 if size == "full" else args.repeats), desc="load")]
    medians = [([statistics.median(t[i] for t, _ in side) for i in (0, 1)], statistics.median(p for _, p in side))
               for side in zip(*runs, strict=True)]
    (ours, peak), (peer, peer_peak) = [*medians, ([None, None], None)][:2]
    gib = sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 2**30
    for what, i in ("load", 0), ("load_and_pass", 1):
        yield row(what, ours[i], peer[i], peak, peer_peak, size=size, about=f"{gib:.3g} GiB of files, in the system's cache")


# ---------------------------------------------------------------------------------------------------------------------
# The layer-wise fit beside training, in processes of their own
# ---------------------------------------------------------------------------------------------------------------------
def prepared(size, device, dtype):
    """A model (at full size one layer of it), an adapter for it, the features of the one picture, the embedding of rows."""
    model = random_model(size, device, dtype, 1 if size == "full" else None)
    side = min(model.config.vision.image_size, 378)
    features = {0: encoded(model, [torch.randn(3, side, side).to(dtype)])[0]}
    return model, MimIC.for_model(model), features, lambda rows: model.embed(
        rows.input_ids.to(device), gather(features, rows.samples))


def one_picture(model, size, B, seed=0):
    batch = random_batch(model.config, SIZES[size][1], B, seed)
    for s in batch.teacher.samples:
        s.image_id = 0
    return batch


def layerwise(size, device, dtype, samples, batch_size, epochs):
    """Seconds of a layer-wise fit. At full size: one batch through one layer and one regression on all tokens, times the rest."""
    model, mimic, _, embed = prepared(size, device, dtype)
    if size != "full":
        chunks = [[one_picture(model, size, batch_size, i)] for i in range(samples // batch_size)]
        began = clock(model.device)
        with tempfile.TemporaryDirectory() as folder:
            fit(model, mimic, chunks, *plan(model, chunks, [model.config.image_token_id], "all", MEMORY_GB), embed, Path(folder))
        return clock(model.device) - began
    batch, c = one_picture(model, size, batch_size), model.config.text
    with torch.no_grad():
        x, s, T_q = embed(batch.teacher), embed(batch.student), batch.align.shape[1]
        for _ in range(2):
            began = clock(model.device)
            teacher(model, 0, x, batch.teacher, is_demonstration(batch), T_q)
            student(model, 0, s, batch.student)
            advance(model, 0, s, batch.student, mimic)
            streams = clock(model.device) - began
        began = clock(model.device)
        N, H, D = samples * T_q, c.num_attention_heads, c.head_dim
        q, log_z1, log_z2, delta = (
            torch.randn(*shape, device=device) for shape in ((H, N, D), (N, H), (N, H), (N, c.hidden_size)))
        w_o = model.text_model.layers[0].self_attn.o_proj.weight.float().view(-1, H, D)
        fit_layer(mimic, 0, q, log_z1, log_z2, delta, w_o)
        return TextConfig().num_hidden_layers * (streams * samples / batch_size + clock(model.device) - began)


def training(size, device, dtype, samples, batch_size, epochs):
    """Seconds of end-to-end training: one epoch, or at full size one step of a one-layer model, times what is missing."""
    model, mimic, features, _ = prepared(size, device, dtype)
    args, optimiser = parse([]), torch.optim.AdamW(mimic.parameters(), lr=1e-3)
    batches = [one_picture(model, size, batch_size, i) for i in range(1 if size == "full" else samples // batch_size)]

    def step(batch):
        align, ce = losses(model, mimic, batch, features, args)
        (align + 0.5 * ce).backward()
        optimiser.step()
        optimiser.zero_grad()

    step(batches[0])
    began = clock(model.device)
    for batch in batches:
        step(batch)
    missing = TextConfig().num_hidden_layers * samples / batch_size if size == "full" else 1
    return (clock(model.device) - began) * missing * epochs


@torch.no_grad()
def inference(size, device, dtype, samples, batch_size, epochs):
    """Seconds of one pass of the model over a batch's demonstrations and queries."""
    model, _, features, _ = prepared(size, device, dtype)
    torch.optim.SGD([torch.zeros(1)], lr=0.1).step()     # loads 80 MB of torch's own code, as the other two's optimisers do
    rows = one_picture(model, size, batch_size).teacher
    began = clock(model.device)
    model.hidden_states(rows.input_ids.to(device), rows.attention_mask.to(device), gather(features, rows.samples))
    return clock(model.device) - began


def bench_fit(args, size):
    samples, batch_size = args.samples or {"toy": 1000, "mid": 64, "full": 1000}[size], 4 if size == "toy" else 2
    words = size, args.device, getattr(torch, args.dtype_of(size)), samples, batch_size, EPOCHS
    _, needed = measured(inference, *words)
    runs = [[measured(side, *words) for side in (layerwise, training)] for _ in tqdm(range(args.repeats), desc="fit")]
    (ours, peak), (peer, peer_peak) = (map(statistics.median, zip(*side, strict=True)) for side in zip(*runs, strict=True))
    how = "; one layer measured, the rest extrapolated" if size == "full" else ""
    yield row("fit_layerwise", ours, peer, peak, peer_peak, size=size, batch=batch_size, inference_peak_gib=needed,
              about=f"{samples} samples, {SHOTS} shots, --memory-gb {MEMORY_GB}; peer: training, {EPOCHS} epochs; inference "
                    f"alone {needed:.2f} GiB{how}")


# ---------------------------------------------------------------------------------------------------------------------
# CIDEr-D
# ---------------------------------------------------------------------------------------------------------------------
def bench_cider(args):
    """{id: [captions]}: the first caption of each picture is the candidate, the others are its references."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    found, scores = [c for c in read_json(args.captions).values() if len(c) > 1], {}
    candidates, references = [c[0] for c in found], [c[1:] for c in found]

    def ours():
        scores["ours"] = cider(candidates, references)[0]

    def peer():
        tokens = [PTBTokenizer().tokenize({i: [{"caption": c} for c in group] for i, group in enumerate(side)})
                  for side in (references, [[c] for c in candidates])]
        scores["peer"] = Cider().compute_score(*tokens)[0]

    result, = side_by_side(args, {"cider": ours}, peer, batch=len(found))
    yield result | {"about": f"ours {scores['ours']:.6f}, pycocoevalcap with its Java tokenizer {scores['peer']:.6f}"}


COLUMNS = (("ours_s", 10, ".3g"), ("peer_s", 10, ".3g"), ("ratio", 8, ".2f"), ("peak_gib", 10, ".2f"),
           ("peer_peak_gib", 10, ".2f"), ("gflop", 9, ".3g"), ("ceiling", 9, ".0%"))
BENCHES = {"train": bench_train, "generate": bench_generate, "latency": bench_latency, "load": bench_load, "fit": bench_fit,
           "cider": bench_cider}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog=__doc__.split("\n\n", 1)[1])
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=list(BENCHES), help="(default: all)")
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["toy", "mid"], help="(default toy mid)")
    parser.add_argument("--model", default=None, metavar="FOLDER", help="in the place of --size (not for load and fit)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default %(default)s here)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=None,
                        help="(default: float32, bfloat16 on cuda and at full size)")
    parser.add_argument("--repeats", type=int, default=3, help="(default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=None, help="of train_step (default: toy 4, mid 2, full 8, on a CPU 1)")
    parser.add_argument("--samples", type=int, default=None, help="of fit (default: toy and full 1000, mid 64)")
    parser.add_argument("--pictures", default=None, metavar="FOLDER", help="JPEGs to encode (default: noise)")
    parser.add_argument("--captions", default=None, metavar="FILE", help="for cider: JSON {image id: [captions]}")
    parser.add_argument("--threads", type=int, default=None, help="of the CPU (default: torch's)")
    parser.add_argument("--out", default=None, metavar="FILE", help="writes the rows as JSON")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    temporary, kept = tempfile.TemporaryDirectory(), {}
    cpu, here = args.device == "cpu", importlib.util.find_spec("transformers") is not None
    if args.model:
        kind, processor = classes_of(args.model)
        args.size, args.only = [Path(args.model).name], [name for name in args.only if name not in ("load", "fit")]
        SIZES[args.size[0]] = processor.config_class.from_file(Path(args.model) / "config.json"), 20, kind
    args.slow = lambda size: size == "full" and cpu                                   # minutes a call: one of each
    args.alone = lambda size: not here or (size == "full" and cpu) or SIZES[size][2] is not Idefics2          # without a peer
    args.dtype_of = lambda size: args.dtype or ("float32" if cpu and size != "full" else "bfloat16")

    def checkpoint(size):
        folder = Path(temporary.name) / size
        if not folder.exists():
            folder.mkdir()
            write_checkpoint(folder, SIZES[size][0], getattr(torch, args.dtype_of(size)))
        return folder

    def models(size):
        if size not in kept:
            kept.clear()
            dtype = getattr(torch, args.dtype_of(size))
            kept[size] = (Idefics2.from_pretrained(checkpoint(size), dtype) if size == "full" and cpu
                          else random_model(size, args.device, dtype))
        return kept[size]

    def emit(found, dtype):
        rows.append({**found, "device": args.device, "dtype": dtype})
        cells = [f"{found[key]:>{width}{form}}" if found.get(key) is not None else " " * (width - 1) + "–"
                 for key, width, form in COLUMNS]
        print(f"{found['what']:<18}{found['size']:<6}{found['batch']:>6}" + "".join(cells) + f"  {found['about']}", flush=True)
        if args.out:
            write_atomically(args.out, json.dumps(rows, indent=1) + "\n")

    args.checkpoint, args.models, args.ceilings, rows, speed = checkpoint, models, None, [], {}
    print(f"{'what':<18}{'size':<6}{'batch':>6}{'ours s':>10}{'peer s':>10}{'ratio':>8}{'peak GiB':>10}{'peer GiB':>10}"
          f"{'GFLOP':>9}{'ceiling':>9}  about")
    with temporary:
        for size in args.size if set(args.only) != {"cider"} else ():
            dtype = args.dtype_of(size)
            if dtype not in speed:
                speed[dtype] = ceilings(args.device, getattr(torch, dtype))
                print(f"{dtype}: {speed[dtype][0] / 1e9:,.0f} GFLOP/s, {speed[dtype][1] / 1e9:.1f} GB/s read")
            args.ceilings = speed[dtype]
            for name in args.only:
                for found in BENCHES[name](args, size) if name != "cider" else ():
                    emit(found, dtype)
            for found in okvqa_run(rows, size):
                emit(found, dtype)
        args.ceilings = None
        for found in bench_cider(args) if "cider" in args.only and args.captions else ():
            emit(found, "float64")
    return rows


if __name__ == "__main__":
    run_command(main)
