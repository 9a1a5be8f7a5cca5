"""Train MimIC: the zero-shot model, with shifts, imitates the same model run with demonstrations.

    python train.py                                          # the toy world: everything in two minutes
    python train.py --dataset okvqa                          # OK-VQA in data/, the model in idefics2-8b-base/
    python train.py --method lora                            # or live, hificl, stave, prompt-tuning

Trains on --samples of the training split, chooses the epoch by the score on --dev-samples others, evaluates
on another split. --resume continues behind the last whole epoch. On N GPUs: docs/running.md.
"""

import inspect
import math
import random
import sys
import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from data import DATASETS, chunks, collate, draw, encode_images
from eval import read_samples, report, sayer, score
from mimic import Recorder, align_loss, lm_loss
from model import KVCache
from support.files import InputError, check_finite, fits_into_memory, load_state, run_command, save_state
from support.options import Parser, add_common_arguments, add_training_arguments, early, read_run, taken
from support.parallel import add, add_gradients, join, rank, wait, world
from support.results import about, already_finished, begin_run, open_log

LOG = ("step", "epoch", "loss", "align", "ce", "lr", "grad_norm", "seconds", "dev")    # columns of log.csv


# ---- The loss
def losses(model, adapter, batch, features, lambda_align=1.0, align_on="layer", align_norm=True,
           ce_on="answer"):
    """L_align and L_gt of a batch, two scalars in fp32.  Paper, Figure 3.
    features {image id: (n_latents,d)}; lambda_align 0: no teacher; align_on "layer" (the paper's H) or "ffn"
    (official code); ce_on: a mask of Batch, "answer" or "sequence" (official code)."""
    # 1. Teacher: the frozen model reads {demonstrations, query}.
    teacher = Recorder(last=batch.T_q)
    if lambda_align:
        with torch.no_grad():
            teacher_pass(model, batch, features, teacher)

    # 2. Student: the model with shifts reads the query alone.
    student = Recorder(adapter, last=batch.T_q)
    model = adapter.student(model)                             # itself, unless the method changes weights
    if adapter.changes_vision:
        features = encode_images(model, batch.student.processor, batch.student.samples, {})
    inputs = batch.student.inputs(model, features)
    states = model.hidden_states(**inputs, shifts=student)

    # 3. L_align: the student's states against the teacher's, in every layer.
    align = torch.zeros((), device=model.device)
    if lambda_align:
        student_states = getattr(student, align_on)
        teacher_states = getattr(teacher, align_on)
        compared = batch.align.to(model.device)
        align = align_loss(student_states, teacher_states, compared, align_norm)

    # 4. L_gt: the tokens of the answer, each predicted from the column before it.
    read = getattr(batch, ce_on).to(model.device)
    return align, lm_loss(model, states, inputs["input_ids"], read)


def teacher_pass(model, batch, features, recorder):
    """The teacher reads {demonstrations, query}; demonstrations that all queries share it reads once."""
    inputs = batch.teacher.inputs(model, features)
    if not batch.shared:
        return model.hidden_states(**inputs, shifts=recorder, last=batch.T_q)
    shown = inputs["attention_mask"]
    cache = KVCache(model.config.text.num_hidden_layers, shown.shape[1] + batch.T_q)
    model.hidden_states(**inputs, cache=cache)
    cache.repeat(len(batch.align))
    query = batch.student.inputs(model, features)
    query_ids = query["input_ids"][:, -batch.T_q:]
    asked = batch.align.to(model.device)
    mask = torch.cat([shown.expand(len(asked), -1), asked], 1)
    return model.hidden_states(query_ids, mask, query["image_features"], recorder, cache=cache)


