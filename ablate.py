"""What each choice is worth: train.py with one option changed, over tasks of the toy world and seeds.

    python ablate.py                                          # every variant, tasks 0-3, seeds 0-2
    python ablate.py --only default mu-one --tasks 0 1 2 3 4 5 6 7 8 9 --dataset toy-caption

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

VARIANTS = {                                        # name → options of train.py
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
    "epochs-2": ["--epochs", "2"],
    "epochs-10": ["--epochs", "10"],
    "mu-one": ["--mu", "one"],
    "mu-layer": ["--mu", "layer"],
    "mu-one-lr-5e-3": ["--mu", "one", "--lr", "5e-3"],
    "mu-one-epochs-10": ["--mu", "one", "--epochs", "10"],
    "mu-one-samples-200": ["--mu", "one", "--samples", "200"],
    "live": ["--method", "live"],
    "live-lr-5e-3": ["--method", "live", "--lr", "5e-3"],
    "live-epochs-10": ["--method", "live", "--epochs", "10"],
    "live-samples-200": ["--method", "live", "--samples", "200"],
    "samples-20": ["--samples", "20"],
    "samples-50": ["--samples", "50"],
    "samples-200": ["--samples", "200"],
    "teacher-1-shot": ["--shots", "1"],
    "teacher-2-shots": ["--shots", "2"],
    "teacher-4-shots": ["--shots", "4"],
    "draws-1": ["--draws", "1"],
    "draws-2": ["--draws", "2"],
    "official": ["--official"],
    "layerwise": ["--fit", "layerwise"],
    "layerwise-20": ["--fit", "layerwise", "--samples", "20"],
    "layerwise-50": ["--fit", "layerwise", "--samples", "50"],
    "layerwise-200": ["--fit", "layerwise", "--samples", "200"],
    "layerwise-20-draws-1": ["--fit", "layerwise", "--samples", "20", "--draws", "1"],
    "layerwise-20-draws-40": ["--fit", "layerwise", "--samples", "20", "--draws", "40"],
    "layerwise-20-text": ["--fit", "layerwise", "--samples", "20", "--fit-tokens", "text"],
    "layerwise-20-answer": ["--fit", "layerwise", "--samples", "20", "--fit-tokens", "answer"],
    "layerwise-mu-one": ["--fit", "layerwise", "--mu", "one"],
    "layerwise-50-mu-one": ["--fit", "layerwise", "--samples", "50", "--mu", "one"],
    "layerwise-1-shot": ["--fit", "layerwise", "--shots", "1"],
    "layerwise-2-shots": ["--fit", "layerwise", "--shots", "2"],
    "layerwise-4-shots": ["--fit", "layerwise", "--shots", "4"],
    "polish-20": ["--init", "layerwise", "--samples", "20"],
    "polish-50": ["--init", "layerwise", "--samples", "50"],
    "polish-200-1-epoch": ["--init", "layerwise", "--samples", "200", "--epochs", "1"],
}
SHOTS = (0, 1, 2, 4, 8)                             # of the untrained rows: zero-shot and in-context learning


def run(dataset, name, options, task, seed, folder):
    """One run → its test score and seconds of training. options: a list for train.py, or the shots of an untrained row."""
    out = Path(folder) / dataset / name / f"task{task}-seed{seed}"
    if not (out / "results.json").exists():
        common = ["--dataset", dataset, "--task", str(task), "--seed", str(seed), "--out", str(out), "--eval-batch-size", "64"]
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            if name in VARIANTS:
                train.main([*common, *options, "--compare"])
            else:
                evaluation.main([*common, "--method", "icl" if options else "zero-shot", "--shots", str(options)])
    row = json.loads((out / "results.json").read_text())[-1]
    return row["score"], row["train_seconds"]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog=__doc__.split("\n\n", 1)[1])
    parser.add_argument("--dataset", choices=[d for d in DATASETS if d.startswith("toy")], default="toy", help="(default toy)")
    parser.add_argument("--only", nargs="+", choices=[*VARIANTS, "icl"], default=[*VARIANTS, "icl"], metavar="VARIANT",
                        help=f"of {', '.join(VARIANTS)}; icl: the untrained rows (default: all)")
    parser.add_argument("--tasks", type=int, nargs="+", default=[0, 1, 2, 3], help="hidden rules (default 0 1 2 3)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default 0 1 2)")
    parser.add_argument("--options", default="", help="options of train.py for every variant, in one string")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time (default: one a core)")
    parser.add_argument("--out", default="runs/ablation", metavar="FOLDER", help="(default %(default)s)")
    args = parser.parse_args(argv)
    wanted = {name: VARIANTS[name] + args.options.split() for name in VARIANTS if name in args.only}
    if "icl" in args.only:
        wanted = {f"{k}-shot": k for k in SHOTS} | wanted
    scores, seconds = {name: {} for name in wanted}, {name: [] for name in wanted}
    with ProcessPoolExecutor(args.workers) as pool:
        jobs = {pool.submit(run, args.dataset, name, options, task, seed, args.out): (name, task, seed)
                for task in args.tasks for seed in args.seeds for name, options in wanted.items()}
        for job in tqdm(as_completed(jobs), total=len(jobs), unit="run"):
            name, task, seed = jobs[job]
            score, time = job.result()
            scores[name].setdefault(task, []).append(score)
            seconds[name].append(time)
    lines = [f"| {args.dataset} | mean | sd | " + " | ".join(f"task {t}" for t in args.tasks) + " | train s |",
             "|---|---|---|" + "---|" * (len(args.tasks) + 1)]
    for name, by_task in scores.items():
        every = np.array([by_task[t] for t in args.tasks])                                # (tasks, seeds)
        lines.append(f"| {name} | {every.mean():.1f} | {every.std():.1f} | " + " | ".join(f"{m:.1f}" for m in every.mean(1))
                     + f" | {np.mean(seconds[name]):.0f} |")
    text = "\n".join(lines) + "\n"
    write_atomically(Path(args.out) / f"{args.dataset}.md", text)
    print(text)


if __name__ == "__main__":
    run_command(main)
