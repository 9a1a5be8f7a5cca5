"""Train MimIC: the zero-shot model, with shifts, imitates the same model run with demonstrations. Or a method beside it.

    python train.py                                                             # the toy world: everything in three minutes
    python train.py --dataset okvqa                                             # OK-VQA in data/, the model in idefics2-8b-base/
    python train.py --dataset coco --data FOLDER --model FOLDER --lr 1e-3 --out runs/my-run
    python train.py --method lora                                               # or live, hificl, stave, prompt-tuning
    python train.py --fit layerwise                                             # without backpropagation: fit.py

Trains on --samples of the training split, chooses the epoch by the score on --dev-samples others, then evaluates on the
dataset's evaluation split, which training never sees. --out gets args.json, log.csv, METHOD.safetensors, results.json and
predictions.jsonl; `python eval.py --run FOLDER` evaluates again. What was interrupted or killed goes on, to the same bits, by
the same command with --resume. On N devices: `torchrun --nproc-per-node N -- train.py …`, which takes the same steps.
"""

import argparse
import csv
import json
import math
import os
import platform
import random
import subprocess
import sys
import time
from collections import ChainMap
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import memory
from baselines.lora import PROJECTIONS
from baselines.stave import STAVE, cue_length
from data import DATASETS, collate, load, pick_icds, train_dev
from eval import (
    ADAPTERS,
    add_common_arguments,
    answer,
    classes_of,
    count,
    evaluate,
    fits_into_memory,
    generation_options,
    load_model,
    resolve,
    run_command,
    table,
    template_of,
    with_pictures,
)
from features import Features, encode_images, gather, sees_alike
from fit import fit, gigabytes, is_demonstration, plan, seconds_of
from mimic import Recorder, align_loss
from model import InputError, KVCache, not_finite, read_json
from parallel import add, join, rank, share, wait, world
from results import made_with, make_folder, read_lines, read_predictions, read_rows, score, write_atomically
from resume import held_back, load_state, save_state

COMPARE = [0, 1, 2, 4, 8]         # shots of in-context learning that a toy run shows beside MimIC
# method: highest rate; that on the toys; weights of L_align and of the LM loss; demonstrations (None = the paper's for the model)
DEFAULTS = {
    "mimic":         (5e-3, 2e-2, 1.0, 0.5, None),
    "live":          (5e-3, 2e-2, 1.0, 0.5, None),        # L_align: KL
    "lora":          (5e-4, 2e-3, 0.0, 1.0, None),        # the LM loss alone: no teacher, so no demonstrations either
    "hificl":        (5e-3, 2e-2, 0.0, 1.0, None),
    "stave":         (3e-3, 3e-1, 0.0, 1.0, 1),           # the LM loss with and without demonstrations; its authors: 8 on COCO
    "prompt-tuning": (1e-2, 2e-2, 0.0, 1.0, None),
}
# up to so many samples, so many epochs, as in the official code (None = the paper's for the model)
EPOCHS = (99, 15), (500, 10), (math.inf, None)
LOG = ["step", "epoch", "loss", "align", "ce", "lr", "grad_norm", "seconds", "dev", "test"]       # columns of log.csv
UNFINISHED = "state.safetensors", "fit.safetensors", "features.json", "features.bin"      # what a run goes on from
SAVE_SECONDS = 60                 # between two states of a run to go on from, at most; its epochs end with one, too


