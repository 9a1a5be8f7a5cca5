"""Loading: the published names, shapes and sizes; every way a folder can be wrong; dtypes; memory."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, TINY_CONFIG, save_model
from safetensors.torch import load_file, save_file

import models
from model import Config, Idefics2
from models.idefics1 import Idefics1, Idefics1Config
from support.files import InputError

SMALL = {**TINY_CONFIG, "text_config": {**TINY_CONFIG["text_config"], "vocab_size": 300}, "image_token_id": 299,
         "vision_config": {**TINY_CONFIG["vision_config"], "image_size": 140}}
SMALL = {"idefics2": SMALL, "idefics1": {**TINY["idefics1"], "vocab_size": 298}}
TEXT = {"idefics2": "model.text_model.", "idefics1": "model."}          # what the decoder's names begin with
DOWN, NORM = "layers.0.mlp.down_proj.weight", "norm.weight"


@pytest.fixture(params=SMALL)
def folder(request, tmp_path):
    """A small model of either kind, in a folder of that name."""
    return save_model(tmp_path / request.param, SMALL[request.param])


def load(folder, **options):
    return models.of(folder)[0].from_pretrained(folder, **options)


def edit(folder, change):
    """Rewrites model.safetensors: `change` gets the dict of tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def shard(folder):
    """model.safetensors becomes three shards and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, index = sorted(tensors), {}
    for i in range(3):
        file, part = f"model-0000{i + 1}-of-00003.safetensors", names[i::3]
        index |= dict.fromkeys(part, file)
        save_file({n: tensors[n] for n in part}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": index}))


def read_config(tmp_path, config, kind=Config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return kind.from_file(tmp_path / "config.json")


def complaint(action, *words):
    """The error of `action`: an InputError of one line that holds all of `words`."""
    with pytest.raises(InputError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text and all(str(word) in text for word in words), text
    return text


def same(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


# ---- The published model
def numbers(c):
    """What no shape says."""
    return (c.vision.num_attention_heads, c.vision.image_size, c.vision.layer_norm_eps, c.perceiver.resampler_n_heads,
            c.text.num_attention_heads, c.text.head_dim, c.text.rms_norm_eps, c.text.rope_theta, c.text.sliding_window,
            c.text.pad_token_id, c.text.eos_token_id, c.image_token_id, c.tokens_per_image)


@pytest.mark.parametrize("name, kind, size, said", [
    ("idefics2-8b-base", Idefics2, 8_402_759_920, (16, 980, 1e-6, 16, 32, 128, 1e-5, 10000.0, 4096, 0, 2, 32001, 64)),
    ("idefics-9b", Idefics1, 8_929_679_632, (16, 224, 1e-5, 16, 32, 128, 1e-6, 10000.0, 0, 0, 2, 32001, 1))])
def test_names_shapes_and_size_are_the_published_ones(name, kind, size, said, shared, tmp_path):
    published = json.loads((shared / f"spec/expected_{name}.json").read_text())
    bare = {"model_type": published["config"]["model_type"], "vision_config": None, "perceiver_config": {}}
    for config in published["config"], bare:                  # the second: a config that leaves everything out
        with torch.device("meta"):
            model = kind(read_config(tmp_path, config, kind.config_class))
        assert {name: list(x.shape) for name, x in model.state_dict().items()} == published["tensors"]
        assert sum(p.numel() for p in model.parameters()) == size and numbers(model.config) == said


def test_what_a_config_says_is_taken(tmp_path):
    text = {"rms_norm_eps": 0.5, "sliding_window": None, "head_dim": 4, "rope_parameters": {"rope_theta": 7.0},
            "eos_token_id": [5, 2]}
    config = read_config(tmp_path, {"model_type": "idefics2", "text_config": text, "image_token_id": 11})
    assert config.perceiver.rms_norm_eps == 0.5               # the text model's, unless the perceiver has its own
    assert (config.text.sliding_window, config.text.head_dim, config.text.rope_theta) == (0, 4, 7.0)
    assert (config.text.eos_token_id, config.image_token_id) == (5, 11)
    own = read_config(tmp_path, {"model_type": "idefics2", "text_config": {"rope_theta": 9.0},
                                 "perceiver_config": {"model_type": "idefics2", "rms_norm_eps": 0.25}})
    assert (own.perceiver.rms_norm_eps, own.text.rms_norm_eps, own.text.rope_theta) == (0.25, 1e-5, 9.0)
    other = {"model_type": "idefics", "vocab_size": 50, "additional_vocab_size": 3, "image_token_id": 7, "eos_token_id": [5, 2],
             "rope_parameters": {"rope_theta": 7.0}, "vision_config": {"embed_dim": 64}}
    config = read_config(tmp_path, other, Idefics1Config)
    assert (config.text.vocab_size, config.text.additional_vocab_size, config.image_token_id) == (53, 3, 7)
    assert (config.text.eos_token_id, config.text.rope_theta, config.vision.hidden_size) == (5, 7.0, 64)


@pytest.mark.parametrize("kind, config, words", [
    (Config, {"model_type": "llava"}, ["model_type", "'idefics2'", "'llava'"]),
    (Config, {"text_config": {"hidden_size": "4096"}}, ["hidden_size '4096'", "int"]),
    (Config, {"vision_config": {"patch_size": 14.5}}, ["patch_size 14.5", "int"]),
    (Config, {"vision_config": {"num_hidden_layers": -1}}, ["num_hidden_layers -1", "int in 0 … 1000"]),
    (Config, {"text_config": {"hidden_act": "gelu"}}, ["hidden_act", "'silu'", "'gelu'"]),
    (Config, {"text_config": {"rope_scaling": {"type": "yarn"}}}, ["type 'yarn'", "'default'"]),
    (Config, {"vision_config": {"num_attention_heads": 7}}, ["hidden_size 1152", "num_attention_heads 7"]),
    (Idefics1Config, {"model_type": "idefics2"}, ["model_type", "'idefics'", "'idefics2'"]),
    (Idefics1Config, {"vision_config": {"hidden_act": "quick_gelu"}}, ["hidden_act", "'gelu'", "'quick_gelu'"]),
    (Idefics1Config, {"additional_vocab_size": -2}, ["additional_vocab_size", "-2"]),
    (Idefics1Config, {"rope_parameters": {"rope_type": "yarn"}}, ["rope", "'default'", "yarn"])])
def test_a_config_this_model_is_not_is_refused_in_one_line(tmp_path, kind, config, words):
    config = {"model_type": "idefics2" if kind is Config else "idefics", **config}
    complaint(lambda: read_config(tmp_path, config, kind), tmp_path / "config.json", *words)


@pytest.mark.parametrize("config", [{"model_type": "llava"}, {}, [1], "{"])
def test_a_folder_of_no_known_model_is_refused_in_one_line(tmp_path, config):
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    complaint(lambda: models.of(tmp_path), tmp_path / "config.json", "expected")


# ---- Files
def test_shards_give_the_same_model_as_one_file(folder):
    whole = load(folder)
    shutil.copytree(folder, folder.parent / "sharded")
    shard(folder.parent / "sharded")
    assert same(load(folder.parent / "sharded"), whole)


@pytest.mark.parametrize("stored, wanted", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32),
                                            (torch.float16, torch.float16)])
def test_every_stored_dtype_loads_as_every_wanted_one(folder, stored, wanted):
    edit(folder, lambda tensors: tensors.update({name: x.to(stored) for name, x in tensors.items()}))
    tensors, model = load_file(folder / "model.safetensors"), load(folder, dtype=wanted)
    assert model.dtype == wanted and not model.training
    for name, p in model.named_parameters():
        assert p.dtype == wanted and not p.requires_grad and torch.equal(p, tensors[name].to(wanted)), name


def test_leftovers_of_published_files_are_ignored(folder):
    before = load(folder)
    edit(folder, lambda tensors: tensors.update({
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.vision_model.embeddings.position_ids": torch.arange(9), "model.vision_model.head.probe": torch.ones(1, 1, 32)}))
    assert same(load(folder), before)


@pytest.mark.parametrize("change, words", [
    (lambda t, text: t.update({text + NORM: torch.ones(63)}), ["size mismatch", NORM, "[63]", "[64]"]),
    (lambda t, text: (t.pop(text + DOWN), t.update({"extra": torch.ones(1), text + NORM: torch.ones(64, 1)})),
     ["Missing", DOWN, "Unexpected", "extra", "size mismatch"]),
    (lambda t, text: [t.pop(name) for name in list(t) if name.startswith(text + "layers")], ["Missing", "layers.0."])],
    ids=["misshapen", "all_three", "many"])
def test_tensors_that_do_not_fit_the_config_are_listed(folder, change, words):
    edit(folder, lambda tensors: change(tensors, TEXT[folder.name]))
    assert len(complaint(lambda: load(folder), folder, *words)) < 500


def harm(name, content=None):
    """A function that removes the file `name` or gives it `content`; an int keeps its first bytes only."""
    def damage(folder):
        path = folder / name
        if content is None:
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:content] if isinstance(content, int) else content.encode())
    return damage


@pytest.mark.parametrize("damage, words", [
    (shutil.rmtree, ["expected a model folder", "no such folder"]),
    (harm("config.json"), ["config.json", "complete JSON", "found no file"]),
    (harm("config.json", 100), ["config.json", "complete JSON"]),
    (harm("generation_config.json", "[1]"), ["generation_config.json", "expected"]),
    (harm("generation_config.json", '{"bad_words_ids": [[5, 6]]}'), ["bad_words_ids", "too many"]),
    (harm("generation_config.json", '{"eos_token_id": "</s>"}'), ["token ids", "'<'"]),
    (harm("model.safetensors", 5000), ["model.safetensors", "complete safetensors file"])])
def test_damaged_folders_are_refused_in_one_line(folder, damage, words):
    damage(folder)
    complaint(lambda: load(folder), folder, *words)


INDEX, SHARD = "model.safetensors.index.json", "model-00002-of-00003.safetensors"


@pytest.mark.parametrize("damage, words", [
    (harm(SHARD), [SHARD, "found no file"]), (harm(INDEX, "{}"), [INDEX, "weight_map"]),
    (harm(INDEX, '{"weight_map": {"a": 1}}'), [INDEX, "weight_map"])])
def test_damaged_shards_are_refused_in_one_line(folder, damage, words):
    shard(folder)
    damage(folder)
    complaint(lambda: load(folder), folder, *words)


@pytest.mark.parametrize("written, ends, banned, pad", [
    (None, {2}, set(), 0), ({"eos_token_id": 0, "pad_token_id": 3}, {0}, set(), 3),
    ({"eos_token_id": [2, 9], "bad_words_ids": [[4], [5]]}, {2, 9}, {4, 5}, 0)])
def test_end_banned_and_pad_ids_come_from_the_generation_config(folder, written, ends, banned, pad):
    path = folder / "generation_config.json"
    path.unlink() if written is None else path.write_text(json.dumps(written))
    model = load(folder)
    assert (model.end_ids, model.banned_ids, model.pad_id) == (ends, banned, pad)


# ---- Memory
MEASURE = """
import re, sys, torch
from pathlib import Path
from model import Config, Idefics2
def peak():        # of this process alone; ru_maxrss would start from the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
with torch.device("meta"):
    Idefics2(Config())      # torch's own imports, done before we measure
before = peak()
model = Idefics2.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
loaded = peak() - before
total = sum(p.float().abs().max().item() for p in model.parameters())     # touches every page
print(loaded, peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize("dtype, copies", [("float32", 1.0), ("bfloat16", 1.5)])
def test_loading_maps_the_file_and_makes_no_second_copy(tmp_path, dtype, copies):
    """The peak holds the file's pages and, if another dtype is wanted, the converted tensors; nothing besides."""
    text = {**SMALL["idefics2"]["text_config"], "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4}
    folder = save_model(tmp_path / "model", {**SMALL["idefics2"], "text_config": text})
    size = (folder / "model.safetensors").stat().st_size
    run = subprocess.run([sys.executable, "-c", MEASURE, folder, dtype], capture_output=True, text=True, check=True,
                         cwd=Path(__file__).resolve().parents[1])
    loaded, touched = map(int, run.stdout.split())
    assert touched < (copies + 0.2) * size
    if dtype == "float32":
        assert loaded < 0.2 * size
