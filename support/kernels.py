"""The same results by faster kernels: model.py has the equations, and tests hold each kernel to them."""

import contextlib
import ctypes
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

if torch.__version__ < "2.9":     # `attention_with_lse` there reads foreign memory if heads share their keys
    raise ImportError(f"expected torch 2.9 or later, found {torch.__version__}")


def sdpa(q, k, v, mask):
    """Attention where nobody asks for lse.  q (B,H,T,D); k, v (B,Hkv,S,D); mask bool or None → (B,H,T,D)."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def attention_with_lse(q, k, v, mask):
    """`model.attention` by the CPU's kernel → out (B,H,T,D), lse (B,H,T); None elsewhere, and with gradients,
    which it does not pass on to lse. Rows with no allowed key have out = 0, their lse means nothing."""
    if q.device.type != "cpu" or torch.is_grad_enabled():
        return None
    added = torch.where(mask, 0.0, -torch.inf).to(q.dtype)                     # to the scores
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=added)


class Embedding(nn.Embedding):
    """nn.Embedding; on the meta device without random numbers, for which torch imports its compiler (2 s)."""
    def reset_parameters(self):
        if not self.weight.is_meta:
            super().reset_parameters()


class Linear(nn.Linear):
    """nn.Linear. Without gradients, large fp32 weights on a CPU are multiplied by oneDNN: for the few rows of
    a decoding step it is up to six times as fast as the library that torch takes."""
    LARGE = 2 ** 17 if torch.backends.mkldnn.is_available() else torch.inf     # below, the call costs more

    def forward(self, x):
        w = self.weight
        large = w.numel() >= self.LARGE and w.dtype == torch.float32 and w.device.type == "cpu"
        if not large or torch.is_grad_enabled():
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, w, self.bias, "none", [], "")


def keep_freed():
    """Tells glibc to keep freed memory. By default the system gets it and hands it out anew, page by page, in
    every layer of a pass: a tenth of the time on a CPU. Other C libraries are left alone."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2**31 - 1)          # M_TRIM_THRESHOLD of malloc.h, bytes
        libc.mallopt(-3, 2**25)              # M_MMAP_THRESHOLD, the most it takes


def clock(device):
    """Seconds, with the device's work done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