def say_unread(args, given):
    """A line for every option that was given and that only another method, or way to fit, reads."""
    layerwise = "layerwise" in (args.fit, args.init)
    for names, reads, who in (
            ("epochs lr warmup weight_decay clip accumulate lambda_align lambda_ce align_on align_norm ce_on ce_prompts kl_late "
             "test_every_epoch", args.fit == "training", "--fit training"),
            ("fit_tokens memory_gb", layerwise, "--fit or --init layerwise"), ("z2 mu", args.method == "mimic", "--method mimic"),
            ("rank", args.method in ("lora", "hificl"), "--method lora or hificl"),
            ("targets scope", args.method == "lora", "--method lora")):
        for name in () if reads else sorted(given & set(names.split())):
            print(f"--{name.replace('_', '-')} changes nothing here: only {who} reads it", file=sys.stderr)


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog=__doc__.split("\n\n", 1)[1])
    run = add_common_arguments(parser)
    method = parser.add_argument_group("method")
    method.add_argument("--method", choices=ADAPTERS, default="mimic", help="what is trained (default %(default)s)")
    method.add_argument("--fit", choices=("training", "layerwise"), default="training",
                        help="how: gradient steps on L_align and the LM loss (default), or every layer's f and v fitted to the "
                             "true shift, forward passes only (fit.py)")
    method.add_argument("--init", choices=("random", "layerwise"), default="random",
                        help="where training starts (default %(default)s); layerwise = from what --fit layerwise finds")
    method.add_argument("--shots", type=int, default=None,
                        help="demonstrations the teacher reads (default: the paper's for the model, 8 of Idefics2; stave, "
                             "which has no teacher but reads them: 1)")
    method.add_argument("--draws", type=int, default=0, metavar="N",
                        help="different sets of demonstrations a query meets; 0 (default) = a new one every epoch, or for the "
                             "layer-wise fit as many as make 1,000 pairs of query and set, 10 at most")
    method.add_argument("--share-icds", action="store_true",
                        help="the queries of a batch meet the same demonstrations, which the teacher then reads once: faster, "
                             "and as good on the toy (BENCHMARKS.md, LOG.md)")
    method.add_argument("--fit-tokens", choices=("all", "text", "answer"), default="all",
                        help="where the layer-wise fit looks: all tokens of query and answer (default), all but image tokens, or "
                             "the answer's alone")
    method.add_argument("--align-on", choices=("layer", "ffn", "logits"), default=None,
                        help="compared: each layer's output, the paper's H (default), or its FFN's output (official code), or, "
                             "by KL, the probabilities of the answer's tokens (default of live)")
    method.add_argument("--align-norm", action=argparse.BooleanOptionalAction, default=None,
                        help="divide a layer's error by the mean square of the teacher's states (default, unless --official)")
    method.add_argument("--ce-on", choices=("answer", "sequence"), default=None,
                        help="tokens of the language-modelling loss: the answer's (default) or all of them (official code)")
    method.add_argument("--ce-prompts", choices=("query", "both"), default=None,
                        help="the LM loss is that of the answer behind the query alone (default) or the mean of that and the one "
                             "behind demonstrations and query (default of stave)")
    method.add_argument("--kl-late", action=argparse.BooleanOptionalAction, default=None,
                        help="--align-on logits: miss the distribution of the answer's first token, start at the second "
                             "(official code; default: only with --official)")
    method.add_argument("--rank", type=int, default=None, help="of lora (default 16) and hificl (default 8)")
    method.add_argument("--targets", nargs="+", default=list(PROJECTIONS), metavar="NAME",
                        help=f"linear layers lora changes (default {' '.join(PROJECTIONS)})")
    method.add_argument("--scope", choices=("text", "all"), default=None,
                        help="where lora looks for them: the decoder (default) or vision tower and connector too (official code)")
    method.add_argument("--z2", choices=("masked", "unmasked"), default=None,
                        help="keys in log Z2: those the softmax sees (default) or all of them (official code)")
    method.add_argument("--mu", choices=("head", "layer", "one"), default="head",
                        help="one μ̃ a head (the paper), one a layer, or μ̃ = 1, the vectors alone (default %(default)s)")
    method.add_argument("--lambda-align", type=float, default=None,
                        help="weight of L_align; 0 = no teacher (default 1 for mimic and live, else 0)")
    method.add_argument("--lambda-ce", type=float, default=None,
                        help="weight of the LM loss, λ (default 0.5 for mimic and live, else 1)")
    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument("--epochs", type=int, default=None, help="(default: 15 below 100 samples, 10 up to 500, else "
                                                                         "the paper's for the model, 5 of Idefics2)")
    optimisation.add_argument("--batch-size", type=int, default=4, help="queries at a time (default %(default)s)")
    optimisation.add_argument("--accumulate", type=int, default=1, metavar="N", help="batches a step (default %(default)s)")
    optimisation.add_argument("--lr", type=float, default=None,
                              help="highest rate of AdamW (default, and that on the toys: " + ", ".join(
                                  f"{method} {lr:g}, {on_toys:g}" for method, (lr, on_toys, *_) in DEFAULTS.items()) + ")")
    optimisation.add_argument("--warmup", type=float, default=0.1,
                              help="share of the steps with a rising rate, then cosine (default %(default)s)")
    optimisation.add_argument("--weight-decay", type=float, default=1e-3, help="of AdamW (default %(default)s)")
    optimisation.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient (default %(default)s)")
    run.add_argument("--test-every-epoch", action="store_true",
                     help="score the evaluation split after every epoch, too, and write the best as test_best (what many papers "
                          "report) beside the score of the epoch that dev chose")
    run.add_argument("--memory-gb", type=float, default=8.0, metavar="GB",
                     help="for the states and tokens of a layer-wise fit; states beyond it go to disk (default %(default)s)")
    run.add_argument("--compare", type=int, nargs="*", default=None, metavar="K",
                     help="evaluate in-context learning too, with these shots, 0 = zero-shot (toys: 0 1 2 4 8, else none)")
    args = parser.parse_args(argv)
    if os.environ.get("RANK", "0") == "0":              # of torchrun's processes one speaks
        say_unread(args, {name for name, value in vars(args).items() if value != parser.get_default(name)})
    resolve(args)
    toy = args.dataset.startswith("toy")
    kind = "-layerwise" if args.fit == "layerwise" else "-polished" if args.init == "layerwise" else ""
    args.out = args.out or f"runs/{args.dataset}" + ("" if args.method == "mimic" else f"-{args.method}") + kind
    lr, toy_lr, *weights = DEFAULTS[args.method]
    args.lr = (toy_lr if toy and args.init == "random" else lr) if args.lr is None else args.lr
    args.lambda_align, args.lambda_ce, args.shots = (
        default if given is None else given
        for given, default in zip((args.lambda_align, args.lambda_ce, args.shots), weights, strict=True))
    if args.shots is None:
        args.shots = classes_of(args.model)[0].shots
    args.compare = (COMPARE if toy else []) if args.compare is None else args.compare
    if min(args.compare, default=0) < 0:
        raise InputError(f"--compare: expected numbers of demonstrations, 0 or more, found {min(args.compare)}")
    args.align_on = args.align_on or ("logits" if args.method == "live" else "ffn" if args.official else "layer")
    args.ce_on = args.ce_on or ("sequence" if args.official else "answer")
    args.ce_prompts = args.ce_prompts or ("both" if args.method == "stave" else "query")
    args.kl_late = args.official if args.kl_late is None else args.kl_late
    args.z2 = args.z2 or ("unmasked" if args.official else "masked")
    args.scope = args.scope or ("all" if args.official else "text")
    args.align_norm = not args.official if args.align_norm is None else args.align_norm
    wrong = [(args.method != "mimic", f"--method {args.method}"), (args.shots < 1, f"--shots {args.shots}"),
             (args.z2 != "masked", f"--z2 {args.z2}"), (args.mu == "layer", "--mu layer"), (args.official, "--official")]
    if "layerwise" in (args.fit, args.init) and (found := " ".join(option for bad, option in wrong if bad)):
        raise InputError("a layer-wise fit: expected --method mimic, at least one shot, --z2 masked, --mu head or one and no "
                         f"--official; found {found}")
    wrong = [(args.fit == "layerwise", "--fit layerwise"), (args.ce_prompts == "both", "--ce-prompts both"),
             (args.official, "--official")]
    if args.share_icds and (found := " ".join(option for bad, option in wrong if bad)):
        raise InputError(f"--share-icds: expected gradient steps on the query alone, without --official; found {found}")
    if args.official and args.method not in ("mimic", "live", "lora"):
        raise InputError(f"--official: expected mimic, live or lora, which the official code has, found {args.method}")
    if args.method == "prompt-tuning" and args.lambda_align:
        raise InputError("--method prompt-tuning: expected --lambda-align 0 (its prompt is no part of the teacher's), found "
                         f"{args.lambda_align:g}")
    if not args.lambda_align and args.ce_prompts == "query" and "layerwise" not in (args.fit, args.init):
        args.shots = 0                                         # nobody reads demonstrations
    if args.dtype == "float16":
        raise InputError("--dtype: expected bfloat16 or float32 for training (float16 rounds its small gradients to 0), found it")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# One step
