"""Command lines: options that refuse impossible values in a line, and take a run's saved ones as defaults."""

import argparse
import inspect
import math
import sys
from difflib import get_close_matches
from functools import partial
from pathlib import Path

import torch

from support.files import InputError, read_json, reading

MOVED = {                         # an option of earlier versions → what does it now
    "--table": "python -m experiments.table",
    "--score": "python -m tools.score FILE",
    "--chair": "python -m tools.score FILE --chair SYNONYMS",
    "--fit": "python -m experiments.layerwise",
    "--restore-shots": "--shots",
    "--order": "eval.py --method rices-first",
}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """A line for most options; values are N."""
    def _get_default_metavar_for_optional(self, action):
        return "N"


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line (InputError), no abbreviations, the script's docstring as its help."""
    def __init__(self, doc, prog=None):
        first, _, rest = doc.partition("\n\n")
        super().__init__(prog=prog, usage="%(prog)s [options]", description=first, epilog=rest,
                         allow_abbrev=False, formatter_class=partial(HelpFormatter, max_help_position=26))

    def error(self, message):
        raise InputError(message)

    def parse(self, argv=None):
        """The arguments (default: of the command line). For an unknown option, the one that was meant."""
        args, unknown = self.parse_known_args(argv)
        if not unknown:
            return args
        word = unknown[0].split("=")[0]
        if word in MOVED:
            raise InputError(f"{self.prog} {word} is gone; now {MOVED[word]}")
        near = get_close_matches(word, [name for a in self._actions for name in a.option_strings], 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"{self.prog}: expected options that --help names, found {word}{meant}")

    def use(self, saved, path, but=()):
        """The saved arguments become defaults, where there is such an option; what is typed wins."""
        for action in self._actions:
            value = saved.get(action.dest)
            if value is None or action.dest in but:
                continue
            with reading(path, f"the arguments of a run, not {action.option_strings[0]} {value!r:.80}"):
                if action.nargs != 0:                          # 0: a flag, true or false
                    value = (action.type or str)(str(value))
                if action.choices and value not in action.choices:
                    raise ValueError(f"none of {', '.join(action.choices)}")
                action.default = value


def number(kind, least, most=math.inf):
    """A type for argparse: an int or float from `least` to `most`."""
    def read(word):
        value = kind(word)
        if not least <= value <= most:
            limits = f"at least {least:g}" if most == math.inf else f"{least:g} to {most:g}"
            raise argparse.ArgumentTypeError(f"expected {limits}, found {value:g}")
        return value
    read.__name__ = kind.__name__
    return read


def early(names, argv=None):
    """What the command line says of these options (text, or None), for whoever makes the parser."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(f"--{name}", nargs="?")
    return parser.parse_known_args(sys.argv[1:] if argv is None else argv)[0]


def read_run(folder, methods):
    """The arguments in a run's args.json, a dict. Raises InputError if it is something else."""
    path = Path(folder) / "args.json"
    what = "the arguments of a run of train.py or experiments.layerwise"
    with reading(path, what):
        saved = read_json(path, what)
        if saved["method"] not in list(methods):
            raise ValueError(f"--method {saved['method']!r:.80}, not {' or '.join(methods)}")
    if "finished" not in saved:
        print(f"{folder}: an unfinished run; what follows is of its best epoch so far", file=sys.stderr)
    return saved


