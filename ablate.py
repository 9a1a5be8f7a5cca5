"""What each choice is worth: many runs of train.py and eval.py over tasks of the toy world and seeds, in one table.

    python ablate.py main                                     # in-context learning and MimIC, tasks 0-9, seeds 0-2
    python ablate.py choices --tasks 0 1 2 3                  # every option of MimIC, at a budget at which they still differ
    python ablate.py samples --figure docs/samples.png        # accuracy against training samples: layer-wise fit and training
    python ablate.py main --dataset toy-caption --workers 1

Every run is a folder that train.py or eval.py writes; runs that are there already are not repeated, so an interrupted table
goes on. Prints a table of test scores, mean and standard deviation over tasks and seeds, and writes it beside the runs.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")       # the toy is too small for two cores: one process a core instead

import numpy as np
from tqdm import tqdm

import eval as evaluation
import train
from data import DATASETS
from eval import METRICS, run_command
from model import InputError
from results import read_rows, write_atomically

LAYERWISE = ["--fit", "layerwise"]
GROUPS = {                                          # group → row → options of train.py, or behind "eval" those of eval.py
    "main": {"zero-shot": ["eval"], **{f"{k}-shot": ["eval", "--shots", str(k)] for k in (1, 2, 4, 8)}, "MimIC": []},
    "methods": {                                    # the table of `eval.py --table`
        "zero-shot": ["eval"],
        "8-shot ICL": ["eval", "--shots", "8"],
        "RICES, 8 shots": ["eval", "--method", "rices"],
        "Task Vector": ["eval", "--method", "task-vector"],
        "Function Vector": ["eval", "--method", "function-vector"],
        **{name: [*options, "--test-every-epoch"] for name, options in {
            "LIVE": ["--method", "live"],
            "LoRA": ["--method", "lora"],
            "LoRA, o_proj, rank 1": ["--method", "lora", "--targets", "o_proj", "--rank", "1", "--lr", "5e-3"],
            "prompt tuning": ["--method", "prompt-tuning"],
            "STAVE": ["--method", "stave"],
            "HiFICL": ["--method", "hificl"],
            "MimIC": [],
        }.items()},
        "MimIC, layer-wise fit": LAYERWISE,
        "MimIC, layer-wise fit of 50 samples": [*LAYERWISE, "--samples", "50"],
    },
    "choices": {name: [*options, "--epochs", "2"] for name, options in {
        "default": [],
        "align-on-ffn": ["--align-on", "ffn"],
        "align-raw": ["--no-align-norm"],
        "ce-on-sequence": ["--ce-on", "sequence"],
        "z2-unmasked": ["--z2", "unmasked"],
        "align-only": ["--lambda-ce", "0"],
        "ce-only": ["--lambda-align", "0"],
        "lambda-0.1": ["--lambda-ce", "0.1"],
        "lambda-2": ["--lambda-ce", "2"],
        "lr-5e-3": ["--lr", "5e-3"],
        "lr-1e-2": ["--lr", "1e-2"],
        "lr-4e-2": ["--lr", "4e-2"],
        "mu-one": ["--mu", "one"],
        "mu-layer": ["--mu", "layer"],
        "teacher-1-shot": ["--shots", "1"],
        "teacher-2-shots": ["--shots", "2"],
        "teacher-4-shots": ["--shots", "4"],
        "share-icds": ["--share-icds"],
        "draws-1": ["--draws", "1"],
        "draws-2": ["--draws", "2"],
        "official": ["--official"],
    }.items()},
    "official": {                                   # --official, taken apart: all of it but one
        "official": ["--official"],
        "but-align-norm": ["--official", "--align-norm"],
        "but-ce-on-answer": ["--official", "--ce-on", "answer"],
        "but-align-on-layer": ["--official", "--align-on", "layer"],
        "but-z2-masked": ["--official", "--z2", "masked"],
        "but-norm-and-answer": ["--official", "--align-norm", "--ce-on", "answer"],
    },
    "budgets": {                                    # is a query-dependent magnitude needed?
        "MimIC": [],
        "MimIC, lr 5e-3": ["--lr", "5e-3"],
        "MimIC, 200 samples": ["--samples", "200"],
        "constant": ["--mu", "one"],
        "constant, lr 5e-3": ["--mu", "one", "--lr", "5e-3"],
        "constant, 10 epochs": ["--mu", "one", "--epochs", "10"],
        "constant, 200 samples": ["--mu", "one", "--samples", "200"],
        "LIVE": ["--method", "live"],
        "LIVE, lr 5e-3": ["--method", "live", "--lr", "5e-3"],
        "LIVE, 10 epochs": ["--method", "live", "--epochs", "10"],
        "LIVE, 200 samples": ["--method", "live", "--samples", "200"],
    },
    "samples": {f"{name}, {n}": [*options, "--samples", str(n)] for name, options in {
        "layer-wise fit": LAYERWISE,
        "training": [],
        "layer-wise fit of a constant shift": [*LAYERWISE, "--mu", "one"],
    }.items() for n in (20, 50, 200, 1000)} | {
        f"training of 1250 steps, {n}": ["--samples", str(n), "--epochs", str(5000 // n)] for n in (20, 50, 200, 1000)
    } | {"8-shot ICL, 1000": ["eval", "--shots", "8"]},
    "layerwise": {
        "20 samples": [*LAYERWISE, "--samples", "20"],
        "20, 1 draw": [*LAYERWISE, "--samples", "20", "--draws", "1"],
        "20, 40 draws": [*LAYERWISE, "--samples", "20", "--draws", "40"],
        "20, no image tokens": [*LAYERWISE, "--samples", "20", "--fit-tokens", "text"],
        "20, answer only": [*LAYERWISE, "--samples", "20", "--fit-tokens", "answer"],
        "20, 1-shot teacher": [*LAYERWISE, "--samples", "20", "--shots", "1"],
        "1000, 1-shot teacher": [*LAYERWISE, "--shots", "1"],
        "1000, 2-shot teacher": [*LAYERWISE, "--shots", "2"],
        "1000, 4-shot teacher": [*LAYERWISE, "--shots", "4"],
        "20, polished": ["--init", "layerwise", "--samples", "20"],
        "50, polished": ["--init", "layerwise", "--samples", "50"],
        "50, polished 2 epochs": ["--init", "layerwise", "--samples", "50", "--epochs", "2"],
        "1000, no fit, 10 epochs": ["--epochs", "10"],
    },
}


def run(dataset, options, task, seed, out, common=()):
    """One run, unless it is there → its row of results.json. common: options of train.py and eval.py alike."""
    if not (out / "results.json").exists():
        common = ["--dataset", dataset, "--task", str(task), "--seed", str(seed), "--out", str(out), "--resume",
                  *(["--eval-batch-size", "64"] if dataset.startswith("toy") else []), *common]
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            if options[:1] == ["eval"]:
                evaluation.main([*common, *options[1:]])
            else:
                train.main([*common, *options, "--compare"])
    row, words = read_rows(out / "results.json")[-1], [*common, *options]
    given = dict(zip(words, words[1:], strict=False))
    for name in {"num_beams", "length_penalty", "samples", "dtype"} & row.keys():
        option, found = f"--{name.replace('_', '-')}", row[name]
        if type(found)(given.get(option, found)) != found:
            raise InputError(f"{out}: expected no results or those with {option} {given[option]}, found {found}; choose another "
                             "--out")
    return row


def end_with_parent():
    """A worker of a command that was killed ends with it, or it would write where the next call of the command goes on."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_all(group, dataset, only, tasks, seeds, workers, out, common=()):
    """The rows of a group → {name: {(task, seed): row of results.json}}; workers runs at a time. What a dataset or a model is no
    good for is an InputError in the place of its row, unless nothing else comes of the group."""
    rows, jobs = {name: {} for name in GROUPS[group] if only is None or name in only}, {}
    with ProcessPoolExecutor(workers, initializer=end_with_parent) as pool:
        for task in tasks:
            for seed in seeds:
                for name in rows:
                    folder = Path(out) / dataset / group / name.replace(", ", "-").replace(" ", "-") / f"task{task}-seed{seed}"
                    options = GROUPS[group][name]
                    if not dataset.startswith("toy"):                                     # there it takes too long
                        options = [o for o in options if o != "--test-every-epoch"]
                    jobs[pool.submit(run, dataset, options, task, seed, folder, common)] = name, task, seed
        try:
            for job in tqdm(as_completed(jobs), total=len(jobs), desc=dataset, unit="run"):
                name, *where = jobs[job]
                rows[name][tuple(where)] = job.exception() if isinstance(job.exception(), InputError) else job.result()
        except BaseException:                       # do not start what waits
            pool.shutdown(cancel_futures=True)
            raise
    found = [row for by in rows.values() for row in by.values()]
    if all(isinstance(row, InputError) for row in found):
        raise found[0]
    return rows


