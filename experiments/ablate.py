"""What each choice is worth: many runs over tasks of the toy world and seeds, in a table. Answers: LOG.md.

    python -m experiments.ablate main                            # in-context learning and MimIC
    python -m experiments.ablate choices --tasks 0 1 2 3         # MimIC's options, where they still differ
    python -m experiments.ablate samples --figure docs/samples.png

Test scores, mean and standard deviation over tasks and seeds; the table is written beside the runs, too. What
is there is not made again, and options are passed on to every run, as in experiments.table.
"""

import numpy as np

from experiments.table import compare, parse
from support.files import run_command
from support.options import Parser

N = 20, 50, 200, 1000             # training samples of a curve
CURVES = {                        # curve → command for n samples
    "layer-wise fit": "fit --samples {n}",
    "training": "train --samples {n}",
    "layer-wise fit of a constant shift": "fit --mu one --samples {n}",
    "training of 1250 steps": "train --samples {n} --epochs {epochs}",
}
CHOICES = ["", "--align-on ffn", "--no-align-norm", "--ce-on sequence", "--z2 unmasked", "--official",
           "--lambda-ce 0", "--lambda-align 0", "--mu one", "--mu layer", "--shots 1", "--share-icds"]
FITS = ["", "--draws 1", "--draws 40", "--tokens text", "--tokens answer", "--shots 1"]
GROUPS = {                        # group → row → command, as in table.METHODS
    "main": {
        "zero-shot": "eval",
        **{f"{k}-shot": f"eval --shots {k}" for k in (1, 2, 4, 8)},
        "MimIC": "train",
    },
    "choices": {o.strip("-") or "default": f"train --epochs 2 {o}" for o in CHOICES},
    "samples": {
        "8-shot ICL": "eval --shots 8",
        **{f"{c}, {n}": CURVES[c].format(n=n, epochs=5000 // n) for c in CURVES for n in N},
    },
    "layerwise": {o.strip("-") or "default": f"fit --samples 20 {o}" for o in FITS},
}


def figure(path, rows):
    """Accuracy against training samples, mean and standard deviation.  rows: of `compare`."""
    from matplotlib import pyplot as plt
    found = {row["method"]: (row["vqa_accuracy"], row["vqa_accuracy_sd"]) for row in rows}
    plt.figure(figsize=(6, 3.4), dpi=130)
    for curve in CURVES:
        mean, sd = np.array([found[f"{curve}, {n}"] for n in N]).T
        plt.plot(N, mean, "o-", label=curve)
        plt.fill_between(N, mean - sd, np.minimum(mean + sd, 100), alpha=0.2)
    plt.axhline(found["8-shot ICL"][0], color="grey", ls="--", label="8-shot ICL")
    plt.gca().set(xscale="log", xlabel="training samples", ylabel="accuracy in %")
    plt.xticks(N, N)
    plt.legend(loc="center right", fontsize=8, bbox_to_anchor=(1, 0.4))
    plt.grid(alpha=0.3)
    plt.tight_layout()
    plt.savefig(path)


def main(argv=None):
    parser = Parser(__doc__, "python -m experiments.ablate")
    parser.add_argument("group", choices=GROUPS, help="which rows")
    parser.add_argument("--figure", metavar="PNG", help="of the group samples: its curves (needs matplotlib)")
    args, options = parse(parser, argv, range(10))
    args.out = f"{args.out}/{args.group}"
    rows = compare(GROUPS[args.group], [args.dataset or "toy"], args, options)
    if args.figure:
        figure(args.figure, rows)


if __name__ == "__main__":
    run_command(main)
