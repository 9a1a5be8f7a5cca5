"""Seconds and memory, side by side with transformers. What was found so far: BENCHMARKS.md.

    python -m experiments.bench --pictures FOLDER                       # ten minutes on two cores
    python -m experiments.bench --size full --repeats 0 --only train    # Idefics2-8b-base's exact shape

train     train_step: a MimIC step on 8 demonstrations, and its queries' pictures, encoded once in 5 epochs;
          beside the step as the official code does it. train_step_shared: with --share-icds
generate  encode: 9 pictures. generate: 10 tokens behind 1 and 16 encoded prompts, with 1 and 3 beams
latency   prefill and decoding of a token under MimIC and LIVE, beside no shifts; batch 3: a prompt's beams
cider     ours beside pycocoevalcap (needs Java): the first caption of each picture against the others

Weights and tokens are random (they change no time), pictures those of --pictures or noise of COCO's sizes.
Ours and the peer's alternate in one process; seconds are the median of --repeats, behind a first call of
each, whose peak of memory counts, beside what was there before. No peer: full size on a CPU.
"""

import ctypes
import gc
import re
import statistics
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from PIL import Image

from baselines.live import LIVE
from data import ANSWER, ICD, QUERY, START, Batch, Rows, encode_images
from metrics.cider import cider
from mimic import MimIC
from model import Config, Idefics2, KVCache, PerceiverConfig, TextConfig, VisionConfig
from support.files import InputError, read_json, run_command, write_json
from support.kernels import clock
from support.options import Parser, number
from support.pictures import ImageTransform, open_image
from train import losses

TOY = Config(VisionConfig(96, 192, 3, 4, 40, 8), PerceiverConfig(4, 1, 4, 32, 2),
             TextConfig(128, 352, 6, 8, 4, vocab_size=130), image_token_id=4)
MID = Config(VisionConfig(192, 768, 7, 3), PerceiverConfig(64, 3, 8, 64, 4), TextConfig(512, 1408, 8, 8, 4))
SIZES = {"toy": TOY, "mid": MID, "full": Config()}
COCO_SIZES = (640, 480), (480, 640), (640, 427), (640, 480)        # width and height, pixels
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH, SHOTS, EPOCHS = 2, 8, 5         # of a training
NEW_TOKENS = 10


# ---- What is measured: a random model, pictures, prompts
def random_model(config, dtype=torch.float32):
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with DEVICE:
        model = Idefics2(config)
    torch.set_default_dtype(torch.float32)
    return model.requires_grad_(False).eval()


def random_batch(config, B, shots=SHOTS, shared=False):
    """B queries behind `shots` demonstrations: random tokens, the last 3 the answer. Picture n of row b has
    image_id b·(shots+1) + n; shared: the demonstrations of row 0 serve all."""
    one = config.tokens_per_image + (20 if config.vision.image_size > 40 else 6)     # tokens of an example
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 100, (B, 1 + one * (shots + 1)), generator=random)
    ids[:, 0] = 1
    ids[:, 1:].unflatten(1, (-1, one))[:, :, :config.tokens_per_image] = config.image_token_id
    part = torch.full_like(ids, ICD)
    part[:, 0] = START
    part[:, -one:] = QUERY
    part[:, -3:] = ANSWER
    samples = [SimpleNamespace(image_id=i) for i in range(B * (shots + 1))]
    processor = SimpleNamespace(image_ids=[config.image_token_id])
    query = [0, *range(-one, 0)]
    student = Rows(ids[:, query], part[:, query], samples[shots::shots + 1], processor)
    if shared:
        return Batch(Rows(ids[:1, :-one], part[:1, :-one], samples[:shots], processor), student, shared)
    return Batch(Rows(ids, part, samples, processor), student)


def random_prompts(model, B, picture):
    """→ ids, mask (B,T), image features: to generate from, all about one picture (n_latents,d)."""
    ids = random_batch(model.config, B, shots=0).student.input_ids[:, :-3].to(DEVICE)
    return ids, torch.ones_like(ids, dtype=torch.bool), picture.expand(B, -1, -1)


