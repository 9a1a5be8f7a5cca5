"""The models: `of` says which a folder holds. A new one: a file with model.py's names, two lines in `of`."""

from pathlib import Path

import torch

from data import Processor
from model import Idefics2
from support.files import InputError, read_json


def of(folder):
    """What reads this folder, by its config.json → class of the model, class of the processor."""
    path = Path(folder) / "config.json"
    if not path.parent.is_dir():
        raise InputError(f"{folder}: expected a model folder with config.json and safetensors, "
                         "found no such folder")
    raw = read_json(path)
    found = raw.get("model_type") if isinstance(raw, dict) else raw
    if found == "idefics2":
        return Idefics2, Processor
    if found == "idefics":
        from models.idefics1 import Idefics1, Idefics1Processor
        return Idefics1, Idefics1Processor
    raise InputError(f"{path}: expected model_type 'idefics2' or 'idefics', found {found!r}")


def load_model(folder, device="cpu", dtype="float32"):
    """→ model, processor of a folder. Raises InputError for a bad folder or an impossible device."""
    model_class, processor_class = of(folder)
    processor = processor_class.from_pretrained(folder)
    model = model_class.from_pretrained(folder, getattr(torch, dtype), device)
    if model.device.type == "cpu" and model.config.text.hidden_size <= 256:
        torch.set_num_threads(1)         # so small that threads wait longer for each other than they save
    return model, processor