# ---------------------------------------------------------------------------------------------------------------------
def losses(model, shifts, batch, features, args, processor=None, whole=None):
    """L_align and L_gt of a batch, scalars in fp32. Paper, Figure 3. processor: for a method that changes the vision tower.

    whole: the Batch of which this one is a part, if it is one; then the losses are shares, whose sum is the whole batch's."""
    def states(model, rows, features, shifts, last=None):
        position_ids = None if rows.position_ids is None else rows.position_ids.to(model.device)
        return model.hidden_states(rows.input_ids.to(model.device), rows.attention_mask.to(model.device),
                                   gather(features, rows.samples), shifts, position_ids, last=last)

    def teacher_states(shifts):
        """Without gradients; demonstrations that all rows share are computed for one of them."""
        rows, n = batch.teacher, batch.n_shared
        if not n:
            return states(model, rows, features, shifts, T_q)
        ids, mask, B = rows.input_ids.to(model.device), rows.attention_mask.to(model.device), len(rows.input_ids)
        cache, icds = KVCache(model.config.text.num_hidden_layers, ids.shape[1]), rows.samples[:len(rows.samples) // B - 1]
        model.hidden_states(ids[:1, :n], mask[:1, :n], gather(features, icds), cache=cache, last=1)
        cache.repeat(B)
        return model.hidden_states(ids[:, n:], mask, gather(features, batch.student.samples), shifts, cache=cache)

    def logits(model, out, columns):
        return model.lm_head(out[columns.to(model.device)]).float()

    def before(columns):                                                                  # column t is predicted from t − 1
        return F.pad(columns[:, 1:], (0, 1))

    def part(mean, count):                 # means over parts of different sizes do not add up; count(batch): their size
        return mean if whole is None else mean * (count(batch) / count(whole))

    # 1. Teacher: the original model reads {demonstrations, query}; its states over the query's columns.
    T, T_q = batch.student.input_ids.shape[1], batch.align.shape[1]
    teacher, student = Recorder(last=T_q), Recorder(shifts)
    if args.lambda_align:
        with torch.no_grad():
            teacher_out = teacher_states(teacher)

    # 2. Student: the model with shifts reads the query alone.
    changed = shifts.student(model)                          # `model` itself, unless the method changes weights
    if not sees_alike(model, changed):
        rows = batch.teacher if args.ce_prompts == "both" else batch.student
        features = encode_images(changed, processor, rows.samples, {})
    if isinstance(shifts, STAVE):                            # it asks which columns are the prompt, pass by pass
        shifts.prompt, behind = prompt_columns(batch)
    out = states(changed, batch.student, features, student)

    # 3. L_align over the common columns; L_gt over the answer, logits made only where they are read.
    align = torch.zeros((), device=model.device)
    if args.lambda_align and args.align_on == "logits":
        columns = (batch.answer if args.kl_late else before(batch.answer))[:, -T_q:]
        log_p, log_q = (logits(m, o[:, -T_q:], columns).log_softmax(-1) for m, o in ((model, teacher_out), (changed, out)))
        align = (log_p.exp() * (log_p - log_q)).sum(-1).mean()                            # KL(teacher ‖ student)
        align = part(align, lambda b: int(b.answer.sum()))
    elif args.lambda_align:
        align = align_loss([s[:, -T_q:] for s in getattr(student, args.align_on)], getattr(teacher, args.align_on),
                           batch.align.to(model.device), norm=args.align_norm)
        align = part(align, lambda b: len(b.align))
    read = getattr(batch, args.ce_on)
    ce = F.cross_entropy(logits(changed, out, before(read)), batch.student.input_ids[read].to(model.device))
    ce = part(ce, lambda b: int(getattr(b, args.ce_on).sum()))
    if args.ce_prompts == "both":
        if isinstance(shifts, STAVE):
            shifts.prompt = behind
        out = states(changed, batch.teacher, features, shifts)[:, -T:]
        ce_behind = F.cross_entropy(logits(changed, out, before(batch.answer)),
                                    batch.student.input_ids[batch.answer].to(model.device))
        ce = (ce + part(ce_behind, lambda b: int(b.answer.sum()))) / 2
    return align, ce


def prompt_columns(batch):
    """Columns of instruction and query, neither demonstration nor answer nor padding: student's (B,T), teacher's (B,S) bool."""
    answer = F.pad(batch.answer, (batch.teacher.input_ids.shape[1] - batch.answer.shape[1], 0))
    return (batch.student.attention_mask & ~batch.answer,
            batch.teacher.attention_mask & ~answer & ~is_demonstration(batch))


def demonstrations(args, samples, queries, draw):
    """The ICDs of each query in its draw-th draw, or with --share-icds those of them all, drawn for the first of them."""
    if not args.share_icds:
        return [pick_icds(samples, q, args.shots, f"{args.seed}-{draw}-{q.id}") for q in queries]
    others = [s for s in samples if s.id not in {q.id for q in queries}]
    return [pick_icds(others, queries[0], args.shots, f"{args.seed}-{draw}-{queries[0].id}")] * len(queries)


def learning_rate(step, steps, warmup):
    """Share of the highest rate at a step: linear up over `warmup` of the steps, then half a cosine down to 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


# ---------------------------------------------------------------------------------------------------------------------
# All steps
# ---------------------------------------------------------------------------------------------------------------------
def train(args, model, processor, adapter, samples, dev, test, features, folder, seconds=0.0):
    """Trains the adapter, writes log.csv and the best epoch's → (the best adapter, seconds of training, best score on test).

    folder/state.safetensors is what a killed run goes on from. It is written last: whatever a crash leaves ahead of it, rows of
    log.csv or a better adapter, is made again, the same, from there."""
    trained = [p for p in adapter.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(adapter.groups(args.lr), weight_decay=args.weight_decay)
    highest = [group["lr"] for group in optimiser.param_groups]
    template, path = adapter.template(template_of(args, processor)), folder / f"{args.method}.safetensors"
    per_step = args.batch_size * args.accumulate
    steps_an_epoch = math.ceil(len(samples) / per_step)
    steps, step, best, test_best = args.epochs * steps_an_epoch, 0, -math.inf, None
    state, log_path = folder / "state.safetensors", folder / "log.csv"

    def score_on(items):
        adapter.eval()
        answers, _ = answer(model, processor, args.dataset, items, shifts=adapter, features=features,
                            **generation_options(args, processor))
        return score(args.dataset, items, answers, args.data)[0]

    if state.exists():
        found = load_state(state, adapter, optimiser)
        step, best, test_best, seconds = (found[name] for name in ("step", "best", "test_best", "seconds"))
    elif args.init == "layerwise" and dev:              # the fit is a candidate, too
        best = score_on(dev)
        adapter.save(path, **about(args), epoch=0)
    rows = read_lines(log_path)[:step + 1] if step else [",".join(LOG)]
    write_atomically(log_path, "\n".join(rows) + "\n")
    with (open(log_path if rank() == 0 else os.devnull, "a", newline="") as file, held_back() as interrupted,
          tqdm(total=steps, initial=step, desc="train", unit="step", disable=rank() > 0) as bar):
        log, saved = csv.DictWriter(file, LOG, lineterminator="\n"), time.perf_counter()
        for epoch in range(step // steps_an_epoch, args.epochs):
            adapter.train()
            order = random.Random(f"{args.seed}-{epoch}").sample(samples, len(samples))
            draw = epoch % args.draws if args.draws else epoch
            for at in range(step % steps_an_epoch * per_step, len(order), per_step):
                began = time.perf_counter()
                torch.manual_seed(random.Random(f"{args.seed}-{step}-{rank()}").getrandbits(63))         # of dropout
                micro = [order[i:i + args.batch_size] for i in range(at, min(at + per_step, len(order)), args.batch_size)]
                sums = torch.zeros(3)                   # of L_align and L_gt, and whether a process was interrupted
                for queries in micro:
                    align, ce = backward(args, model, processor, template, adapter, samples, queries, draw, features, len(micro))
                    sums += torch.tensor([align, ce, 0.0]) / len(micro)
                sums[2] = len(interrupted)
                add([p.grad for p in trained])
                add([sums])
                align, ce, stop = sums.tolist()
                norm = torch.nn.utils.clip_grad_norm_(trained, args.clip).item()
                if not math.isfinite(align + ce + norm):
                    raise InputError(
                        f"step {step + 1}: expected finite losses and gradients, found align {align}, ce {ce}, gradient {norm} "
                        f"for the samples {[q.id for queries in micro for q in queries]} ({not_finite(model)}); last good: "
                        + (" and ".join(str(p) for p in (path, state) if p.exists()) or "none yet"))
                for group, lr in zip(optimiser.param_groups, highest, strict=True):
                    group["lr"] = lr * learning_rate(step, steps, args.warmup)
                optimiser.step()
                optimiser.zero_grad()
                step, elapsed = step + 1, time.perf_counter() - began
                seconds += elapsed
                row = {"step": step, "epoch": epoch + 1, "loss": args.lambda_align * align + args.lambda_ce * ce, "align": align,
                       "ce": ce, "lr": optimiser.param_groups[0]["lr"], "grad_norm": norm, "seconds": round(elapsed, 4)}
                bar.update()
                bar.set_postfix(loss=f"{row['loss']:.3f}", align=f"{align:.3f}", ce=f"{ce:.3f}")
                if step % steps_an_epoch == 0:          # the dev score chooses the epoch; of equals the later one
                    value = step
                    if dev:
                        value = row["dev"] = score_on(dev)
                        bar.write(f"epoch {epoch + 1}: loss {row['loss']:.3f}, dev score {value:.2f}")
                    if value >= best:
                        best = value
                        adapter.save(path, **about(args), epoch=epoch + 1)
                    if test:                            # only reported
                        row["test"] = score_on(test)
                        test_best = max(row["test"], test_best or 0)
                log.writerow(row)
                file.flush()
                if stop or step % steps_an_epoch == 0 or time.perf_counter() - saved > SAVE_SECONDS:
                    save_state(state, adapter.state_dict(), optimiser, step=step, best=best, test_best=test_best, seconds=seconds)
                    saved = time.perf_counter()
                if stop:
                    raise KeyboardInterrupt
        if interrupted:                                 # in the last of the scoring
            raise KeyboardInterrupt
    wait()                                              # until the first process has written the file
    return ADAPTERS[args.method].load(path).to(model.device), seconds, test_best


def backward(args, model, processor, template, adapter, samples, queries, draw, features, n_batches):
    """Adds the gradients of one batch, a step's n_batches-th part → L_align and L_gt, numbers. Under torchrun: of this process's
    share of the queries, which may be none."""
    mine, whole = share(queries), None
    if len(mine) < len(queries):
        whole = collate(queries, [[]] * len(queries), processor, template)
        for p in adapter.parameters():
            if p.requires_grad and p.grad is None:
                p.grad = torch.zeros_like(p)
        if not mine:
            return 0.0, 0.0
    icds = share(demonstrations(args, samples, queries, draw))
    with fits_into_memory("--batch-size", args.batch_size, ", with twice the --accumulate the steps stay the same"):
        batch = collate(mine, icds, processor, template, args.share_icds)
        align, ce = losses(model, adapter, batch, features, args, processor, whole)
        ((args.lambda_align * align + args.lambda_ce * ce) / n_batches).backward()
    return align.item(), ce.item()


def about(args):
    """What an adapter file says of itself."""
    return {"method": args.method, "model": Path(args.model).resolve().name, "dataset": args.dataset, "task": args.task,
            "shots": args.shots, "seed": args.seed, "fit": args.fit, "init": args.init, "torch": torch.__version__}


def fit_draws(args, n):
    """Sets of demonstrations that each of n queries meets in a layer-wise fit."""
    return args.draws or max(1, min(10, round(1000 / n)))


def layerwise_chunks(args, samples, processor):
    """What the layer-wise fit reads: lists of Batch, the same queries with other demonstrations each (fit.plan)."""
    draws, template = fit_draws(args, len(samples)), template_of(args, processor)

    def collated(queries, draw):
        icds = [pick_icds(samples, q, args.shots, f"{args.seed}-{draw}-{q.id}") for q in queries]
        return collate(queries, icds, processor, template)

    return [[collated(samples[i:i + args.batch_size], draw) for draw in range(draws)]
            for i in range(0, len(samples), args.batch_size)]


def new_adapter(args, processor, model):
    """An untrained adapter of the method, on the model's device."""
    rank = {"rank": args.rank} if args.rank else {}
    options = {"mimic": {"z2": args.z2, "mu_of": args.mu},
               "lora": {"targets": args.targets, "scope": args.scope, **rank},
               "hificl": rank,
               "stave": {"n_cue": cue_length(processor, template_of(args, processor))}}.get(args.method, {})
    return ADAPTERS[args.method].for_model(model, **options)


def check_memory(args, n, processor):
    """Before the weights are read: what training on n samples and evaluation will need. Raises InputError if this machine cannot
    do it."""
    how = {"adapter_of": partial(new_adapter, args, processor)}
    if args.fit == "layerwise":
        one = processor.tokens_per_image + memory.TEXT_TOKENS
        columns = n * one * (1 + fit_draws(args, n) * (args.shots + 1))
        wanted = sum(gigabytes(processor.config.text, n * one, columns, getattr(torch, args.dtype).itemsize))
        how = {"fit_gb": min(args.memory_gb, wanted)}           # what is beyond goes to disk
    memory.check(args, processor.config, args.shots, (0, *args.compare), kind=classes_of(args.model)[0], **how)


def is_finished(args):
    """Whether --resume has nothing left to do. A folder with a run of other arguments, or without --resume with an unfinished
    one, is left alone: InputError."""
    folder, mine = Path(args.out), arguments(args)
    old = read_json(folder / "args.json") if (folder / "args.json").exists() else {}
    if not isinstance(old, dict):
        raise InputError(f"{folder / 'args.json'}: expected the arguments of a run, found something else; delete it")
    differ = sorted(k for k in mine if old.get(k, mine[k]) != mine[k] and k != "memory_gb")
    unfinished = [name for name in UNFINISHED if (folder / name).exists()]
    if differ and (unfinished or any(folder.glob("*.safetensors"))):
        raise InputError(f"{folder}: expected no run or one of the same arguments, found other {', '.join(differ)}; "
                         "choose another --out or delete it")
    if not args.resume and "finished" not in old and unfinished:
        raise InputError(f"{folder}: expected no unfinished run, found one; go on with it: the same command with --resume, or "
                         "choose another --out or delete it")
    return args.resume and "finished" in old and not differ


def arguments(args):
    """What args.json holds of them."""
    return {k: v for k, v in vars(args).items() if k != "resume"}


def start_run(args):
    """The run's folder, with args.json. Without --resume nothing is left of an earlier run but what this one writes anew."""
    folder = Path(args.out)
    make_folder(folder)
    if args.resume and (folder / "args.json").exists():
        return folder
    delete_unfinished(folder)
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True,
                                text=True).stdout.strip()
    except OSError:
        commit = ""
    versions = {"commit": commit, "torch": torch.__version__, "python": platform.python_version()}
    about = {**arguments(args), **versions, "started": time.strftime("%F %T")}
    write_atomically(folder / "args.json", json.dumps(about, indent=1) + "\n")
    return folder


