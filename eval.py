"""Generate answers over a split, score them, write the rows.

    python eval.py --run runs/okvqa                                             # a trained adapter, zero-shot
    python eval.py --method zero-shot --dataset okvqa --model FOLDER --data FOLDER
    python eval.py --method icl --shots 8 --dataset okvqa --model FOLDER --data FOLDER --limit 500
    python eval.py --method rices --order first --dataset okvqa --model FOLDER --data FOLDER
    python eval.py --method task-vector --dataset okvqa --model FOLDER --data FOLDER       # or function-vector
    python eval.py --run runs/okvqa --restore-shots 8                           # with demonstrations put back in the prompt
    python eval.py --table                                                      # every method on the toys, three seeds
    python eval.py --table --dataset okvqa --model FOLDER --data FOLDER         # or on a dataset
    python eval.py --score FILE --dataset okvqa --data FOLDER                   # any system's result file, without a model
    python eval.py --score FILE --chair SYNONYMS.txt --data FOLDER              # captions: CHAIR as well

A run's folder gets results.json (a list of rows {dataset, split, method, shots, metric, score (0-100), n, seed, parameters,
prompt_tokens, ms_per_query, train_seconds; model, task, samples, dtype, official, num_beams, length_penalty} and the further
scores of results.py; a row that agrees in dataset, split, method, shots, n and seed is replaced if those behind the semicolon
agree, too, else the command is refused), predictions.jsonl (one line a prediction) and a result file in the official format.
shots: demonstrations in the prompt; train_seconds: what it took to make an adapter or a vector; parameters: the numbers that it
consists of. A task or function vector is written beside them, RICES' image vectors too.
"""

import argparse
import contextlib
import hashlib
import json
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import memory
from baselines import function_vector, rices, task_vector
from baselines.hificl import HiFICL
from baselines.live import LIVE
from baselines.lora import LoRA
from baselines.prompt_tuning import PromptTuning
from baselines.stave import STAVE
from data import DATASETS, Processor, load, pick_icds, prompts, readable, stemmer, train_dev
from features import encode_images, gather, sees_alike
from idefics1 import Idefics1, Idefics1Processor
from metrics import cider, vqa_accuracy  # noqa: F401 (from eval import cider, vqa_accuracy)
from mimic import MimIC
from model import Idefics2, InputError, Shifts, read_json, written_whole
from parallel import gather as together
from parallel import join, leave, rank, share, wait, world
from results import (
    add_results,
    further_scores,
    made_with,
    make_folder,
    official_name,
    official_records,
    read_rows,
    score,
    score_file,
    write_atomically,
)
from resume import command_to_go_on

ADAPTERS = {"mimic": MimIC, "live": LIVE, "lora": LoRA, "hificl": HiFICL, "stave": STAVE,
            "prompt-tuning": PromptTuning}       # trained by train.py; a run's file is <method>.safetensors
VECTORS = {"task-vector": task_vector.make, "function-vector": function_vector.make}      # made of demonstrations, not trained
SHOTS = {"zero-shot": 0, "icl": None, "rices": None, "task-vector": None, "function-vector": 10}    # methods without --run:
                                  # --shots by default, None = the model's
METRICS = {"vqa_accuracy": "VQA accuracy", "cider": "CIDEr-D x 100"}
POOL_IN_MEMORY = 4096             # samples of a pool whose image features are kept for the next queries


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------
MODELS = {"idefics2": (Idefics2, Processor), "idefics": (Idefics1, Idefics1Processor)}      # model_type in config.json


def classes_of(folder):
    """What reads this folder, by its config.json → class of the model, of the processor."""
    path = Path(folder) / "config.json"
    if not path.parent.is_dir():
        raise InputError(f"{folder}: expected a model folder with config.json and safetensors, found no such folder")
    raw = read_json(path)
    found = raw.get("model_type") if isinstance(raw, dict) else raw
    if not isinstance(found, str) or found not in MODELS:
        raise InputError(f"{path}: expected model_type {' or '.join(map(repr, MODELS))}, found {found!r}")
    return MODELS[found]


