"""Scores of a split, a run's files of rows and predictions, and official result files: eval.py's, and any other system's.

    VQA     [{"question_id": int, "answer": str}]        COCO     [{"image_id": int, "caption": str}]

A row of results.json has, beside what eval.py says, the further scores of its answers (all 0-100):
    per_answer_type, per_question_type    VQA accuracy of the questions of a type, as the official evaluation reports it
    score_of      OK-VQA: what `score` is: "stemmed", answers stemmed as the official ones are
    raw_score     OK-VQA: answers as they are, against what the annotators wrote
    unstemmed_score   OK-VQA: answers as they are, against the official ones: what the official tool makes of the file
    chair_s, chair_i, recall    captions with --chair
"""

import hashlib
import json
from pathlib import Path

from data import DATASETS, fields, load, records, stemmer
from metrics import caption_objects, chair, cider, read_synonyms, vqa_accuracy
from model import InputError, read_json, written_whole
from parallel import rank


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------
def vqa_accuracies(answers, truths):
    """N VQA accuracies in [0, 1]; truths: a list of the annotators' answers for each."""
    return [vqa_accuracy(a, t) for a, t in zip(answers, truths, strict=True)]


def percent(each):
    """Mean of numbers in [0, 1] → 0-100, two digits; summed in order, as in the official tool, so that 81.875 goes its way."""
    return round(100 * float(sum(each)) / len(each), 2)


def item_scores(dataset, samples, answers, root):
    """→ each item's score, N numbers whose mean is the score; 1.0 is "100". OK-VQA's official answers are stemmed: so are the
    answers here before they are scored (root: the --data folder)."""
    truths = [s.answers for s in samples]
    if DATASETS[dataset].metric == "cider":
        return cider(answers, truths)[1]
    return vqa_accuracies(map(stemmer(root), answers) if dataset == "okvqa" else answers, truths)


def score(dataset, samples, answers, root=None):
    """→ score (0-100) and each item's (0-100), or None and Nones where the split has no annotations."""
    if not all(s.answers for s in samples):
        return None, [None] * len(samples)
    each = item_scores(dataset, samples, answers, root)
    return percent(each), [percent([x]) for x in each]


def further_scores(dataset, samples, answers, root=None):
    """The scores beside the score, as the head of this file lists them → dict, empty for captions and toys."""
    if DATASETS[dataset].metric == "cider" or not all(s.answers for s in samples):
        return {}
    each, found = item_scores(dataset, samples, answers, root), {}
    if dataset == "okvqa":
        found = {"score_of": "stemmed",
                 "raw_score": percent(vqa_accuracies(answers, [s.raw_answers for s in samples])),
                 "unstemmed_score": percent(vqa_accuracies(answers, [s.answers for s in samples]))}
    for name in ("answer_type", "question_type"):
        types = [getattr(s, name) for s in samples]
        if all(types):
            found[f"per_{name}"] = by_type(each, types)
    return found


def by_type(each, types):
    """Mean (0-100) of the N scores by type; types: N strings → {type: mean}, in the order of the alphabet."""
    return {t: percent([x for x, mine in zip(each, types, strict=True) if mine == t]) for t in sorted(set(types))}


# ---------------------------------------------------------------------------------------------------------------------
# CHAIR's truth
# ---------------------------------------------------------------------------------------------------------------------
def picture_objects(root, folder, synonyms):
    """The nodes in each picture of "train2014" or "val2014", of the instance annotations and the reference captions → {image
    id: set}. The large files are read once; what they say is kept in coco/annotations/chair_FOLDER.json.

    synonyms: path of the list. Raises InputError for a bad file, or a list without a category."""
    nodes, at = read_nodes(synonyms), Path(root) / "coco/annotations"
    kept, digest = at / f"chair_{folder}.json", hashlib.sha256(Path(synonyms).read_bytes()).hexdigest()
    found = read_json(kept) if kept.exists() else {}
    if not isinstance(found, dict) or (found and not isinstance(found.get("objects"), dict)):
        raise InputError(f"{kept}: expected an object with 'objects', found another; delete it")
    if found.get("synonyms_sha256") == digest:
        return {int(image): set(names) for image, names in found["objects"].items()}
    instances, captions = at / f"instances_{folder}.json", at / f"captions_{folder}.json"
    categories = dict(fields(c, instances, id=int, name=str) for c in records(instances, "categories"))
    if lacking := sorted(set(categories.values()) - set(nodes)):
        raise InputError(f"{synonyms}: expected a line with the category {lacking[0]!r} of {instances.name}, found none")
    objects = {fields(i, instances, id=int)[0]: set() for i in records(instances, "images")}
    for a in records(instances, "annotations"):
        image, category = fields(a, instances, image_id=int, category_id=int)
        if category not in categories:
            raise InputError(f"{instances}: expected a category of the file, found category_id {category}")
        objects.setdefault(image, set()).add(nodes[categories[category]])
    for a in records(captions, "annotations"):
        image, caption = fields(a, captions, image_id=int, caption=str)
        objects.setdefault(image, set()).update(caption_objects(caption, nodes))
    text = json.dumps({"synonyms_sha256": digest, "objects": {i: sorted(names) for i, names in objects.items()}})
    try:
        write_atomically(kept, text + "\n")
    except InputError as e:
        print(f"not kept for the next time: {e}")
    return objects