# ---- The loop
def learning_rate(step, steps, warmup):
    """Share of the highest rate: linear up over `warmup` of the steps, then half a cosine down to 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    return 0.5 * (1 + math.cos(math.pi * done))


def steps_of(pool, epoch, seed=0, batch_size=4, accumulate=1, shots=8, draws=0, share_icds=False):
    """The steps of an epoch over the pool, in a new order: lists of micro-batches (queries, their
    demonstrations).

    draws: sets of demonstrations a query meets, 0 = a new one every epoch. share_icds: the queries of a
    micro-batch stand behind the same demonstrations, drawn for the first of them."""
    shuffled = random.Random(f"{seed}-{epoch}")
    order = shuffled.sample(pool, len(pool))
    draw_number = epoch % draws if draws else epoch
    seed = f"{seed}-{draw_number}"

    def shown(queries):
        if not share_icds:
            return draw(pool, queries, shots, seed)
        asked = {q.id for q in queries}
        others = [s for s in pool if s.id not in asked]
        return draw(others, queries[:1], shots, seed) * len(queries)

    batches = chunks(order, batch_size)
    for micro in chunks(batches, accumulate):
        yield [(queries, shown(queries)) for queries in micro]


def train(args, compute, adapter, samples, dev_score, save, folder):
    """Trains the adapter → seconds. compute(queries, icds) → L_align, L_gt; save(epoch=…) keeps the adapter
    of the best epoch. state.safetensors, written behind every epoch, is what --resume continues from."""
    optimiser = torch.optim.AdamW(adapter.groups(args.lr), weight_decay=args.weight_decay)
    highest = [group["lr"] for group in optimiser.param_groups]
    per_epoch = math.ceil(len(samples) / (args.batch_size * args.accumulate))
    steps = args.epochs * per_epoch
    draws = partial(steps_of, samples, **taken(steps_of, vars(args)))
    state = folder / "state.safetensors"
    step, best, seconds = load_state(state, adapter, optimiser) or (0, -1.0, 0.0)
    bar = tqdm(total=steps, initial=step, desc="train", unit="step", disable=rank() > 0)
    with open_log(folder / "log.csv", LOG, step) as log, bar:
        for epoch in range(step // per_epoch, args.epochs):
            adapter.train()
            for micro in draws(epoch):
                began = time.perf_counter()
                seed = random.Random(f"{args.seed}-{step}-{rank()}").getrandbits(63)
                torch.manual_seed(seed)                        # of LoRA's dropout

                # 1. Two passes, two losses, one backward for every micro-batch; the processes share them.
                optimiser.zero_grad()
                sums = torch.zeros(2)
                for queries, icds in micro[rank()::world()]:
                    with fits_into_memory("--batch-size", args.batch_size):
                        align, ce = compute(queries, icds)
                        loss = args.lambda_align * align + args.lambda_ce * ce
                        (loss / len(micro)).backward()
                    sums += torch.tensor([align.item(), ce.item()]) / len(micro)
                add_gradients(adapter.parameters())
                add(sums)

                # 2. Clip, schedule, step.
                norm = torch.nn.utils.clip_grad_norm_(adapter.parameters(), args.clip).item()
                align, ce = sums.tolist()
                check_finite(step + 1, micro, align=align, ce=ce, gradient=norm)
                for group, lr in zip(optimiser.param_groups, highest, strict=True):
                    group["lr"] = lr * learning_rate(step, steps, args.warmup)
                optimiser.step()
                step += 1

                # 3. Log. The last row of an epoch waits for the dev score.
                took = time.perf_counter() - began
                seconds += took
                loss = args.lambda_align * align + args.lambda_ce * ce
                lr = optimiser.param_groups[0]["lr"]
                row = [step, epoch + 1, loss, align, ce, lr, norm, round(took, 4)]
                if step % per_epoch:
                    log.writerow(row)
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}", align=f"{align:.3f}", ce=f"{ce:.3f}")

            # 4. The dev score chooses the epoch; of equals the later one.
            found = dev_score(adapter)
            log.writerow([*row, found])
            bar.write(f"epoch {epoch + 1}: loss {loss:.3f}, dev score {found:.2f}")
            if found >= best:
                best = found
                save(epoch=epoch + 1)
            save_state(state, adapter, optimiser, (step, best, seconds))
    return seconds


# ---- Command line
def parse(argv=None):
    """→ arguments, and the class of the adapter, which brings its defaults and its own options."""
    import baselines
    import models
    argv = sys.argv[1:] if argv is None else argv
    methods = baselines.adapters()
    given = early(("method", "dataset", "init"), argv)
    kind = methods.get(given.method, methods["mimic"])
    parser = Parser(__doc__)
    add_common_arguments(parser, argv, DATASETS)
    add_training_arguments(parser, methods, inspect.signature(kind.losses or losses).parameters)
    own = parser.add_argument_group(f"--method {given.method or 'mimic'}")
    kind.add_arguments(own)
    parser.set_defaults(lr=5e-3, lambda_ce=1.0)                # of methods that say no others
    parser.set_defaults(lambda_align=0.0, share_icds=False)    # of methods that have no such options
    parser.set_defaults(**kind.defaults)
    if DATASETS.get(given.dataset, DATASETS["toy"]).toy:
        parser.set_defaults(compare=[0, 1, 2, 4, 8])
        if not given.init:
            parser.set_defaults(lr=kind.toy_lr)                # too high for what is trained already
    if "--official" in argv:
        if kind.official is None or "--share-icds" in argv:
            raise InputError("--official: expected a method that it has, no --share-icds, found others")
        parser.set_defaults(align_on="ffn", align_norm=False, ce_on="sequence", **kind.official)
    args = parser.parse(argv)
    if args.dtype == "float16":
        raise InputError("--dtype: expected bfloat16 or float32, found float16: small gradients would be 0")
    if args.init:
        read_run(args.init, [args.method])
    if args.shots is None:
        args.shots = models.of(args.model)[0].shots
    if not args.lambda_align and not kind.losses:
        args.shots = 0                                         # nobody reads demonstrations
    suffix = "" if args.method == "mimic" else f"-{args.method}"
    args.out = args.out or f"runs/{args.dataset}{suffix}"
    return args, kind


def default_epochs(n_samples, folder):
    """As the official code: more for few samples, else the paper's for the model in the folder."""
    import models
    if n_samples < 100:
        return 15
    if n_samples <= 500:
        return 10
    return models.of(folder)[0].epochs


