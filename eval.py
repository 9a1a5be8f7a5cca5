"""Generate answers over a split, score them, write the rows.

    python eval.py --run runs/okvqa                              # a trained adapter, zero-shot
    python eval.py --run runs/okvqa --shots 8                    # with demonstrations back in the prompt
    python eval.py --dataset okvqa --model FOLDER --data FOLDER  # the base model
    python eval.py --dataset okvqa --shots 8 --limit 500         # in-context learning
    python eval.py --dataset okvqa --method rices                # rices-first, task-vector, function-vector

The folder --out (default: the run's, or runs/DATASET-METHOD) gets results.json, a list of rows {dataset,
split, method, shots, metric, score (0-100), n, seed, parameters, prompt_tokens, ms_per_query, train_seconds,
…}; predictions.jsonl, a line an answer, written batch by batch, so that --resume goes on behind them; and a
file *_results.json in the format of the VQA server or of COCO.
"""

import time
from collections import ChainMap
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from data import DATASETS, chunks, draw, encode_images, load, prompts, train_dev
from metrics.cider import cider
from metrics.vqa import vqa_accuracies, vqa_accuracy  # noqa: F401 (from eval import vqa_accuracy)
from model import Shifts
from support.files import InputError, fits_into_memory, run_command
from support.kernels import clock
from support.options import Parser, add_common_arguments, early, number, read_run
from support.parallel import gather, join, leave, rank, world
from support.results import Unfinished, about, finish_run, new_row, read_rows, table


# ---- Answer
def first_line(text, stop):
    """The answer in a generated text: what stands before the first stop word."""
    for word in stop:
        text = text.split(word)[0]
    return text.strip()


@torch.no_grad()
def answer(model, processor, dataset, queries, icds, shifts=None, features=None, template=None, num_beams=3,
           length_penalty=0.0, batch_size=16, progress=None, done=(), keep=None):
    """Generated answers for the queries, each behind its demonstrations → list[str].

    icds: a list of demonstrations a query, drawn by the caller. features: of `encode_images`, to use and, for
    demonstrations, to add to. keep([(number of a query, answer, tokens of its prompt, ms)]) is called after
    every batch; batches whose numbers are in `done` are left out. ms: prefill and decoding, pictures aside.
    Under torchrun each process answers a batch at a time, and all get all answers."""
    task = DATASETS[dataset]
    shifts = shifts if shifts is not None else Shifts()
    template = shifts.template(template or processor.templates[task.task])
    ends = [] if template.separator else [processor.newline_id]
    options = {"max_new_tokens": task.max_new_tokens, "num_beams": num_beams,
               "length_penalty": length_penalty, "shifts": shifts, "end_ids": ends,
               "banned_ids": processor.image_ids}
    model = shifts.student(model)
    if features is None or shifts.changes_vision:
        features = {}

    def answered(batch):
        asked = [queries[i] for i in batch]
        shown = [icds[i] for i in batch]
        demonstrations = [s for some in shown for s in some]
        encode_images(model, processor, demonstrations, features)
        seen = encode_images(model, processor, asked, ChainMap({}, features))      # the queries' are not kept
        rows = prompts(asked, shown, processor, template)
        inputs = rows.inputs(model, seen)
        began = clock(model.device)
        with fits_into_memory("--eval-batch-size", batch_size):
            ids = model.generate(**inputs, **options)
        seconds = clock(model.device) - began
        ms = 1000 * seconds / len(batch)
        texts = map(processor.decode, ids.tolist())
        tokens = rows.attention_mask.sum(1).tolist()
        return [(i, first_line(said, template.stop), n, ms)
                for i, said, n in zip(batch, texts, tokens, strict=True)]

    lengths = [len(q.question or "") for q in queries]
    order = sorted(range(len(queries)), key=lengths.__getitem__)                # like lengths: little padding
    everything = chunks(order, batch_size)
    left = [batch for batch in everything if not set(batch) <= set(done)]
    answers = [""] * len(queries)
    quiet = not progress or rank() > 0
    n_left = sum(map(len, left))
    with tqdm(total=n_left, desc=progress, unit="query", disable=quiet) as bar:
        for batches in chunks(left, world()):
            mine = []
            if rank() < len(batches):
                mine = answered(batches[rank()])
            parts = gather(mine)
            found = [record for part in parts for record in part]
            for i, said, *_ in found:
                answers[i] = said
            if keep:
                keep(found)
            bar.update(len(found))
    return answers


