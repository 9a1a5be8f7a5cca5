"""Exercise, step 1: attention that also says what it divided by. Guidance: step_1.md. Grade: pytest tests/test_1* --of exercises

Letters: B batch, H heads, Hkv key/value heads, T query tokens, S keys, D head_dim.
"""

import torch  # noqa: F401 (for you to use)


def attention(q, k, v, mask=None):
    """out = Σ_s exp(q·k_s/√D − lse) v_s,  lse = log Σ_s exp(q·k_s/√D), over the keys s that the mask allows.

    q (B,H,T,D), k and v (B,Hkv,S,D) with H a multiple of Hkv: query heads h·H/Hkv … (h+1)·H/Hkv − 1 share key head h.
    mask (B,1,T,S) bool, True = may attend; None: all may. → out (B,H,T,D), lse (B,H,T). A row with no allowed key gives out = 0
    and lse = −inf, and no gradient."""
    raise NotImplementedError("step 1: scores q·k/√D, masked; lse is their logsumexp over s; out their exp(scores − lse) @ v")
