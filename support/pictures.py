"""Picture files → PIL images → pixels, bit by bit as the published transform makes them."""

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from support.files import chunks, reading

# What the content of a file may be, whatever it is called. Not EPS, which Pillow has Ghostscript run.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
PIXELS_AT_ONCE = 2_000_000        # that the vision tower encodes together: six COCO pictures


def open_image(path, read=True):
    """The PIL image, its pixels read and the file closed; read=False: only its header. Raises InputError."""
    with reading(path, "a complete image"), Image.open(path, formats=FORMATS) as image:
        if read:
            image.load()
        return image


def to_rgb(image):
    """RGB as it is; anything else over white, transparent or not."""
    if image.mode == "RGB":
        return image
    white = Image.new("RGBA", image.size, (255, 255, 255))
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def pixels(size):
    """A number of pixels in a file of settings, or None. Raises ValueError for anything else."""
    if size is not None and (type(size) is not int or not 0 < size < 10_000):
        raise ValueError(f"{size!r:.80} pixels")
    return size


class ImageTransform:
    """Bit by bit transformers' Idefics2ImageProcessor (PIL) without image splitting."""

    def __init__(self, longest_edge=980, shortest_edge=378, mean=(0.5,) * 3, std=(0.5,) * 3, rescale=1 / 255,
                 resample=Image.Resampling.BILINEAR):
        self.longest = longest_edge                                                      # pixels
        self.shortest = shortest_edge
        self.resample = Image.Resampling(resample)
        # A byte has 256 values: the published arithmetic (rescaled in fp64, normalised in fp32), done once.
        scaled = (np.arange(256, dtype=np.float64) * rescale).astype(np.float32)[:, None]
        self.pixel_of_byte = (scaled - np.array(mean, np.float32)) / np.array(std, np.float32)       # (256,3)
        if self.pixel_of_byte.shape != (256, 3):
            raise ValueError(f"image_mean {mean!r:.50}, image_std {std!r:.50}")

    @classmethod
    def settings(cls, raw):
        """What preprocessor_config.json says, in the words of __init__."""
        given = {**cls.sizes(raw), "mean": raw.get("image_mean"), "std": raw.get("image_std"),
                 "rescale": raw.get("rescale_factor"), "resample": raw.get("resample")}
        return {name: value for name, value in given.items() if value is not None}

    @staticmethod
    def sizes(raw):
        size = raw.get("size") or {}
        return {name: pixels(size.get(name)) for name in ("longest_edge", "shortest_edge")}

    def resized(self, width, height):
        """Longer side ≤ `longest`, then each ≥ `shortest`: small pictures are distorted, as published."""
        ratio = width / height
        if width >= height and width > self.longest:
            width = self.longest
            height = int(self.longest / ratio)
        elif height > width and height > self.longest:
            width = int(self.longest * ratio)
            height = self.longest
        return max(width, self.shortest), max(height, self.shortest)

    def images(self, pictures):
        """PIL images → pixel_values (N,3,H,W) fp32, zeros below and right, pixel_mask (N,H,W) bool."""
        arrays = []
        for picture in map(to_rgb, pictures):
            size = self.resized(*picture.size)
            u8 = np.asarray(picture.resize(size, self.resample))                                   # (H,W,3)
            channels = [self.pixel_of_byte[:, c][u8[:, :, c]] for c in range(3)]
            arrays.append(np.stack(channels))
        H = max(a.shape[1] for a in arrays)
        W = max(a.shape[2] for a in arrays)
        values = torch.zeros(len(arrays), 3, H, W)
        mask = torch.zeros(len(arrays), H, W, dtype=torch.bool)
        for i, a in enumerate(arrays):
            values[i, :, :a.shape[1], :a.shape[2]] = torch.from_numpy(a)
            mask[i, :a.shape[1], :a.shape[2]] = True
        return values, mask


def encode_images(model, processor, samples, features, progress=None, encode=None):
    """Fills `features` {image id: (n_latents,d)} with what it lacks, each distinct picture once → features.
    Pictures of one size go together, so that nothing is padded. progress: title of a progress bar, or None.
    encode(pixel_values, pixel_mask) → one tensor an image: in the place of the model's own."""
    encode = encode or model.encode_images
    missing = {s.image_id: s for s in samples if s.image_id not in features}
    by_size = {}
    for s in missing.values():
        by_size.setdefault(processor.resized(*s.picture_size()), []).append(s)
    with tqdm(total=len(missing), desc=progress, unit="image", disable=not progress) as bar:
        for (width, height), group in by_size.items():
            for chunk in chunks(group, max(1, PIXELS_AT_ONCE // (width * height))):
                values, mask = processor.images([s.picture() for s in chunk])
                encoded = encode(values.to(model.device), mask.to(model.device))
                features.update(zip([s.image_id for s in chunk], encoded, strict=True))
                bar.update(len(chunk))
    return features