# ---- Score
def percent(each):
    """Mean of numbers in [0, 1] → 0-100, two digits; summed in order, as the official tool does it."""
    total = float(sum(each))
    return round(100 * total / len(each), 2)


def item_scores(dataset, samples, answers, root):
    """Each item's score; 1.0 is "100". OK-VQA's official answers are stemmed, so ours are too."""
    truths = [s.answers for s in samples]
    if DATASETS[dataset].metric == "cider":
        return cider(answers, truths)[1]
    if DATASETS[dataset].stemmer:
        stem = DATASETS[dataset].stemmer(root)
        answers = map(stem, answers)
    return vqa_accuracies(answers, truths)


def score(dataset, samples, answers, root=None):
    """→ score (0-100), each item's in [0, 1]; None and Nones without annotations. root: the --data folder."""
    if not all(s.answers for s in samples):
        return None, [None] * len(samples)
    each = item_scores(dataset, samples, answers, root)
    return percent(each), each


def further_scores(dataset, samples, answers, each):
    """Scores of VQA answers beside the score, all 0-100 → dict: per_answer_type and per_question_type, as the
    official evaluation reports them; where answers are stemmed also raw_score, of answers as they are against
    what the annotators wrote, and unstemmed_score, of the same against official ones. each: of `score`."""
    if DATASETS[dataset].metric == "cider" or not all(s.answers for s in samples):
        return {}
    found = {}
    if DATASETS[dataset].stemmer:
        raw_truths = [s.raw_answers for s in samples]
        raw = vqa_accuracies(answers, raw_truths)
        unstemmed = vqa_accuracies(answers, [s.answers for s in samples])
        found = {"score_of": "stemmed", "raw_score": percent(raw), "unstemmed_score": percent(unstemmed)}
    for name in ("answer_type", "question_type"):
        by_type = {}
        for s, x in zip(samples, each, strict=True):
            mine = by_type.setdefault(getattr(s, name), [])
            mine.append(x)
        if "" not in by_type:
            means = {kind: percent(by_type[kind]) for kind in sorted(by_type)}
            found[f"per_{name}"] = means
    return found


# ---- Rows
def evaluate(args, folder, split, method, say, samples, icds, shifts=None, features=None, file=None,
             seconds=0):
    """Answers the samples, scores the answers, writes all of it → the row, whole.  Arguments as `answer`.

    say: of `sayer`; file: of a trained adapter, seconds: what it took. With args.resume, what was answered
    for such a row is not asked again. Raises InputError if there is such a row, made with other options."""
    task = DATASETS[args.dataset]
    row = new_row(args, task.metric, split, method, len(icds[0]), len(samples), shifts, file, seconds)
    begun = Unfinished(folder, row, args.resume)
    if begun.done:
        return begun.row
    done = list(begun.made)
    say(samples, icds, shifts, features, progress=begun.title, done=done, keep=begun.keep)
    answers = [begun.made[i]["prediction"] for i in range(len(samples))]
    row["score"], each = score(args.dataset, samples, answers, args.data)
    row |= begun.cost()
    row |= further_scores(args.dataset, samples, answers, each)
    shown = [None if x is None else percent([x]) for x in each]
    return begun.finish(row, samples, answers, shown, task.keys)


def sayer(args, model, processor):
    """`answer` with all that the options say → say(queries, icds, shifts, features), and its template."""
    templates = processor.official_templates if args.official else processor.templates
    template = templates[DATASETS[args.dataset].task]
    options = {"template": template, "num_beams": args.num_beams,
               "length_penalty": args.length_penalty, "batch_size": args.eval_batch_size}
    say = partial(answer, model, processor, args.dataset, **options)
    return say, template


def read_samples(args, split, with_pool=True):
    """→ samples to train on or to show, dev samples, queries of the split (with_pool=False: they alone). What
    would stop a command later stops it here: bad pictures, answers that cannot be scored."""
    task = DATASETS[args.dataset]
    queries = load(args.dataset, args.data, split, args.task)
    queries = queries[:args.limit]
    pool = []
    dev = []
    if with_pool:
        pool, dev = train_dev(args.dataset, args.data, args.samples, args.dev_samples,
                              args.seed, args.task)
    for s in {s.image_id: s for s in [*pool, *dev, *queries]}.values():
        s.picture_size()
    if task.stemmer and queries[0].answers:
        task.stemmer(args.data)
    return pool, dev, queries