def finish_run(folder):
    """Notes in args.json that everything is done, and deletes what was kept to go on from."""
    about = read_json(folder / "args.json") | {"finished": time.strftime("%F %T")}
    write_atomically(folder / "args.json", json.dumps(about, indent=1) + "\n")
    delete_unfinished(folder)


def delete_unfinished(folder):
    wait()                                              # until nobody reads it any more
    if rank() == 0:
        for name in UNFINISHED:
            (folder / name).unlink(missing_ok=True)
    wait()


def show_answers(folder, args, split, n=3):
    """A few questions with what each method said to them."""
    said = {}
    for p in read_predictions(folder / "predictions.jsonl"):
        if p["dataset"] == args.dataset and p["split"] == split:
            said.setdefault(p["id"], []).append(p)
    for predictions in list(said.values())[:n]:
        first = predictions[0]
        truth = max(first["answers"], key=first["answers"].count) if first["answers"] else "?"
        print(f"\nimage {first['image_id']}  {first['question'] or ''}  (truth: {truth})")
        for p in predictions:
            shots = f" {p['shots']}-shot" if p["shots"] else ""
            print(f"  {p['method'] + shots:<12}{p['prediction']}")


def main(argv=None):
    args = parse(argv)
    device, began = join(args.device), time.perf_counter()
    layerwise, fitted_before = "layerwise" in (args.fit, args.init), 0.0
    if layerwise and world() > 1:
        raise InputError(f"a layer-wise fit: expected one process, found {world()}")
    samples, dev = train_dev(args.dataset, args.data, args.samples, args.dev_samples, args.seed, args.task)
    split = DATASETS[args.dataset].eval_split
    queries = load(args.dataset, args.data, split, args.task)[:args.limit]
    fewer = len(samples) < args.samples
    samples, dev, queries = with_pictures(args, samples, dev, queries)
    annotated = all(q.answers for q in queries)
    if not dev and not annotated:
        raise InputError(f"{args.data}: expected annotations of {args.dataset} {split}, or dev samples to score instead, "
                         "found neither")
    args.epochs = args.epochs or next(n or classes_of(args.model)[0].epochs for most, n in EPOCHS if len(samples) <= most)
    print(f"{len(samples)} samples to train on, {len(dev)} for dev, {len(queries)} to evaluate"
          + (f" (--samples {args.samples}: there are no more)" if fewer else ""))
    demonstrations(args, samples, samples[:args.batch_size], 0)           # too few samples? say it before the long work
    pick_icds(samples, queries[0], max(args.compare, default=0), "")
    if is_finished(args):
        delete_unfinished(Path(args.out))                      # a kill came in between
        rows = read_rows(Path(args.out) / "results.json")
        print(f"{args.out}: already finished\n\n" + table(rows))
        return rows
    scored = (split, len(queries)) if annotated else ("dev", len(dev))
    for method, shots in [("icl" if k else "zero-shot", k) for k in args.compare] + [(args.method, 0)]:
        made_with(args.out, vars(args), dataset=args.dataset, split=scored[0], method=method, shots=shots, n=scored[1],
                  seed=args.seed)                              # another's results? likewise
    model, processor = load_model(args.model, device, args.dtype, partial(check_memory, args, len(samples)))
    if layerwise:                                              # too little memory? likewise
        chunks = layerwise_chunks(args, samples, processor)
        kept, on_disk = plan(model, chunks, processor.image_ids, args.fit_tokens, args.memory_gb)
    folder, pictured = start_run(args), samples + (dev if args.fit == "training" else [])
    if rank() > 0:
        wait()                                                 # the first process encodes the pictures, the others find them
    stored = Features(folder / "features", sorted({s.image_id for s in pictured}))
    features = ChainMap({}, encode_images(model, processor, pictured, stored, "encode images"))
    if rank() == 0:
        wait()
    torch.manual_seed(args.seed)
    adapter = new_adapter(args, processor, model)
    if layerwise:
        def embed(rows):
            return model.embed(rows.input_ids.to(model.device), gather(features, rows.samples))

        def pictures(rows):
            return model.pictures(rows.input_ids.to(model.device), gather(features, rows.samples))

        fitted_before = seconds_of(folder)
        shares = fit(model, adapter, chunks, kept, on_disk, embed, folder, pictures)
        print("explained of the shift, layer by layer: " + " ".join(f"{share:.2f}" for share in shares))
    seconds, test_best = fitted_before + time.perf_counter() - began, None
    if args.fit == "layerwise":
        adapter.save(folder / f"{args.method}.safetensors", **about(args), epoch=0)
    else:
        test = queries if args.test_every_epoch and annotated else ()
        adapter, seconds, test_best = train(args, model, processor, adapter, samples, dev, test, features, folder, seconds)
    seconds = round(seconds, 1)

    if not annotated:
        print(f"{args.dataset} {split} has no annotations in {args.data}: evaluating on the {len(dev)} dev samples instead")
        split, queries = "dev", dev
    options, rows = generation_options(args, processor) | {"features": features, "seed": args.seed, "root": args.data,
                                                           "settings": arguments(args), "resume": args.resume}, []
    for shots in args.compare:
        rows.append(evaluate(folder, model, processor, args.dataset, split, queries, "icl" if shots else "zero-shot", shots,
                             pool=samples, **options))
    rows.append(evaluate(folder, model, processor, args.dataset, split, queries, args.method, 0, adapter, train_seconds=seconds,
                         parameters=count(adapter), test_best=test_best, **options))
    finish_run(folder)
    print("\n" + table(rows))
    show_answers(folder, args, split)
    print(f"\n{folder}: trained in {seconds:.0f} s, everything in {time.perf_counter() - began:.0f} s")
    return rows


if __name__ == "__main__":
    run_command(main, goes_on=True)