def compare(out="runs/table", tasks=(0,), seeds=(0, 1, 2), workers=None, datasets=("toy", "toy-caption"), common=()):
    """Every method → table.md and table.json in `out`; scores are mean ± standard deviation over tasks and seeds. datasets: of
    different metrics; common: options of every run.

    The dev split chooses the epoch; on the toys the best epoch on the test split stands in brackets where its score is another.
    A method that a dataset or a model is no good for has no score and its reason below."""
    by_metric = {DATASETS[d].metric: run_all("methods", d, None, tasks, seeds, workers, out, common) for d in datasets}
    head = ["method", "parameters", *(METRICS[m] for m in by_metric), "prompt tokens", "ms / query", "train s"]
    rows, reasons, lines = [], [], ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in GROUPS["methods"]:
        row, cells = {"method": name}, []
        for metric, by_name in by_metric.items():
            found = [r for r in by_name[name].values() if not isinstance(r, InputError) and r["score"] is not None]
            reasons += [f"{name}: {e}" for e in by_name[name].values() if isinstance(e, InputError)][:1]
            if not found:
                cells.append("–")
                continue
            row[metric], row[f"{metric}_sd"] = (float(f([r["score"] for r in found])) for f in (np.mean, np.std))
            row[f"{metric}_test_best"] = best = float(np.mean([r.get("test_best", r["score"]) for r in found]))
            score = f"{row[metric]:.1f}"
            cells.append(f"{score} ± {row[f'{metric}_sd']:.1f}" + (f" ({best:.1f})" if f"{best:.1f}" != score else ""))
            for key in "parameters", "prompt_tokens", "ms_per_query", "train_seconds":
                row.setdefault(key, float(np.mean([r[key] for r in found])) if key != "parameters" else found[0][key])
        rows.append(row)
        costs = [f"{row[key]:{form}}" if key in row else "–" for key, form in (
            ("parameters", ","), ("prompt_tokens", ".0f"), ("ms_per_query", ".1f"), ("train_seconds", ".0f"))]
        lines.append("| " + " | ".join([name, costs[0], *cells, *costs[1:]]) + " |")
    text = "\n".join([*lines, *([""] + reasons if reasons else [])])
    write_atomically(Path(out) / "table.json", json.dumps(rows, indent=1) + "\n")
    write_atomically(Path(out) / "table.md", text + "\n")
    print(text)
    return rows


