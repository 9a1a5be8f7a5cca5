"""Task vector: the state that demonstrations leave at the last token, put in its place (Hendel et al. 2023).

    θ_l = mean over dummy queries of h_l(last token of [demonstrations, dummy query])
    inference, no demonstrations:  h_l(last token of the prompt) ← θ_l    one layer l, chosen on dev

h_l: the state after layer l. 100 dummy queries are training samples, each behind demonstrations of its own.
The prompt alone is patched. What other tokens know of the query, the layers above l can still attend to.
"""

import random

import torch
import torch.nn as nn
from tqdm import tqdm

from data import chunks, draw, encode_images, prompts
from mimic import Adapter, Recorder
from model import Shifts


class TaskVector(Adapter):
    """`model.generate(…, shifts=vector)`: vector (d) replaces the last token's state after `layer`."""
    shots, least = None, 1        # demonstrations by default (None = the model's), and at least
    kept = {"layer": int}

    def __init__(self, vector, layer):
        super().__init__()
        self.vector = nn.Parameter(vector)
        self.layer = layer

    @staticmethod
    def sizes(tensors):
        return [tensors["vector"]]

    def patched(self, last):
        return self.vector.to(last).expand_as(last)

    def after_layer(self, layer, hidden_states):
        """(B,T,d) → (B,T,d). Prompts are padded on the left: the last column is every row's last token."""
        if layer != self.layer:
            return hidden_states
        return torch.cat([hidden_states[:, :-1], self.patched(hidden_states[:, -1:])], 1)

    @property
    def while_decoding(self):
        """Nothing: only the prompt is patched."""
        return Shifts()

    @classmethod
    def prepare(cls, model, processor, template, pool, queries, shots, seed, batch_size, dev_score):
        """→ no demonstrations for any query, and the task vector; dev_score chooses the layer."""
        features = encode_images(model, processor, pool, {}, "encode images")
        dummies = random.Random(f"{seed}-dummies").sample(pool, min(100, len(pool)))
        batches = [prompts(some, draw(pool, some, shots, f"{seed}-dummy"), processor, template)
                   for some in chunks(dummies, batch_size)]
        states = mean_states(model, features, batches)
        candidates = [cls(state, layer) for layer, state in enumerate(states)]
        return [[]] * len(queries), best_layer("task-vector", candidates, dev_score)


@torch.no_grad()
def mean_states(model, features, batches):
    """θ: mean over all prompts, batches of Rows, of the last token's state after every layer → (L,d) fp32."""
    total = 0.0
    for rows in tqdm(batches, desc="states of the demonstrations", unit="batch"):
        recorder = Recorder(last=1)
        model.hidden_states(**rows.inputs(model, features), shifts=recorder)
        total = total + torch.stack(recorder.layer)[:, :, 0].float().sum(1)
    return total / sum(len(rows.input_ids) for rows in batches)


def best_layer(method, candidates, dev_score):
    """Of the candidates, one a layer, that with the highest dev score; of equals the lowest layer."""
    scores = [dev_score(c) for c in tqdm(candidates, desc="dev, layer by layer", unit="layer")]
    best = candidates[scores.index(max(scores))]
    shown = " ".join(f"{score:.1f}" for score in scores)
    print(f"{method}: after layer {best.layer} (the first is 0); dev score by layer: {shown}")
    return best
