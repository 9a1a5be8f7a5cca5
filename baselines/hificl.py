"""HiFICL: learnt key/value pairs before every head's own, a low-rank prefix tuning (2603.12760, CVPR 2026).

    softmax(q·[K̂;K]) [V̂;V] = SA(q,K,V) + μ·(SA(q,K̂,V̂) − SA(q,K,V)), μ = Z1/(Z1 + Z2), Z1 = Σ_i e^(q·K̂_i)

which is MimIC's identity (mimic.py) with n virtual demonstrations. K̂ = K_A K_B and V̂ = V_A V_B (n,D) have
rank r, for every head of every layer; virtual keys stay unrotated. Z2 is over the keys the softmax sees (not
in the official code). Only L_gt. At start V_B = 0; our choice: K_A, V_A ~ N(0, 1/r), K_B ~ N(0, 0.02²).
"""

import torch
import torch.nn as nn

from mimic import Adapter, mixing_weight
from model import attention


class HiFICL(Adapter):
    """`model(…, shifts=hificl)`. fp32 parameters: K_A, V_A (L,H,n,r), K_B, V_B (L,H,r,D)."""
    defaults = {"lr": 5e-3, "lambda_align": 0.0, "lambda_ce": 1.0}

    def __init__(self, n_layers, n_heads, head_dim, n, rank):
        super().__init__()
        self.K_A = nn.Parameter(rank ** -0.5 * torch.randn(n_layers, n_heads, n, rank))
        self.V_A = nn.Parameter(rank ** -0.5 * torch.randn(n_layers, n_heads, n, rank))
        self.K_B = nn.Parameter(0.02 * torch.randn(n_layers, n_heads, rank, head_dim))
        self.V_B = nn.Parameter(torch.zeros(n_layers, n_heads, rank, head_dim))

    @classmethod
    def for_model(cls, model, n=8, rank=8):
        c = model.config.text
        return cls(c.num_hidden_layers, c.num_attention_heads, c.head_dim, n, rank).to(model.device)

    @property
    def options(self):
        n, rank = self.K_A.shape[2:]
        return {"n": n, "rank": rank}

    @staticmethod
    def sizes(tensors):
        L, H, n, rank = tensors["K_A"].shape
        return L, H, tensors["K_B"].shape[-1], n, rank

    def after_attention(self, layer, q, k, out, lse):
        """Attention over [K̂;K] from the attentions over K̂ and over K."""
        K = self.K_A[layer] @ self.K_B[layer]                                            # (H,n,D)
        V = self.V_A[layer] @ self.V_B[layer]
        rows = (len(q), -1, -1, -1)
        virtual, log_z1 = attention(q.to(K.dtype), K.expand(rows), V.expand(rows))       # (B,H,T,D), (B,H,T)
        mu = mixing_weight(log_z1, lse).unsqueeze(-1)
        shift = virtual - out.to(virtual.dtype)
        return out + (mu * shift).to(out.dtype)
