"""Score any system's result file, without a model.

    python -m tools.score FILE --dataset okvqa --data data [--split val]
    python -m tools.score FILE --chair SYNONYMS.txt --data data          # captions of COCO: CHAIR as well

FILE is a list as the VQA server has it, of {"question_id": 1, "answer": "a"}, or as COCO has it, of
{"image_id": 1, "caption": "a"}. Printed are scores of 0-100:
    score                    CIDEr-D x 100, or VQA accuracy; OK-VQA's is of stemmed answers, as score_of says
    per_answer_type, per_question_type    VQA accuracy, as the official evaluation reports it
    raw_score                OK-VQA: answers as they are, against what the annotators wrote
    unstemmed_score          OK-VQA: answers as they are, against the official ones, as the official tool does
    chair_s, chair_i, recall captions with --chair: metrics/chair.py
"""

import json
from pathlib import Path

from data import DATASETS, load
from eval import further_scores, percent, score
from metrics.chair import caption_objects, chair, read_synonyms
from support.files import InputError, read_json, reading, run_command, string
from support.options import Parser


def read_answers(path, samples, keys):
    """Records of `keys`, id and answer → samples answered, and the answers. Raises InputError for bad ids."""
    key, said = keys
    with reading(path, f'a list of {{"{key}": …, "{said}": …}} for samples of the split'):
        records = [(record[key], string(record[said])) for record in read_json(path)]
        answers = dict(records)
        if len(answers) < len(records):
            raise ValueError(f"a {key} twice")
        if unknown := answers.keys() - {s.id for s in samples}:
            raise ValueError(f"{key} {unknown.pop()!r:.80}, which is none of them")
        if not answers:
            raise ValueError("an empty one")
    answered = [s for s in samples if s.id in answers]
    return answered, [answers[s.id] for s in answered]


def chair_scores(root, samples, captions, synonyms):
    """CHAIRs, CHAIRi, recall, 0-100. In a picture is what COCO's instances or its reference captions name."""
    path = Path(root) / "coco/annotations/instances_val2014.json"
    with reading(path, "COCO's instances in every picture"):
        found = read_json(path)
        names = {c["id"]: c["name"] for c in found["categories"]}
        named = {image["id"]: set() for image in found["images"]}
        for a in found["annotations"]:
            named[a["image_id"]].add(names[a["category_id"]])
        seen = [named[s.image_id] for s in samples]
    with reading(synonyms, "a synonym list, a line `node, synonym, …` for every category of COCO"):
        nodes = read_synonyms(Path(synonyms).read_text(encoding="utf-8"))
        truths = [{nodes[name] for name in names} for names in seen]
    for s, truth in zip(samples, truths, strict=True):
        truth.update(*(caption_objects(reference, nodes) for reference in s.answers))
    return {name: percent([x]) for name, x in chair(captions, truths, nodes).items()}


def main(argv=None):
    parser = Parser(__doc__, prog="python -m tools.score")
    add = parser.add_argument
    add("file", metavar="FILE", help="the answers")
    add("--dataset", choices=[name for name in DATASETS if DATASETS[name].keys], default="coco")
    add("--split", metavar="NAME", help="train, val or test, if the dataset has it (default: its own)")
    add("--data", default="data", metavar="FOLDER", help="as train.py's (default data)")
    add("--chair", metavar="SYNONYMS", help="captions: CHAIR as well; the file's lines: node, synonym, …")
    args = parser.parse(argv)
    task = DATASETS[args.dataset]
    split = args.split or task.eval_split
    if args.chair and task.metric != "cider":
        raise InputError(f"--chair: expected --dataset coco, found {args.dataset}")
    samples = load(args.dataset, args.data, split)
    answered, answers = read_answers(args.file, samples, task.keys)
    if len(answered) < len(samples):
        print(f"{args.file} answers {len(answered)} of the {len(samples)} items of {args.dataset} {split}: "
              "scored are these alone")
    total, each = score(args.dataset, answered, answers, args.data)
    if total is None:
        raise InputError(f"{args.data}: expected annotations of {args.dataset} {split} to score against, "
                         "found none")

    found = {"dataset": args.dataset, "split": split, "metric": task.metric, "score": total,
             "n": len(answered)}
    found |= further_scores(args.dataset, answered, answers, each)
    if args.chair:
        found |= chair_scores(args.data, answered, answers, args.chair)
    print(json.dumps(found, indent=1))
    return found


if __name__ == "__main__":
    run_command(main)