def read_nodes(path):
    """The published synonym list, which is no part of this repository → {word: node}."""
    try:
        return read_synonyms(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: expected a synonym list, a line `node, synonym, synonym` an object, found: {e}") from None


def chair_scores(root, samples, captions, synonyms):
    """CHAIRs, CHAIRi and recall (0-100) of captions of the samples' pictures."""
    objects = {}
    for folder in sorted({s.image.parent.name for s in samples}):
        objects |= picture_objects(root, folder, synonyms)
    if lacking := [s.image_id for s in samples if s.image_id not in objects]:
        raise InputError(f"{root}/coco/annotations: expected instances of every picture, found none of {lacking[0]}")
    found = chair(captions, [objects[s.image_id] for s in samples], read_nodes(synonyms))
    return {name: percent([x]) for name, x in found.items()}


# ---------------------------------------------------------------------------------------------------------------------
# A run's results.json and predictions.jsonl
# ---------------------------------------------------------------------------------------------------------------------
SAME = ("dataset", "split", "method", "shots", "n", "seed")            # a new row takes the place of one that agrees in these
ALSO = ("model", "task", "samples", "dtype", "official", "num_beams", "length_penalty")          # and must agree in these, too


def write_atomically(path, text):
    """The whole file or none: `model.written_whole`. Of many processes the first one writes."""
    if rank() == 0:
        with written_whole(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def read_lines(path):
    """The lines of a file, none if it is not there. (splitlines would cut at characters that JSON leaves as they are.)"""
    try:
        return [line for line in path.read_text(encoding="utf-8").split("\n") if line] if path.exists() else []
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: expected text, found bytes that are none ({e})") from None


def make_folder(path):
    """The folder, and those above it. Raises InputError if it cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"{path}: expected a folder that can be written, found: {e.strerror}") from None


def read_rows(path):
    """The rows of a results.json, none if it is not there. Raises InputError if it is something else."""
    rows = read_json(path) if path.exists() else []
    if not isinstance(rows, list) or not all(isinstance(r, dict) and all(k in r for k in SAME) for r in rows):
        raise InputError(f"{path}: expected a list of rows with {', '.join(SAME)}, found something else")
    return rows


def read_predictions(path):
    """The objects of a predictions.jsonl. Raises InputError, with the line, if one is none."""
    found = []
    for number, line in enumerate(read_lines(path), 1):
        try:
            found.append(json.loads(line))
            found[-1]["dataset"]
        except (ValueError, TypeError, KeyError):
            raise InputError(f"{path}: expected a prediction in line {number}, found {line[:60]!r}") from None
    return found


def add_results(folder, row, samples, answers, each):
    """Adds a row to results.json and its predictions to predictions.jsonl, in the place of older ones of the same kind."""
    folder = Path(folder)
    make_folder(folder)
    results, predictions = folder / "results.json", folder / "predictions.jsonl"

    def other(r):
        return any(r.get(k) != row[k] for k in SAME)

    rows = [r for r in read_rows(results) if other(r)]
    lines = [json.dumps(x, ensure_ascii=False) for x in read_predictions(predictions) if other(x)]
    kind = {k: row[k] for k in SAME}
    lines += [json.dumps({**kind, "id": s.id, "image_id": s.image_id, "question": s.question, "prediction": a,
                          "answers": s.answers, "score": x}, ensure_ascii=False)
              for s, a, x in zip(samples, answers, each, strict=True)]
    write_atomically(predictions, "\n".join(lines) + "\n")
    write_atomically(results, json.dumps([*rows, row], indent=1) + "\n")                # last: a row says that it is done


def made_with(folder, settings, **row):
    """The ALSO of a new row. Raises InputError if results.json has a row that agrees with it in SAME and not in these."""
    also = {k: settings[k] for k in ALSO} | {"model": Path(settings["model"]).resolve().name}
    for old in read_rows(Path(folder) / "results.json"):
        if all(old[k] == row[k] for k in SAME) and (differ := [k for k in ALSO if old.get(k, also[k]) != also[k]]):
            name = row["method"] + (f" {row['shots']}-shot" if row["shots"] else "")
            raise InputError(f"{folder}: expected no results of {name} or those of the same arguments, found other "
                             f"{', '.join(differ)}; choose another --out")
    return also


# ---------------------------------------------------------------------------------------------------------------------
# Official result files
# ---------------------------------------------------------------------------------------------------------------------
def official_names(dataset):
    """The two keys of a record."""
    return ("image_id", "caption") if dataset == "coco" else ("question_id", "answer")


def official_records(dataset, samples, answers):
    """The content of a result file. OK-VQA's answers are not stemmed in it."""
    key, text = official_names(dataset)
    return [{key: s.id, text: a} for s, a in zip(samples, answers, strict=True)]


def official_name(row):
    """Name of the result file that belongs to a row of results.json."""
    shots = f"-{row['shots']}-shot" if row["shots"] else ""
    return f"{row['dataset']}_{row['split']}_{row['method']}{shots}_n{row['n']}_seed{row['seed']}_results.json"


def read_official(path, dataset, samples):
    """A result file → the samples it answers, in the order of the split, and its answers. A part of a split is enough.
    Raises InputError for an id that is not in the split, or is there twice, and for a file of another form."""
    content, (key, text) = read_json(path), official_names(dataset)
    if not isinstance(content, list) or not content or not all(isinstance(x, dict) for x in content):
        raise InputError(f"{path}: expected a list of {{{key!r}, {text!r}}}, found "
                         + ("an empty one" if content == [] else type(content).__name__))
    known, said = {s.id for s in samples}, {}
    for record in content:
        number, answer = fields(record, path, **{key: int, text: str})
        if number in said:
            raise InputError(f"{path}: expected each {key} once, found {number} twice")
        if number not in known:
            raise InputError(f"{path}: expected {key}s of the split, {len(known)} in all, found {number}")
        said[number] = answer
    covered = [s for s in samples if s.id in said]
    return covered, [said[s.id] for s in covered]


def score_file(args):
    """Scores the file --score without a model, prints the scores and, with --out, adds a row to results.json → the row."""
    if not args.score:
        raise InputError("--chair: expected --score FILE beside it, found none")
    if args.run or args.limit:
        raise InputError("--score: expected neither --run nor --limit (the file says what is scored), found one")
    dataset = "coco" if args.chair and args.dataset == "toy" else args.dataset
    if dataset.startswith("toy") or (args.chair and dataset != "coco"):
        raise InputError(f"--score: expected --dataset {'coco' if args.chair else 'okvqa, vqav2 or coco'}, found {dataset}")
    split = args.split or DATASETS[dataset].eval_split
    samples = load(dataset, args.data, split)
    covered, answers = read_official(args.score, dataset, samples)
    if len(covered) < len(samples):
        print(f"{args.score} answers {len(covered)} of the {len(samples)} items of {dataset} {split}: scored are these alone")
    total, each = score(dataset, covered, answers, args.data)
    if total is None:
        raise InputError(f"{args.data}: expected annotations of {dataset} {split} to score against, found none")
    row = {"dataset": dataset, "split": split, "method": Path(args.score).stem, "shots": 0, "metric": DATASETS[dataset].metric,
           "score": total, "n": len(covered), "seed": None, "parameters": None, "prompt_tokens": None, "ms_per_query": None,
           "train_seconds": None, **further_scores(dataset, covered, answers, args.data)}
    if args.chair:
        row |= chair_scores(args.data, covered, answers, args.chair)
    for name, value in row.items():
        if isinstance(value, dict):
            print(f"{name}:\n" + "\n".join(f"    {kind:<24}{x:>8.2f}" for kind, x in value.items()))
        elif value is not None and name not in ("shots", "method"):
            print(f"{name:<20}{value}")
    if args.out:
        add_results(args.out, row, covered, answers, each)
        print(f"{args.out}/results.json written")
    return row
