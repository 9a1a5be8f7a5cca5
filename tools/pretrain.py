"""Make checkpoints/tiny: a tiny Idefics2 that has learnt to learn in context, in the toy world.

    python -m tools.pretrain --out /tmp/tiny                # about half an hour on two cores

    1. vision    vision tower and connector alone, with a throw-away linear head that names all attributes
    2. decoder   episodes of nine examples under one hidden rule, their pictures encoded once; loss on every
                 answer, so that all numbers of shots from 0 to 8 are trained at the same time

Trained end to end from scratch the same model learns nothing but the form of the answers for a long time:
attention has no reason to look at pictures that do not yet say anything. So the pictures come first. The form
of the prompt matters as much: data.TEMPLATES.
"""

import functools
import shutil
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from data import ANSWER, Processor, Sample, chunks, left_pad, row
from mimic import lm_loss
from model import Config, Idefics2
from support.files import make_folder, run_command, save_tensors
from support.options import Parser
from toy import world

TINY = Path(__file__).parents[1] / "checkpoints" / "tiny"
SEED = 0                                 # of weights, pictures and episodes
LR = 2e-3                                # the highest
VISION_STEPS = 600
VISION_BATCH = 256                       # pictures a step
STEPS = 4000                             # of the decoder
BATCH = 32                               # episodes a step
BANK = 24_000                            # pictures of all episodes
E = 9                                    # examples of an episode


# --- Pictures and texts -------------------------------------------------------------------------------------
def random_pictures(n, seed):
    """→ scenes (n,4), pictures (n,40,40,3) uint8."""
    rng = np.random.default_rng(seed)
    scenes = world.random_scenes(n, rng)
    return scenes, world.draw(scenes, rng)


def encode(model, processor, pictures):
    """Pictures (N,40,40,3) uint8 → features (N,n_latents,d)."""
    return model.encode_images(*processor.images(map(Image.fromarray, pictures)))


@functools.lru_cache(4096)
def example(processor, question, told):
    """→ ids of question and answer, and whether each of them is of the answer or its line end."""
    template = processor.templates["toy" if question else "toy-caption"]
    ids, parts = row(processor, template, [], Sample(0, None, question, [told], told))
    return ids[1:], [part == ANSWER for part in parts[1:]]                             # without <s>


def write(processor, episodes):
    """B episodes of E pairs (question, answer) → left-padded input_ids (B,T), trained ones (B,T) bool."""
    all_ids, all_trained = [], []
    for episode in episodes:
        ids, trained = zip(*[example(processor, *pair) for pair in episode], strict=True)
        all_ids.append([processor.bos_id, *chain(*ids)])
        all_trained.append([False, *chain(*trained)])
    return left_pad(all_ids, processor.pad_id), left_pad(all_trained, False)


# --- Training -----------------------------------------------------------------------------------------------
def schedule(step, steps, warmup):
    """Factor on the learning rate: up in `warmup` steps, then 1, in the last three tenths down to 0."""
    return min((step + 1) / warmup, 1.0, (steps - step) / (0.3 * steps))


def train(title, modules, steps, warmup, loss_of):
    """Minimises loss_of(step) with AdamW, which decays matrices only; the gradient is clipped to norm 1."""
    parameters = list(nn.ModuleList(modules).parameters())
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
              {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, LR, (0.9, 0.98), fused=True)
    bar = tqdm(range(steps), title)
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = LR * schedule(step, steps, warmup)
        loss = loss_of(step)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def train_vision(model, processor):
    """Vision tower and connector learn to name colour, shape, place and ground of fresh pictures."""
    torch.manual_seed(SEED + 1)
    size = model.config.tokens_per_image * model.config.text.hidden_size       # of a picture's features
    head = nn.Linear(size, sum(world.SIZES))

    def loss_of(step):
        scenes, pictures = random_pictures(VISION_BATCH, [SEED, 1, step])
        logits = head(encode(model, processor, pictures).flatten(1))
        labels = torch.from_numpy(scenes).T
        return sum(map(F.cross_entropy, logits.split(world.SIZES, 1), labels))       # attribute by attribute

    trained = [model.model["vision_model"], model.model["connector"], head]
    train("vision", trained, VISION_STEPS, 50, loss_of)


def train_decoder(model, processor):
    """The decoder learns to continue episodes under any seen rule, about a bank of pictures encoded once."""
    scenes, pictures = random_pictures(BANK, [SEED, 4])
    with torch.no_grad():
        bank = torch.cat([encode(model, processor, some) for some in chunks(pictures, 512)])

    def loss_of(step):
        rng = np.random.default_rng([SEED, 2, step])
        indices, episodes = world.episodes(rng, BATCH, E, scenes)
        ids, trained = write(processor, episodes)
        features = bank[torch.from_numpy(indices).flatten()]                           # (B·E,n_latents,d)
        states = model.hidden_states(ids, ids != model.pad_id, features)
        return lm_loss(model, states, ids, trained)

    train("decoder", [model.model["text_model"], model.lm_head], STEPS, 200, loss_of)


def main(argv=None):
    parser = Parser(__doc__, prog="python -m tools.pretrain")
    parser.add_argument("--out", type=Path, default=TINY, metavar="FOLDER",
        help="where the model goes; json files that are there stay (default checkpoints/tiny)")
    folder = parser.parse(argv).out
    make_folder(folder)
    for path in TINY.glob("*.json"):
        if not (folder / path.name).exists():
            shutil.copy(path, folder)
    torch.manual_seed(SEED)
    model = Idefics2(Config.from_file(folder / "config.json"))
    processor = Processor.from_pretrained(folder)
    train_vision(model, processor)
    train_decoder(model, processor)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    save_tensors(folder / "model.safetensors", weights, {"format": "pt"})
    print(f"{folder}: a model; score it with python eval.py --model {folder} --dataset toy --shots 8")


if __name__ == "__main__":
    run_command(main)
