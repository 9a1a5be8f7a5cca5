"""STAVE: two learnt vectors, added to the prompt's token embeddings (2610.07572).

    x_t ← x_t + w_readout / √n_readout    t: the prompt's last token, and the answer's cue ("Answer:")
    x_t ← x_t + w_context / √n_context    t: other tokens of instruction and query, the picture's among them
    x_t ← x_t                             t: <s>, padding, demonstrations, the answer, whatever is generated
    L = (CE(answer | query) + CE(answer | demonstrations, query)) / 2

n: how many tokens of its prompt a row covers. W = [w_readout; w_context] (2,d) = 0 at start: the base model.
"""

import re

import torch
import torch.nn as nn

from data import ANSWER, INSTRUCTION, QUERY
from mimic import Adapter, lm_loss
from model import Shifts


def cue_length(processor, template):
    """Tokens of the answer's cue: what the template has behind question and picture, maybe nothing."""
    text = processor.expand(template.query.format(question="?"))
    cue = re.split(r"\{question\}|<image>", template.query)[-1].strip()
    starts = processor.encode_with_offsets(text)[1]
    place = len(text) - len(cue)
    return sum(start > place for start in starts) + 1 if cue else 0      # its first may begin with a space


class STAVE(Adapter):
    """`model(…, shifts=stave)` on prompts to generate from: all but <s> is covered; on others see `Parted`.
    fp32 parameters: W (2,d), the readout row and the context row."""
    defaults = {"lr": 3e-3, "lambda_ce": 1.0, "shots": 1}                    # its authors: 8 shots on COCO
    toy_lr = 3e-1
    kept = {"n_cue": int, "pad_id": int}

    def __init__(self, hidden_size, n_cue, pad_id):
        super().__init__()
        self.W = nn.Parameter(torch.zeros(2, hidden_size))
        self.n_cue = n_cue
        self.pad_id = pad_id

    @classmethod
    def for_model(cls, model, processor=None, template=None, n_cue=0, pad_id=None):
        """n_cue is worked out if processor and template are given."""
        n_cue = cue_length(processor, template) if processor else n_cue
        pad_id = model.pad_id if pad_id is None else pad_id
        return cls(model.config.text.hidden_size, n_cue, pad_id).to(model.device)

    @staticmethod
    def sizes(tensors):
        return tensors["W"].shape[1:]

    def after_embedding(self, input_ids, x):
        if input_ids.shape[1] == 1:                                          # a generated token
            return x
        token = input_ids != self.pad_id
        return self.add(token & (token.cumsum(1) > 1), x)                    # never to <s>

    def add(self, prompt, x):
        """To x (B,T,d), where `prompt` (B,T) bool is instruction or query."""
        readout = prompt & (prompt.flip(1).cumsum(1).flip(1) <= max(1, self.n_cue))
        for w, covered in zip(self.W, (readout, prompt & ~readout), strict=True):
            n = covered.sum(1, keepdim=True).clamp(min=1).to(w.dtype)
            x = x + ((covered / n.sqrt()).unsqueeze(-1) * w).to(x.dtype)
        return x

    @staticmethod
    def losses(model, adapter, batch, features, ce_on="answer"):
        """No L_align, and the mean of the LM losses without demonstrations and with them."""
        def ce(rows, read):
            inputs = rows.inputs(model, features)
            states = model.hidden_states(**inputs, shifts=Parted(adapter, rows))
            return lm_loss(model, states, inputs["input_ids"], read.to(model.device))

        alone = ce(batch.student, getattr(batch, ce_on))
        behind = ce(batch.teacher, batch.teacher.part == ANSWER)
        return torch.zeros_like(alone), (alone + behind) / 2


class Parted(Shifts):
    """STAVE on rows with demonstrations or an answer: every token says which part of them it is."""
    def __init__(self, stave, rows):
        self.stave = stave
        self.prompt = (rows.part == INSTRUCTION) | (rows.part == QUERY)

    def after_embedding(self, input_ids, x):
        return self.stave.add(self.prompt.to(x.device), x)
