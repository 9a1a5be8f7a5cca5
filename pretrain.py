"""Makes checkpoints/tiny/ from nothing: a tiny Idefics2 that has learnt to learn in context, in the toy world of toy.py.

    python pretrain.py                                   # everything below; interrupted, the same command goes on
    python pretrain.py --out /tmp/tiny --steps 1000      # somewhere else, shorter

    1. vision    vision tower and connector alone, with a throw-away linear head that names all attributes of a picture
    2. decoder   episodes of nine examples under one hidden rule each, the vision part frozen and its pictures encoded once;
                 loss on every answer of an episode, so that all numbers of shots from 0 to 8 are trained at the same time
    3. table     real generation for 0, 1, 2, 4, 8 shots, under rules of pre-training and under rules never used in it

Trained end to end from scratch the same model learns nothing but the form of the answers for a long time: attention has no
reason to look at pictures that do not yet say anything. So the pictures come first. The form of the prompt matters as much:
the question word stands right before its answer (data.TEMPLATES), so that looking up an earlier answer takes one comparison
of it with the token before that answer. With one more word in between, what the made-up words mean is not learnt in the
same time: the model goes on guessing among the meanings it has seen.

Letters: B episodes, T tokens, N pictures, d width of the decoder, E = 9 examples an episode.
"""

import argparse
import csv
import functools
import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from tqdm import tqdm

import toy
from data import DATASETS, TEMPLATES, Processor, Sample, left_pad, prompts, render
from eval import run_command
from mimic import save_atomically
from model import Config, Idefics2, InputError, Shifts
from resume import load_state, read_state, save_state

E, SHOTS = 9, (0, 1, 2, 4, 8)                            # examples an episode; shots of the table
SPECIAL_FIRST, SPECIAL_LAST = ("<unk>", "<s>", "</s>"), ("<fake_token_around_image>", "<image>")


# ---------------------------------------------------------------------------------------------------------------------
# The model folder, as published
# ---------------------------------------------------------------------------------------------------------------------
def vocabulary():
    """Every token in the order of its id: <unk> (the padding) 0, <s> 1, </s> 2, words, the two image tokens."""
    return [*SPECIAL_FIRST, *toy.vocabulary(), *SPECIAL_LAST]


def config_json():
    """config.json: Idefics2 with 1.7 M parameters, four visual tokens for a picture of 40 x 40 pixels."""
    words = vocabulary()
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return {
        "architectures": ["Idefics2ForConditionalGeneration"], "model_type": "idefics2", "dtype": "bfloat16",
        "image_token_id": words.index("<image>"), "tie_word_embeddings": False, "use_cache": True, **ids,
        "vision_config": {"model_type": "idefics2_vision", "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3,
                          "num_attention_heads": 4, "num_channels": 3, "image_size": toy.SIDE, "patch_size": 8,
                          "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "attention_dropout": 0.0},
        "perceiver_config": {"model_type": "idefics2_perceiver", "hidden_act": "silu", "hidden_size": 128,
                             "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4, "resampler_head_dim": 32,
                             "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "attention_dropout": 0.0},
        "text_config": {"model_type": "mistral", "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 6,
                        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "vocab_size": len(words),
                        "max_position_embeddings": 512, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu",
                        "sliding_window": None, "attention_dropout": 0.0, "tie_word_embeddings": False, **ids}}


def tokenizer():
    """One token a word: text is split at blanks, which vanish, and at line ends, which are tokens."""
    t = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary())}, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")])
    t.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    t.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in (*SPECIAL_FIRST, *SPECIAL_LAST)])
    return t


def write_settings(folder):
    """Everything of the model folder but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer().save(str(folder / "tokenizer.json"))
    side = {"longest_edge": toy.SIDE, "shortest_edge": toy.SIDE}                   # a toy picture stays as it is
    for name, content in {
        "config": config_json(),
        "generation_config": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        "preprocessor_config": {"image_processor_type": "Idefics2ImageProcessor", "do_convert_rgb": True, "do_resize": True,
                                "size": side, "resample": 2, "do_rescale": True, "rescale_factor": 1 / 255,
                                "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_pad": True,
                                "do_image_splitting": False},
        "processor_config": {"processor_class": "Idefics2Processor",
                             "image_seq_len": config_json()["perceiver_config"]["resampler_n_latents"]},
        "tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>",
                             "eos_token": "</s>", "pad_token": "<unk>", "additional_special_tokens": list(SPECIAL_LAST),
                             "padding_side": "left", "model_max_length": 512, "clean_up_tokenization_spaces": False},
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def new_model(folder, seed):
    """A randomly initialised Idefics2 of the folder's config.json."""
    torch.manual_seed(seed)
    return Idefics2(Config.from_file(folder / "config.json"))


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------
def random_pictures(n, rng):
    """→ scenes (n,4), pictures (n,40,40,3) uint8."""
    scenes = toy.random_scenes(n, rng)
    return scenes, toy.draw(scenes, rng)


