"""Every method in one table: many runs of train.py, eval.py and experiments.layerwise.

    python -m experiments.table                                  # both toys, three seeds
    python -m experiments.table --dataset okvqa --model FOLDER --data FOLDER --limit 500 --seeds 0

--out gets table.md and a folder a run. What is there is not made again: several terminals may make a seed
each before one asks for all. Options that train.py and eval.py share (--limit, --samples …) are passed on to
every run. Scores are mean ± standard deviation over tasks and seeds; the dev split chooses the epoch.
"""

import os
import statistics
from contextlib import redirect_stderr, redirect_stdout
from itertools import product
from pathlib import Path

from tqdm import tqdm

import eval as evaluation
import train
from data import DATASETS
from experiments import layerwise
from support.files import InputError, chunks, run_command, write_text
from support.options import Parser, add_common_arguments, number
from support.results import METRICS, read_rows

METHODS = {                       # row → the command that makes it; see `run`
    "zero-shot": "eval",
    "8-shot ICL": "eval --shots 8",
    "RICES, 8 shots": "eval --method rices",
    "Task Vector": "eval --method task-vector",
    "Function Vector": "eval --method function-vector",
    "LIVE": "train --method live",
    "LoRA": "train --method lora",
    "LoRA, o_proj, rank 1": "train --method lora --targets o_proj --rank 1 --lr 5e-3",
    "prompt tuning": "train --method prompt-tuning",
    "STAVE": "train --method stave",
    "HiFICL": "train --method hificl",
    "MimIC": "train",
    "MimIC, layer-wise fit": "fit",
    "MimIC, layer-wise fit of 50 samples": "fit --samples 50",
}
COMMANDS = {"train": train.main, "eval": evaluation.main, "fit": layerwise.main}
COSTS = {"parameters": ",", "prompt_tokens": ".0f", "ms_per_query": ".1f", "train_seconds": ".0f"}


def run(rows, options, folder, name, task, seed):
    """The command rows[name] → its row of results.json; where it refuses the dataset or model, the reason."""
    program, *words = rows[name].split()
    out = Path(folder) / name.replace(", ", "-").replace(" ", "-") / f"task{task}-seed{seed}"
    words = [*options, "--task", str(task), "--seed", str(seed), "--out", str(out), "--resume", *words]
    if program == "train":
        words.append("--compare")                              # with nothing: the table has rows for that
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            COMMANDS[program](words)
        except InputError as e:
            return {"score": None, "reason": str(e)}
    return read_rows(out / "results.json")[-1]


def run_all(rows, dataset, args, options):
    """→ {row: what `run` gives for every task and seed}. Raises InputError if none has a score."""
    jobs = tqdm(list(product(rows, args.tasks, args.seeds)), desc=dataset, unit="run")
    found = [run(rows, [*options, "--dataset", dataset], f"{args.out}/{dataset}", *job) for job in jobs]
    if all("reason" in r for r in found):
        raise InputError(found[0]["reason"])
    return dict(zip(rows, chunks(found, len(args.tasks) * len(args.seeds)), strict=True))


def spread(runs):
    """Mean ± standard deviation of their scores."""
    scores = [r["score"] for r in runs]
    return f"{statistics.fmean(scores):.1f} ± {statistics.pstdev(scores):.1f}" if runs else "–"


def compare(rows, datasets, args, options):
    """A row a command, a column a dataset (a metric each) → the cells. Below: why a row has no score."""
    found = {DATASETS[d].metric: run_all(rows, d, args, options) for d in datasets}
    table = [["method", "parameters", *map(METRICS.get, found), "prompt tokens", "ms / query", "train s"]]
    table.append(["---"] * len(table[0]))
    reasons = []
    for name in rows:
        made = [by_name[name] for by_name in found.values()]
        for runs in made:
            reasons += [f"{name}: {r['reason']}" for r in runs if "reason" in r][:1]
        scored = [[r for r in runs if r["score"] is not None] for runs in made]
        first = next(filter(None, scored), [])
        parameters, *costs = [format(statistics.mean(r[key] for r in first), form) if first else "–"
                              for key, form in COSTS.items()]
        table.append([name, parameters, *map(spread, scored), *costs])
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in table)
    text = "\n".join([text, "", *reasons]).rstrip() + "\n"
    write_text(f"{args.out}/table.md", text)
    print(text)
    return table


def parse(parser, argv, tasks):
    """→ arguments, and the options of every run. Raises InputError for one that not all commands take."""
    add = parser.add_argument
    add("--dataset", choices=DATASETS, help="(default: toy; experiments.table also toy-caption)")
    add("--tasks", "--task", type=number(int, 0), nargs="+", default=tasks, metavar="N",
        help=f"hidden rules of the toy (default {' '.join(map(str, tasks))})")
    add("--seeds", "--seed", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="(default 0 1 2)")
    add("--out", default=f"runs/{parser.prog.split('.')[-1]}", metavar="FOLDER", help="(default %(default)s)")
    args, options = parser.parse_known_args(argv)
    shared = Parser(__doc__, parser.prog)
    add_common_arguments(shared, argv, DATASETS)
    shared.parse(options)
    return args, options


def main(argv=None):
    args, options = parse(Parser(__doc__, "python -m experiments.table"), argv, [0])
    datasets = [args.dataset] if args.dataset else ["toy", "toy-caption"]
    return compare(METHODS, datasets, args, options)


if __name__ == "__main__":
    run_command(main)
