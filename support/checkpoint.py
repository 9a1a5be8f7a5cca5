"""A model folder as published: sizes in config.json, token ids in generation_config.json, tensors."""

import contextlib
from dataclasses import fields

from safetensors import safe_open

from support.files import read_json, reading


@contextlib.contextmanager
def read_config(path, model_type):
    """with read_config(…) as raw: the object in config.json; what is raised within becomes InputError."""
    with reading(path, f"a config of model_type {model_type!r}"):
        raw = read_json(path)
        if raw["model_type"] != model_type:
            raise ValueError(repr(raw["model_type"]))
        yield raw


def expect(raw, name, value):
    """Raises ValueError if the object says something else; left out or null is as published."""
    if raw.get(name) not in (None, value):
        raise ValueError(f"{name} {raw[name]!r}, not {value!r}")


def entry(raw, name, default):
    """The number under `name`, of the default's type; null or left out, the default."""
    value = raw.get(name)
    if value is None:
        return default
    kind = type(default)
    most = 1000 if name.endswith(("_layers", "_depth")) else 2 ** 31   # 10⁹ layers are built for hours
    if type(value) not in (kind, int) or not 0 <= value <= most:
        raise ValueError(f"{name} {value!r}, no {kind.__name__} in 0 … {most}")
    return kind(value)


def sizes(kind, raw, act):
    """A section of config.json as the dataclass `kind`, with its defaults. act: the only one that we have."""
    raw = dict(raw or {})
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    expect(raw, "hidden_act", act)
    expect(rope, "rope_type", "default")
    expect(rope, "type", "default")
    raw.setdefault("rope_theta", rope.get("rope_theta"))
    if "sliding_window" in raw:
        raw["sliding_window"] = raw["sliding_window"] or 0                  # null: no window
    if isinstance(raw.get("eos_token_id"), list):
        raw["eos_token_id"] = raw["eos_token_id"][0]                        # `generation_ids` has the others
    found = {f.name: entry(raw, f.name, f.default) for f in fields(kind)}
    d, H = found.get("hidden_size"), found.get("num_attention_heads")
    if H is not None and d % H and not found.get("head_dim"):
        raise ValueError(f"hidden_size {d}, no multiple of num_attention_heads {H}")
    return kind(**found)


def generation_ids(folder, pad):
    """generation_config.json, if there → ids that end an answer, ids that are never made, id of padding."""
    path = folder / "generation_config.json"
    if not path.exists():
        return [], [], pad
    with reading(path, "token ids, each of bad_words_ids in a list of its own"):
        raw = read_json(path)
        ends = raw.get("eos_token_id")
        ends = [ends] if isinstance(ends, int) else ends or []
        banned = [token for (token,) in raw.get("bad_words_ids") or []]
        ends, banned = ([entry({"id": i}, "id", 0) for i in ids] for ids in (ends, banned))
        return ends, banned, entry(raw, "pad_token_id", pad)


def read_weights(folder):
    """model.safetensors, or the shards that its index names → {name: tensor}, memory-mapped."""
    files = {folder / "model.safetensors"}
    index = folder / "model.safetensors.index.json"
    if index.exists():
        with reading(index, "a weight_map of tensor names to file names"):
            files = {folder / file for file in read_json(index)["weight_map"].values()}
    tensors = {}
    for file in sorted(files):
        with reading(file, "a complete safetensors file"), safe_open(file, "pt") as shard:
            for name in shard.keys():
                if name.endswith(("inv_freq", "position_ids")) or name.startswith("model.vision_model.head."):
                    continue                  # in some published files; computed or unused here
                tensors[name] = shard.get_tensor(name)
    return tensors
