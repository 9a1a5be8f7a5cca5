"""Every method in one table: many runs of train.py, eval.py and experiments.layerwise.

    python -m experiments.table                                  # both toys, three seeds
    python -m experiments.table --dataset okvqa --model FOLDER --data FOLDER --limit 500 --seeds 0

--out gets table.md, table.json and a folder a run. What is there is not made again, so an interrupted table
goes on. Options that train.py and eval.py share (--limit, --samples, --num-beams …) are passed on to every
run. Scores are mean ± standard deviation over tasks and seeds; the dev split chooses the epoch.
"""

import os
import statistics
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from itertools import product
from pathlib import Path

from tqdm import tqdm

import eval as evaluation
import train
from data import DATASETS
from experiments import layerwise
from support.files import InputError, run_command, write_json, write_text
from support.options import Parser, add_common_arguments, number
from support.results import METRICS

METHODS = {                       # row → what is run for it; see `run`
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


# ---- Many runs
def run(dataset, commands, task, seed, out, common=()):
    """The commands of a row, or what is left of them → the last one's row of results.json.

    commands: "train --method lora" or "fit …; train …"; FIT in them is a folder between the two. common:
    options that all of them take."""
    size = ["--eval-batch-size", "64"] if DATASETS[dataset].toy else []
    where = ["--dataset", dataset, "--task", str(task), "--seed", str(seed), "--out", str(out)]
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        for command in commands.split("; "):
            name, *options = [f"{out}/fit" if word == "FIT" else word for word in command.split()]
            compared = [] if name == "eval" else ["--compare"]
            found = COMMANDS[name]([*size, *common, *where, *options, "--resume", *compared])
    return found if name == "eval" else found[-1]


def end_with_parent():
    """A worker ends with a command that was killed: where it writes, the command's next call goes on."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_all(rows, dataset, tasks, seeds, workers, out, common=()):
    """→ {row: {(task, seed): row of results.json}}, `workers` runs at a time; an InputError instead where
    a method has no use for the dataset or the model. rows: row → commands of `run`."""
    found = {name: {} for name in rows}
    jobs = {}
    with ProcessPoolExecutor(workers, initializer=end_with_parent) as pool:
        for task, seed, name in product(tasks, seeds, rows):
            folder = Path(out) / name.replace(", ", "-").replace(" ", "-") / f"task{task}-seed{seed}"
            job = pool.submit(run, dataset, rows[name], task, seed, folder, common)
            jobs[job] = name, task, seed
        try:
            for job in tqdm(as_completed(jobs), total=len(jobs), desc=dataset, unit="run"):
                name, task, seed = jobs[job]
                error = job.exception()
                found[name][task, seed] = error if isinstance(error, InputError) else job.result()
        except BaseException:                                  # do not start what waits
            pool.shutdown(cancel_futures=True)
            raise
    return found


def add_arguments(parser, out, tasks):
    """Options of a command that makes many runs."""
    add = parser.add_argument
    add("--tasks", "--task", type=number(int, 0), nargs="+", default=tasks, metavar="N",
        help=f"hidden rules of the toy (default {' '.join(map(str, tasks))})")
    add("--seeds", "--seed", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="(default 0 1 2)")
    add("--workers", type=number(int, 1), metavar="N",
        help="runs at a time (default: of toys one a core, else 1)")
    add("--out", default=out, metavar="FOLDER", help="(default %(default)s)")
    add("--resume", action="store_true", help="(it goes on without being told to, too)")


def markdown(rows):
    """Lists of cells, the head first → the text of a table."""
    head, *others = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *others]) + "\n"


# ---- The table of methods
def compare(datasets, tasks, seeds, workers, out, common=()):
    """Every method on datasets of different metrics → the rows of table.json. A method without a score has
    its reason below the table."""
    found = {}
    for d in datasets:
        folder = Path(out) / d / "methods"
        found[DATASETS[d].metric] = run_all(METHODS, d, tasks, seeds, workers, folder, common)
    titles = [METRICS[metric] for metric in found]
    lines = [["method", "parameters", *titles, "prompt tokens", "ms / query", "train s"]]
    rows, reasons = [], []
    for name in METHODS:
        row = {"method": name}
        scores = []
        for metric, by_name in found.items():
            runs = by_name[name].values()
            reasons += [f"{name}: {r}" for r in runs if isinstance(r, InputError)][:1]
            runs = [r for r in runs if not isinstance(r, InputError) and r["score"] is not None]
            if runs:
                row[metric] = statistics.fmean(r["score"] for r in runs)
                row[f"{metric}_sd"] = statistics.pstdev(r["score"] for r in runs)
                row = {key: statistics.mean(r[key] for r in runs) for key in COSTS} | row
            scores.append(f"{row[metric]:.1f} ± {row[metric + '_sd']:.1f}" if runs else "–")
        rows.append(row)
        parameters, *costs = (format(row[key], form) if key in row else "–" for key, form in COSTS.items())
        lines.append([name, parameters, *scores, *costs])
    if len(reasons) == len(METHODS) * len(datasets):
        raise InputError(reasons[0])
    text = "\n".join([markdown(lines), *reasons]).rstrip("\n") + "\n"
    write_json(Path(out) / "table.json", rows)
    write_text(Path(out) / "table.md", text)
    print(text)
    return rows


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(__doc__, "python -m experiments.table")
    parser.add_argument("--dataset", choices=DATASETS, help="(default: toy and toy-caption)")
    add_arguments(parser, "runs/table", [0])
    args, common = parser.parse_known_args(argv)
    shared = Parser(__doc__, parser.prog)
    add_common_arguments(shared, argv, DATASETS)
    shared.parse(common)                                       # refuses what only one of the commands takes
    datasets = [args.dataset] if args.dataset else ["toy", "toy-caption"]
    workers = args.workers or (os.cpu_count() if DATASETS[datasets[0]].toy else 1)
    return compare(datasets, args.tasks, args.seeds, workers, args.out, common)


if __name__ == "__main__":
    run_command(main)
