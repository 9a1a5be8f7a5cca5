"""A run's folder: args.json, log.csv, and of its evaluations results.json, a list of rows, and
predictions.jsonl, a line an answer. Answers stand there one by one, so that --resume can go on behind them;
once a row has all of them, lines with scores replace them, and the row joins results.json.
"""

import contextlib
import csv
import hashlib
import json
import os
import platform
import subprocess
import time
from pathlib import Path

import torch

from support.files import InputError, make_folder, read_json, reading, write_json, write_text
from support.parallel import rank, wait

METRICS = {"vqa_accuracy": "VQA accuracy", "cider": "CIDEr-D x 100"}
SAME = ("dataset", "split", "method", "shots", "n", "seed")    # a new row replaces the one with the same,
ALSO = ("model", "task", "samples", "dtype", "official", "num_beams", "length_penalty")   # or is refused


def settings(args):
    """Of a command's arguments (a dict) those that decide what comes out, as JSON has them."""
    return json.loads(json.dumps({k: args[k] for k in args if k not in ("out", "run", "resume")}))


def about(args):
    """What an adapter's file says of its making."""
    names = "method", "dataset", "task", "shots", "seed"
    return {name: getattr(args, name) for name in names} | {"model": Path(args.model).resolve().name}


def new_row(args, metric, split, method, shots, n, shifts=None, file=None, seconds=0):
    """A row before it is made. made_with: digest of what its answers depend on; parameters: those trained."""
    given = settings(vars(args))
    made_of = hashlib.sha256(file.read_bytes()).hexdigest() if file else ""
    parameters = sum(p.numel() for p in shifts.parameters() if p.requires_grad) if shifts else 0
    made_with = hashlib.sha256(json.dumps([given, split, made_of], sort_keys=True).encode()).hexdigest()
    row = {"dataset": args.dataset, "split": split, "method": method, "shots": shots, "metric": metric,
           "score": None, "n": n, "seed": args.seed, "parameters": parameters, "train_seconds": seconds}
    row |= {name: given[name] for name in ALSO}
    return row | {"model": Path(args.model).resolve().name, "made_with": made_with[:12]}


def alike(a, b):
    return all(a.get(name) == b[name] for name in SAME)


def read_rows(path):
    """The rows of a results.json, none if it is not there. Raises InputError if it is something else."""
    if not Path(path).exists():
        return []
    with reading(path, f"a list of rows with {', '.join(SAME)}"):
        return [row for row in read_json(path) if [row[name] for name in SAME]]      # raises KeyError, or all


def read_predictions(path):
    """The objects of a predictions.jsonl, none if it is not there, without a last line that a crash cut."""
    if not Path(path).exists():
        return []
    with reading(path, "a prediction, a JSON object, in every line"):
        found = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n")[:-1]]
        return [record for record in found if [record["dataset"]]]


