"""Prompt tuning: n learnt token embeddings at the beginning of the prompt (Lester et al., EMNLP 2021).

    [<s>; x_1 … x_T]  →  [<s>; p_1 … p_n; x_1 … x_T]        p (n,d): as many tokens more to read, for every query

The prompt gets n placeholder tokens right behind <s> (`template`), and `after_embedding` puts p in the place of their
embeddings, so that positions, masks and caches know them as tokens like others. p starts as the embeddings of n words drawn from
the vocabulary, and is trained by the LM loss alone, without demonstrations.
"""

from dataclasses import replace

import torch
import torch.nn as nn

from mimic import read_adapter, save_atomically
from model import InputError, Shifts

PLACEHOLDER = "<unk>"             # a token of every vocabulary; its own embedding is never read


class PromptTuning(nn.Module, Shifts):
    """`model(…, shifts=tuning)` on prompts of `tuning.template(template)`. fp32 parameters: vector (n,d), the paper's P."""

    def __init__(self, n, hidden_size, pad_id=0):
        super().__init__()
        self.pad_id, self.vector = pad_id, nn.Parameter(torch.zeros(n, hidden_size))

    @classmethod
    def for_model(cls, model, n=20):
        words = model.text_model.embed_tokens.weight
        tuning = cls(n, words.shape[1], model.pad_id).to(model.device)
        drawn = torch.randperm(len(words))[:n].to(model.device)
        tuning.vector.data = words.detach()[drawn].float()
        return tuning

    def like(self, model):
        return self.for_model(model, len(self.vector))

    def template(self, template):
        return replace(template, instruction=PLACEHOLDER * len(self.vector) + template.instruction)

    def after_embedding(self, input_ids, x):
        """p in the n columns behind each row's first token.  A single column is a generated token: it is left as it is."""
        if input_ids.shape[1] == 1:
            return x
        first = (input_ids != self.pad_id).int().argmax(1, keepdim=True)                   # (B,1): column of <s>
        columns = first + 1 + torch.arange(len(self.vector), device=x.device)              # (B,n)
        index = columns.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        return x.scatter(1, index, self.vector.to(x.dtype).expand(len(x), -1, -1))

    def groups(self, lr):
        """Parameter groups of the optimiser."""
        return [{"params": [self.vector], "lr": lr}]

    def save(self, path, **about):
        save_atomically(self.state_dict(), path, {k: str(v) for k, v in {**about, "pad_id": self.pad_id}.items()})

    @classmethod
    def load(cls, path):
        tensors, about = read_adapter(path, "prompt-tuning")
        shapes = {name: tuple(x.shape) for name, x in tensors.items()}
        if shapes.keys() != {"vector"} or len(shapes["vector"]) != 2 or not about.get("pad_id", "").isdecimal():
            raise InputError(f"{path}: expected a prompt-tuning adapter with vector (n,d) and its pad_id, found {shapes}")
        tuning = cls(*shapes["vector"], int(about["pad_id"]))
        tuning.load_state_dict(tensors)
        return tuning
