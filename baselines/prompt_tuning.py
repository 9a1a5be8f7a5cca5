"""Prompt tuning: n learnt token embeddings at the beginning of the prompt (Lester et al., EMNLP 2021).

    [<s>; x_1 … x_T]  →  [<s>; p_1 … p_n; x_1 … x_T]        p (n,d): n tokens more to read, for every query

The prompt gets n times <unk> right behind <s>, and `after_embedding` puts p in the place of their embeddings.
p starts as the embeddings of n words drawn from the vocabulary, and is trained by the LM loss.
"""

from dataclasses import replace

import torch
import torch.nn as nn

from mimic import Adapter, lm_loss


class PromptTuning(Adapter):
    """`model(…, shifts=tuning)` on prompts of `tuning.template(…)`. fp32 parameters: vector (n,d), p."""
    defaults = {"lr": 1e-2, "lambda_ce": 1.0, "shots": 0}
    kept = {"pad_id": int}

    def __init__(self, n, hidden_size, pad_id):
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(n, hidden_size))
        self.pad_id = pad_id

    @classmethod
    def for_model(cls, model, n=20, pad_id=None):
        words = model.text_model.embed_tokens.weight
        tuning = cls(n, words.shape[1], model.pad_id if pad_id is None else pad_id).to(model.device)
        drawn = torch.randperm(len(words))[:n]
        tuning.vector.data = words.detach()[drawn].float()
        return tuning

    @property
    def options(self):
        return {"n": len(self.vector), "pad_id": self.pad_id}

    def template(self, template):
        return replace(template, instruction="<unk>" * len(self.vector) + template.instruction)

    def after_embedding(self, input_ids, x):
        """p in the n columns behind each row's first token; a single column is a generated token."""
        if input_ids.shape[1] == 1:
            return x
        first = (input_ids != self.pad_id).int().argmax(1, keepdim=True)             # (B,1): column of <s>
        columns = first + 1 + torch.arange(len(self.vector), device=x.device)        # (B,n)
        index = columns.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        return x.scatter(1, index, self.vector.to(x.dtype).expand(len(x), -1, -1))

    @staticmethod
    def losses(model, adapter, batch, features, ce_on="answer"):
        """No L_align, as p is no part of a teacher's prompt, and the LM loss."""
        student = batch.student.inputs(model, features)
        states = model.hidden_states(**student, shifts=adapter)
        ce = lm_loss(model, states, student["input_ids"], getattr(batch, ce_on).to(model.device))
        return torch.zeros_like(ce), ce