def figure(path, scores):
    """Accuracy against training samples, mean over tasks and seeds, the band its standard deviation over tasks."""
    from matplotlib import pyplot as plt
    curves = {}
    for name, every in scores.items():
        method, n = name.rsplit(", ", 1)
        curves.setdefault(method, []).append((int(n), every.mean(), every.mean(1).std()))
    plt.figure(figsize=(6, 3.4), dpi=130)
    for method, points in curves.items():
        n, mean, sd = map(np.array, zip(*points, strict=True))
        if len(n) == 1:                             # demonstrations in the prompt: a level, whatever is learnt
            plt.axhline(mean[0], color="grey", ls="--", label=method)
            continue
        plt.plot(n, mean, "o-", label=method)
        plt.fill_between(n, mean - sd, np.minimum(mean + sd, 100), alpha=0.2)
    plt.xscale("log")
    plt.xticks(ticks := sorted({n for points in curves.values() for n, *_ in points}), ticks)
    plt.xlabel("training samples")
    plt.ylabel("accuracy in %")
    plt.legend(loc="center right", fontsize=8, bbox_to_anchor=(1, 0.4))
    plt.grid(alpha=0.3)
    plt.tight_layout()
    plt.savefig(path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog=__doc__.split("\n\n", 1)[1])
    parser.add_argument("group", choices=GROUPS, help="which rows")
    parser.add_argument("--dataset", choices=[d for d in DATASETS if d.startswith("toy")], default="toy", help="(default toy)")
    parser.add_argument("--only", nargs="+", default=None, metavar="ROW", help="some rows of the group (default: all)")
    parser.add_argument("--tasks", type=int, nargs="+", default=list(range(10)), help="hidden rules (default 0 … 9)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default 0 1 2)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time (default: one a core)")
    parser.add_argument("--out", default="runs/ablation", metavar="FOLDER", help="(default %(default)s)")
    parser.add_argument("--resume", action="store_true", help="(it goes on without being told to, too)")
    parser.add_argument("--figure", default=None, metavar="PNG", help="group samples: draws the curves (needs matplotlib)")
    args = parser.parse_args(argv)
    if unknown := set(args.only or ()) - set(GROUPS[args.group]):
        raise InputError(f"--only: expected rows of {args.group} ({'; '.join(GROUPS[args.group])}), found {'; '.join(unknown)}")
    if args.figure and args.group != "samples":
        raise InputError(f"--figure: expected the group samples, found {args.group}")
    if args.figure and not importlib.util.find_spec("matplotlib"):
        raise InputError("--figure: expected matplotlib (pip install matplotlib), found none")
    rows = run_all(args.group, args.dataset, args.only, args.tasks, args.seeds, args.workers, args.out)
    lines = [f"| {args.dataset} | mean | sd | " + " | ".join(f"task {t}" for t in args.tasks) + " | train s |",
             "|---|---|---|" + "---|" * (len(args.tasks) + 1)]
    scores = {name: np.array([[by[t, s]["score"] for s in args.seeds] for t in args.tasks]) for name, by in rows.items()}
    for name, every in scores.items():                                                    # (tasks, seeds)
        seconds = np.mean([row["train_seconds"] for row in rows[name].values()])
        lines.append(f"| {name} | {every.mean():.1f} | {every.std():.1f} | " + " | ".join(f"{m:.1f}" for m in every.mean(1))
                     + f" | {seconds:.0f} |")
    text = "\n".join(lines) + "\n"
    write_atomically(Path(args.out) / args.dataset / f"{args.group}.md", text)
    print(text)
    if args.figure:
        figure(args.figure, scores)


if __name__ == "__main__":
    run_command(main, goes_on=True)
