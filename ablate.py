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
import json
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")       # the toy is too small for two cores: one process a core instead

import numpy as np
from tqdm import tqdm

import eval as evaluation
import train
from data import DATASETS
from eval import run_command, write_atomically
from model import InputError

LAYERWISE = ["--fit", "layerwise"]
GROUPS = {                                          # group → row → options of train.py, or the shots of an untrained row
    "main": {"zero-shot": 0, "1-shot": 1, "2-shot": 2, "4-shot": 4, "8-shot": 8, "MimIC": []},
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
    }.items() for n in (20, 50, 200, 1000)},
    "layerwise": {
        "20 samples": [*LAYERWISE, "--samples", "20"],
        "20, 1 draw": [*LAYERWISE, "--samples", "20", "--draws", "1"],
        "20, 40 draws": [*LAYERWISE, "--samples", "20", "--draws", "40"],
        "20, no image tokens": [*LAYERWISE, "--samples", "20", "--fit-tokens", "text"],
        "20, answer only": [*LAYERWISE, "--samples", "20", "--fit-tokens", "answer"],
        "20, 1-shot teacher": [*LAYERWISE, "--samples", "20", "--shots", "1"],
        "1,000, 1-shot teacher": [*LAYERWISE, "--shots", "1"],
        "1,000, 2-shot teacher": [*LAYERWISE, "--shots", "2"],
        "1,000, 4-shot teacher": [*LAYERWISE, "--shots", "4"],
        "20, polished": ["--init", "layerwise", "--samples", "20"],
        "50, polished": ["--init", "layerwise", "--samples", "50"],
        "50, polished 2 epochs": ["--init", "layerwise", "--samples", "50", "--epochs", "2"],
        "1,000, 10 epochs, no fit": ["--epochs", "10"],
    },
}


def run(dataset, options, task, seed, out):
    """One run, unless it is there → its test score and seconds of training."""
    if not (out / "results.json").exists():
        common = ["--dataset", dataset, "--task", str(task), "--seed", str(seed), "--out", str(out), "--eval-batch-size", "64"]
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            if isinstance(options, list):
                train.main([*common, *options, "--compare"])
            else:
                evaluation.main([*common, "--method", "icl" if options else "zero-shot", "--shots", str(options)])
    row = json.loads((out / "results.json").read_text())[-1]
    return row["score"], row["train_seconds"]


def figure(path, scores, dataset):
    """Accuracy against training samples, mean over tasks and seeds, the band its standard deviation over tasks."""
    from matplotlib import pyplot as plt
    curves = {}
    for name, every in scores.items():
        method, n = name.rsplit(", ", 1)
        curves.setdefault(method, []).append((int(n), every.mean(), every.mean(1).std()))
    plt.figure(figsize=(6, 4), dpi=120)
    for method, points in curves.items():
        n, mean, sd = map(np.array, zip(*points, strict=True))
        plt.plot(n, mean, "o-", label=method)
        plt.fill_between(n, mean - sd, np.minimum(mean + sd, 100), alpha=0.2)
    plt.xscale("log")
    plt.xticks(n, n)
    plt.xlabel("training samples")
    plt.ylabel("accuracy in %, no demonstration in the prompt")
    plt.legend(loc="center right", fontsize=8)
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
    parser.add_argument("--figure", default=None, metavar="PNG", help="group samples: draws the curves (needs matplotlib)")
    args = parser.parse_args(argv)
    if unknown := set(args.only or ()) - set(GROUPS[args.group]):
        raise InputError(f"--only: expected rows of {args.group} ({'; '.join(GROUPS[args.group])}), found {'; '.join(unknown)}")
    if args.figure and args.group != "samples":
        raise InputError(f"--figure: expected the group samples, found {args.group}")
    wanted = {name: options for name, options in GROUPS[args.group].items() if not args.only or name in args.only}
    scores, seconds = ({name: {} for name in wanted} for _ in range(2))
    with ProcessPoolExecutor(args.workers) as pool:
        jobs = {}
        for task in args.tasks:
            for seed in args.seeds:
                for name, options in wanted.items():
                    folder = "".join(c if c.isalnum() or c in "-." else "-" for c in name.replace(", ", "-"))
                    out = Path(args.out) / args.dataset / args.group / folder / f"task{task}-seed{seed}"
                    jobs[pool.submit(run, args.dataset, options, task, seed, out)] = name, task, seed
        for job in tqdm(as_completed(jobs), total=len(jobs), unit="run"):
            name, task, seed = jobs[job]
            scores[name][task, seed], seconds[name][task, seed] = job.result()
    lines = [f"| {args.dataset} | mean | sd | " + " | ".join(f"task {t}" for t in args.tasks) + " | train s |",
             "|---|---|---|" + "---|" * (len(args.tasks) + 1)]
    scores = {name: np.array([[by[t, s] for s in args.seeds] for t in args.tasks]) for name, by in scores.items()}
    for name, every in scores.items():                                                    # (tasks, seeds)
        lines.append(f"| {name} | {every.mean():.1f} | {every.std():.1f} | " + " | ".join(f"{m:.1f}" for m in every.mean(1))
                     + f" | {np.mean(list(seconds[name].values())):.0f} |")
    text = "\n".join(lines) + "\n"
    write_atomically(Path(args.out) / args.dataset / f"{args.group}.md", text)
    print(text)
    if args.figure:
        figure(args.figure, scores, args.dataset)


if __name__ == "__main__":
    run_command(main)
