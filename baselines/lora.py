"""LoRA: a low-rank change of weight matrices instead of a shift (Hu et al., ICLR 2022).

    y = W x + (α/r) · B A x̃     W (d_out,d_in) frozen, A (r,d_in), B (d_out,r); B = 0 at start: base model
                                x̃: x under dropout while training, else x

on the q, k, v and o projections of the decoder, or with scope "all" of every module with such names, as in
the official code (the tower's out_proj has another). A starts uniform in ±1/√d_in. Trained by L_gt alone.
"""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

from mimic import Adapter
from support.files import InputError
from support.options import number

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]


class LoRALinear(nn.Module):
    """y = W x + b + scale · B A x̃.  The linear and A, B are those given, not copies."""
    def __init__(self, linear, A, B, scale, dropout):
        super().__init__()
        self.linear = linear
        self.A = A
        self.B = B
        self.scale = scale
        self.dropout = dropout

    def forward(self, x):
        y = self.linear(x)
        x = F.dropout(x.to(self.A.dtype), self.dropout)
        return y + (self.scale * (x @ self.A.T @ self.B.T)).to(y.dtype)


def rebuilt(module, new):
    """The module with new[part] in the place of each such part; those that hold one are copies."""
    if module in new:
        return new[module]
    children = {name: rebuilt(child, new) for name, child in module._modules.items()}
    if children == module._modules:
        return module
    other = copy.copy(module)
    other._modules = children
    return other


class LoRA(Adapter):
    """`model(…, shifts=lora)` needs `lora.student(model)` as model. fp32 parameters: A (r,d_in), B (d_out,r)
    of every linear. shapes: its name, / for the dots → (d_out, d_in)."""
    defaults = {"lr": 5e-4, "lambda_align": 0.0, "lambda_ce": 1.0}
    toy_lr = 2e-3
    official = {"scope": "all"}
    kept = {"rank": int, "alpha": float, "dropout": float, "targets": str, "scope": str}

    def __init__(self, shapes, rank, alpha, dropout, targets, scope):
        super().__init__()
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.targets = targets
        self.scope = scope
        self.changes_vision = scope == "all"
        self.A = nn.ParameterDict()
        self.B = nn.ParameterDict()
        for name, (d_out, d_in) in shapes.items():
            self.A[name] = nn.Parameter(torch.empty(rank, d_in).uniform_(-d_in ** -0.5, d_in ** -0.5))
            self.B[name] = nn.Parameter(torch.zeros(d_out, rank))

    @classmethod
    def for_model(cls, model, rank=16, alpha=0, dropout=0.05, targets=PROJECTIONS, scope="text"):
        """alpha 0 = 2·rank. targets: last part of the names of the linears, a list or one text."""
        targets = targets.split() if isinstance(targets, str) else targets
        inside = set((model if scope == "all" else model.text_model.layers).modules())
        shapes = {name.replace(".", "/"): m.weight.shape for name, m in model.named_modules()
                  if isinstance(m, nn.Linear) and m in inside and name.split(".")[-1] in targets}
        named = " ".join(targets)
        if not shapes:
            raise InputError(f"--targets: expected names of linear layers such as q_proj, found {named}")
        return cls(shapes, rank, alpha or 2 * rank, dropout, named, scope).to(model.device)

    @staticmethod
    def sizes(tensors):
        names = [key[2:] for key in tensors if key.startswith("A.")]
        return [{name: (len(tensors[f"B.{name}"]), tensors[f"A.{name}"].shape[1]) for name in names}]

    @staticmethod
    def add_arguments(group):
        group.add_argument("--rank", type=number(int, 1), default=16, help="of A and B (default 16)")
        group.add_argument("--targets", nargs="+", default=PROJECTIONS, metavar="NAME",
                           help=f"linear layers that change (default {' '.join(PROJECTIONS)})")
        group.add_argument("--scope", choices=("text", "all"), default="text",
                           help="where: the decoder (default), or all of the model (official code)")

    def student(self, model):
        """A second model with a LoRALinear in the place of each linear; it shares all other modules."""
        dropout = self.dropout if self.training else 0.0
        new = {}
        for key, A in self.A.items():
            linear = model.get_submodule(key.replace("/", "."))
            new[linear] = LoRALinear(linear, A, self.B[key], self.alpha / self.rank, dropout)
        return rebuilt(model, new)
