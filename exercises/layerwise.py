"""Exercise, step 5: f and v of one layer without backpropagation. Guidance: step_5.md. Grade: pytest tests/test_5* --of exercises

Letters: N tokens, H heads, D head_dim, d hidden size. Δ (N,d) is what a layer has to add behind its attention, W_o included.
"""

import torch  # noqa: F401 (for you to use)


def start_f(q, log_z1, ridge=1e-3):
    """Each head's ridge regression of log Z1 on [q; 1].  q (H,N,D), log_z1 (N,H) → weight (H,D), bias (H).

    argmin (1/N)·Σ_n (weight·q_n + bias − log Z1_n)² + ridge·‖weight‖²: the bias is not penalised."""
    raise NotImplementedError("step 5: centre q and log Z1, solve (QᵀQ + ridge·N) weight = Qᵀz for every head, then the bias")


def best_v(mu, delta, w_o, gram_o, ridge=1e-6):
    """argmin_v Σ_n ‖Σ_h μ̃_nh W_o^h v_h − Δ_n‖² over the vectors of all heads at once → v (H,D).

    mu (N,H), delta (N,d), w_o (d,H,D), gram_o (H,D,H,D) = W_oᵀW_o in fp64. ridge: times the mean of the diagonal of the normal
    equations, added to it."""
    raise NotImplementedError("step 5: block (h,h') of the normal equations is (Σ_n μ̃_nh μ̃_nh') · gram_o[h,:,h',:]")


def unexplained(mu, v, delta, w_o):
    """Σ_n ‖Σ_h μ̃_nh W_o^h v_h − Δ_n‖² / Σ_n ‖Δ_n‖², a scalar.  Shapes as above."""
    raise NotImplementedError("step 5: multiply the square out, or make Σ_h μ̃_nh W_o^h v_h, (N,d), and subtract Δ")