def lines(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


class Unfinished:
    """A row that is being made: `made` {number of a sample: its answer and cost}, `keep`, `finish`.
    .done: the row is there, in .row, and `resume` asks for no more."""
    def __init__(self, folder, row, resume):
        make_folder(folder)
        self.results = Path(folder) / "results.json"
        self.predictions = Path(folder) / "predictions.jsonl"
        self.title = row["method"] + (f" {row['shots']}-shot" if row["shots"] else "")
        old = next((r for r in read_rows(self.results) if alike(r, row)), {})
        if differ := [k for k in ALSO if old.get(k, row[k]) != row[k]]:
            raise InputError(f"{folder}: expected no results of {self.title} or those of the same arguments, "
                             f"found other {', '.join(differ)}; choose another --out")
        self.done = resume and old.get("made_with") == row["made_with"]
        self.row = old if self.done else row
        if self.done:
            print(f"{self.title}: all {row['n']} answers are there already")
            return
        found = read_predictions(self.predictions)
        mine = [x for x in found if resume and alike(x, row) and x.get("made_with") == row["made_with"]]
        self.made = {x["number"]: x for x in mine}
        self.others = [x for x in found if not alike(x, row)]
        wait()                                                # nobody writes before all have read
        write_text(self.predictions, lines(self.others + list(self.made.values())))

    def keep(self, found):
        """found: [(number of a sample, answer, tokens of its prompt, ms)]: some lines more, at once."""
        kind = {k: self.row[k] for k in (*SAME, "made_with")}
        new = {i: kind | {"number": i, "prediction": said, "tokens": tokens, "ms": ms}
               for i, said, tokens, ms in found}
        self.made.update(new)
        if rank() == 0:
            with reading(self.predictions, "room"), open(self.predictions, "ab") as file:
                file.write(lines(new.values()).encode())

    def cost(self):
        """Means over the prompts → {prompt_tokens, ms_per_query}."""
        tokens = sum(x["tokens"] for x in self.made.values()) / len(self.made)
        ms = sum(x["ms"] for x in self.made.values()) / len(self.made)
        return {"prompt_tokens": round(tokens, 1), "ms_per_query": round(ms, 2)}

    def finish(self, row, samples, answers, each, keys):
        """Writes the scored answers, an official file if there are two `keys`, and last the row → the row."""
        kind = {k: row[k] for k in SAME}
        scored = []
        for s, said, x in zip(samples, answers, each, strict=True):
            scored.append(kind | {"id": s.id, "image_id": s.image_id, "question": s.question,
                                  "prediction": said, "answers": s.answers, "score": x})
        write_text(self.predictions, lines(self.others + scored))
        if keys:
            method = self.title.replace(" ", "-")
            name = f"{row['dataset']}_{row['split']}_{method}_n{row['n']}_seed{row['seed']}_results.json"
            official = [dict(zip(keys, (x["id"], x["prediction"]), strict=True)) for x in scored]
            write_json(self.results.parent / name, official)
        others = [r for r in read_rows(self.results) if not alike(r, row)]
        write_json(self.results, [*others, row])
        return row


def table(rows):
    """Rows as text, a line each."""
    head = ("method", "shots", "split", "score", "n", "parameters", "prompt tokens", "ms/query")
    form = "{:<16}{:>6}{:>7}{:>8}{:>7}{:>12}{:>15}{:>10}"
    found = [f"{rows[0]['dataset']}: {METRICS[rows[0]['metric']]}", form.format(*head)]
    for r in rows:
        score = "–" if r["score"] is None else f"{r['score']:.2f}"               # no annotations
        found.append(form.format(r["method"], r["shots"], r["split"], score, r["n"], f"{r['parameters']:,}",
                                 r["prompt_tokens"], f"{r['ms_per_query']:.2f}"))
    return "\n".join(found)


# ---- A run of train.py
def begin_run(folder, args, resume):
    """Makes the folder with args.json (args: a dict) → whether all of the run is there already. Raises
    InputError for a folder of another run, or of an unfinished one that nobody asks to resume."""
    path = Path(folder) / "args.json"
    state = Path(folder) / "state.safetensors"
    mine = settings(args)
    old = mine
    if path.exists():
        with reading(path, "the arguments of a run"):
            old = dict(read_json(path))
    differ = sorted(k for k in mine if old.get(k) != mine[k])
    if differ and any(Path(folder).glob("*.safetensors")):
        raise InputError(f"{folder}: expected no run or one of the same arguments, found other "
                         f"{', '.join(differ)}; choose another --out or delete it")
    if state.exists() and not resume:
        raise InputError(f"{folder}: expected no unfinished run, found one; the same command with --resume "
                         "continues it, or choose another --out or delete it")
    if resume and "finished" in old and not differ:
        return True
    make_folder(folder)
    wait()                                                    # until all processes have looked
    if not state.exists():
        versions = {"commit": commit(), "torch": torch.__version__, "python": platform.python_version()}
        write_json(path, {**mine, "out": str(folder), **versions, "started": time.strftime("%F %T")})
    return False


def already_finished(folder):
    """Says so → the rows."""
    path = Path(folder) / "results.json"
    rows = read_rows(path)
    with reading(path, "the rows of a finished run"):
        print(f"{folder}: already finished\n\n{table(rows)}")
    return rows


def commit():
    """The commit of this code, "" if nobody knows."""
    command = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return ""


@contextlib.contextmanager
def open_log(path, columns, step):
    """log.csv with the rows of the first `step` steps, to write more. Raises InputError if they are gone."""
    found = [",".join(columns)]
    if step:
        with reading(path, f"the rows of {step} steps"):
            found = path.read_text(encoding="utf-8").split("\n")[:-1][:step + 1]
            if len(found) <= step:
                raise ValueError(f"{len(found)} lines; to start anew delete state.safetensors")
    wait()
    write_text(path, "\n".join(found) + "\n")
    with open(path if rank() == 0 else os.devnull, "a", encoding="utf-8", newline="", buffering=1) as file:
        yield csv.writer(file, lineterminator="\n")


def finish_run(folder):
    """Notes in args.json that everything is done, and deletes what was kept to continue from."""
    path = Path(folder) / "args.json"
    write_json(path, read_json(path) | {"finished": time.strftime("%F %T")})
    wait()
    if rank() == 0:
        (Path(folder) / "state.safetensors").unlink(missing_ok=True)
