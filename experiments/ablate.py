"""What each choice is worth: many runs over tasks of the toy world and seeds, in a table. Answers: LOG.md.

    python -m experiments.ablate main                            # in-context learning and MimIC
    python -m experiments.ablate choices --tasks 0 1 2 3         # MimIC's options, where they still differ
    python -m experiments.ablate samples --figure docs/samples.png
    python -m experiments.ablate main --dataset toy-caption --workers 1

What is there is not made again, so an interrupted table goes on. Test scores, mean and standard deviation
over tasks and seeds; the table is written beside the runs, too.
"""

import importlib.util
import os
from pathlib import Path

import numpy as np

from data import DATASETS
from experiments.table import add_arguments, markdown, run_all
from support.files import InputError, run_command, write_text
from support.options import Parser

N = 20, 50, 200, 1000             # training samples of a curve
CURVES = {"layer-wise fit": "fit", "training": "train", "layer-wise fit of a constant shift": "fit --mu one"}
CHOICES = {
    "default": "", "align-on-ffn": "--align-on ffn",
    "align-raw": "--no-align-norm", "ce-on-sequence": "--ce-on sequence",
    "z2-unmasked": "--z2 unmasked", "align-only": "--lambda-ce 0",
    "ce-only": "--lambda-align 0", "lambda-0.1": "--lambda-ce 0.1",
    "lambda-2": "--lambda-ce 2", "lr-5e-3": "--lr 5e-3",
    "lr-1e-2": "--lr 1e-2", "lr-4e-2": "--lr 4e-2",
    "mu-one": "--mu one", "mu-layer": "--mu layer",
    "teacher-1-shot": "--shots 1", "teacher-2-shots": "--shots 2",
    "teacher-4-shots": "--shots 4", "share-icds": "--share-icds",
    "draws-1": "--draws 1", "draws-2": "--draws 2",
    "official": "--official",
}
OFFICIAL = {                      # all of it but one
    "official": "", "but-align-norm": "--align-norm",
    "but-ce-on-answer": "--ce-on answer", "but-align-on-layer": "--align-on layer",
    "but-z2-masked": "--z2 masked", "but-norm-and-answer": "--align-norm --ce-on answer",
}
BUDGETS = {                       # is a query-dependent magnitude needed?
    "MimIC": "", "MimIC, lr 5e-3": "--lr 5e-3",
    "MimIC, 200 samples": "--samples 200", "constant": "--mu one",
    "constant, lr 5e-3": "--mu one --lr 5e-3", "constant, 10 epochs": "--mu one --epochs 10",
    "constant, 200 samples": "--mu one --samples 200", "LIVE": "--method live",
    "LIVE, lr 5e-3": "--method live --lr 5e-3", "LIVE, 10 epochs": "--method live --epochs 10",
    "LIVE, 200 samples": "--method live --samples 200",
}
GROUPS = {                        # group → row → what is run for it, as in table.METHODS
    "main": {
        "zero-shot": "eval", "1-shot": "eval --shots 1",
        "2-shot": "eval --shots 2", "4-shot": "eval --shots 4",
        "8-shot": "eval --shots 8", "MimIC": "train",
    },
    "choices": {name: f"train --epochs 2 {options}" for name, options in CHOICES.items()},
    "official": {name: f"train --official {options}" for name, options in OFFICIAL.items()},
    "budgets": {name: f"train {options}" for name, options in BUDGETS.items()},
    "samples": {
        **{f"{name}, {n}": f"{command} --samples {n}" for name, command in CURVES.items() for n in N},
        **{f"training of 1250 steps, {n}": f"train --samples {n} --epochs {5000 // n}" for n in N},
        "8-shot ICL, 1000": "eval --shots 8",
    },
    "layerwise": {
        "20 samples": "fit --samples 20", "20, 1 draw": "fit --samples 20 --draws 1",
        "20, 40 draws": "fit --samples 20 --draws 40",
        "20, no image tokens": "fit --samples 20 --tokens text",
        "20, answer only": "fit --samples 20 --tokens answer",
        "20, 1-shot teacher": "fit --samples 20 --shots 1",
        "1000, 1-shot teacher": "fit --shots 1", "1000, 2-shot teacher": "fit --shots 2",
        "1000, 4-shot teacher": "fit --shots 4", "1000, no fit, 10 epochs": "train --epochs 10",
        "20, polished": "fit --samples 20 --out FIT; train --samples 20 --init FIT",
        "50, polished": "fit --samples 50 --out FIT; train --samples 50 --init FIT",
        "50, polished 2 epochs": "fit --samples 50 --out FIT; train --samples 50 --init FIT --epochs 2",
    },
}


