"""HiFICL: a few learnt key/value pairs before every head's own, low-rank prefix tuning (2603.12760, CVPR 2026).

    softmax(q·[K̂;K]) [V̂;V] = α·SA(q,K,V) + β·V̂,    α = Z2 / (Z1 + Z2),  β_i = e^(q·K̂_i) / (Z1 + Z2)
                            = SA(q,K,V) + μ · (SA(q,K̂,V̂) − SA(q,K,V)),    μ = Z1 / (Z1 + Z2),  Z1 = Σ_i e^(q·K̂_i)

which is MimIC's identity (mimic.py) with n virtual demonstrations in the place of the true ones. K̂ = K_A K_B and V̂ = V_A V_B
(n,D) have rank r, one of each for every head of every layer; the virtual keys are not rotated (no RoPE). V_B = 0 at start:
virtual pairs that take a share of the attention and add nothing. Trained by the LM loss alone, without demonstrations.
Z2 is over the keys the softmax sees (the official code's is not, as in MimIC's). Start of the others, our choice: K_A, V_A
~ N(0, 1/r), K_B ~ N(0, 0.02²), so that K̂ is small.
"""

import torch
import torch.nn as nn

from mimic import mixing_weight, read_adapter, save_atomically
from model import InputError, Shifts, attention


class HiFICL(nn.Module, Shifts):
    """`model(…, shifts=hificl)`. fp32 parameters: K_A, V_A (L,H,n,r), K_B, V_B (L,H,r,D)."""

    def __init__(self, n_layers, n_heads, head_dim, n=8, rank=8):
        super().__init__()
        self.options = {"n": n, "rank": rank}
        self.K_A, self.V_A = (nn.Parameter(rank ** -0.5 * torch.randn(n_layers, n_heads, n, rank)) for _ in range(2))
        self.K_B = nn.Parameter(0.02 * torch.randn(n_layers, n_heads, rank, head_dim))
        self.V_B = nn.Parameter(torch.zeros(n_layers, n_heads, rank, head_dim))

    @classmethod
    def for_model(cls, model, **options):
        c = model.config.text
        return cls(c.num_hidden_layers, c.num_attention_heads, c.head_dim, **options).to(model.device)

    def like(self, model):
        return self.for_model(model, **self.options)

    def after_attention(self, layer, q, k, out, lse):
        """Attention over [K̂;K] from the attentions over K̂ and over K."""
        K, V = ((A[layer] @ B[layer]).expand(len(q), -1, -1, -1) for A, B in ((self.K_A, self.K_B), (self.V_A, self.V_B)))
        virtual, log_z1 = attention(q.to(K.dtype), K, V)                                   # (B,H,T,D), (B,H,T)
        mu = mixing_weight(log_z1, lse).unsqueeze(-1)
        return out + (mu * (virtual - out.to(virtual.dtype))).to(out.dtype)

    def groups(self, lr):
        """Parameter groups of the optimiser."""
        return [{"params": list(self.parameters()), "lr": lr}]

    def save(self, path, **about):
        save_atomically(self.state_dict(), path, {k: str(v) for k, v in about.items()})

    @classmethod
    def load(cls, path):
        tensors, _ = read_adapter(path, "HiFICL")
        shapes = {name: tuple(x.shape) for name, x in tensors.items()}
        (L, H, n, r), D = (shapes.get("K_A", ()) + (0,) * 4)[:4], (shapes.get("K_B") or (0,))[-1]
        if shapes != {"K_A": (L, H, n, r), "V_A": (L, H, n, r), "K_B": (L, H, r, D), "V_B": (L, H, r, D)} or not r:
            raise InputError(f"{path}: expected a HiFICL adapter with K_A, V_A (L,H,n,r) and K_B, V_B (L,H,r,D), found {shapes}")
        hificl = cls(L, H, D, n, r)
        hificl.load_state_dict(tensors)
        return hificl