def some_pictures(folder, model, n):
    """n pictures (3,H,W), normalised, as the model sees them: the folder's JPEGs, or noise."""
    found = [Image.effect_noise(size, 99) for size in COCO_SIZES]
    if folder:
        found = [open_image(path) for path in sorted(Path(folder).rglob("*.jpg"))[:n]]
    if not found:
        raise InputError(f"--pictures {folder}: expected JPEGs, found none")
    side = model.config.vision.image_size
    transform = ImageTransform(side, min(side, 378))
    return [transform.images([found[i % len(found)]])[0][0].to(model.dtype) for i in range(n)]


def padded(pictures):
    """As the published processor batches them: (N,3,H,W) of the largest sizes, and the mask (N,H,W)."""
    H, W = (max(x.shape[i] for x in pictures) for i in (1, 2))
    values = torch.stack([F.pad(x, (0, W - x.shape[2], 0, H - x.shape[1])) for x in pictures])
    return values, (values != 0).any(1)                     # the transform makes no byte 0


@torch.no_grad()
def encoded(model, pictures):
    """Their features {number: (n_latents,d)}, by `encode_images`: its samples have their pixels already."""
    samples = [SimpleNamespace(image_id=i, picture=lambda x=x: x, picture_size=lambda x=x: x.shape[:0:-1])
               for i, x in enumerate(pictures)]
    processor = SimpleNamespace(resized=lambda width, height: (width, height), images=padded)
    return encode_images(model, processor, samples, {})


# ---- The peer: transformers' Idefics2, and a MimIC step on it as the official code does it
def theirs(model, attention):
    """transformers' Idefics2 around the very tensors of our model. attention: "eager" or "sdpa"."""
    import transformers
    from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
    transformers.logging.set_verbosity_error()
    c = model.config
    text = asdict(c.text) | {"model_type": "mistral", "sliding_window": c.text.sliding_window or None}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": c.text.rope_theta}
    perceiver = asdict(c.perceiver) | {"hidden_size": c.text.hidden_size}
    config = transformers.Idefics2Config(text_config=text, perceiver_config=perceiver,
                                         vision_config=asdict(c.vision), image_token_id=c.image_token_id)
    config._attn_implementation = attention
    with torch.device("meta"):
        peer = transformers.Idefics2ForConditionalGeneration(config).eval()
    peer.load_state_dict(model.state_dict(), assign=True)
    peer.model.text_model.rotary_emb = MistralRotaryEmbedding(peer.config.text_config).to(DEVICE)
    peer.generation_config.update(eos_token_id=2, pad_token_id=0, bos_token_id=1)
    return peer.requires_grad_(False)


