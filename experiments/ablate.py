"""What each choice is worth: many runs over tasks of the toy world and seeds, in a table. Answers: LOG.md.

    python -m experiments.ablate main                            # in-context learning and MimIC
    python -m experiments.ablate choices --tasks 0 1 2 3         # MimIC's options, where they still differ
    python -m experiments.ablate samples --tasks 0 1 2 3         # the layer-wise fit, from few samples

What is there is not made again, and options are passed on to every run, as in experiments.table.
"""

from experiments.table import compare, parse
from support.files import run_command
from support.options import Parser

N = 20, 50, 200, 1000             # training samples
CHOICES = ["", "--align-on ffn", "--no-align-norm", "--ce-on sequence", "--z2 unmasked", "--official",
           "--lambda-ce 0", "--lambda-align 0", "--mu one", "--mu layer", "--shots 1", "--share-icds"]
GROUPS = {                        # group → row → command, as in table.METHODS
    "main": {
        "zero-shot": "eval",
        **{f"{k}-shot": f"eval --shots {k}" for k in (1, 2, 4, 8)},
        "MimIC": "train",
    },
    "choices": {o.strip("-") or "default": f"train --epochs 2 {o}" for o in CHOICES},
    "samples": {
        "8-shot ICL": "eval --shots 8",
        **{f"layer-wise fit, {n}": f"fit --samples {n}" for n in N},
        **{f"training, {n}": f"train --samples {n}" for n in N},
        **{f"layer-wise fit of a constant shift, {n}": f"fit --mu one --samples {n}" for n in N},
        **{f"training of 1250 steps, {n}": f"train --samples {n} --epochs {5000 // n}" for n in N},
    },
}


def main(argv=None):
    parser = Parser(__doc__, "python -m experiments.ablate")
    parser.add_argument("group", choices=GROUPS, help="which rows")
    args, options = parse(parser, argv, range(10))
    args.out = f"{args.out}/{args.group}"
    return compare(GROUPS[args.group], [args.dataset or "toy"], args, options)


if __name__ == "__main__":
    run_command(main)
