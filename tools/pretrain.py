"""Make checkpoints/tiny: a tiny Idefics2 that has learnt to learn in context, in the toy world.

    python -m tools.pretrain --out /tmp/tiny                # about half an hour on two cores

    1. vision    vision tower and connector alone, with a throw-away linear head that names all attributes
    2. decoder   episodes of nine examples under one hidden rule, their pictures encoded once; loss on every
                 answer, so that all numbers of shots from 0 to 8 are trained at the same time
    3. table     real generation for 0, 1, 2, 4, 8 shots, under rules of pre-training and never-seen ones

Trained end to end from scratch the same model learns nothing but the form of the answers for a long time:
attention has no reason to look at pictures that do not yet say anything. So the pictures come first. The form
of the prompt matters as much: the question word stands right before its answer (data.TEMPLATES), so that
looking up an earlier answer takes one comparison of it with the token before that answer.

B episodes, T tokens, E = 9 examples an episode.
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
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split
from tokenizers.processors import TemplateProcessing
from tqdm import tqdm

from data import ANSWER, Processor, Sample, left_pad, row
from eval import answer
from mimic import lm_loss
from model import Config, Idefics2
from models import load_model
from support.files import make_folder, run_command, save_tensors, write_json, write_text
from support.options import Parser
from toy import world

TINY = Path(__file__).parents[1] / "checkpoints" / "tiny"
SETTINGS = ["config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
            "tokenizer_config.json"]
SPECIAL_FIRST = ["<unk>", "<s>", "</s>"]
SPECIAL_LAST = ["<fake_token_around_image>", "<image>"]

SEED = 0                                 # of weights, pictures and episodes
LR = 2e-3                                # the highest
VISION_STEPS = 600
VISION_BATCH = 256                       # pictures a step
STEPS = 4000                             # of the decoder
BATCH = 32                               # episodes a step
BANK = 24_000                            # pictures of all episodes
E = 9                                    # examples of an episode
SHOTS = [0, 1, 2, 4, 8]                  # of the table
EPISODES = 500                           # of a cell of the table


# --- The model folder ---------------------------------------------------------------------------------------
def vocabulary():
    """Every token in the order of its id: <unk> (the padding) 0, <s> 1, </s> 2, words, the image tokens."""
    return [*SPECIAL_FIRST, *world.vocabulary(), *SPECIAL_LAST]


def tokenizer():
    """One token a word: text is split at blanks, which vanish, and at line ends, which are tokens."""
    words = {word: i for i, word in enumerate(vocabulary())}
    t = Tokenizer(WordLevel(words, unk_token="<unk>"))
    t.pre_tokenizer = Sequence([Split(" ", "removed"), Split("\n", "isolated")])
    t.post_processor = TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    special = SPECIAL_FIRST + SPECIAL_LAST
    t.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    return t


def write_settings(folder):
    """Everything of a model folder but the weights: a tokenizer and, if it has none of its own, the settings
    of checkpoints/tiny."""
    make_folder(folder)
    for name in SETTINGS:
        if not (folder / name).exists():
            shutil.copy(TINY / name, folder / name)
    write_text(folder / "tokenizer.json", tokenizer().to_str(pretty=True))


# --- Pictures and texts -------------------------------------------------------------------------------------
def random_pictures(n, seed):
    """→ scenes (n,4), pictures (n,40,40,3) uint8."""
    rng = np.random.default_rng(seed)
    scenes = world.random_scenes(n, rng)
    return scenes, world.draw(scenes, rng)


def encode(model, processor, pictures):
    """Pictures (N,40,40,3) uint8 → features (N,n_latents,d)."""
    return model.encode_images(*processor.images(map(Image.fromarray, pictures)))


@torch.no_grad()
def make_bank(model, processor, n, seed):
    """n pictures, encoded once → scenes (n,4), features (n,n_latents,d)."""
    scenes, pictures = random_pictures(n, seed)
    return scenes, torch.cat([encode(model, processor, pictures[i:i + 512]) for i in range(0, n, 512)])


@functools.lru_cache(4096)
def example(processor, question, told):
    """→ ids of question and answer, and whether each of them is of the answer or its line end."""
    template = processor.templates["toy" if question else "toy-caption"]
    ids, parts = row(processor, template, [], Sample(0, None, question, [told], told))
    return ids[1:], [part == ANSWER for part in parts[1:]]                             # without <s>


def write(processor, episodes):
    """Episodes, each E pairs of question and answer → left-padded input_ids (B,T), and (B,T) bool: which of
    them are trained."""
    all_ids, all_trained = [], []
    for episode in episodes:
        ids, trained = zip(*[example(processor, *pair) for pair in episode], strict=True)
        all_ids.append([processor.bos_id, *chain(*ids)])
        all_trained.append([False, *chain(*trained)])
    return left_pad(all_ids, processor.pad_id), left_pad(all_trained, False)


# --- Training -----------------------------------------------------------------------------------------------
def schedule(step, steps, warmup):
    """Factor on the learning rate: up in `warmup` steps, then 1, in the last three tenths down to 0."""
    rise = (step + 1) / min(warmup, max(1, steps // 5))
    fall = (steps - step) / (0.3 * steps)
    return min(rise, 1.0, fall)


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
    """Vision tower and connector learn to name colour, shape, place and ground; prints how well."""
    torch.manual_seed(SEED + 1)
    sizes = model.config
    head = nn.Linear(sizes.perceiver.resampler_n_latents * sizes.text.hidden_size, sum(world.SIZES))

    def named(step, n):
        """→ logits and labels of n fresh pictures, attribute by attribute."""
        scenes, pictures = random_pictures(n, [SEED, 1, step])
        logits = head(encode(model, processor, pictures).flatten(1))
        return zip(logits.split(world.SIZES, 1), torch.from_numpy(scenes).T, strict=True)

    def loss_of(step):
        return sum(F.cross_entropy(logits, labels) for logits, labels in named(step, VISION_BATCH))

    trained = [model.model["vision_model"], model.model["connector"], head]
    train("vision", trained, VISION_STEPS, 50, loss_of)
    with torch.no_grad():
        right = [logits.argmax(1) == labels for logits, labels in named(VISION_STEPS, 2000)]
    share = torch.stack(right).all(0).float().mean()
    print(f"vision: {100 * share:.2f} % of 2,000 fresh pictures right in all four attributes")


def train_decoder(model, processor):
    """The decoder learns to continue episodes under any seen rule."""
    scenes, bank = make_bank(model, processor, BANK, [SEED, 4])

    def loss_of(step):
        rng = np.random.default_rng([SEED, 2, step])
        indices, episodes = world.episodes(rng, BATCH, E, scenes)
        ids, trained = write(processor, episodes)
        features = bank[torch.from_numpy(indices).flatten()]                           # (B·E,n_latents,d)
        states = model.hidden_states(ids, ids != model.pad_id, features)
        return lm_loss(model, states, ids, trained)

    train("decoder", [model.model["text_model"], model.lm_head], STEPS, 200, loss_of)


# --- What came of it ----------------------------------------------------------------------------------------
def as_samples(indices, episodes):
    """What world.episodes gives → a list of E Samples an episode."""
    return [[Sample(i, None, asked, [told], told) for i, (asked, told) in zip(*both, strict=True)]
            for both in zip(indices.tolist(), episodes, strict=True)]


def score(model, processor, bank, kind, episodes, shots):
    """Percent of the episodes (of `as_samples`) whose last question is answered right behind its `shots`
    neighbours."""
    queries = [examples[E - 1] for examples in episodes]
    icds = [examples[E - 1 - shots:E - 1] for examples in episodes]
    features = dict(enumerate(bank))
    said = answer(model, processor, kind, queries, icds, features=features, num_beams=1, batch_size=100)
    right = sum(found == query.target for found, query in zip(said, queries, strict=True))
    return round(100 * right / len(queries), 1)


def make_table(model, processor):
    """→ list of {kind, rules, shots, n, accuracy (0-100), shown}. shown (0-100): how often a demonstration
    asks the query's word; None for captions, where any of them tells the rule."""
    scenes, bank = make_bank(model, processor, 2048, [SEED, 6])
    table = []
    for kind in world.KINDS:
        for rules in ("seen", "never seen"):
            rng = np.random.default_rng([SEED, 7])
            held_out = rules == "never seen"
            episodes = as_samples(*world.episodes(rng, EPISODES, E, scenes, {kind: 1.0}, held_out))
            for shots in SHOTS:
                cell = {"kind": kind, "rules": rules, "shots": shots, "n": EPISODES}
                cell["accuracy"] = score(model, processor, bank, kind, episodes, shots)
                cell["shown"] = None if kind == "toy-caption" else round(100 * (1 - 0.75 ** shots), 1)
                table.append(cell)
    return table


