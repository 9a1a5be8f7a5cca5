"""MimIC, equation by equation ("Mimic In-Context Learning for Multimodal Tasks", CVPR 2025).

Attention over [demonstrations; query] is attention over the query alone plus a shift (section 3.1):

    SA(q,[K_D;K],[V_D;V]) = SA(q,K,V) + μ · (SA(q,K_D,V_D) − SA(q,K,V)),    μ = Z1 / (Z1 + Z2),
    Z1 = Σ_i exp(q·K_D,i),    Z2 = Σ_j exp(q·K_j)          (q·k stands for q·k/√D, under the model's own mask)

which is how flash-decoding merges two attentions by their log-sum-exp. Only SA(q,K_D,V_D) and Z1 know the demonstrations.
MimIC (section 3.2) puts a learnable vector v in the place of the difference and a linear map f(q) in the place of log Z1:

    SA(q,K,V) + μ̃ · v,    μ̃ = e^f(q) / (e^f(q) + Z2)       one v and one f for every head of every layer

Tensors in, tensors out. Letters: B batch, H heads, T query tokens, S keys, D head_dim, L layers, d hidden size. `v` is always
the values; the paper's bold v is `vector`.
"""

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from model import InputError, Shifts, attention, written_whole
from parallel import rank


def mixing_weight(log_z1, log_z2):
    """μ = Z1 / (Z1 + Z2) = sigmoid(log Z1 − log Z2), in (0,1): never overflows. Same shapes in and out.

    A row without keys (log Z2 = −inf) gives 1, or 0 if it has no demonstration either, and no gradient to log Z2."""
    return torch.sigmoid(log_z1 - log_z2.clamp(min=torch.finfo(log_z2.dtype).min))


def icl_attention(q, k_D, v_D, k, v, mask_D=None, mask=None):
    """The exact identity: attention over [K_D;K] from the attentions over K_D and over K.

    q (B,H,T,D); k_D, v_D (B,Hkv,S_D,D); k, v (B,Hkv,S,D); masks (B,1,T,S_D) and (B,1,T,S) bool, True = may attend.
    → out (B,H,T,D) = SA + μ·shift, mu (B,H,T,1), shift (B,H,T,D) = SA_D − SA. Paper, section 3.1."""
    out_D, log_z1 = attention(q, k_D, v_D, mask_D)
    out, log_z2 = attention(q, k, v, mask)
    mu, shift = mixing_weight(log_z1, log_z2).unsqueeze(-1), out_D - out
    return out + mu.to(out.dtype) * shift, mu, shift


