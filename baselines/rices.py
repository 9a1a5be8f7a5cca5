"""RICES: in-context learning with the demonstrations whose pictures look most like the query's (Yang et al. 2022, Flamingo).

    z(image) = mean over valid patches of the vision tower's last states, divided by its L2 norm       (before the connector)
    demonstrations = the k training samples with the largest z(image) · z(query's image)

order "last" puts the most similar one right before the query, "first" at the beginning. Equally similar samples, such as two
questions about one picture, rank as they stand in the pool. The query itself is never shown. Another question about its own
picture may be, as the most similar of all: it says nothing of the query's answer that the picture does not. No picture of the
evaluation splits is in the training split, so that concerns `--split train` alone. Finding the neighbours is not part of
ms_per_query, as encoding the images is not.
"""

import hashlib
from pathlib import Path

import torch

from mimic import read_whole, save_atomically
from model import InputError

IMAGES_AT_ONCE = 4096         # distinct images encoded between two writings of the cache


@torch.no_grad()
def image_vector(model, pixel_values, pixel_mask):
    """z of images: pixel_values (N,3,H,W), pixel_mask (N,H,W) bool → (N,d_vision) fp32 of length 1. Padding changes nothing."""
    states, valid = model.patches(pixel_values, pixel_mask)
    states, valid = states.float(), valid.unsqueeze(-1)                                        # (N,P,d_vision), (N,P,1)
    mean = states.masked_fill(~valid, 0).sum(1) / valid.sum(1).clamp(min=1)
    return torch.nn.functional.normalize(mean, dim=-1)


def image_vectors(model, samples, encode, path):
    """z of every distinct image → image id → (d_vision,) fp32 on the CPU; what the file `path` holds is not computed again.

    encode(samples, vectors) adds to a dict what `image_vector` gives (eval.encode_images does). The file is written every
    IMAGES_AT_ONCE images, and started afresh for another vision tower."""
    tower, vectors = fingerprint(model), {}
    if Path(path).exists():
        tensors, about = read_whole(path, "image vectors of RICES", (torch.float32, torch.int64))
        shapes = {name: (x.dtype, len(x), x.ndim) for name, x in tensors.items() if x.ndim}
        n = len(tensors.get("image_ids", ()))
        if shapes != {"image_ids": (torch.int64, n, 1), "vectors": (torch.float32, n, 2)}:
            raise InputError(f"{path}: expected image_ids (N) and vectors (N,d), found {', '.join(tensors)}; delete it")
        if about.get("tower") == tower:
            vectors = dict(zip(tensors["image_ids"].tolist(), tensors["vectors"], strict=True))
    missing = list({s.image_id: s for s in samples if s.image_id not in vectors}.values())
    for start in range(0, len(missing), IMAGES_AT_ONCE):
        found = {}
        encode(missing[start:start + IMAGES_AT_ONCE], found)
        vectors |= {image_id: z.cpu() for image_id, z in found.items()}
        save_atomically({"image_ids": torch.tensor(list(vectors)), "vectors": torch.stack(list(vectors.values()))}, path,
                        {"tower": tower})
    return vectors


def fingerprint(model):
    """Tells vision towers apart: a hash of some of the weights."""
    tower = model.eyes[0]
    some = tower.embeddings.patch_embedding.weight, tower.post_layernorm.weight
    weights = torch.cat([w.detach().flatten().float().cpu() for w in some])
    return hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:16] + f" {model.dtype}"


class Nearest:
    """Chooses demonstrations as data.pick_icds does, but the most similar ones: `answer(…, pool=pool, pick=Nearest(…))`."""

    def __init__(self, pool, vectors, order="last"):
        if order not in ("last", "first"):
            raise ValueError(f"expected order last or first, found {order!r}")
        self.vectors, self.order = vectors, order
        ids = list(dict.fromkeys(s.image_id for s in pool))            # a picture of many questions is compared once, so that
        self.images = torch.stack([vectors[i] for i in ids])           # (N,d) they are equally similar to the last bit
        row = {image_id: i for i, image_id in enumerate(ids)}
        self.row_of = torch.tensor([row[s.image_id] for s in pool])

    def __call__(self, pool, query, shots, seed=None):
        """The `shots` samples of the pool (the one given above) nearest to the query's image, in the order of the prompt."""
        similarity = (self.images @ self.vectors[query.image_id])[self.row_of]                 # one a sample
        ranked = similarity.sort(descending=True, stable=True).indices[:shots + 1].tolist()
        nearest = [pool[i] for i in ranked if pool[i].id != query.id][:shots]
        if len(nearest) < shots:
            raise InputError(f"expected at least {shots} training samples beside the query, found {len(nearest)}")
        return nearest[::-1] if self.order == "last" else nearest
