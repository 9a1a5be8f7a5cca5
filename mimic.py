"""MimIC, equation by equation ("Mimic In-Context Learning for Multimodal Tasks", CVPR 2025).

Attention over [demonstrations; query] is attention over the query alone plus a shift (section 3.1):

    SA(q,[K_D;K],[V_D;V]) = SA(q,K,V) + μ · (SA(q,K_D,V_D) − SA(q,K,V)),    μ = Z1 / (Z1 + Z2),
    Z1 = Σ_i exp(q·K_D,i),    Z2 = Σ_j exp(q·K_j)          (q·k stands for q·k/√D, under the model's own mask)

which is how flash-decoding merges two attentions by their log-sum-exp. Only SA(q,K_D,V_D) and Z1 know the
demonstrations. MimIC (section 3.2) puts a learnable vector v in the place of the difference and a linear map
f(q) in the place of log Z1:

    SA(q,K,V) + μ̃ · v,    μ̃ = e^f(q) / (e^f(q) + Z2)       one v and one f for every head of every layer

Tensors in, tensors out. Letters: B batch, H heads, T query tokens, S keys, D head_dim, L layers, d hidden
size. `v` is always the values; the paper's bold v is `vector`.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Shifts, attention
from support.files import Stored


def mixing_weight(log_z1, log_z2):
    """μ = Z1 / (Z1 + Z2) = sigmoid(log Z1 − log Z2), in (0,1): never overflows. Same shapes in and out.

    A row without keys (log Z2 = −inf) gives 1, or 0 if it has no demonstration either, and no gradient."""
    smallest = torch.finfo(log_z2.dtype).min
    return torch.sigmoid(log_z1 - log_z2.clamp(min=smallest))


def icl_attention(q, k_D, v_D, k, v, mask_D=None, mask=None):
    """The exact identity: attention over [K_D;K] from the attentions over K_D and over K.  Paper, section
    3.1.

    q (B,H,T,D); k_D, v_D (B,Hkv,S_D,D); k, v (B,Hkv,S,D); masks (B,1,T,S_D) and (B,1,T,S) bool, True = may
    attend. → out (B,H,T,D) = SA + μ·shift, mu (B,H,T,1), shift (B,H,T,D) = SA_D − SA."""
    out_D, log_z1 = attention(q, k_D, v_D, mask_D)
    out, log_z2 = attention(q, k, v, mask)
    mu = mixing_weight(log_z1, log_z2).unsqueeze(-1)
    shift = out_D - out
    return out + mu.to(out.dtype) * shift, mu, shift


class Adapter(Stored, Shifts):
    """Shifts with parameters. A method is a subclass with its equation at the seam, and with
    `for_model(model, **options)` → an untrained one on its device; `sizes` and `kept` as in Stored."""
    defaults = {}                 # of train.py's options
    toy_lr = 2e-2                 # highest learning rate on the toy models
    official = None               # options that --official sets; None: the official code has no such method
    losses = None                 # its own losses(model, adapter, batch, features, …); None: train.losses

    @staticmethod
    def add_arguments(group):
        """The method's own options of train.py."""

    def groups(self, lr):
        """Parameter groups of the optimiser."""
        trained = [p for p in self.parameters() if p.requires_grad]
        return [{"params": trained, "lr": lr}]


