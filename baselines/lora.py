"""LoRA: a low-rank change of weight matrices instead of a shift (Hu et al., ICLR 2022).

    y = W x + (α/r) · B A x̃        W (d_out,d_in) frozen, A (r,d_in), B (d_out,r); B = 0 at start: the base model
                                   x̃: x under dropout while training, else x

on the q, k, v and o projections. scope="text": of the decoder's layers. scope="all": of every module with such a
name, the vision tower (its out_proj has another name) and the perceiver too, as the official code's search by name finds them.

The base model is not touched: `student(model)` is a second model that shares all tensors of the first but has these sums in
the place of its linears. `merge(model)` is one with W + (α/r)·BA as plain weights, which costs nothing at inference.
Start of A: uniform within ±1/√d_in, as in the paper's code.
"""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

from mimic import read_adapter, save_atomically
from model import InputError, Shifts

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class LoRALinear(nn.Module):
    """y = W x + b + scale · B A x̃.  The linear and A, B are those given, not copies."""

    def __init__(self, linear, A, B, scale, dropout):
        super().__init__()
        self.linear, self.A, self.B, self.scale, self.dropout = linear, A, B, scale, dropout

    def forward(self, x):
        y, x = self.linear(x), x.to(self.A.dtype)
        x = F.dropout(x, self.dropout) if self.dropout else x
        return y + (self.scale * (x @ self.A.T @ self.B.T)).to(y.dtype)


def rebuilt(module, new, name=""):
    """The module with new[name] in the place of each descendant of that name. Only the modules above them are copied, and no
    tensor: all else is the very same object."""
    if name in new:
        return new[name]
    children = {n: rebuilt(m, new, f"{name}.{n}" if name else n) for n, m in module._modules.items()}
    if all(child is module._modules[n] for n, child in children.items()):
        return module
    other = copy.copy(module)
    other._modules = children
    return other


class LoRA(nn.Module, Shifts):
    """`model(…, shifts=lora)` needs `lora.student(model)` as model. fp32 parameters: A (r,d_in), B (d_out,r) for every name.

    shapes: name of a linear → (d_out, d_in). alpha 0 = 2·rank. Dropout acts in train mode only: train.py sets it."""

    def __init__(self, shapes, rank=16, alpha=0, dropout=0.05, **options):
        super().__init__()
        self.alpha, self.dropout = alpha or 2 * rank, dropout
        self.scale = self.alpha / rank
        self.options = {"rank": rank, "alpha": self.alpha, "dropout": dropout, **options}         # what for_model was given
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        for name, (d_out, d_in) in shapes.items():              # a parameter's name cannot hold a dot
            self.A[name.replace(".", "/")] = nn.Parameter(torch.empty(rank, d_in).uniform_(-d_in ** -0.5, d_in ** -0.5))
            self.B[name.replace(".", "/")] = nn.Parameter(torch.zeros(d_out, rank))

    @classmethod
    def for_model(cls, model, rank=16, alpha=0, dropout=0.05, targets=PROJECTIONS, scope="text"):
        """targets: last part of the names of the linears. scope: "text" or "all"."""
        where = {"text": model.text_model.layers, "all": model}[scope]
        inside = set(where.modules())
        shapes = {name: (m.out_features, m.in_features) for name, m in model.named_modules()
                  if isinstance(m, nn.Linear) and m in inside and name.split(".")[-1] in targets}
        if not shapes:
            raise InputError(f"--targets: expected names of linear layers such as q_proj, found {' '.join(targets)}")
        return cls(shapes, rank, alpha, dropout, targets=" ".join(targets), scope=scope).to(model.device)

    def like(self, model):
        return self.for_model(model, **{**self.options, "targets": self.options["targets"].split()})

    def replaced(self, model, make):
        """The model with make(linear, A, B) in the place of each target."""
        linears = {name.replace("/", "."): name for name in self.A}
        return rebuilt(model, {name: make(model.get_submodule(name), self.A[key], self.B[key]) for name, key in linears.items()})

    def student(self, model):
        """The model that runs with this LoRA; gradients reach A and B."""
        dropout = self.dropout if self.training else 0.0
        return self.replaced(model, lambda linear, A, B: LoRALinear(linear, A, B, self.scale, dropout))

    @torch.no_grad()
    def merge(self, model):
        """The model with W + (α/r)·BA as weights; the other weights are shared with `model`, which stays as it is."""
        def merged(linear, A, B):
            linear = copy.copy(linear)
            linear._parameters = dict(linear._parameters)
            weight = linear.weight + (self.scale * (B @ A)).to(linear.weight.dtype)
            linear._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
            return linear
        return self.replaced(model, merged)

    def groups(self, lr):
        """Parameter groups of the optimiser."""
        return [{"params": list(self.parameters()), "lr": lr}]

    def save(self, path, **about):
        save_atomically(self.state_dict(), path, {k: str(v) for k, v in {**about, **self.options}.items()})

    @classmethod
    def load(cls, path):
        tensors, about = read_adapter(path, "LoRA")
        names = {key[2:] for key in tensors if key.startswith("A.")}
        try:
            A, B = ({name: tensors[f"{side}.{name}"].shape for name in names} for side in "AB")
            shapes = {name.replace("/", "."): (B[name][0], A[name][1]) for name in names}
            rank, alpha, dropout = int(about["rank"]), float(about["alpha"]), float(about["dropout"])
            if not names or len(tensors) != 2 * len(names) or any(A[n][0] != rank or B[n][1] != rank for n in names):
                raise ValueError
            if about["scope"] not in ("text", "all") or not 0 < alpha < 1e6 or not 0 <= dropout < 1:
                raise ValueError
            lora = cls(shapes, rank, alpha, dropout, targets=about["targets"], scope=about["scope"])
        except (KeyError, ValueError, IndexError, ZeroDivisionError):
            raise InputError(f"{path}: expected a LoRA adapter with A.name (r,d_in), B.name (d_out,r) and its rank, found "
                             f"{len(tensors)} tensors such as {', '.join(sorted(tensors)[:3])}") from None
        lora.load_state_dict(tensors)
        return lora.eval()
