"""RICES: in-context learning with demonstrations whose pictures are most like the query's (Yang et al. 2022).

    z(image) = mean over valid patches of the vision tower's last states, divided by its L2 norm
    demonstrations = the k training samples with the largest z(image) · z(query's image)

The most similar one stands right before the query; with rices-first, at the beginning. The query itself is
never shown; another question about its own picture may be. ms_per_query does not include the search.
"""

from functools import partial

import torch
import torch.nn.functional as F

from data import encode_images


@torch.no_grad()
def image_vector(model, pixel_values, pixel_mask):
    """z of images: pixel_values (N,3,H,W), pixel_mask (N,H,W) bool → (N,d_vision) fp32, of length 1."""
    states, valid = model.patches(pixel_values, pixel_mask)
    valid = valid.unsqueeze(-1)                                  # (N,P,1): padding changes nothing
    total = states.float().masked_fill(~valid, 0).sum(1)
    mean = total / valid.sum(1).clamp(min=1)
    return F.normalize(mean, dim=-1).cpu()


def nearest(pool, queries, shots, vectors):
    """Each query's `shots` samples, nearest picture first, of equals the pool's first. vectors: id → z."""
    ids = list(dict.fromkeys(s.image_id for s in pool))      # a picture is compared once, so that all of its
    images = torch.stack([vectors[i] for i in ids])          # questions are equally similar, to the last bit
    places = [ids.index(s.image_id) for s in pool]

    def ranked(query):
        similarity = (images @ vectors[query.image_id])[places]                          # one a sample
        best = similarity.sort(descending=True, stable=True).indices[:shots + 1].tolist()
        others = [pool[i] for i in best if pool[i].id != query.id]
        return others[:shots]

    return [ranked(query) for query in queries]


class Nearest:
    """eval.py --method rices."""
    shots, least = None, 1        # demonstrations by default (None = the model's), and at least
    order = -1                    # the most similar one last

    @classmethod
    def prepare(cls, model, processor, template, pool, queries, shots, seed, batch_size, dev_score):
        """→ the demonstrations of every query, and no shifts."""
        vectors = encode_images(model, processor, [*pool, *queries], {}, "encode images for RICES",
                                partial(image_vector, model))
        return [found[::cls.order] for found in nearest(pool, queries, shots, vectors)], None


class NearestFirst(Nearest):
    """eval.py --method rices-first."""
    order = 1
