"""STAVE: two learnt vectors, added to the prompt's token embeddings (2610.07572).

    x_t ← x_t + w_readout / √n_readout      t: the last token of the prompt and the answer's cue (the template's "Answer:")
    x_t ← x_t + w_context / √n_context      t: the other tokens of instruction and query, the picture's among them
    x_t ← x_t                               t: <s>, padding, demonstrations, the answer, whatever is generated

n: how many tokens of that prompt a row covers. W = [w_readout; w_context] (2,d) = 0 at start: bitwise the base model. Trained by
the LM loss of the answer behind the prompt with demonstrations and behind the same without, 1:1 (train.py --ce-prompts both).
"""

import re

import torch
import torch.nn as nn

from mimic import read_adapter, save_atomically
from model import InputError, Shifts


def cue_length(processor, template):
    """Tokens of the answer's cue: of what a template has behind question and picture (0 if it has nothing there)."""
    text = processor.expand(template.query.format(question="?"))
    place = len(text) - len(re.split(r"\{question\}|<image>", template.query)[-1].strip())
    starts = processor.encode_with_offsets(text)[1]
    return sum(start > place for start in starts) + 1 if place < len(text) else 0     # its first may begin at a space before


class STAVE(nn.Module, Shifts):
    """`model(…, shifts=stave)`. fp32 parameters: W (2,d), the readout row and the context row.

    .prompt: (B,T) bool, True = token of instruction or query, for the next pass only; None (default): all tokens of a pass are,
    as in a prompt to generate from. Whoever runs a prompt with an answer or with demonstrations has to set it."""

    def __init__(self, hidden_size, n_cue=0, pad_id=0):
        super().__init__()
        self.n_cue, self.pad_id, self.prompt = n_cue, pad_id, None
        self.W = nn.Parameter(torch.zeros(2, hidden_size))

    @classmethod
    def for_model(cls, model, n_cue=0):
        return cls(model.config.text.hidden_size, n_cue, model.pad_id).to(model.device)

    def like(self, model):
        return self.for_model(model, self.n_cue)

    def columns(self, input_ids, prompt=None):
        """Which tokens the two rows cover: readout, context (B,T) bool."""
        token = input_ids != self.pad_id
        prompt = (token if prompt is None else prompt.to(token.device)) & (token.cumsum(1) > 1)           # never <s>
        readout = prompt & (prompt.flip(1).cumsum(1).flip(1) <= max(1, self.n_cue))
        return readout, prompt & ~readout

    def after_embedding(self, input_ids, x):
        prompt, self.prompt = self.prompt, None
        if input_ids.shape[1] == 1:                                                       # a generated token
            return x
        for w, covered in zip(self.W, self.columns(input_ids, prompt), strict=True):
            n = covered.sum(1, keepdim=True).clamp(min=1).to(w.dtype)
            x = x + ((covered / n.sqrt()).unsqueeze(-1) * w).to(x.dtype)
        return x

    def groups(self, lr):
        """Parameter groups of the optimiser."""
        return [{"params": [self.W], "lr": lr}]

    def save(self, path, **about):
        about |= {"n_cue": self.n_cue, "pad_id": self.pad_id}
        save_atomically(self.state_dict(), path, {k: str(v) for k, v in about.items()})

    @classmethod
    def load(cls, path):
        tensors, about = read_adapter(path, "STAVE")
        shapes, numbers = {name: tuple(x.shape) for name, x in tensors.items()}, [about.get(k, "") for k in ("n_cue", "pad_id")]
        d = (shapes.get("W", ()) + (0, 0))[1]
        if shapes != {"W": (2, d)} or not all(map(str.isdecimal, numbers)):
            raise InputError(f"{path}: expected a STAVE adapter with W (2,d), n_cue and pad_id, found {shapes}")
        stave = cls(d, *map(int, numbers))
        stave.load_state_dict(tensors)
        return stave
