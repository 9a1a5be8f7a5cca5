"""Fixtures: the folder of oracle data, and tiny random models in the published layout."""

import json
import os
import shutil

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")      # threads that spin at barriers are 5 times slower on a busy machine
os.environ.setdefault("GOMP_SPINCOUNT", "0")
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model import Config, Idefics2

torch.set_num_threads(1)         # the models of the tests are too small for two threads to help


@pytest.fixture(scope="session")
def shared():
    """The folder `shared` beside the repository: golden vectors, real data samples, the real tokenizer."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        why = f"{folder} (golden vectors and data samples) is not on this machine"
        pytest.fail(why) if os.environ.get("CI") == "true" else pytest.skip(why)
    return folder


TINY_CONFIG = {
    "model_type": "idefics2", "image_token_id": 32001, "tie_word_embeddings": False,
    "vision_config": {"model_type": "idefics2", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                      "num_attention_heads": 4, "image_size": 980, "patch_size": 14},
    "perceiver_config": {"model_type": "idefics2", "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4,
                         "resampler_head_dim": 8, "num_key_value_heads": 2},
    "text_config": {"model_type": "mistral", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
                    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 32002, "pad_token_id": 0},
}


def save_model(folder, config, seed=0, std=0.1):
    """A random Idefics2 of `config` (as config.json has it) written to `folder` as published."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    model = Idefics2(Config.from_file(folder / "config.json"))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std) if p.ndim > 1 else None
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}))
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, shared):
    """A tiny random Idefics2 with the real 32,002-word tokenizer: what a researcher's model folder looks like."""
    folder = save_model(tmp_path_factory.mktemp("models") / "tiny-idefics2", TINY_CONFIG)
    shutil.copy(shared / "data/tokenizer/tokenizer.json", folder)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Three random layers in float64, vocabulary 100."""
    config = json.loads(json.dumps(TINY_CONFIG))
    config["image_token_id"], config["text_config"]["vocab_size"] = 99, 100
    return Idefics2.from_pretrained(save_model(tmp_path_factory.mktemp("model"), config), torch.float64)
