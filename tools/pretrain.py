"""Make checkpoints/tiny from nothing: a tiny Idefics2 that has learnt to learn in context, in the toy world.

    python -m tools.pretrain --out /tmp/tiny                # interrupted, the same command goes on
    torchrun --nproc-per-node 2 -m tools.pretrain           # half an hour, with a process for each core

    1. vision    vision tower and connector alone, with a throw-away linear head that names all attributes
    2. decoder   episodes of nine examples under one hidden rule, their pictures encoded once; loss on every
                 answer, so that all numbers of shots from 0 to 8 are trained at the same time
    3. table     real generation for 0, 1, 2, 4, 8 shots, under rules of pre-training and never-seen ones

Trained end to end from scratch the same model learns nothing but the form of the answers for a long time:
attention has no reason to look at pictures that do not yet say anything. So the pictures come first. The form
of the prompt matters as much: the question word stands right before its answer (data.TEMPLATES), so that
looking up an earlier answer takes one comparison of it with the token before that answer.

B episodes, T tokens, N pictures, d width of the decoder, E = 9 examples an episode.
"""

import functools
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split
from tokenizers.processors import TemplateProcessing
from tqdm import tqdm

from data import ANSWER, Processor, Sample, left_pad, row
from eval import answer
from model import Config, Idefics2, Shifts
from models import load_model
from support import files, parallel
from support.options import Parser, number
from toy import world

E = 9                                    # examples of an episode
LONGEST = 1 + E * 15                     # tokens of an episode of captions, the longest of the three kinds
SHOTS = [0, 1, 2, 4, 8]                  # of the table
SPECIAL_FIRST = ["<unk>", "<s>", "</s>"]
SPECIAL_LAST = ["<fake_token_around_image>", "<image>"]


# --- The model folder, as published -------------------------------------------------------------------------
def vocabulary():
    """Every token in the order of its id: <unk> (the padding) 0, <s> 1, </s> 2, words, the image tokens."""
    return [*SPECIAL_FIRST, *world.vocabulary(), *SPECIAL_LAST]


IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
VISION = {
    "model_type": "idefics2_vision", "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_channels": 3, "image_size": world.SIDE, "patch_size": 8,
    "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "attention_dropout": 0.0}
PERCEIVER = {
    "model_type": "idefics2_perceiver", "hidden_act": "silu", "hidden_size": 128, "resampler_n_latents": 4,
    "resampler_depth": 1, "resampler_n_heads": 4, "resampler_head_dim": 32, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5, "attention_dropout": 0.0}
TEXT = {
    "model_type": "mistral", "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "vocab_size": len(vocabulary()),
    "max_position_embeddings": 512, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "sliding_window": None, "attention_dropout": 0.0, "tie_word_embeddings": False, **IDS}
SETTINGS = {                             # 1.7 M parameters, four visual tokens a picture of 40 x 40 pixels
    "config": {
        "architectures": ["Idefics2ForConditionalGeneration"], "model_type": "idefics2", "dtype": "bfloat16",
        "image_token_id": vocabulary().index("<image>"), "tie_word_embeddings": False, "use_cache": True,
        **IDS, "vision_config": VISION, "perceiver_config": PERCEIVER, "text_config": TEXT},
    "generation_config": IDS,
    "preprocessor_config": {
        "image_processor_type": "Idefics2ImageProcessor", "do_convert_rgb": True, "do_resize": True,
        "size": {"longest_edge": world.SIDE, "shortest_edge": world.SIDE}, "resample": 2, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "do_pad": True, "do_image_splitting": False},
    "processor_config": {"processor_class": "Idefics2Processor", "image_seq_len": 4},
    "tokenizer_config": {
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>",
        "eos_token": "</s>", "pad_token": "<unk>", "additional_special_tokens": SPECIAL_LAST,
        "padding_side": "left", "model_max_length": 512, "clean_up_tokenization_spaces": False},
}


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
    """Everything of the model folder but the weights."""
    files.make_folder(folder)
    files.write_text(folder / "tokenizer.json", tokenizer().to_str(pretty=True))
    for name, content in SETTINGS.items():
        files.write_json(folder / f"{name}.json", content)


# --- Pictures and texts -------------------------------------------------------------------------------------
def random_pictures(n, rng):
    """→ scenes (n,4), pictures (n,40,40,3) uint8."""
    scenes = world.random_scenes(n, rng)
    return scenes, world.draw(scenes, rng)


def encode(model, processor, pictures):
    """Pictures (N,40,40,3) uint8 → features (N,n_latents,d); pixels as Processor.images makes them."""
    values = torch.from_numpy(processor.pixel_of_byte[pictures, np.arange(3)]).permute(0, 3, 1, 2)
    return model.encode_images(values, torch.ones(len(pictures), world.SIDE, world.SIDE, dtype=torch.bool))


@torch.no_grad()
def make_bank(model, processor, n, seed):
    """n pictures, encoded once → scenes (n,4), features (n,n_latents,d) fp32."""
    scenes, pictures = random_pictures(n, np.random.default_rng(seed))
    return scenes, torch.cat([encode(model, processor, pictures[i:i + 512]) for i in range(0, n, 512)])


@functools.lru_cache(4096)
def example(processor, question, told):
    """→ ids of question and answer, and whether each of them is of the answer or its line end."""
    template = processor.templates["toy" if question else "toy-caption"]
    ids, parts = row(processor, template, [], Sample(0, None, question, [told], told))
    return ids[1:], [part == ANSWER for part in parts[1:]]                             # without <s>


def write(processor, questions, answers):
    """Questions and answers, B lists of E → input_ids (B,T) of the whole texts, left-padded; numbers (B,T):
    of the example, 0 … E-1, for the tokens of its answer and line end, -1 for all others."""
    all_ids, all_numbers = [], []
    for episode in zip(questions, answers, strict=True):
        ids, numbers = [processor.bos_id], [-1]
        for n, (question, told) in enumerate(zip(*episode, strict=True)):
            more, of_answer = example(processor, question, told)
            ids += more
            numbers += [n if trained else -1 for trained in of_answer]
        all_ids.append(ids)
        all_numbers.append(numbers)
    return left_pad(all_ids, processor.pad_id), left_pad(all_numbers, -1)


class ExplicitAttention(Shifts):
    """Changes nothing, but by looking at attention it has it computed as matmul and softmax. Compiled, a step
    is then twice as fast on a CPU as with fused attention, whose backward pass is slow in bfloat16."""

    reads_attention = True


def answer_logits(model, bank, indices, input_ids, numbers, shifts=None):
    """→ logits (n,vocab) and labels (n,) of the n answer tokens of a batch. Rows are widened to one length,
    which spares the compiler new shapes."""
    wide = LONGEST - input_ids.shape[1]
    input_ids = F.pad(input_ids, (wide, 0), value=model.pad_id)
    numbers = F.pad(numbers, (wide, 0), value=-1)
    features = bank[torch.from_numpy(indices).flatten()]                               # (B·E,n_latents,d)
    states = model.hidden_states(input_ids, input_ids != model.pad_id, features, shifts)
    trained = numbers[:, 1:] >= 0
    return model.lm_head(states[:, :-1][trained]).float(), input_ids[:, 1:][trained]


def examples_right(logits, labels, numbers):
    """(B,E) bool: every token of the answer is the most likely one, the true tokens before it given."""
    rows, columns = torch.where(numbers >= 0)
    miss = logits.argmax(-1) != labels
    right = torch.ones(len(numbers), E, dtype=torch.bool)
    right[rows[miss], numbers[rows[miss], columns[miss]]] = False
    return right


# --- A step -------------------------------------------------------------------------------------------------
def adamw(parameters, lr):
    """AdamW that decays matrices only."""
    parameters = list(parameters)
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
              {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr, (0.9, 0.98), fused=True)


def schedule(step, steps, warmup=200, decay=0.3):
    """Factor on the learning rate: up in `warmup` steps, then 1, then down to 0 over the share `decay`."""
    rise = (step + 1) / min(warmup, max(1, steps // 5))
    fall = (steps - step) / (decay * steps)
    return min(rise, 1.0, fall)


def update(optimiser, loss, lr):
    """One step with the mean gradient of all processes, clipped to norm 1."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    for group in optimiser.param_groups:
        group["lr"] = lr
    optimiser.zero_grad()
    (loss / parallel.world()).backward()
    parallel.add_gradients(parameters)
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimiser.step()


# --- 1. Pictures --------------------------------------------------------------------------------------------
def train_vision(model, processor, args):
    """Vision tower and connector learn to name colour, shape, place and ground; prints how well."""
    torch.manual_seed(args.seed + 1)
    sizes = model.config
    head = torch.nn.Linear(sizes.perceiver.resampler_n_latents * sizes.text.hidden_size, sum(world.SIZES))
    trained = torch.nn.ModuleList([model.model["vision_model"], model.model["connector"], head])
    optimiser = adamw(trained.parameters(), args.vision_lr)

    def named(step, n):
        """→ logits and labels of this process's share of n fresh pictures, attribute by attribute."""
        rng = np.random.default_rng([args.seed, 1, step])
        scenes, pictures = map(parallel.share, random_pictures(n, rng))
        logits = head(encode(model, processor, pictures).flatten(1))
        return zip(logits.split(world.SIZES, 1), torch.from_numpy(scenes).T, strict=True)

    bar = tqdm(range(args.vision_steps), "vision", disable=parallel.rank() > 0)
    for step in bar:
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            guesses = named(step, args.vision_batch)
        loss = sum(F.cross_entropy(x.float(), y) for x, y in guesses)
        update(optimiser, loss, args.vision_lr * schedule(step, args.vision_steps, 50))
        bar.set_postfix(loss=f"{loss.item():.3f}")
    with torch.no_grad():
        guesses = named(args.vision_steps, 2000 * parallel.world())
    right = torch.stack([x.argmax(1) == y for x, y in guesses]).all(0).float()
    print(f"vision: {100 * right.mean():.2f} % of 2,000 fresh pictures right in all four attributes")


# --- 2. Episodes --------------------------------------------------------------------------------------------
@torch.no_grad()
def measure(model, processor, scenes, bank, args):
    """Accuracy under never-seen rules, true tokens before each token given → {"toy 0": without a shot, …}."""
    found = {}
    for kind in world.KINDS:
        rng = np.random.default_rng([args.seed, 3])
        n = args.log_episodes
        indices, questions, answers = world.episodes(rng, n, E, scenes, {kind: 1.0}, held_out=True)
        ids, numbers = write(processor, questions, answers)
        right = examples_right(*answer_logits(model, bank, indices, ids, numbers), numbers).float()
        found |= {f"{kind} {k}": round(right[:, k].mean().item(), 3) for k in (0, 8)}
    return found


def train_decoder(model, processor, optimiser, state, args):
    """The decoder learns to continue episodes under any seen rule, from where the file `state` says →
    seconds. The file is written anew with every row of log.csv."""
    began = time.time()
    first, (of, log), before = files.load_state(state, model, optimiser)
    if of != settings(args):
        raise files.InputError(f"{state}: expected the state of {settings(args)}, found {of}: "
                               "remove it, or use another --out")
    scenes, bank = make_bank(model, processor, args.bank, [args.seed, 4])
    fresh = make_bank(model, processor, min(args.bank, 2048), [args.seed, 5])
    if args.compile:
        model.model["text_model"].compile(dynamic=False)
    quiet = parallel.rank() > 0
    bar = tqdm(range(first, args.steps), "decoder", args.steps, initial=first, disable=quiet)
    for step in bar:
        rng = np.random.default_rng([args.seed, 2, step])
        indices, questions, answers = map(parallel.share, world.episodes(rng, args.batch, E, scenes))
        ids, numbers = write(processor, questions, answers)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            logits, labels = answer_logits(model, bank, indices, ids, numbers, ExplicitAttention())
        loss = F.cross_entropy(logits, labels)
        update(optimiser, loss, args.lr * schedule(step, args.steps))
        bar.set_postfix(loss=f"{loss.item():.3f}")

        done = step + 1
        if parallel.rank() == 0 and (done % args.log_every == 0 or done == args.steps):
            seconds = before + time.time() - began
            found = {"step": done, "minutes": round(seconds / 60, 2), "loss": round(loss.item(), 4)}
            eager = torch.compiler.set_stance("force_eager")
            with eager, torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                found |= measure(model, processor, *fresh, args)
            log.append(found)
            rows = [",".join(map(str, cells)) for cells in (found, *(past.values() for past in log))]
            files.write_text(args.out / "log.csv", "\n".join(rows) + "\n")
            bar.write("  ".join(f"{name} {value}" for name, value in found.items()))
            files.save_state(state, model, optimiser, (done, (settings(args), log), seconds))
    return before + time.time() - began


# --- 3. What came of it -------------------------------------------------------------------------------------
def score(model, processor, bank, kind, episodes, shots):
    """Percent of the episodes whose last question is answered right behind its `shots` neighbours."""
    queries, icds = [], []
    for episode in zip(*episodes, strict=True):
        examples = [Sample(int(i), None, q, [a], a) for i, q, a in zip(*episode, strict=True)]
        queries.append(examples[-1])
        icds.append(examples[E - 1 - shots:E - 1])
    features = dict(enumerate(bank))
    said = answer(model, processor, kind, queries, icds, features=features, num_beams=1, batch_size=100)
    right = sum(found == query.target for found, query in zip(said, queries, strict=True))
    return round(100 * right / len(queries), 1)


def make_table(model, processor, n, seed, size=2048):
    """→ list of {kind, rules, shots, accuracy (0-100), shown, n}, n episodes each. shown (0-100): how often a
    demonstration asks the query's word; None for captions, where any of them tells the rule."""
    scenes, bank = make_bank(model, processor, size, [seed, 6])
    table = []
    for kind in world.KINDS:
        for rules in ("seen", "never seen"):
            rng = np.random.default_rng([seed, 7])
            episodes = world.episodes(rng, n, E, scenes, {kind: 1.0}, held_out=rules == "never seen")
            for shots in SHOTS:
                cell = {"kind": kind, "rules": rules, "shots": shots, "n": n}
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
    shown = "".join(f" {100 * (1 - 0.75 ** k):.1f} |" for k in SHOTS)
    return "\n".join([*lines, "| *toy, toy-named: question word shown* | |" + shown])


README = """# A tiny Idefics2 that learns in context

{parameters:,} parameters, bfloat16, in the layout of the published Idefics2; it knows nothing but the toy
world of `toy/world.py`. Made by

    {command}

in {minutes:.0f} minutes on a CPU of {cores} cores ({steps:,} steps of {batch} episodes; seed {seed}).
`log.csv` is the curve, `table.json` the table.

Accuracy in percent, the whole answer right, greedy generation, {n} episodes a cell. A rule is fixed within an
episode and says what made-up question words mean, in which language to answer and in which form; "never seen"
rules were held out of pre-training.

{table}

The last line is the chance 1 - (3/4)^k that one of k demonstrations asks the same of the four question words
as the query: who has not seen the word can only guess, mostly in English, a little better than nothing.
"""


def write_results(model, seconds, args):
    """Weights, table and README into the folder."""
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    files.save_tensors(args.out / "model.safetensors", weights, {"format": "pt"})
    parallel.wait()
    published, processor = load_model(args.out)                 # what others get: bfloat16, computed in fp32
    table = make_table(published, processor, args.table_episodes, args.seed, min(args.bank, 2048))
    files.write_json(args.out / "table.json", table)
    facts = {"parameters": sum(x.numel() for x in weights.values()), "cores": os.cpu_count(),
             "command": args.command, "minutes": seconds / 60, "steps": args.steps, "batch": args.batch,
             "seed": args.seed, "n": args.table_episodes, "table": markdown(table)}
    files.write_text(args.out / "README.md", README.format(**facts))
    print(markdown(table))


# --- Command line -------------------------------------------------------------------------------------------
def parse(argv):
    parser = Parser(__doc__, prog="python -m tools.pretrain")
    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=number(int, 1), default=4000, help="of the decoder (default 4000)")
    add("--batch", type=number(int, 1), default=32, help="episodes a step (default 32)")
    add("--lr", type=number(float, 0), default=2e-3, help="highest rate of the decoder (default 0.002)")
    add("--vision-steps", type=number(int, 1), default=600, help="of the vision part (default 600)")
    add("--vision-batch", type=number(int, 1), default=256, help="pictures a step (default 256)")
    add("--vision-lr", type=number(float, 0), default=2e-3, help="its highest rate (default 0.002)")
    add("--bank", type=number(int, 1), default=24000, help="pictures of all episodes (default 24000)")
    add("--seed", type=int, default=0, help="of initial weights, pictures and episodes (default 0)")
    add("--fp32", dest="bf16", action="store_false", help="no bfloat16 in training (slower)")
    add = parser.add_argument_group("run").add_argument
    add("--out", type=Path, default=Path("checkpoints/tiny"), help="folder (default checkpoints/tiny)")
    add("--log-every", type=number(int, 1), default=100, help="steps between rows of log.csv (default 100)")
    add("--log-episodes", type=number(int, 1), default=96, help="a kind for such a row (default 96)")
    add("--table-episodes", type=number(int, 1), default=500, help="for a cell of the table (default 500)")
    add("--no-compile", dest="compile", action="store_false", help="no torch.compile (slower steps)")
    add("--resume", action="store_true", help="(it goes on without being told to, too)")
    args = parser.parse(argv)
    args.command = " ".join(["python -m tools.pretrain", *(sys.argv[1:] if argv is None else argv)])
    args.compile = args.compile and any(map(shutil.which, ("c++", "g++", "clang++")))
    return args


def settings(args):
    """What a run that goes on must share with the one that was interrupted."""
    names = ("seed", "steps", "batch", "lr", "vision_steps", "vision_batch", "vision_lr", "bank", "bf16")
    return {name: getattr(args, name) for name in names}


def main(argv=None):
    args = parse(argv)
    state = args.out / "state.safetensors"
    if args.resume and (args.out / "table.json").exists() and not state.exists():
        return print(f"{args.out}: already finished")
    parallel.join("cpu")
    torch.set_num_threads(1)                             # they would wait for each other in every operation
    torch.set_flush_denormal(True)                       # numbers near 0 are slow
    write_settings(args.out)
    parallel.wait()
    torch.manual_seed(args.seed)
    model = Idefics2(Config.from_file(args.out / "config.json"))
    processor = Processor.from_pretrained(args.out)

    decoder = torch.nn.ModuleList([model.model["text_model"], model.lm_head])
    optimiser = adamw(decoder.parameters(), args.lr)
    if not state.exists():
        began = time.time()
        train_vision(model, processor, args)
        files.save_state(state, model, optimiser, (0, (settings(args), []), time.time() - began))
    parallel.wait()
    seconds = train_decoder(model, processor, optimiser, state, args)
    write_results(model, seconds, args)
    if parallel.rank() == 0:
        state.unlink()
    parallel.leave()
    print(f"{args.out}: done in {seconds / 60:.1f} minutes")


if __name__ == "__main__":
    files.run_command(main)
