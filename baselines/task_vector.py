"""Task vector: the state that demonstrations leave at the last token, put in its place (Hendel et al., EMNLP Findings 2023).

    θ_l = mean over dummy queries of h_l(last token of [S demonstrations, dummy query])        h_l: residual state after layer l
    inference, no demonstrations:  h_l(last token of the prompt) ← θ_l                         at one layer l, chosen on dev

Dummy queries are training samples, each behind demonstrations of its own. The prompt alone is patched: the tokens generated
after it are ordinary, but the cache that they read was made by the layers above l from θ_l. (Hendel et al. generate one token.)
What the last token knows of the query at layer l is lost; what the other tokens know, the layers above l can still attend to.
"""

import random

import torch
from tqdm import tqdm

from data import pick_icds, prompts
from features import gather
from mimic import Recorder, read_adapter, save_atomically
from model import InputError, Shifts

DUMMIES = 100                 # dummy queries that θ is the mean of


class TaskVector(Shifts):
    """`model.generate(…, shifts=task_vector)`: vector (d) takes the place of the last prompt token's state after `layer`."""

    def __init__(self, vector, layer):
        self.vector, self.layer = vector, layer

    def after_layer(self, layer, hidden_states):
        """(B,T,d) → (B,T,d). Prompts are padded on the left: the last column is every row's last token."""
        if layer != self.layer:
            return hidden_states
        return torch.cat([hidden_states[:, :-1], self.vector.to(hidden_states).expand_as(hidden_states[:, -1:])], 1)

    @property
    def while_decoding(self):
        """Nothing: only the prompt is patched."""
        return Shifts()

    def save(self, path, **about):
        save_vector(self, path, about)

    @classmethod
    def load(cls, path):
        return cls(*load_vector(path, "task vector"))


def save_vector(shifts, path, about):
    """vector (d) as safetensors; its layer and whatever `about` says become the metadata, as text."""
    save_atomically({"vector": shifts.vector}, path, {"layer": str(shifts.layer), **{k: str(v) for k, v in about.items()}})


def load_vector(path, what):
    """→ vector (d), layer. Raises InputError if the file is something else."""
    tensors, about = read_adapter(path, what)
    if tensors.keys() != {"vector"} or tensors["vector"].ndim != 1 or not about.get("layer", "").isdecimal():
        raise InputError(f"{path}: expected a {what} with vector (d) and its layer, found {sorted(tensors)} and {about}")
    return tensors["vector"], int(about["layer"])


def inputs(model, processor, template, features, queries, icds):
    """What the model reads for these prompts, on its device → input_ids (B,T), attention_mask (B,T), image_features."""
    rows = prompts(queries, icds, processor, template)
    return rows.input_ids.to(model.device), rows.attention_mask.to(model.device), gather(features, rows.samples)


@torch.no_grad()
def mean_states(model, batches):
    """θ: the mean over all prompts of the last token's state after every layer → (L,d) fp32. batches: as `inputs` gives them."""
    total, n = 0.0, 0
    for input_ids, attention_mask, images in batches:
        recorder = Recorder(last=1)
        model.hidden_states(input_ids, attention_mask, images, recorder)
        total, n = total + torch.stack(recorder.layer)[:, :, 0].float().sum(1), n + len(input_ids)
    return total / n


def choose_layer(candidates, dev_score):
    """The shifts with the highest dev score (of equals the lowest layer) → shifts, the score of each."""
    scores = [dev_score(c) for c in tqdm(candidates, desc="dev, layer by layer", unit="layer")]
    return candidates[scores.index(max(scores))], scores


def make(model, processor, template, features, pool, shots, seed, dev_score, batch_size=16):
    """The task vector of the pool's task → TaskVector, what its file says of it. features: of every image in the pool.

    dev_score(shifts) → number: how well the model answers with them."""
    dummies = random.Random(f"{seed}-dummies").sample(pool, min(DUMMIES, len(pool)))
    chunks = [dummies[i:i + batch_size] for i in range(0, len(dummies), batch_size)]
    theta = mean_states(model, (
        inputs(model, processor, template, features, chunk, [pick_icds(pool, q, shots, f"{seed}-dummy-{q.id}") for q in chunk])
        for chunk in tqdm(chunks, desc="states of the demonstrations", unit="batch")))
    chosen, scores = choose_layer([TaskVector(state, layer) for layer, state in enumerate(theta)], dev_score)
    return chosen, {"dev_scores": scores, "dummies": len(dummies)}
