"""What a run will need of the machine's memory, said before it begins; one that cannot fit stops there, with advice.

Weights are counted by their shapes. What autograd keeps of the student's pass is counted by running that very pass on the meta
device, where tensors have shapes and no memory. The rest, the widest moment of a pass without gradients and the decoder's
cache, are short formulas. An estimate: prompts are taken to have TEXT_TOKENS tokens of text an example, and what a decoder that
looks at pictures by cross-attention keeps of them is left out.
"""

import contextlib
import ctypes
import os

import torch

from features import PIXELS_AT_ONCE
from model import Idefics2, InputError

TEXT_TOKENS = 32                  # of a question with its template and answer: more than OK-VQA's have on average
GIB = 2 ** 30


def meta_model(config, dtype, kind=Idefics2):
    """The shapes of a model of that kind, without memory."""
    with torch.device("meta"):
        return kind(config).to(dtype).requires_grad_(False).eval()


def kept_by_autograd(model, shifts, B, T):
    """Bytes that the student's pass over (B,T) tokens keeps for its backward pass, weights aside. model, shifts: on meta."""
    own, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def pack(x):
        if (storage := x.untyped_storage())._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return x

    x = torch.empty(B, T, model.config.text.hidden_size, dtype=model.dtype, device="meta", requires_grad=True)
    mask = torch.ones(B, T, dtype=torch.bool, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = shifts.student(model).text_model(x, mask, mask.long().cumsum(1), shifts, None)
    del out
    return sum(kept.values())


def widest_moment(c, B, T, itemsize):
    """Bytes of a pass over (B,T) tokens without gradients, at its widest: states and the FFN's three products, or a chunk of
    pictures in the connector. c: the model's config."""
    patches = PIXELS_AT_ONCE // c.vision.patch_size ** 2
    seeing = patches * (3 * c.text.intermediate_size + c.text.hidden_size + 4 * c.vision.hidden_size)
    return itemsize * max(B * T * (4 * c.text.hidden_size + 3 * c.text.intermediate_size), seeing)


def cache_bytes(c, rows, T, itemsize):
    """Bytes of the keys and values of (rows,T) tokens."""
    return rows * T * 2 * c.text.num_hidden_layers * c.text.num_key_value_heads * c.text.head_dim * itemsize


def parts(model, shots, eval_shots, beams, eval_batch, batch=0, adapter_of=None, fit_gb=None):
    """GiB by part: weights; training, if adapter_of(model) makes what is trained, or a layer-wise fit of fit_gb; answering.

    model: on meta, as `meta_model` makes it."""
    config, itemsize = model.config, model.dtype.itemsize
    one = config.tokens_per_image + TEXT_TOKENS
    found = {"weights": sum(p.numel() for p in model.parameters()) * itemsize}
    teacher, text = widest_moment(config, batch, (shots + 1) * one, itemsize), config.text
    if adapter_of:
        adapter = adapter_of(model)
        numbers = sum(p.numel() for p in adapter.parameters())                       # fp32, with gradient and AdamW's moments
        compared = text.num_hidden_layers * batch * one * text.hidden_size * (itemsize + 4)         # teacher's states, errors
        found["training"] = teacher + kept_by_autograd(model, adapter, batch, one) + compared + 16 * numbers
    if fit_gb:
        found["training"] = teacher + fit_gb * 1e9
    T = (max(eval_shots) + 1) * one
    found["answering"] = cache_bytes(config, eval_batch * beams, T, itemsize) + widest_moment(config, eval_batch, T, itemsize)
    return {name: n / GIB for name, n in found.items()}


def needed(found):
    """Training and answering come one after the other."""
    return found["weights"] + max(found.get("training", 0), found["answering"])


def free(device):
    """GiB of memory that is not taken; None where the machine does not say."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0] / GIB
    if os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) * 1024 / GIB
    return None


def keep_freed():
    """Tells glibc to keep the memory that it is given back: by default the system gets it and hands it out anew, page by page, in
    every layer of a pass (a tenth of the time on a CPU). Peaks stay as they are. Other C libraries are left alone."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3                                # malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)                                      # bytes, the most it takes


def check(args, config, shots=0, eval_shots=(0,), adapter_of=None, fit_gb=None, kind=Idefics2):
    """Prints what the run needs and what there is. Raises InputError with options that would fit if it cannot.

    args: device, dtype, num_beams, eval_batch_size and, for training, batch_size and accumulate; the rest: see `parts`."""
    def estimate(model, batch_size, eval_batch_size):
        return parts(model, shots, eval_shots, args.num_beams, eval_batch_size, batch_size, adapter_of, fit_gb)

    batch_sizes = {"batch_size": getattr(args, "batch_size", 0), "eval_batch_size": args.eval_batch_size}
    found = estimate(meta_model(config, getattr(torch, args.dtype), kind), **batch_sizes)
    there = free(args.device)
    what = " + ".join(f"{name} {gib:.3g}" for name, gib in found.items())
    line = f"memory in GiB: {what}, at most {needed(found):.3g} at a time; free on {args.device}: "
    print(line + ("unknown" if there is None else f"{there:.3g}"))
    if there is None or needed(found) <= there:
        return
    advice = "no batch is small enough" + (", a smaller --memory-gb may be" if fit_gb else "")
    for dtype in dict.fromkeys(("bfloat16", args.dtype)):              # the last that fits is the best advice
        model, smaller = meta_model(config, getattr(torch, dtype), kind), dict(batch_sizes)
        while needed(fits := estimate(model, **smaller)) > there and max(smaller.values()) > 1:
            larger = max(smaller, key=smaller.get)
            smaller[larger] //= 2
        if needed(fits) <= there:
            options = {"dtype": dtype, **smaller, "accumulate": getattr(args, "accumulate", 1)}
            options["accumulate"] *= max(1, batch_sizes["batch_size"] // max(1, smaller["batch_size"]))
            changed = [f"--{k.replace('_', '-')} {v}" for k, v in options.items() if v != getattr(args, k, v)]
            advice = "it would fit with " + " ".join(changed)
    raise InputError(f"{args.device}: expected {needed(found):.3g} GiB free ({what}), found {there:.3g}; {advice}")