def markdown(table):
    """The table for people: a line for each kind and sort of rule, a column for each number of shots."""
    lines = ["| dataset | rules |" + "".join(f" {k} shots |" for k in SHOTS)]
    lines.append("|---|---|" + "---|" * len(SHOTS))
    for i in range(0, len(table), len(SHOTS)):
        cells = table[i:i + len(SHOTS)]
        accuracies = "".join(f" {cell['accuracy']:.1f} |" for cell in cells)
        lines.append(f"| {cells[0]['kind']} | {cells[0]['rules']} |{accuracies}")
    shown = "".join(f" {cell['shown']:.1f} |" for cell in table[:len(SHOTS)])
    return "\n".join([*lines, "| *toy, toy-named: question word shown* | |" + shown])


def main(argv=None):
    parser = Parser(__doc__, prog="python -m tools.pretrain")
    parser.add_argument("--out", type=Path, default=TINY, metavar="FOLDER",
        help="gets model and table.json; a config.json that it has stays (default checkpoints/tiny)")
    folder = parser.parse(argv).out
    write_settings(folder)
    torch.manual_seed(SEED)
    model = Idefics2(Config.from_file(folder / "config.json"))
    processor = Processor.from_pretrained(folder)
    train_vision(model, processor)
    train_decoder(model, processor)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    save_tensors(folder / "model.safetensors", weights, {"format": "pt"})
    table = make_table(*load_model(folder))                     # what others get: bfloat16, computed in fp32
    write_json(folder / "table.json", table)
    print(markdown(table))


if __name__ == "__main__":
    run_command(main)
