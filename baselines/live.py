"""LIVE: a learnt vector a layer, added behind the FFN at every token, whatever the query (Peng et al. 2024).

    h ← (h + α·v) · ‖h‖ / ‖h + α·v‖        h: a layer's FFN output, v (d) and α (scalar) learnt for that layer
    L_align = KL(p_teacher ‖ p_student)    mean over the answer's tokens; the teacher reads demonstrations too

As MimIC's authors run its code: v ~ N(0, 0.01²), α = 0.1, the scale's learning rate twice the vector's.
"""

from argparse import BooleanOptionalAction

import torch
import torch.nn as nn
import torch.nn.functional as F

from mimic import Adapter, lm_loss


class LIVE(Adapter):
    """`model(…, shifts=live)`. fp32 parameters: vector (L,d), alpha (L)."""
    defaults = {"lr": 5e-3, "lambda_align": 1.0, "lambda_ce": 0.5}
    official = {"kl_late": True}

    def __init__(self, n_layers, hidden_size):
        super().__init__()
        self.vector = nn.Parameter(0.01 * torch.randn(n_layers, hidden_size))
        self.alpha = nn.Parameter(torch.full((n_layers,), 0.1))

    @classmethod
    def for_model(cls, model):
        c = model.config.text
        return cls(c.num_hidden_layers, c.hidden_size).to(model.device)

    @staticmethod
    def add_arguments(group):
        group.add_argument("--kl-late", action=BooleanOptionalAction, default=False,
                           help="the KL misses the distribution of the answer's first token (official code)")

    def groups(self, lr):
        return [{"params": [self.vector], "lr": lr}, {"params": [self.alpha], "lr": 2 * lr}]

    def after_ffn(self, layer, ffn_out):
        """The norm of h stays, its direction moves.  (B,T,d) → (B,T,d)."""
        h = ffn_out.to(self.vector.dtype)
        moved = h + self.alpha[layer] * self.vector[layer]
        scale = h.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        return (moved * scale).to(ffn_out.dtype)

    @staticmethod
    def losses(model, adapter, batch, features, lambda_align=1.0, ce_on="answer", kl_late=False):
        """The KL of the answer's tokens, and the LM loss; scalars in fp32."""
        student = batch.student.inputs(model, features)
        states = model.hidden_states(**student, shifts=adapter)
        ce = lm_loss(model, states, student["input_ids"], getattr(batch, ce_on).to(model.device))
        if not lambda_align:
            return torch.zeros_like(ce), ce
        T_q = batch.T_q
        answer = batch.answer[:, -T_q:].to(model.device)
        read = answer if kl_late else F.pad(answer[:, 1:], (0, 1))         # column t is predicted from t − 1
        with torch.no_grad():
            teacher = model.hidden_states(**batch.teacher.inputs(model, features))
        log_p, log_q = (model.lm_head(x[:, -T_q:][read]).float().log_softmax(-1) for x in (teacher, states))
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean(), ce