def update(align, ce, mimic, optimiser):
    (align + 0.5 * ce).backward()
    torch.nn.utils.clip_grad_norm_(mimic.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad()


def our_step(model, features):
    """→ step(batch)."""
    mimic = MimIC.for_model(model)
    optimiser = torch.optim.AdamW(mimic.parameters(), lr=1e-3)
    return lambda batch: update(*losses(model, mimic, batch, features), mimic, optimiser)


class OfficialStep:
    """A training step written the way the official code is, on transformers' Idefics2 with eager attention.

    Its attention is replaced by one that adds the shift, log Z2 from a second q·k over all keys; hooks keep
    FFN outputs; both passes encode their pictures; the student's has logits and a loss of all tokens."""

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
        values, mask = padded([pictures[s.image_id] for s in rows.samples])
        values, mask = (x.unflatten(0, (len(rows.input_ids), -1)).to(DEVICE) for x in (values, mask))
        out = self.model(input_ids=rows.input_ids.to(DEVICE), labels=labels, pixel_values=values,
                         pixel_attention_mask=mask, attention_mask=rows.attention_mask.to(DEVICE).long())
        return out, self.ffn

    def __call__(self, batch, pictures):
        from transformers.models.mistral import modeling_mistral as mistral
        self.eager = mistral.eager_attention_forward
        with torch.no_grad():
            _, teacher = self.run(batch.teacher, pictures)
        with mock.patch.object(mistral, "eager_attention_forward", self.attention):
            out, student = self.run(batch.student, pictures, batch.student.input_ids.to(DEVICE))
        errors = [F.mse_loss(s[:, -batch.T_q:].float(), t[:, -batch.T_q:].float())
                  for s, t in zip(student, teacher, strict=True)]
        update(sum(errors) / len(errors), out.loss, self.mimic, self.optimiser)


# ---- Measuring
def seconds_of(call):
    began = clock(DEVICE)
    call()
    return clock(DEVICE) - began


def first_call(call):
    """→ seconds, and the peak of memory in GiB above what was there before: None without Linux's /proc."""
    def memory(name):
        return int(re.search(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20

    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return seconds_of(call), (torch.cuda.max_memory_allocated() - before) / 2**30
    forget = Path("/proc/self/clear_refs")
    if not forget.exists():
        return seconds_of(call), None
    ctypes.CDLL(None).malloc_trim(0)                        # else the allocator uses what it kept
    forget.write_text("5")                                  # VmHWM starts anew
    before = memory("VmRSS")
    return seconds_of(call), memory("VmHWM") - before


def side_by_side(calls, repeats):
    """{name: call} → {name: (seconds, GiB)}: the median of `repeats` calls, alternating, behind a first one
    of each, whose memory counts, and whose seconds if repeats is 0. A call that is None has Nones."""
    first = {name: first_call(call) if call else (None, None) for name, call in calls.items()}
    runs = {name: [] for name in calls}
    for _ in range(repeats):
        for name in [name for name, call in calls.items() if call]:
            runs[name].append(seconds_of(calls[name]))
    return {name: (statistics.median(runs[name] or [s]), gib) for name, (s, gib) in first.items()}


def row(what, ours, peer, batch=1, about=""):
    """Of two (seconds, GiB)."""
    return {"what": what, "batch": batch, "ours_s": ours[0], "peer_s": peer[0], "peak_gib": ours[1],
            "peer_peak_gib": peer[1], "ratio": peer[0] and peer[0] / ours[0], "about": about}


# ---- The benches: (args, model) → rows
def bench_train(args, model):
    pictures = some_pictures(args.pictures, model, BATCH * (SHOTS + 1))
    encode = partial(encoded, model, pictures)
    one = side_by_side({"encode": encode}, args.repeats)["encode"][0] / len(pictures)
    step = our_step(model, encode())
    batch = random_batch(model.config, BATCH)
    peer = OfficialStep(model, MimIC.for_model(model)) if args.peer else None
    calls = {"train_step": partial(step, batch),
             "train_step_shared": partial(step, random_batch(model.config, BATCH, shared=True)),
             "peer": peer and partial(peer, batch, pictures)}
    found = side_by_side(calls, args.repeats)
    for what in "train_step", "train_step_shared":
        seconds, gib = found[what]
        about = f"step {seconds:.3g} s + {BATCH / EPOCHS:g} pictures of {one:.3g} s"
        yield row(what, (seconds + one * BATCH / EPOCHS, gib), found["peer"], BATCH, about)


@torch.no_grad()
def bench_generate(args, model):
    peer = theirs(model, "sdpa") if args.peer else None
    pictures = some_pictures(args.pictures, model, SHOTS + 1)
    pixels = [x[None].to(DEVICE) for x in padded(pictures)]
    calls = {"ours": partial(encoded, model, pictures),
             "peer": peer and partial(peer.model.get_image_features, *pixels)}
    found = side_by_side(calls, args.repeats)
    yield row("encode", *found.values(), len(pictures), "pictures of several sizes; peer: padded to one")
    picture = encoded(model, pictures[:1])[0]
    for B, beams in (1, 1), (1, 3), (16, 1), (16, 3):
        ids, mask, features = random_prompts(model, B, picture)
        ours = partial(model.generate, ids, mask, features, NEW_TOKENS, beams, 0.0, banned_ids=[2])
        prompt = {"inputs_embeds": model.embed(ids, features), "attention_mask": mask.long()}
        other = peer and partial(peer.generate, **prompt, num_beams=beams, length_penalty=0.0,
                                 max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
        found = side_by_side({"ours": ours, "peer": other}, args.repeats)
        about = f"{NEW_TOKENS} tokens, beams: {beams}"
        if peer:
            equal = (ours() == other()[:, -NEW_TOKENS:]).all(1)
            about += f"; {int(equal.sum())} of {B} answers equal"
        yield row("generate", *found.values(), B, about)


@torch.no_grad()
def bench_latency(args, model):
    picture = encoded(model, some_pictures(args.pictures, model, 1))[0]

    def prefill(ids, mask, features, shifts=None):
        cache = KVCache(model.config.text.num_hidden_layers, ids.shape[1] + 1)
        model.lm_head(model.hidden_states(ids, mask, features, shifts, cache=cache)[:, -1])
        return cache

    def decode(ids, mask, cache, shifts=None):
        cache.lengths = [ids.shape[1]] * len(cache.lengths)            # without the token of the call before
        mask = F.pad(mask, (0, 1), value=True)
        model.lm_head(model.hidden_states(ids[:, -1:], mask, None, shifts, cache=cache)[:, -1])

    for B in 1, 3, 16:
        ids, mask, features = random_prompts(model, B, picture)
        calls = {"prefill": partial(prefill, ids, mask, features),
                 "decode": partial(decode, ids, mask, prefill(ids, mask, features))}
        for name, shifts in ("mimic", MimIC.for_model(model)), ("live", LIVE.for_model(model)):
            for what, call in calls.items():
                both = {"ours": partial(call, shifts=shifts), "peer": call}
                found = side_by_side(both, 20 * args.repeats)
                yield row(f"{name}_{what}", *found.values(), B, f"{ids.shape[1]} tokens; peer: no shifts")


def bench_cider(args, model):
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    captions = [c for c in read_json(args.captions).values() if len(c) > 1]
    ours = partial(cider, [c[0] for c in captions], [c[1:] for c in captions])

    def peer():
        groups = [{i: [{"caption": x} for x in c[side]] for i, c in enumerate(captions)}
                  for side in (slice(1, None), slice(1))]
        return Cider().compute_score(*map(PTBTokenizer().tokenize, groups))

    found = side_by_side({"ours": ours, "peer": peer}, args.repeats)
    yield row("cider", *found.values(), len(captions), f"ours {ours()[0]:.6f}, peer {peer()[0]:.6f}")


BENCHES = {"train": bench_train, "generate": bench_generate, "latency": bench_latency, "cider": bench_cider}
COLUMNS = {"ours_s": ".3g", "peer_s": ".3g", "ratio": ".2f", "peak_gib": ".2f", "peer_peak_gib": ".2f"}


def main(argv=None):
    parser = Parser(__doc__, "python -m experiments.bench")
    add = parser.add_argument
    add("--only", nargs="+", choices=BENCHES, default=list(BENCHES)[:3], help="(default: all but cider)")
    add("--size", choices=SIZES, default="mid", help="(default %(default)s)")
    add("--repeats", type=number(int, 0), default=3, help="0 = the first call counts (default %(default)s)")
    add("--pictures", metavar="FOLDER", help="JPEGs to encode (default: noise)")
    add("--captions", metavar="FILE", help="for cider: JSON {image id: [captions]}")
    add("--out", metavar="FILE", help="writes the rows as JSON")
    args = parser.parse(argv)
    args.peer = (DEVICE.type, args.size) != ("cpu", "full")
    dtype = torch.float32 if DEVICE.type == "cpu" and args.peer else torch.bfloat16
    rows = []
    print(f"{args.size:<18}{'batch':>6}" + "".join(f"{name:>15}" for name in COLUMNS))
    for name in args.only:
        for found in BENCHES[name](args, random_model(SIZES[args.size], dtype)):
            rows.append({"size": args.size, "device": DEVICE.type, "dtype": str(dtype)[6:], **found})
            cells = ["–" if found[key] is None else f"{found[key]:{form}}" for key, form in COLUMNS.items()]
            line = "".join(f"{cell:>15}" for cell in cells)
            print(f"{found['what']:<18}{found['batch']:>6}{line}  {found['about']}", flush=True)
            if args.out:
                write_json(args.out, rows)
    return rows


if __name__ == "__main__":
    run_command(main)