class MimIC(nn.Module, Shifts):
    """The MimIC heads of a decoder: `model(…, shifts=mimic)`. fp32 parameters: vector (L,H,D), f_weight (L,H,D), f_bias (L,H).

    z2="masked" takes Z2 over the keys the softmax sees (the paper). z2="unmasked" takes it over all keys, future tokens and
    padding included, as the official code does (shift_encoder.py:697); then the identity above holds for no f and v.
    mu_of, the paper's ablations: "head" is the method; "layer" has one μ̃ for all heads of a layer, from the sum of their f(q) and
    the mean of their log Z2; "one" is μ̃ = 1: the vectors alone (f is there, but not trained)."""

    def __init__(self, n_layers, n_heads, head_dim, z2="masked", mu_of="head"):
        super().__init__()
        if z2 not in ("masked", "unmasked") or mu_of not in ("head", "layer", "one"):
            raise ValueError(f"expected z2 masked or unmasked and mu_of head, layer or one, found {z2!r} and {mu_of!r}")
        self.z2, self.mu_of = z2, mu_of
        self.vector = nn.Parameter(0.001 * torch.randn(n_layers, n_heads, head_dim))       # start: almost the base model
        self.f_weight = nn.Parameter(0.02 * torch.randn(n_layers, n_heads, head_dim))
        self.f_bias = nn.Parameter(torch.zeros(n_layers, n_heads))
        for f in self.f_weight, self.f_bias:
            f.requires_grad_(mu_of != "one")

    @classmethod
    def for_model(cls, model, **options):
        """An untrained adapter for the model, on its device; options as above."""
        c = model.config.text
        return cls(c.num_hidden_layers, c.num_attention_heads, c.head_dim, **options).to(model.device)

    def like(self, model):
        """An untrained adapter with the options of this one, for that model."""
        return self.for_model(model, z2=self.z2, mu_of=self.mu_of)

    def groups(self, lr):
        """Parameter groups of the optimiser."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": lr}]

    def f(self, layer, q):
        """f(q) ≈ log Z1.  q (B,H,T,D), rotated as in the attention, not scaled by 1/√D → (B,H,T)."""
        return torch.linalg.vecdot(q.to(self.f_weight.dtype), self.f_weight[layer, :, None]) + self.f_bias[layer, :, None]

    def mu(self, layer, q, k, lse):
        """μ̃ = e^f / (e^f + Z2), (B,H,T): how much of the vector each head adds at each token."""
        if self.mu_of == "one":
            return torch.ones_like(lse)
        log_z1, log_z2 = self.f(layer, q), lse if self.z2 == "masked" else attention(q, k, k[..., :1])[1]
        if self.mu_of == "layer":
            log_z1, log_z2 = log_z1.sum(1, keepdim=True).expand_as(lse), log_z2.mean(1, keepdim=True)
        return mixing_weight(log_z1, log_z2)

    def after_attention(self, layer, q, k, out, lse):
        """SA(q,K,V) + μ̃·v.  Paper, section 3.2."""
        mu, v = self.mu(layer, q, k, lse).unsqueeze(-1), self.vector[layer, :, None]               # (B,H,T,1), (H,1,D)
        return torch.addcmul(out, mu, v).to(out.dtype)

    def save(self, path, **about):
        """Writes the adapter as safetensors; `about` (method, base model, dataset, seed, …) goes into its metadata as text."""
        save_atomically(self.state_dict(), path, {"z2": self.z2, "mu_of": self.mu_of, **{k: str(v) for k, v in about.items()}})

    @classmethod
    def load(cls, path):
        """The adapter in a file that `save` wrote. Raises InputError if the file is something else."""
        tensors, about = read_adapter(path, "MimIC")
        shapes = {name: tuple(x.shape) for name, x in tensors.items()}
        L, H, D = (shapes.get("vector", ()) + (0, 0, 0))[:3]
        expected = {"vector": (L, H, D), "f_weight": (L, H, D), "f_bias": (L, H)}
        if shapes != expected:
            raise InputError(f"{path}: expected a MimIC adapter with vector, f_weight (L,H,D) and f_bias (L,H), found {shapes}")
        options = about.get("z2", "masked"), about.get("mu_of", "head")
        if options[0] not in ("masked", "unmasked") or options[1] not in ("head", "layer", "one"):
            raise InputError(f"{path}: expected z2 masked or unmasked and mu_of head, layer or one, found {options}")
        mimic = cls(L, H, D, *options)
        mimic.load_state_dict(tensors)
        return mimic


def read_adapter(path, what):
    """The tensors and the metadata of an adapter file. Raises InputError, naming `what` was expected, if it is something else."""
    return read_whole(path, f"a {what} adapter")


def read_whole(path, what, dtypes=(torch.float32,)):
    """The tensors and the metadata of a file that `save_atomically` wrote. Raises InputError, naming `what` was expected, if it
    is no safetensors, has numbers of other types, or such as are not finite."""
    try:
        with safe_open(path, "pt") as file:
            tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except FileNotFoundError:
        raise InputError(f"{path}: expected {what}, found nothing") from None
    except (SafetensorError, OSError) as e:
        raise InputError(f"{path}: expected {what} in safetensors, found: {e}") from None
    for name, x in tensors.items():
        if x.dtype not in dtypes:
            raise InputError(f"{path}: expected {what} of {' or '.join(map(str, dtypes))}, found {name} of {x.dtype}")
        if not x.isfinite().all():
            raise InputError(f"{path}: expected {what} of finite numbers, found {name} with NaN or infinity")
    return tensors, about


def save_atomically(tensors, path, metadata):
    """Safetensors, the whole file or none: `model.written_whole`. Of many processes the first one writes."""
    if rank() == 0:
        with written_whole(path) as temporary:
            temporary.write_bytes(save({k: x.detach().cpu().contiguous() for k, x in tensors.items()}, metadata))


class Recorder(Shifts):
    """Keeps the states of one pass, those of `inner`'s shifts if given: `model(…, shifts=Recorder(mimic))`.

    .ffn: output of each layer's FFN before it is added (what the official code aligns); .layer: output of each layer (the paper's
    hidden states H). One (B,T,d) tensor a layer, or only the last `last` columns. A new pass starts new lists."""

    def __init__(self, inner=None, last=None):
        self.inner, self.last = inner if inner is not None else Shifts(), last
        self.ffn, self.layer = [], []

    @property
    def reads_attention(self):
        return self.inner.reads_attention

    def _kept(self, x):
        return x if self.last is None else x[:, -self.last:].clone()       # a copy, so that the long tensor can be freed

    def after_embedding(self, input_ids, x):
        self.ffn, self.layer = [], []
        return self.inner.after_embedding(input_ids, x)

    def after_attention(self, layer, q, k, out, lse):
        return self.inner.after_attention(layer, q, k, out, lse)

    def after_ffn(self, layer, ffn_out):
        ffn_out = self.inner.after_ffn(layer, ffn_out)
        self.ffn.append(self._kept(ffn_out))
        return ffn_out

    def after_layer(self, layer, hidden_states):
        hidden_states = self.inner.after_layer(layer, hidden_states)
        self.layer.append(self._kept(hidden_states))
        return hidden_states


def align_loss(student, teacher, mask, norm=False):
    """L_align: squared distance of the student's states from the teacher's, a scalar in fp32.

    student, teacher: one (B,T,d) tensor a layer; mask (B,T) bool, True = kept token. The mean over the layers, kept tokens
    and d of a sample, then over samples (the paper sums over tokens and d: a factor that λ would have to absorb). norm=True
    divides each layer's error by the mean square of the teacher's states there, so that no layer drowns the others.
    Paper, Figure 3; official code: F.mse_loss, shift_model.py:145-156."""
    keep, n_kept, loss = mask.bool().unsqueeze(-1), mask.sum(1).clamp(min=1), 0.0

    def mean_square(x):
        return x.masked_fill(~keep, 0).float().pow(2).mean(-1).sum(1) / n_kept          # (B,): over kept tokens and d

    for s, t in zip(student, teacher, strict=True):
        error = mean_square(s.float() - t.float())
        loss = loss + (error / mean_square(t).clamp(min=1e-12) if norm else error).mean()
    return loss / len(student)