def encode(model, processor, pictures):
    """Pictures (N,40,40,3) uint8 → features (N,n_latents,d); pixels as Processor.images makes them."""
    values = torch.from_numpy(processor.pixel_of_byte[pictures, np.arange(3)]).permute(0, 3, 1, 2)
    return model.encode_images(values, torch.ones(len(pictures), *pictures.shape[1:3], dtype=torch.bool))


@torch.no_grad()
def make_bank(model, processor, n, seed):
    """n pictures, encoded once → scenes (n,4), features (n,n_latents,d) fp32."""
    scenes, pictures = random_pictures(n, np.random.default_rng(seed))
    return scenes, torch.cat([encode(model, processor, pictures[i:i + 512]) for i in range(0, n, 512)])


# ---------------------------------------------------------------------------------------------------------------------
# Texts
# ---------------------------------------------------------------------------------------------------------------------
class Writer:
    """Episodes as token ids, the same as the tokenizer makes of the whole text, but put together from remembered pieces."""

    def __init__(self, processor):
        self.pad_id, self.bos_id = processor.pad_id, processor.bos_id
        self.piece = functools.lru_cache(4096)(lambda text: processor.encode(processor.expand(text))[1:])       # without <s>

    def example(self, question, answer):
        """→ ids of the question with its picture, ids of the answer with the line end that closes it."""
        template = TEMPLATES["toy" if question else "toy-caption"]
        _, ask, reply = render(template, [], Sample(0, None, question, [answer], answer))
        return self.piece(ask), self.piece(reply)

    def batch(self, questions, answers):
        """Questions and answers, B lists of E → input_ids (B,T), left-padded; number of the example (0 … E-1) for the tokens
        of its answer and its line end, -1 for all other tokens (B,T)."""
        ids, numbers = [], []
        for row in zip(questions, answers, strict=True):
            ids.append([self.bos_id])
            numbers.append([-1])
            for n, (ask, reply) in enumerate(map(self.example, *row)):
                ids[-1] += ask + reply
                numbers[-1] += [-1] * len(ask) + [n] * len(reply)
        return left_pad(ids, self.pad_id), left_pad(numbers, -1)


LONGEST = 1 + E * 15                                     # tokens of an episode of captions, the longest of the three kinds


class ExplicitAttention(Shifts):
    """Changes nothing, but by looking at attention it has it computed as matmul and softmax. Compiled, a step is then twice as
    fast on a CPU as with the fused attention, whose backward pass is slow in bfloat16 at these sizes."""

    reads_attention = True


def answer_logits(model, bank, indices, input_ids, numbers, shifts=None):
    """→ logits (n,vocab) and labels (n,) of the n answer tokens of a batch; rows are widened to one length, which spares
    the compiler new shapes."""
    wide = LONGEST - input_ids.shape[1]
    input_ids, numbers = F.pad(input_ids, (wide, 0), value=model.pad_id), F.pad(numbers, (wide, 0), value=-1)
    features = bank[torch.from_numpy(indices).flatten()]                                       # (B·E,n_latents,d)
    states = model.hidden_states(input_ids, input_ids != model.pad_id, features, shifts)
    answer = numbers[:, 1:] >= 0
    return model.lm_head(states[:, :-1][answer]).float(), input_ids[:, 1:][answer]


def examples_right(logits, labels, numbers):
    """(B,E) bool: every token of the answer is the most likely one, the true tokens before it given."""
    wrong = torch.zeros(len(numbers), E, dtype=torch.bool)
    rows, columns = torch.where(numbers >= 0)
    miss = logits.argmax(-1) != labels
    wrong[rows[miss], numbers[rows[miss], columns[miss]]] = True
    return ~wrong