def figure(path, scores):
    """Accuracy against training samples, mean over tasks and seeds; the band: standard deviation over tasks.

    scores: row → array (tasks, seeds)."""
    from matplotlib import pyplot as plt
    curves = {}
    for name, every in scores.items():
        method, n = name.rsplit(", ", 1)
        curves.setdefault(method, []).append((int(n), every.mean(), every.mean(1).std()))
    plt.figure(figsize=(6, 3.4), dpi=130)
    for method, points in curves.items():
        n, mean, sd = np.array(points).T
        if len(n) == 1:                                        # demonstrations in the prompt: a level
            plt.axhline(mean[0], color="grey", ls="--", label=method)
            continue
        plt.plot(n, mean, "o-", label=method)
        plt.fill_between(n, mean - sd, np.minimum(mean + sd, 100), alpha=0.2)
    plt.xscale("log")
    plt.xticks(N, N)
    plt.xlabel("training samples")
    plt.ylabel("accuracy in %")
    plt.legend(loc="center right", fontsize=8, bbox_to_anchor=(1, 0.4))
    plt.grid(alpha=0.3)
    plt.tight_layout()
    plt.savefig(path)


def main(argv=None):
    parser = Parser(__doc__, "python -m experiments.ablate")
    add = parser.add_argument
    add("group", choices=GROUPS, help="which rows")
    add("--dataset", choices=[d for d in DATASETS if DATASETS[d].toy], default="toy", help="(default toy)")
    add("--only", nargs="+", metavar="ROW", help="some rows of the group (default: all)")
    add("--figure", metavar="PNG", help="group samples: draws the curves (needs matplotlib)")
    add_arguments(parser, "runs/ablation", list(range(10)))
    args = parser.parse(argv)
    known = GROUPS[args.group]
    rows = {name: known[name] for name in args.only or known if name in known}
    if unknown := set(args.only or ()) - set(rows):
        raise InputError(f"--only: expected rows of {args.group} ({'; '.join(known)}), found {unknown.pop()}")
    if args.figure and (args.group != "samples" or not importlib.util.find_spec("matplotlib")):
        raise InputError("--figure: expected the group samples, and matplotlib (pip install matplotlib)")

    out = Path(args.out) / args.dataset
    workers = args.workers or os.cpu_count()
    found = run_all(rows, args.dataset, args.tasks, args.seeds, workers, out / args.group)
    if errors := [r for by in found.values() for r in by.values() if isinstance(r, InputError)]:
        raise errors[0]
    lines = [[args.dataset, "mean", "sd", *(f"task {t}" for t in args.tasks), "train s"]]
    scores = {}
    for name, by in found.items():
        every = np.array([[by[t, s]["score"] for s in args.seeds] for t in args.tasks])
        seconds = np.mean([r["train_seconds"] for r in by.values()])
        means = [every.mean(), every.std(), *every.mean(1)]
        lines.append([name, *(f"{x:.1f}" for x in means), f"{seconds:.0f}"])
        scores[name] = every
    text = markdown(lines)
    write_text(out / f"{args.group}.md", text)
    print(text)
    if args.figure:
        figure(args.figure, scores)


if __name__ == "__main__":
    run_command(main)