class MimIC(Adapter):
    """The MimIC heads of a decoder, fp32 parameters vector (L,H,D), f_weight (L,H,D), f_bias (L,H).

    z2 "masked" takes Z2 over the keys the softmax sees (the paper), "unmasked" over all, future and padding
    included, as the official code (shift_encoder.py:697): then the identity above holds for no f and v.
    mu_of "head" is the method, the others the paper's ablations: "layer" has one μ̃ for the heads of a layer,
    from the sum of their f(q) and the mean of their log Z2; "one" is μ̃ = 1, the vectors alone."""
    defaults = {"lr": 5e-3, "lambda_align": 1.0, "lambda_ce": 0.5}
    official = {"z2": "unmasked"}
    kept = {"z2": str, "mu_of": str}

    def __init__(self, n_layers, n_heads, head_dim, z2="masked", mu_of="head"):
        super().__init__()
        if z2 not in ("masked", "unmasked") or mu_of not in ("head", "layer", "one"):
            raise ValueError(f"z2 {z2!r:.20} (masked, unmasked) or mu_of {mu_of!r:.20} (head, layer, one)")
        self.z2 = z2
        self.mu_of = mu_of
        self.vector = nn.Parameter(0.001 * torch.randn(n_layers, n_heads, head_dim))   # almost the base model
        self.f_weight = nn.Parameter(0.02 * torch.randn(n_layers, n_heads, head_dim))
        self.f_bias = nn.Parameter(torch.zeros(n_layers, n_heads))
        self.f_weight.requires_grad_(mu_of != "one")
        self.f_bias.requires_grad_(mu_of != "one")

    @classmethod
    def for_model(cls, model, z2="masked", mu_of="head"):
        """An untrained adapter for the model, on its device."""
        c = model.config.text
        mimic = cls(c.num_hidden_layers, c.num_attention_heads, c.head_dim, z2, mu_of)
        return mimic.to(model.device)

    @staticmethod
    def add_arguments(group):
        group.add_argument("--z2", choices=("masked", "unmasked"), default="masked",
                           help="keys in log Z2: those the softmax sees (default) or all (official code)")
        group.add_argument("--mu", dest="mu_of", choices=("head", "layer", "one"), default="head",
                           help="one μ̃ a head (default, the paper), one a layer, or μ̃ = 1")

    def f(self, layer, q):
        """f(q) ≈ log Z1.  q (B,H,T,D), rotated as in the attention, not scaled by 1/√D → (B,H,T)."""
        weight = self.f_weight[layer, :, None]                                           # (H,1,D)
        bias = self.f_bias[layer, :, None]                                               # (H,1)
        return torch.linalg.vecdot(q.to(weight.dtype), weight) + bias

    def mu(self, layer, q, k, lse):
        """μ̃ = e^f / (e^f + Z2), (B,H,T): how much of the vector each head adds at each token."""
        if self.mu_of == "one":
            return torch.ones_like(lse)
        log_z1 = self.f(layer, q)
        log_z2 = lse
        if self.z2 == "unmasked":
            _, log_z2 = attention(q, k, k[..., :1])                  # no mask; nobody reads the values
        if self.mu_of == "layer":
            log_z1 = log_z1.sum(1, keepdim=True).expand_as(lse)
            log_z2 = log_z2.mean(1, keepdim=True)
        return mixing_weight(log_z1, log_z2)

    def after_attention(self, layer, q, k, out, lse):
        """SA(q,K,V) + μ̃·v.  Paper, section 3.2."""
        mu = self.mu(layer, q, k, lse).unsqueeze(-1)                                     # (B,H,T,1)
        v = self.vector[layer, :, None]                                                  # (H,1,D)
        shifted = torch.addcmul(out, mu, v)
        return shifted.to(out.dtype)


class Recorder(Shifts):
    """Keeps the states of a pass, under `inner`'s shifts if given: `model(…, shifts=Recorder(mimic))`.

    .ffn: output of each layer's FFN before it is added (what the official code aligns); .layer: that of each
    layer (the paper's H). One (B,T,d) tensor a layer, or only its last columns. A new pass, new lists."""

    def __init__(self, inner=None, last=None):
        self.inner = inner if inner is not None else Shifts()
        self.last = last
        self.ffn = []
        self.layer = []

    @property
    def reads_attention(self):
        return self.inner.reads_attention

    def _kept(self, x):
        return x if self.last is None else x[:, -self.last:].clone()    # so that the long tensor can be freed

    def after_embedding(self, input_ids, x):
        self.ffn = []
        self.layer = []
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
    """L_align: squared distance of the student's states from the teacher's, in fp32.  Paper, Figure 3.

    student, teacher: one (B,T,d) tensor a layer; mask (B,T) bool, True = kept token. Mean over layers, kept
    tokens and d of a sample, then over samples (the paper sums over tokens and d: then longer samples weigh
    more, and λ has to follow d). norm=True divides a layer's error by the mean square of the teacher's states
    there, so that no layer drowns the others. Official code: F.mse_loss, shift_model.py:145-156."""
    keep = mask.bool().unsqueeze(-1)
    n_kept = mask.sum(1).clamp(min=1)
    loss = 0.0

    def mean_square(x):
        kept = x.masked_fill(~keep, 0).float()
        return kept.pow(2).mean(-1).sum(1) / n_kept                       # (B,): over kept tokens and d

    for s, t in zip(student, teacher, strict=True):
        difference = s.float() - t.float()
        error = mean_square(difference)
        if norm:
            error = error / mean_square(t).clamp(min=1e-12)
        loss = loss + error.mean()
    return loss / len(student)


def lm_loss(model, hidden_states, input_ids, read):
    """L_gt: cross-entropy of the tokens that `read` (B,T) marks, each predicted from the column before it.

    hidden_states (B,T,d) of `model.hidden_states`; logits are made where they are read alone. fp32."""
    before = hidden_states[:, :-1][read[:, 1:]]
    logits = model.lm_head(before).float()
    return F.cross_entropy(logits, input_ids[read])