# ---------------------------------------------------------------------------------------------------------------------
# The state of a run: one file, replaced at once
# ---------------------------------------------------------------------------------------------------------------------
class State:
    """What an interrupted run needs. Batches are drawn from (seed, stage, step), so that no random state has to be kept."""

    def __init__(self, path, settings):
        self.path, self.settings, self.seconds, self.log = path, settings, 0.0, []
        self.stage, self.step, self.model, self.started = "vision", 0, {}, time.time()
        if path.exists():
            self.model, _, found = read_state(path)
            if found.get("settings") != settings:
                raise InputError(f"{path}: expected the state of {settings}, found {found.get('settings')}: "
                                 "remove it, or use another --out")
            for name in ("stage", "step", "seconds", "log"):
                setattr(self, name, found[name])

    def minutes(self):
        return (self.seconds + time.time() - self.started) / 60

    def save(self, stage, step, model, optimizer=None):
        """model: a state dict."""
        self.stage, self.step, self.model = stage, step, model
        numbers = {name: getattr(self, name) for name in ("stage", "step", "settings", "log")}
        save_state(self.path, model, optimizer, **numbers, seconds=self.minutes() * 60)


def find_state(args):
    """The state of this run; raises InputError if the folder has that of a run with other settings."""
    names = ("seed", "steps", "batch", "lr", "vision_steps", "vision_batch", "vision_lr", "bank", "bf16")
    return State(args.out / "pretrain-state" / "state.safetensors", {name: getattr(args, name) for name in names})


def adamw(parameters, lr, betas=(0.9, 0.98), weight_decay=0.1):
    """AdamW that decays matrices only."""
    parameters = list(parameters)
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
              {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr, betas, fused=True)