def add_common_arguments(parser, argv, datasets):
    """What train.py and eval.py share → the group `run`. Some defaults depend on argv's dataset or device."""
    given = early(("dataset", "device"), argv)
    dataset = given.dataset if given.dataset in datasets else "toy"
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = "bfloat16" if device.startswith("cuda") else "float32"
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=datasets, default="toy", help="what to answer (default %(default)s)")
    add("--data", default="data", metavar="FOLDER", help="okvqa/, vqav2/, coco/ as published (default data)")
    add("--task", type=number(int, 0), default=0, metavar="N", help="number of a toy's rule (default 0)")
    add("--samples", type=number(int, 1), default=1000, help="to train on and to show (default 1000)")
    add("--dev-samples", type=number(int, 0), default=200, help="others, that choose the epoch (default 200)")
    add("--seed", type=int, default=0, help="draws samples, ICDs and the adapter's start (default 0)")
    add("--limit", type=number(int, 1), metavar="N", help="evaluate the first N items only (default: all)")
    add = parser.add_argument_group("model").add_argument
    add("--model", default=datasets[dataset].model, metavar="FOLDER",
        help="a model folder as published (default idefics2-8b-base; toys: checkpoints/tiny)")
    add("--device", default=device, metavar="NAME", help="cpu, cuda, cuda:1 … (default cuda, if any)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default=dtype,
        help="of the frozen weights; adapters are fp32 always (default: bfloat16 on cuda, else float32)")
    add("--official", action="store_true", help="prompts, positions, losses and Z2 as in the official code")
    add = parser.add_argument_group("generation").add_argument
    add("--num-beams", type=number(int, 1, 100), default=3, help="1 = greedy (default 3)")
    add("--length-penalty", type=number(float, -100, 100), default=0.0, help="0 = none (default 0)")
    add("--eval-batch-size", type=number(int, 1), default=16, help="queries at a time (default 16)")
    run = parser.add_argument_group("run")
    run.add_argument("--out", metavar="FOLDER", help="the run's folder (default runs/DATASET…)")
    run.add_argument("--resume", action="store_true", help="go on where the same command was interrupted")
    return run


def add_training_arguments(parser, methods, takes):
    """Options of train.py. Of those of a loss only what the method's `takes`, by name, are offered."""
    add = parser.add_argument_group("training").add_argument
    add("--method", choices=methods, default="mimic", help="what is trained (default mimic): see below")
    add("--init", metavar="FOLDER", help="start from the adapter of another run (default: random)")
    add("--shots", type=number(int, 0), help="the teacher's demonstrations (default: the paper's)")
    add("--draws", type=number(int, 0), default=0, metavar="N",
        help="sets of demonstrations that a query meets; 0 (default) = a new one every epoch")
    add("--epochs", type=number(int, 1), help="default: 15 up to 99 samples, 10 up to 500, else the paper's")
    add("--batch-size", type=number(int, 1), default=4, help="queries at a time (default 4)")
    add("--accumulate", type=number(int, 1), default=1, metavar="N", help="batches a step (default 1)")
    add("--lr", type=number(float, 0, 1e3), help="highest rate of AdamW (default %(default)g)")
    add("--warmup", type=number(float, 0, 1), default=0.1, help="share of steps while it rises (default 0.1)")
    add("--weight-decay", type=number(float, 0, 1e3), default=1e-3, help="of AdamW (default 0.001)")
    add("--clip", type=number(float, 1e-9, 1e9), default=1.0, help="largest norm of the gradient (default 1)")
    add("--lambda-ce", type=number(float, 0, 1e6), help="weight of the LM loss, λ (default %(default)g)")
    add("--compare", type=number(int, 0), nargs="*", default=[], metavar="K",
        help="evaluate in-context learning too, with these shots; 0 = zero-shot (toys: 0 1 2 4 8, else none)")
    if "lambda_align" in takes:
        add("--lambda-align", type=number(float, 0, 1e6),
            help="weight of L_align, 0 = no teacher (default %(default)g)")
    if "align_on" in takes:
        add("--share-icds", action="store_true",
            help="one set of demonstrations for the queries of a batch, which the teacher reads once: faster")
        add("--align-on", choices=("layer", "ffn"), default="layer",
            help="compared: each layer's output, the paper's H (default), or its FFN's (official code)")
    if "align_norm" in takes:
        add("--align-norm", action=argparse.BooleanOptionalAction, default=True,
            help="divide a layer's error by the teacher's mean square (default, unless --official)")
    if "ce_on" in takes:
        add("--ce-on", choices=("answer", "sequence"), default="answer",
            help="tokens of the LM loss: the answer's (default) or all of them (official code)")


def taken(function, options):
    """Those of the options (a dict) that the function takes by name; its `model` is none of them."""
    names = inspect.signature(function).parameters
    return {name: options[name] for name in names if name in options and name != "model"}