def load_model(folder, device, dtype, check=None):
    """→ model, processor. check(processor) is called before the weights are read."""
    model_class, processor_class = classes_of(folder)
    processor = processor_class.from_pretrained(folder)
    if check:
        check(processor)
    model = model_class.from_pretrained(folder, getattr(torch, dtype), device)
    if model.device.type == "cpu" and model.config.text.hidden_size <= 256:
        torch.set_num_threads(1)              # so small that threads spend more time waiting for each other than they save
    return model, processor


# ---------------------------------------------------------------------------------------------------------------------
# Generate and score
# ---------------------------------------------------------------------------------------------------------------------
def first_line(text, stop):
    """The answer in a generated text: what stands before the first stop word."""
    for word in stop:
        text = text.split(word)[0]
    return text.strip()


@torch.no_grad()
def answer(model, processor, dataset, queries, pool=(), shots=0, shifts=None, seed=0, features=None, template=None, num_beams=3,
           length_penalty=0.0, batch_size=16, progress=None, pick=pick_icds, done=(), keep=lambda record: None):
    """Generated answers for the queries, each behind `shots` ICDs drawn from `pool` → list[str], {prompt_tokens, ms_per_query}.

    pick(pool, query, shots, seed) draws them. features: image features to use and add to (those of the pool stay in it, if it is
    not a large one). ms_per_query is prefill and decoding, images already encoded, in milliseconds; prompt_tokens the mean number
    of tokens of a prompt, image tokens included. keep(record) is called after every batch, with what `done`, a list of such
    records, spares the next call. Under torchrun each process does its share of the batches, and all get all answers."""
    task = DATASETS[dataset]
    shifts = shifts if shifts is not None else Shifts()
    template = shifts.template(template or processor.templates[task.task])
    base, model = model, shifts.student(model)
    features = features if features is not None and sees_alike(base, model) else {}
    records = {tuple(record["queries"]): record for record in done}
    with tqdm(total=len(queries), desc=progress, unit="query", disable=not progress or rank() > 0) as bar:
        for block in range(0, len(queries), 512):                # images of 512 queries are in memory at a time
            wanted = sorted(range(block, min(block + 512, len(queries))),
                            key=lambda i: len(queries[i].question or ""))          # rows of like length: little padding
            batches = [wanted[i:i + batch_size] for i in range(0, len(wanted), batch_size)]
            bar.update(sum(len(batch) for batch in batches if tuple(batch) in records))
            batches = [batch for batch in share(batches) if tuple(batch) not in records]
            wanted = [i for batch in batches for i in batch]
            icds = {i: pick(pool, queries[i], shots, f"{seed}-{queries[i].id}") for i in wanted}
            kept = set(features) | {s.image_id for d in icds.values() for s in d if len(pool) <= POOL_IN_MEMORY}
            encode_images(model, processor, [s for i in wanted for s in (*icds[i], queries[i])], features)
            for batch in batches:
                rows = prompts([queries[i] for i in batch], [icds[i] for i in batch], processor, template)
                began = clock(model.device)
                with fits_into_memory("--eval-batch-size", batch_size):
                    ids = model.generate(
                        rows.input_ids.to(model.device), rows.attention_mask.to(model.device), gather(features, rows.samples),
                        task.max_new_tokens, num_beams, length_penalty, shifts,
                        end_ids=[] if template.separator else [processor.newline_id], banned_ids=processor.image_ids)
                record = {"queries": batch, "answers": [first_line(processor.decode(row), template.stop) for row in ids.tolist()],
                          "tokens": int(rows.attention_mask.sum()), "seconds": clock(model.device) - began}
                keep(record)
                records[tuple(batch)] = record
                bar.update(len(batch) * world())
            for image_id in set(features) - kept:
                del features[image_id]
    records = {tuple(r["queries"]): r for part in together(list(records.values())) for r in part}.values()
    answers = dict(pair for r in records for pair in zip(r["queries"], r["answers"], strict=True))
    tokens, seconds = (sum(r[key] for r in records) / len(queries) for key in ("tokens", "seconds"))
    cost = {"prompt_tokens": round(tokens, 1), "ms_per_query": round(1000 * seconds, 2)}
    return [answers[i] for i in range(len(queries))], cost