def choose_samples(args):
    """→ samples to train on, dev samples, queries to evaluate and their split (dev, if need be)."""
    split = DATASETS[args.dataset].eval_split
    samples, dev, queries = read_samples(args, split)
    if not all(q.answers for q in queries):
        print(f"{args.dataset} {split} has no annotations in {args.data}: evaluating on dev samples instead")
        split = "dev"
        queries = dev
    if not queries:
        raise InputError(f"{args.data}: expected annotations of {args.dataset} or dev samples, found neither")
    most = max(args.shots, *args.compare, 0)
    draw(samples, samples[:1], most, args.seed)                # too few? better said before the long work
    print(f"{len(samples)} samples to train on, {len(dev)} for dev, {len(queries)} to evaluate")
    return samples, dev, queries, split


def main(argv=None):
    import baselines
    import models
    args, kind = parse(argv)
    device = join(args.device)
    folder = Path(args.out)

    # 1. Samples
    samples, dev, queries, split = choose_samples(args)
    args.epochs = args.epochs or default_epochs(len(samples), args.model)
    if begin_run(folder, vars(args), args.resume):
        return already_finished(folder)

    # 2. Model, features, adapter
    model, processor = models.load_model(args.model, device, args.dtype)
    say, template = sayer(args, model, processor)
    features = encode_images(model, processor, samples + dev, {}, "encode images")
    torch.manual_seed(args.seed)
    options = vars(args) | {"processor": processor, "template": template}
    adapter = kind.for_model(model, **taken(kind.for_model, options))
    path = folder / f"{args.method}.safetensors"
    if args.init:
        found = baselines.load_adapter(Path(args.init) / path.name, args.method, model)
        if found.options != adapter.options:
            raise InputError(f"--init {args.init}: expected {adapter.options}, found {found.options}")
        adapter = found

    # 3. Training
    loss_of = kind.losses or losses
    loss_of = partial(loss_of, model, adapter, features=features, **taken(loss_of, options))
    template = adapter.template(template)

    def compute(queries, icds):
        batch = collate(queries, icds, processor, template, args.share_icds)
        return loss_of(batch)

    def dev_score(adapter):
        alone = [[]] * len(dev)
        answers = say(dev, alone, adapter.eval(), features)
        return score(args.dataset, dev, answers, args.data)[0] if dev else 0.0

    save = partial(adapter.save, path, **about(args))
    seconds = train(args, compute, adapter, samples, dev_score, save, folder)

    # 4. Evaluation
    wait()                                                     # until process 0 has written the file
    adapter = kind.load(path).to(model.device)
    return report(args, folder, say, samples, queries, split, adapter, features, seconds)


if __name__ == "__main__":
    run_command(main)