def report(args, folder, say, pool, queries, split, adapter, features, seconds):
    """After training: evaluates in-context learning as --compare says, and the run's adapter → the rows."""
    made = partial(evaluate, args, folder, split)
    rows = []
    for shots in args.compare:
        method = "icl" if shots else "zero-shot"
        icds = draw(pool, queries, shots, args.seed)
        rows.append(made(method, say, queries, icds, None, features))
    path = folder / f"{args.method}.safetensors"
    alone = [[]] * len(queries)
    rows.append(made(args.method, say, queries, alone, adapter, features, path, round(seconds, 1)))
    finish_run(folder)
    print(f"\n{table(rows)}\n\n{folder}: trained in {seconds:.0f} s")
    leave()
    return rows


# ---- Command line
def parse(argv):
    """→ arguments, and the class of a method that needs no training (None: a run's adapter)."""
    import baselines
    import models
    methods = baselines.untrained()
    parser = Parser(__doc__)
    add = add_common_arguments(parser, argv, DATASETS).add_argument
    add("--run", metavar="FOLDER", help="a folder that train.py wrote: its adapter, model, data and seed")
    add("--method", choices=methods, help="what needs no training (default icl with --shots, else zero-shot)")
    add("--shots", type=number(int, 0), metavar="K",
        help="ICDs before each query, or in a vector's prompts (default: the paper's; with --run 0)")
    add("--split", metavar="NAME", help="train, val or test, if the dataset has it (default: its own)")
    folder = early(["run"], argv).run
    if folder:
        saved = read_run(folder, baselines.adapters())
        own = ("out", "device", "limit", "resume", "method", "shots")
        parser.use(saved, f"{folder}/args.json", but=own)
    args = parser.parse(argv)
    if args.run:
        if args.method:
            raise InputError(f"--run: expected no --method beside it, found {args.method}")
        args.method = saved["method"]
        args.shots = args.shots or 0
        return args, None
    args.method = args.method or ("icl" if args.shots else "zero-shot")
    kind = methods[args.method]
    if args.shots is None:
        args.shots = kind.shots
    if args.shots is None:
        args.shots = models.of(args.model)[0].shots
    if args.shots < kind.least:
        raise InputError(f"--shots: expected at least {kind.least} for {args.method}, found {args.shots}")
    return args, kind


def main(argv=None):
    import baselines
    import models
    args, kind = parse(argv)
    device = join(args.device)
    folder = Path(args.out or args.run or f"runs/{args.dataset}-{args.method}")

    # 1. What is asked, and what may be shown
    task = DATASETS[args.dataset]
    split = args.split or task.eval_split
    pool, dev, queries = read_samples(args, split, args.shots > 0)
    draw(pool, queries[:1], args.shots, args.seed)            # too few? better said before the long work

    # 2. The model, demonstrations and shifts
    model, processor = models.load_model(args.model, device, args.dtype)
    say, template = sayer(args, model, processor)
    features = {}
    path = None
    if args.run:
        path = Path(args.run) / f"{args.method}.safetensors"
        shifts = baselines.load_adapter(path, args.method, model)
        icds = draw(pool, queries, args.shots, args.seed)
        rows = read_rows(Path(args.run) / "results.json")
        seconds = next((r.get("train_seconds", 0) for r in rows if r["method"] == args.method), 0)
    else:
        def dev_score(candidate):
            if not dev:
                raise InputError("--dev-samples: expected some to choose the layer with, found none")
            encode_images(model, processor, dev, features)
            alone = [[]] * len(dev)
            answers = say(dev, alone, candidate, features)
            return score(args.dataset, dev, answers, args.data)[0]

        began = time.perf_counter()
        icds, shifts = kind.prepare(model, processor, template, pool, queries, args.shots,
                                    args.seed, args.eval_batch_size, dev_score)
        seconds = round(time.perf_counter() - began, 1) if shifts else 0

    # 3. Answers, scores
    row = evaluate(args, folder, split, args.method, say, queries, icds, shifts, features, path, seconds)
    if shifts and not args.run:
        shifts.save(folder / f"{args.method}.safetensors", **about(args))
    print(table([row]))
    if row["score"] is None:
        print(f"{args.dataset} {split} has no annotations here: the answers are not scored")
    leave()
    return row


if __name__ == "__main__":
    run_command(main)
