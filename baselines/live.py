"""LIVE: one learnable vector a layer, added behind the FFN at every token, whatever the query (Peng et al., NeurIPS 2024).

    h ← (h + α·v) · ‖h‖ / ‖h + α·v‖        h: the FFN's output of a layer, v (d) and α (scalar) learnt for that layer

Trained to give the answer's tokens the probabilities that the model with demonstrations gives them (KL) plus the LM loss.
The official code's KL begins one distribution late, so that it never sees the answer's first token (train.py --kl-late).
Source: LIVE's code as MimIC's authors run it, on the FFN's output of both Idefics models; that code's settings: v ~ N(0, 0.01²),
α = 0.1, the scale's learning rate twice the vector's.
"""

import torch
import torch.nn as nn

from mimic import read_adapter, save_atomically
from model import InputError, Shifts


class LIVE(nn.Module, Shifts):
    """`model(…, shifts=live)`. fp32 parameters: vector (L,d), alpha (L)."""

    def __init__(self, n_layers, hidden_size):
        super().__init__()
        self.vector = nn.Parameter(0.01 * torch.randn(n_layers, hidden_size))
        self.alpha = nn.Parameter(torch.full((n_layers,), 0.1))

    @classmethod
    def for_model(cls, model):
        return cls(model.config.text.num_hidden_layers, model.config.text.hidden_size).to(model.device)

    def like(self, model):
        return self.for_model(model)

    def after_ffn(self, layer, ffn_out):
        """The norm of h stays, its direction moves.  (B,T,d) → (B,T,d)."""
        h = ffn_out.to(self.vector.dtype)
        moved = h + self.alpha[layer] * self.vector[layer]
        return (moved * (h.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True).clamp(min=1e-12))).to(ffn_out.dtype)

    def groups(self, lr):
        """Parameter groups of the optimiser."""
        return [{"params": [self.vector], "lr": lr}, {"params": [self.alpha], "lr": 2 * lr}]

    def save(self, path, **about):
        save_atomically(self.state_dict(), path, {k: str(v) for k, v in about.items()})

    @classmethod
    def load(cls, path):
        tensors, _ = read_adapter(path, "LIVE")
        shapes = {name: tuple(x.shape) for name, x in tensors.items()}
        L, d = (shapes.get("vector", ()) + (0, 0))[:2]
        if shapes != {"vector": (L, d), "alpha": (L,)}:
            raise InputError(f"{path}: expected a LIVE adapter with vector (L,d) and alpha (L), found {shapes}")
        live = cls(L, d)
        live.load_state_dict(tensors)
        return live