@contextlib.contextmanager
def fits_into_memory(option, size, more=""):
    """What is done with `size` queries at a time: if the memory is too small for it, InputError says which option to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as e:                 # the CPU's allocator has no error of its own
        if not isinstance(e, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in str(e):
            raise
        hint = f"try {option} {size // 2}{more}" if size > 1 else "there is no smaller one"
        raise InputError(f"{option} {size}: expected it to fit into the memory, found that it does not; {hint}") from None


def clock(device):
    """Seconds, with the device's work done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------
def run_arguments(folder):
    """What args.json of a run of train.py says. Raises InputError if it is something else."""
    saved = read_json(Path(folder) / "args.json")
    if not isinstance(saved, dict) or saved.get("method") not in list(ADAPTERS):        # a list: it may be unhashable
        raise InputError(f"{folder}/args.json: expected the arguments of a run of train.py, found something else")
    return saved


def kept_answers(folder, row, settings, resume):
    """→ the batches that were answered before (`answer`'s done), and what keeps one more (its keep).

    folder/answers has a file for every row, settings (a dict, whatever the answers depend on) and process, with a line for every
    batch: a crash loses at most the line that was being written. Without resume what is there is deleted."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    name, done = official_name(row).replace("results.json", digest), []
    make_folder(folder / "answers")
    files, mine = sorted((folder / "answers").glob(f"{name}-*.jsonl")), folder / f"answers/{name}-{rank()}.jsonl"
    for path in files if resume else ():
        *lines, torn = path.read_bytes().split(b"\n")
        try:
            records = [json.loads(line) for line in lines]
            if any(len(r["answers"]) != len(r["queries"]) or r["tokens"] + r["seconds"] < 0 for r in records):
                raise ValueError
        except (ValueError, TypeError, KeyError):
            raise InputError(f"{path}: expected answers to go on from, found something else; delete it") from None
        done += records
        if torn and path == mine:
            with written_whole(path) as temporary:
                temporary.write_bytes(b"".join(line + b"\n" for line in lines))
    wait()                                                     # nobody writes before all have read
    if rank() == 0 and not resume:
        for path in files:
            path.unlink()
    wait()

    def keep(record):
        try:
            with open(mine, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        except OSError as e:
            raise InputError(f"{mine}: expected room for the answers, found: {e.strerror}") from None

    return done, keep


def evaluate(folder, model, processor, dataset, split, samples, method, shots=0, shifts=None, seed=0, parameters=0,
             train_seconds=0, test_best=None, root=None, settings=None, resume=False, **options):
    """Answers, scores and writes one method on one split → the row. options as `answer`; test_best: written if there is one.

    settings: what the answers depend on. If given, they are kept batch by batch; resume: those that are there are not made
    again."""
    row = {"dataset": dataset, "split": split, "method": method, "shots": shots, "metric": DATASETS[dataset].metric,
           "score": None, "n": len(samples), "seed": seed, "parameters": parameters}
    name = f"{method}{f' {shots}-shot' if shots else ''}"
    if settings is not None:
        row |= made_with(folder, settings, dataset=dataset, split=split, method=method, shots=shots, n=len(samples), seed=seed)
        options["done"], options["keep"] = kept_answers(Path(folder), row, settings, resume)
        if sum(len(r["queries"]) for r in options["done"]) == len(samples):
            print(f"{name}: all {len(samples)} answers are there already")
    answers, cost = answer(model, processor, dataset, samples, shots=shots, shifts=shifts, seed=seed, progress=name, **options)
    total, each = score(dataset, samples, answers, root)
    row |= {"score": total, **cost, "train_seconds": train_seconds,
            **({} if test_best is None else {"test_best": test_best}), **further_scores(dataset, samples, answers, root)}
    add_results(folder, row, samples, answers, each)
    if not dataset.startswith("toy"):
        write_atomically(Path(folder) / official_name(row), json.dumps(official_records(dataset, samples, answers)) + "\n")
    return row


def table(rows):
    """Rows as text, a line each; "–" for what is not known."""
    def shown(value, form):
        return "–" if value is None else format(value, form)

    lines = [f"{'method':<16}{'shots':>6}{'split':>7}{'score':>8}{'n':>7}{'parameters':>12}{'prompt tokens':>15}{'ms/query':>10}"]
    for r in rows:
        lines.append(f"{r['method']:<16}{r['shots']:>6}{r['split']:>7}{shown(r['score'], '.2f'):>8}{r['n']:>7}"
                     f"{shown(r['parameters'], ','):>12}{shown(r['prompt_tokens'], ''):>15}{shown(r['ms_per_query'], '.2f'):>10}")
    return f"{rows[0]['dataset']}: {METRICS[rows[0]['metric']]}\n" + "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------
def add_common_arguments(parser):
    """What train.py and eval.py share. Defaults that depend on the machine are filled in by `resolve`."""
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", choices=DATASETS, default="toy", help="what to answer (default %(default)s)")
    data.add_argument("--data", default="data", metavar="FOLDER",
                      help="holds okvqa/, vqav2/ and coco/ as published; see README (default %(default)s)")
    data.add_argument("--task", type=int, default=0, metavar="N", help="number of the toy's hidden rule (default %(default)s)")
    data.add_argument("--samples", type=int, default=1000, help="training samples; ICDs come from them too (default %(default)s)")
    data.add_argument("--dev-samples", type=int, default=200,
                      help="more training samples, not trained on, that choose the epoch (default %(default)s; a sixth at most)")
    data.add_argument("--seed", type=int, default=0, help="draws samples, ICDs and the adapter's start (default %(default)s)")
    data.add_argument("--skip-bad-images", action="store_true",
                      help="leave out samples whose picture is missing or damaged, and list them (default: one is an error)")
    data.add_argument("--limit", type=int, default=None, metavar="N", help="evaluate the first N items only (default: all)")
    model = parser.add_argument_group("model")
    model.add_argument("--model", default=None, metavar="FOLDER",
                       help="config.json, safetensors and tokenizer.json as published (default idefics2-8b-base; toys: "
                            "checkpoints/tiny)")
    model.add_argument("--device", default=None, help="cpu, cuda, cuda:1 … (default: cuda if there is one)")
    model.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default=None,
                       help="of the frozen weights; adapters are fp32 always (default: bfloat16 on cuda, float32 on cpu)")
    model.add_argument("--official", action="store_true",
                       help="prompts, aligned state, CE tokens, Z2, positions and separators as in the official code")
    generation = parser.add_argument_group("generation")
    generation.add_argument("--num-beams", type=int, default=3, help="1 = greedy (default %(default)s)")
    generation.add_argument("--length-penalty", type=float, default=0.0, help="0 = none (default %(default)s)")
    generation.add_argument("--eval-batch-size", type=int, default=16, help="queries at a time (default %(default)s)")
    run = parser.add_argument_group("run")
    run.add_argument("--out", default=None, metavar="FOLDER", help="the run's folder (default runs/DATASET…)")
    run.add_argument("--resume", action="store_true",
                     help="go on where the same command was interrupted or killed; the result is the same, to the bit on a CPU")
    return run


def resolve(args):
    """Fills in what depends on the machine. Raises InputError for a number or a device that cannot be."""
    for name, least in {"samples": 1, "dev_samples": 0, "limit": 1, "shots": 0, "epochs": 1, "batch_size": 1, "accumulate": 1,
                        "draws": 0, "eval_batch_size": 1, "num_beams": 1, "rank": 1, "restore_shots": 0}.items():
        value = getattr(args, name, None)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')}: expected at least {least}, found {value}")
    for name, (least, most) in {"length_penalty": (-100, 100), "lr": (0, 1e3), "warmup": (0, 1), "weight_decay": (0, 1e3),
                                "clip": (1e-9, 1e9), "lambda_align": (0, 1e6), "lambda_ce": (0, 1e6)}.items():
        value = getattr(args, name, None)
        if value is not None and not least <= value <= most:
            raise InputError(f"--{name.replace('_', '-')}: expected {least:g} to {most:g}, found {value:g}")
    args.model = args.model or default_model(args.dataset)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"--device: expected a device of this machine, found {args.device} ({str(e).splitlines()[0]})") from None


def default_model(dataset):
    return "checkpoints/tiny" if dataset.startswith("toy") else "idefics2-8b-base"


def template_of(args, processor):
    return (processor.official_templates if args.official else processor.templates)[DATASETS[args.dataset].task]


def generation_options(args, processor):
    return {"template": template_of(args, processor), "num_beams": args.num_beams, "length_penalty": args.length_penalty,
            "batch_size": args.eval_batch_size}


def nearest(args, model, processor, pool, queries, folder):
    """RICES' choice of demonstrations for the queries; the images' vectors are kept in rices.safetensors."""
    def encode(samples, vectors):
        encode_images(model, processor, samples, vectors, "encode images for RICES",
                      lambda values, mask: rices.image_vector(model, values, mask))

    vectors = rices.image_vectors(model, [*pool, *queries], encode, folder / "rices.safetensors")
    return rices.Nearest(pool, vectors, args.order)


def make_vector(args, model, processor, pool, dev, shots, folder, settings):
    """A task or function vector, its layer chosen on dev, written to METHOD.safetensors → options of `evaluate`."""
    began, features, options = time.perf_counter(), {}, generation_options(args, processor)
    if not dev:
        raise InputError(f"--method {args.method}: expected dev samples to choose the layer with, found none")

    def dev_score(shifts):
        row = {"dataset": args.dataset, "split": "dev", "method": f"{args.method}-layer{shifts.layer}", "shots": shots,
               "n": len(dev), "seed": args.seed}
        done, keep = kept_answers(folder, row, settings, args.resume)
        answers, _ = answer(model, processor, args.dataset, dev, shifts=shifts, features=features, done=done, keep=keep,
                            **options)
        return score(args.dataset, dev, answers, args.data)[0]

    encode_images(model, processor, [*pool, *dev], features, "encode images")
    vector, about = VECTORS[args.method](model, processor, options["template"], features, pool, shots, args.seed, dev_score,
                                         args.eval_batch_size)
    vector.save(folder / f"{args.method}.safetensors", method=args.method, model=Path(args.model).resolve().name, seed=args.seed,
                dataset=args.dataset, task=args.task, shots=shots, torch=torch.__version__, **about)
    scores = " ".join(f"{s:.1f}" for s in about["dev_scores"])
    print(f"{args.method}: after layer {vector.layer} (the first is 0); dev score by layer: {scores}")
    return {"shifts": vector, "parameters": vector.vector.numel(), "train_seconds": round(time.perf_counter() - began, 1)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog=__doc__.split("\n\n", 1)[1])
    run = add_common_arguments(parser)
    run.add_argument("--run", default=None, metavar="FOLDER", help="a folder train.py wrote: its adapter, model, data and seed")
    run.add_argument("--method", choices=SHOTS, default=None,
                     help="what needs no training; of trained adapters --run knows the method (default: icl if --shots is given, "
                          "else zero-shot)")
    run.add_argument("--shots", type=int, default=None,
                     help="ICDs before each query, or in the prompts that a vector is made of (default: the model's, 8 of "
                          "Idefics2; function-vector 10)")
    run.add_argument("--order", choices=("last", "first"), default=None,
                     help="for --method rices: where the most similar ICD stands (default last)")
    run.add_argument("--restore-shots", type=int, default=None, metavar="K",
                     help="for --run: put K ICDs back before each query (default 0)")
    run.add_argument("--table", action="store_true",
                     help="every method, three seeds (or --seed alone), on both toys or on --dataset: --out (default runs/table) "
                          "gets table.md and table.json")
    run.add_argument("--split", default=None, help="train, val or test, as the dataset has it (default: the dataset's own)")
    run.add_argument("--score", default=None, metavar="FILE",
                     help="score a result file (VQA's or COCO's format) without a model")
    run.add_argument("--chair", default=None, metavar="FILE",
                     help="with --score of captions: lines `node, synonym, …`; adds CHAIRs, CHAIRi and recall")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.table:
        mine = ("run", "method", "shots", "order", "restore_shots", "split", "score", "chair", "official")
        given = {k: v for k, v in vars(args).items() if v != parser.get_default(k)}
        if differ := [k for k in given if k in mine]:
            raise InputError(f"--table: expected no option of one method beside it, found --{differ[0].replace('_', '-')}")
        from ablate import compare  # here, because it imports this module
        common = [word for k, v in given.items() if k not in ("table", "out", "task", "resume", "seed", "dataset")
                  for word in (f"--{k.replace('_', '-')}", str(v))[:1 if v is True else 2]]
        datasets = {} if "dataset" not in given else {"datasets": [args.dataset]}
        small = args.dataset.startswith("toy")
        return compare(args.out or "runs/table", [args.task], [args.seed] if "seed" in given else (0, 1, 2),
                       None if small else 1, common=common, **datasets)
    if args.score or args.chair:
        return score_file(args)
    if args.run:                  # the run's own arguments, where the command line says nothing else
        saved = run_arguments(args.run)
        if args.method or args.shots is not None:
            raise InputError("--run: expected neither --method nor --shots beside it (--restore-shots puts demonstrations back), "
                             "found one")
        args = parser.parse_args([*saved_words(saved, args, parser, Path(args.run) / "args.json"), *argv])
    elif args.restore_shots is not None:
        raise InputError(f"--restore-shots {args.restore_shots}: expected --run beside it, found none")
    if args.method == "zero-shot" and args.shots:
        raise InputError(f"--method zero-shot: expected no --shots, found {args.shots}")
    args.method = args.method or ("icl" if args.shots else "zero-shot")
    if args.order and args.method != "rices":
        raise InputError(f"--order {args.order}: expected --method rices, found {args.method}")
    resolve(args)
    args.order, least = args.order or "last", {"rices": 1, "task-vector": 1, "function-vector": 2}.get(args.method, 0)
    if args.shots is not None and args.shots < least:
        raise InputError(f"--method {args.method}: expected --shots of at least {least}, found {args.shots}")
    kind = classes_of(args.model)[0]
    default = kind.shots if SHOTS[args.method] is None else SHOTS[args.method]
    shots = args.restore_shots or 0 if args.run else default if args.shots is None else args.shots
    device, method = join(args.device), saved["method"] if args.run else args.method
    if args.run and "finished" not in saved and rank() == 0:
        print(f"{args.run}: an unfinished run; what follows is of its best epoch so far", file=sys.stderr)
    split = args.split or DATASETS[args.dataset].eval_split
    queries = load(args.dataset, args.data, split, args.task)[:args.limit]
    pool, dev = train_dev(args.dataset, args.data, args.samples, args.dev_samples, args.seed, args.task) if shots else ((), ())
    if method in VECTORS and args.shots is None:
        shots = max(least, min(shots, len(pool) - 1))          # few training samples: shorter prompts
    pool, dev, queries = with_pictures(args, pool, dev, queries)
    if shots:
        pick_icds(pool, pool[0], shots, "")                    # too few even so? say it before the long work
    if args.dataset == "okvqa" and all(q.answers for q in queries):
        stemmer(args.data)                                     # can it be scored? likewise
    model, processor = load_model(args.model, device, args.dtype,
                                  lambda processor: memory.check(args, processor.config, 0, (shots,), kind=kind))
    options, folder = generation_options(args, processor), Path(args.out or args.run or f"runs/{args.dataset}-{args.method}")
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "run", "resume", "score", "chair", "table")}
    options |= {"settings": settings, "resume": args.resume}
    if args.run:
        path = Path(args.run) / f"{method}.safetensors"
        adapter = ADAPTERS[method].load(path).to(device)
        check_fits(adapter, model, path)
        settings["adapter"] = hashlib.sha256(path.read_bytes()).hexdigest()
        options |= {"shifts": adapter, "parameters": count(adapter)}
        trained = [r.get("train_seconds") for r in read_rows(Path(args.run) / "results.json") if r["method"] == method]
        options["train_seconds"] = trained[0] if trained else 0
    made_with(folder, vars(args), dataset=args.dataset, split=split, method="rices-first" if args.order == "first" else method,
              shots=0 if method in VECTORS else shots, n=len(queries), seed=args.seed)  # before a vector file is replaced
    make_folder(folder)
    if method in VECTORS:
        options |= make_vector(args, model, processor, pool, dev, shots, folder, settings)
        shots = 0
    elif method == "rices":
        options["pick"] = nearest(args, model, processor, pool, queries, folder)
        method = "rices-first" if args.order == "first" else "rices"
    row = evaluate(folder, model, processor, args.dataset, split, queries, method, shots, seed=args.seed, pool=pool,
                   root=args.data, **options)
    print(table([row]))
    if row["score"] is None:
        print(f"{args.dataset} {split} has no annotations here: the answers are not scored")
    print(f"{folder / 'results.json'} and {folder / 'predictions.jsonl'} written")
    return row


def saved_words(saved, args, parser, path):
    """The arguments of a run as words of a command line, those that eval.py has too. Raises InputError if they are none."""
    words = []
    for name, value in saved.items():
        if name in vars(args) and name not in ("out", "run", "shots", "method", "device", "limit", "resume"):
            option = f"--{name.replace('_', '-')}"
            words += [option] if value is True else [] if value is None or value is False else [f"{option}={value}"]

    def refuse(message):
        raise InputError(f"{path}: expected the arguments of a run of train.py, found one that is none: {message}")

    parser.error, error = refuse, parser.error
    parser.parse_args(words)
    parser.error = error
    return words


def with_pictures(args, *parts):
    """The lists of samples, their pictures looked at: `data.readable`; with --skip-bad-images without those of bad ones, which
    are counted and listed. Raises InputError if a list that had samples has none left."""
    found, bad = [], {}
    for part in parts:
        kept, problems = readable(part, args.skip_bad_images)
        bad |= dict.fromkeys(problems)
        found.append(kept)
        if part and not kept:
            raise InputError(f"{args.data}: expected a readable picture, found none in {len(part)}; the first: {problems[0]}")
    if args.skip_bad_images:
        left_out = sum(map(len, parts)) - sum(map(len, found))
        print("\n".join([f"--skip-bad-images: {len(bad)} bad pictures, {left_out} samples left out", *bad]))
    return found


def count(adapter):
    """Its trained parameters."""
    return sum(p.numel() for p in adapter.parameters() if p.requires_grad)


def check_fits(adapter, model, where):
    """Raises InputError unless the adapter has the parameters that one for this model has."""
    found, expected = ({name: tuple(p.shape) for name, p in a.named_parameters()} for a in (adapter, adapter.like(model)))
    for name in [*expected, *found]:
        if found.get(name) != expected.get(name):
            raise InputError(f"{where}: expected an adapter whose {name} is {expected.get(name, 'not there')} as for this model, "
                             f"found {found.get(name, 'none')}")


def run_command(main, goes_on=False):
    """Runs a command line: the user's mistakes are one line and exit status 2, ours a traceback. goes_on: it knows --resume."""
    memory.keep_freed()
    try:
        main()
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except OSError as e:
        print(f"error: {e.filename or 'a file'}: expected to read or write it, found: {e.strerror or e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if rank() == 0:
            print("interrupted" + (f"; this goes on:\n    {command_to_go_on()}" if goes_on else ""), file=sys.stderr)
        sys.exit(130)
    leave()


if __name__ == "__main__":
    run_command(main, goes_on=True)
