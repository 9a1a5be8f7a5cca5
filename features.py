"""Image features: the vision tower is frozen, so each distinct image is encoded once, and what comes out is kept.

    features = encode_images(model, processor, samples, {})                   # image id → (n_latents,d), in memory
    features = encode_images(model, processor, samples, Features(path, ids))    # the same in a memory-mapped file
    model(input_ids, attention_mask, gather(features, samples))
"""

import json
import math
import os
from collections.abc import Mapping

import torch
from tqdm import tqdm

from model import InputError, read_json
from results import write_atomically

PIXELS_AT_ONCE = 2_000_000        # pixels the vision tower encodes together: six COCO pictures, or a thousand toy ones


class Features(Mapping):
    """Image id → features (n_latents,d), in a memory-mapped file: the machine's memory is its cache, however many there are, and
    what has been encoded is there again after a crash.

    path.bin has a row for each of image_ids, in their order; path.json says whose are filled, and the form of a row. Raises
    InputError if the disk is too small for all rows."""

    def __init__(self, path, image_ids):
        self.data, self.index = path.with_suffix(".bin"), path.with_suffix(".json")
        self.row, self.filled, self.rows = {image_id: i for i, image_id in enumerate(image_ids)}, set(), None
        if self.index.exists() and self.data.exists():
            about = read_json(self.index)
            if about["images"] == list(self.row):
                self.filled = set(about["filled"])
                self.open(about["shape"], getattr(torch, about["dtype"]))

    def open(self, shape, dtype):
        n = len(self.row) * math.prod(shape)
        try:
            with open(self.data, "r+b" if self.filled else "wb") as file:   # all of it now: no write to a map can fail in words
                os.posix_fallocate(file.fileno(), 0, n * dtype.itemsize)
        except OSError as e:
            raise InputError(f"{self.data}: expected room for {n * dtype.itemsize / 1e9:.3g} GB of features, found: {e.strerror}"
                             ) from None
        self.rows = torch.from_file(str(self.data), shared=True, size=n, dtype=dtype).view(-1, *shape)

    def __getitem__(self, image_id):
        if image_id not in self.filled:
            raise KeyError(image_id)
        return self.rows[self.row[image_id]]

    def __contains__(self, image_id):
        return image_id in self.filled

    def __iter__(self):
        return iter(self.filled)

    def __len__(self):
        return len(self.filled)

    def update(self, pairs):
        """Keeps (image id, features) pairs."""
        for image_id, features in pairs:
            if self.rows is None:
                self.open(features.shape, features.dtype)
            self.rows[self.row[image_id]] = features.to("cpu")
            self.filled.add(image_id)
        about = {"images": list(self.row), "shape": self.rows.shape[1:], "dtype": str(self.rows.dtype)[6:]}
        write_atomically(self.index, json.dumps({**about, "filled": sorted(self.filled)}) + "\n")


def encode_images(model, processor, samples, features, progress=None, encode=None):
    """Fills `features` (a dict or Features) with what it lacks, each distinct image once → features.

    Pictures of one size go together, so that nothing is padded. progress: title of a progress bar, or None. encode(pixel_values,
    pixel_mask) → one tensor an image: in the place of the model's own."""
    missing = {s.image_id: s for s in samples if s.image_id not in features}
    by_size = {}
    for s in missing.values():
        by_size.setdefault(processor.resized(*s.picture_size()), []).append(s)
    with tqdm(total=len(missing), desc=progress, unit="image", disable=not progress) as bar:
        for (width, height), group in by_size.items():
            step = max(1, PIXELS_AT_ONCE // (width * height))
            for i in range(0, len(group), step):
                chunk = group[i:i + step]
                values, mask = processor.images([s.picture() for s in chunk])
                encoded = (encode or model.encode_images)(values.to(model.device), mask.to(model.device))
                features.update(zip((s.image_id for s in chunk), encoded, strict=True))
                bar.update(len(chunk))
    return features


def sees_alike(model, other):
    """Whether the features of one are the features of the other: they have the same vision tower and connector."""
    return all(mine is theirs for mine, theirs in zip(model.eyes, other.eyes, strict=True))


def gather(features, samples):
    """The features of the samples' images, in order (N,n_latents,d)."""
    return torch.stack([features[s.image_id] for s in samples])
