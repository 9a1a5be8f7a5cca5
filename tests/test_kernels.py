"""Every kernel of support/kernels.py is the plain computation, and what it saves is saved."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import attention, causal_mask
from support.kernels import Embedding, Linear, attention_with_lse, sdpa

REPOSITORY = Path(__file__).resolve().parents[1]


def output(*words):
    return subprocess.check_output([sys.executable, "-c", *words], text=True, cwd=REPOSITORY)


@pytest.mark.parametrize("B, H, Hkv, T, S, D, window", [
    (2, 4, 2, 5, 9, 8, 0), (1, 4, 1, 40, 60, 10, 20), (3, 6, 6, 1, 33, 16, 0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attention_with_lse_and_sdpa_are_the_attention_of_the_equation(dtype, B, H, Hkv, T, S, D, window):
    """Judged by ours in float64: a kernel may be off by what ours is in the same dtype, twice."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, h, t, D, dtype=torch.float64).to(dtype) for h, t in ((H, T), (Hkv, S), (Hkv, S)))
    present = torch.ones(B, S, dtype=torch.bool)
    present[0, :S - T + 2 if T > 2 else 3] = False                                  # some rows of the first prompt have no key
    mask = causal_mask(present, T, window)
    exact = attention(q.double(), k.double(), v.double(), mask)
    ours = attention(q, k, v, mask)
    with torch.no_grad():
        fused = attention_with_lse(q, k, v, mask)
    seen = mask.any(-1).expand(B, H, T)
    for truth, mine, kernel in zip((exact[0], *exact), (ours[0], *ours), (sdpa(q, k, v, mask), *fused), strict=True):
        error, allowed = (x[seen].double().sub(truth[seen]).abs().max().item() for x in (kernel, mine))
        assert error <= 2 * allowed + 4 * torch.finfo(dtype).eps * truth[seen].abs().max().item()
    assert fused[0].isfinite().all() and (fused[0][~seen] == 0).all() and fused[1].dtype == ours[1].dtype


def test_attention_with_lse_leaves_passes_with_gradients_and_other_devices_to_the_equation():
    q = torch.randn(1, 2, 3, 4)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    assert attention_with_lse(q, q, q, mask) is None
    with torch.no_grad():
        assert attention_with_lse(q.to("meta"), q.to("meta"), q.to("meta"), mask.to("meta")) is None


@pytest.mark.parametrize("rows, bias", [((1, 1), True), ((3, 1), False), ((2, 50), True), ((0, 4), False)])
def test_a_large_linear_without_gradients_is_the_product_in_float64(rows, bias):
    torch.manual_seed(0)
    linear = Linear(512, 300, bias=bias)
    assert linear.weight.numel() >= linear.LARGE
    x = torch.randn(*rows[:1], rows[1] + 2, 512)[:, 1:-1]                                          # not contiguous
    exact = torch.nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    with torch.no_grad():
        y = linear(x)
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=512 ** 0.5 * torch.finfo(torch.float32).eps * 3)
    assert y.dtype == torch.float32 and linear(x).requires_grad and torch.equal(linear(x), torch.nn.Linear.forward(linear, x))


def test_an_embedding_starts_from_the_numbers_of_torch_and_from_none_on_the_meta_device():
    tables = []
    for kind in Embedding, torch.nn.Embedding:
        torch.manual_seed(0)
        tables.append(kind(30, 7).weight)
    assert torch.equal(*tables)
    code = """if True:
        import sys, torch
        from model import Config, Idefics2
        from models.idefics1 import Idefics1, Idefics1Config
        with torch.device("meta"):
            assert Idefics2(Config()).device.type == Idefics1(Idefics1Config()).device.type == "meta"
        print("torch._dynamo" in sys.modules, "sympy" in sys.modules)"""
    assert output(code) == "False False\n"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the others' malloc has no such knob")
def test_freed_memory_is_kept_for_the_next_tensors():
    """Page faults of tensors of 1, 2, … 30 MB, each freed before the next: every page once, or every time."""
    code = """if True:
        import resource, sys, torch
        from support import kernels
        sys.argv[1] == "keep" and kernels.keep_freed()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for megabytes in range(1, 31):
            torch.ones(megabytes * 2 ** 18)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    keep, plain = (int(output(code, how)) for how in ("keep", "plain"))
    assert keep < plain / 4


def test_a_torch_whose_kernel_reads_foreign_memory_is_refused():
    """Before 2.9 the kernel behind `attention_with_lse` takes every query head to have keys of its own."""
    pretend = "import torch; torch.__version__ = torch.torch_version.TorchVersion('2.8.0+cpu'); import support.kernels"
    found = subprocess.run([sys.executable, "-c", pretend], capture_output=True, text=True, cwd=REPOSITORY)
    assert found.returncode != 0 and "expected torch 2.9 or later, found 2.8.0+cpu" in found.stderr