def schedule(step, steps, warmup=200, decay=0.3):
    """Factor on the learning rate: up in `warmup` steps, 1, then down to 0 over the last `decay` of all steps."""
    return min((step + 1) / min(warmup, max(1, steps // 5)), 1.0, (steps - step) / (decay * steps))


class Team:
    """The processes of a run, one a core: each computes its share of a batch, all make the same step with the mean gradient.

    One thread each. On idle cores threads do as well, but they wait for each other in every operation, so that a step takes
    many times as long as soon as anything else runs on a core. Processes wait for each other once a step."""

    def __init__(self, size, n_numbers):
        self.size, self.rank, self.parent = size, 0, os.getpid()
        if size > 1:
            self.barrier, self.shared = mp.get_context("spawn").Barrier(size), torch.zeros(size, n_numbers).share_memory_()

    def share(self, *parts):
        """What this process does of a batch: every size-th episode, from its rank on."""
        return [part[self.rank::self.size] for part in parts]

    def wait(self):
        """Until all processes are here. Whoever finds that the command was killed ends too, and so does who waits for him."""
        if os.getppid() != self.parent:
            sys.exit("the command was killed")
        self.barrier.wait(timeout=300)                   # seconds

    def mean(self, tensors):
        """The mean over the processes, in place; the same bits in all of them."""
        if self.size > 1:
            flat = self.shared[:, :sum(t.numel() for t in tensors)]
            torch.cat([t.flatten() for t in tensors], out=flat[self.rank])
            self.wait()
            mean = flat.mean(0)
            self.wait()                                  # nobody writes before all have read
            for t, part in zip(tensors, mean.split([t.numel() for t in tensors]), strict=True):
                t.copy_(part.view_as(t))


def update(optimizer, loss, lr, team):
    """One step with the whole team's gradient, clipped to norm 1."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    team.mean([p.grad for p in parameters])
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def steps_bar(name, state, steps, team, args):
    """The steps of a stage that are left, with a progress bar."""
    return tqdm(range(state.step, steps), name, steps, initial=state.step, disable=args.quiet or team.rank > 0)


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1: pictures
# ---------------------------------------------------------------------------------------------------------------------
def train_vision(model, processor, state, team, args):
    """Vision tower and connector learn to name colour, shape, place and ground; prints how well."""
    c = model.config
    torch.manual_seed(args.seed + 1)
    head = torch.nn.Linear(c.perceiver.resampler_n_latents * c.text.hidden_size, sum(toy.SIZES))
    trained = torch.nn.ModuleList([model.model["vision_model"], model.model["connector"], head])
    optimizer = adamw(trained.parameters(), args.vision_lr)
    if state.stage == "vision" and state.step:
        load_state(state.path, trained, optimizer)

    def named(step, n):
        """→ logits and labels of the process's share of n fresh pictures, attribute by attribute."""
        scenes, pictures = team.share(*random_pictures(n, np.random.default_rng([args.seed, 1, step])))
        logits = head(encode(model, processor, pictures).flatten(1))
        return logits.split(toy.SIZES, 1), torch.from_numpy(scenes).T

    bar = steps_bar("vision", state, args.vision_steps, team, args)
    for step in bar:
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            logits, labels = named(step, args.vision_batch)
        loss = sum(F.cross_entropy(x.float(), y) for x, y in zip(logits, labels, strict=True))
        update(optimizer, loss, args.vision_lr * schedule(step, args.vision_steps, 50), team)
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if team.rank == 0 and (step + 1) % args.save_every == 0:
            state.save("vision", step + 1, trained.state_dict(), optimizer)
    if team.rank > 0:
        return
    with torch.no_grad():
        logits, labels = named(args.vision_steps, 2000 * team.size)
    right = torch.stack([x.argmax(1) == y for x, y in zip(logits, labels, strict=True)])
    print(f"vision: all four attributes right in {100 * right.all(0).float().mean():.2f} % of 2,000 fresh pictures, "
          f"each in {', '.join(f'{100 * r:.2f} %' for r in right.float().mean(1))}; {state.minutes():.1f} minutes")


# ---------------------------------------------------------------------------------------------------------------------
# Stage 2: episodes
# ---------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def measure(model, writer, scenes, bank, n, seed):
    """Accuracy under never-seen rules for every number of shots, true tokens before each token given: kind → (E,) in 0 … 1."""
    found = {}
    for kind in toy.KINDS:
        indices, questions, answers = toy.episodes(np.random.default_rng([seed, 3]), n, E, scenes, {kind: 1.0}, held_out=True)
        ids, numbers = writer.batch(questions, answers)
        right = [examples_right(*answer_logits(model, bank, indices[i:i + 32], ids[i:i + 32], numbers[i:i + 32]),
                                numbers[i:i + 32]) for i in range(0, n, 32)]
        found[kind] = torch.cat(right).float().mean(0)
    return found


def train_decoder(model, processor, state, team, args):
    """The decoder learns to continue episodes under any seen rule; appends to state.log what never-seen rules say of it."""
    scenes, bank = make_bank(model, processor, args.bank, [args.seed, 4])
    fresh_scenes, fresh_bank = make_bank(model, processor, min(args.bank, 2048), [args.seed, 5])
    writer = Writer(processor)
    decoder = torch.nn.ModuleList([model.model["text_model"], model.lm_head]).requires_grad_(True)
    optimizer = adamw(decoder.parameters(), args.lr)
    if state.stage == "decoder" and state.step:
        load_state(state.path, model, optimizer)
    if args.compile:
        model.model["text_model"].compile(dynamic=False)

    bar = steps_bar("decoder", state, args.steps, team, args)
    for step in bar:
        rng = np.random.default_rng([args.seed, 2, step])
        indices, questions, answers = team.share(*toy.episodes(rng, args.batch, E, scenes))
        ids, numbers = writer.batch(questions, answers)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            logits, labels = answer_logits(model, bank, indices, ids, numbers, ExplicitAttention())
        loss = F.cross_entropy(logits, labels)
        update(optimizer, loss, args.lr * schedule(step, args.steps), team)
        if step % 10 == 0:
            right = examples_right(logits, labels, numbers).float().mean(0)
            bar.set_postfix(loss=f"{loss.item():.3f}", shots_0=f"{right[0]:.2f}", shots_8=f"{right[8]:.2f}")
        if team.rank == 0 and ((step + 1) % args.log_every == 0 or step + 1 == args.steps):
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16), torch.compiler.set_stance("force_eager"):
                shots = measure(model, writer, fresh_scenes, fresh_bank, args.log_episodes, args.seed)
            row = {"step": step + 1, "minutes": round(state.minutes(), 2), "loss": round(loss.item(), 4)}
            state.log.append(row | {f"{kind} {k}": round(shots[kind][k].item(), 3) for kind in shots for k in (0, 8)})
            tqdm.write("  ".join(f"{k} {v}" for k, v in state.log[-1].items()))
        if team.rank == 0 and (step + 1) % args.save_every == 0:
            state.save("decoder", step + 1, model.state_dict(), optimizer)


# ---------------------------------------------------------------------------------------------------------------------
# Stage 3: what came of it
# ---------------------------------------------------------------------------------------------------------------------
def score(model, processor, bank, episodes, shots):
    """Share of episodes whose last question is answered right behind its `shots` neighbours, by greedy generation."""
    queries, demonstrations, kept = [], [], []
    for indices, questions, answers in zip(*episodes, strict=True):
        rows = [Sample(i, None, q, [a], a) for i, q, a in zip(indices.tolist(), questions, answers, strict=True)][-shots - 1:]
        queries.append(rows[-1])
        demonstrations.append(rows[:-1])
        kept += [row.image_id for row in rows]
    kind = "toy" if queries[0].question else "toy-caption"
    rows = prompts(queries, demonstrations, processor, TEMPLATES[kind])
    ids = model.generate(rows.input_ids, rows.attention_mask, bank[torch.tensor(kept)], DATASETS[kind].max_new_tokens,
                         end_ids=[processor.newline_id], banned_ids=processor.image_ids)
    return np.mean([processor.decode(row).split("\n")[0].strip() == q.target for row, q in zip(ids, queries, strict=True)])


def make_table(model, processor, n, seed, bank=2048):
    """→ list of {kind, rules, shots, accuracy (0-100), shown, n}: n episodes a row. shown (0-100): how
    often one of the demonstrations asks the query's word; None for captions, where any of them tells the rule."""
    scenes, bank = make_bank(model, processor, bank, [seed, 6])
    rows = []
    for kind in toy.KINDS:
        for rules in ("seen", "never seen"):
            rng = np.random.default_rng([seed, 7])
            episodes = toy.episodes(rng, n, E, scenes, {kind: 1.0}, held_out=rules == "never seen")
            for shots in SHOTS:
                parts = [[part[i:i + 100] for part in episodes] for i in range(0, n, 100)]
                right = sum(score(model, processor, bank, part, shots) * len(part[0]) for part in parts)
                shown = None if kind == "toy-caption" else round(100 * (1 - 0.75 ** shots), 1)
                rows.append({"kind": kind, "rules": rules, "shots": shots, "accuracy": round(100 * right / n, 1),
                             "shown": shown, "n": n})
    return rows


def markdown(table):
    """The table for people: a line for each kind and sort of rule, a column for each number of shots."""
    lines = ["| dataset | rules | " + " | ".join(f"{k} shots" for k in SHOTS) + " |", "|---|---|" + "---|" * len(SHOTS)]
    for kind in toy.KINDS:
        for rules in ("seen", "never seen"):
            row = [r["accuracy"] for r in table if (r["kind"], r["rules"]) == (kind, rules)]
            lines.append(f"| {kind} | {rules} | " + " | ".join(f"{x:.1f}" for x in row) + " |")
    shown = [f"{100 * (1 - 0.75 ** k):.1f}" for k in SHOTS]
    return "\n".join([*lines, "| *toy, toy-named: question word shown* | | " + " | ".join(shown) + " |"])


README = """# A tiny Idefics2 that learns in context

{parameters:,} parameters, bfloat16, in the layout of the published Idefics2; it knows nothing but the toy world of `toy.py`.
Made by

    {command}

in {minutes:.0f} minutes on {machine} ({steps:,} steps of {batch} episodes; seed {seed}). `log.csv` is the curve, `table.json`
the table.

Accuracy in percent, the whole answer right, greedy generation, {n} episodes a cell. A rule is fixed within an episode and says
what made-up question words mean, in which language to answer and in which form; "never seen" rules were held out of
pre-training.

{table}

The last line is the chance 1 - (3/4)^k that one of k demonstrations asks the same of the four question words as the query: who
has not seen the word can only guess, mostly in English, which is a little better than nothing.
"""


def write_results(model, state, args):
    """Weights (replaced at once), curve, table and README into the folder."""
    write_settings(args.out)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    save_atomically(weights, args.out / "model.safetensors", {"format": "pt"})
    with open(args.out / "log.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(state.log[0]))
        writer.writeheader()
        writer.writerows(state.log)
    published = Idefics2.from_pretrained(args.out)              # what others get: rounded to bfloat16, computed in fp32
    table = make_table(published, Processor.from_pretrained(args.out), args.table_episodes, args.seed, min(args.bank, 2048))
    (args.out / "table.json").write_text(json.dumps(table, indent=1) + "\n")
    machine = f"CPU, {os.cpu_count()} cores"
    text = README.format(parameters=sum(t.numel() for t in weights.values()), command=args.command, minutes=state.minutes(),
                         machine=machine, steps=args.steps, batch=args.batch, seed=args.seed, n=args.table_episodes,
                         table=markdown(table))
    (args.out / "README.md").write_text(text, encoding="utf-8")
    print(markdown(table))


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------
def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag, add = parser.add_argument, functools.partial(parser.add_argument, metavar="N")
    # optimisation
    add("--steps", type=int, default=4000, help="steps of the decoder (default %(default)s)")
    add("--batch", type=int, default=32, help="episodes a step (default %(default)s)")
    add("--lr", type=float, default=2e-3, metavar="X", help="largest learning rate of the decoder (default %(default)s)")
    add("--vision-steps", type=int, default=600, help="steps of the vision part (default %(default)s)")
    add("--vision-batch", type=int, default=256, help="pictures a step (default %(default)s)")
    add("--vision-lr", type=float, default=2e-3, metavar="X", help="its largest learning rate (default %(default)s)")
    add("--bank", type=int, default=24000, help="pictures drawn and encoded once for the decoder (default %(default)s)")
    add("--seed", type=int, default=0, help="of the initial weights, pictures and episodes (default %(default)s)")
    # run
    add("--out", type=Path, default=Path("checkpoints/tiny"), metavar="FOLDER", help="where it goes (default %(default)s)")
    add("--processes", type=int, default=os.cpu_count(), help="one thread each (default: the number of cores, %(default)s)")
    add("--log-every", type=int, default=100, help="steps between two rows of log.csv (default %(default)s)")
    add("--log-episodes", type=int, default=96, help="never-seen episodes a kind for such a row (default %(default)s)")
    add("--save-every", type=int, default=100, help="steps between two saved states (default %(default)s)")
    add("--table-episodes", type=int, default=500, help="episodes for a cell of the final table (default %(default)s)")
    flag("--fp32", dest="bf16", action="store_false", help="no bfloat16 in training (slower)")
    flag("--no-compile", dest="compile", action="store_false", help="no torch.compile (slower steps, no compiler needed)")
    flag("--resume", action="store_true", help="(it goes on without being told to, too)")
    flag("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    args.command = " ".join(["python pretrain.py", *(sys.argv[1:] if argv is None else argv)])
    args.compile = args.compile and any(map(shutil.which, ("c++", "g++", "clang++")))
    return args


def work(rank, team, args):
    """One process of the team. All of them read the same state; the first one writes."""
    team.rank = rank
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)                       # numbers near 0 are slow
    model = new_model(args.out / "pretrain-state", args.seed)
    processor = Processor.from_pretrained(args.out / "pretrain-state")
    state = find_state(args)
    team.mean([torch.zeros(1)])                          # wait until all have read it

    if state.stage == "vision":
        train_vision(model, processor, state, team, args)
        if rank == 0:
            state.save("decoder", 0, model.state_dict())
    else:
        model.load_state_dict(state.model)
    if state.stage != "done":
        train_decoder(model, processor, state, team, args)
        if rank == 0:
            state.save("done", args.steps, model.state_dict())
    if rank == 0:
        write_results(model, state, args)
        shutil.rmtree(args.out / "pretrain-state")
        print(f"{args.out}: done in {state.minutes():.1f} minutes")


def main(argv=None):
    args = parse(argv)
    if args.resume and (args.out / "table.json").exists() and not (args.out / "pretrain-state").exists():
        return print(f"{args.out}: already finished")
    write_settings(args.out / "pretrain-state")
    state = find_state(args)
    if state.step or state.stage != "vision":
        print(f"going on in stage {state.stage} at step {state.step}")
    model = new_model(args.out / "pretrain-state", args.seed)
    team = Team(args.processes, sum(p.numel() for p in model.parameters()) + 100_000)        # room for the head of stage 1
    if args.processes == 1:
        work(0, team, args)
    else:
        mp.spawn(work, (team, args), nprocs=args.processes)


if __name__ == "__main__":
    run_command(main, goes_on=True)
