"""Your own data: one entry in DATASETS and one function; after that it trains, evaluates, shows and scores like the others."""

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

import eval as evaluation
import train
from data import DATASETS, Dataset, Sample, load
from support.files import InputError, read_json, reading, string
from support.results import read_predictions
from tools import score, show


def load_vizwiz(root, split, task):
    """As VizWiz has it: of a picture, named by its file, one question and ten answers."""
    folder, samples = Path(root) / "vizwiz", []
    with reading(folder / f"{split}.json", "questions of VizWiz with answers"):
        for x in read_json(folder / f"{split}.json"):
            name = string(x["image"])
            answers = [string(a["answer"]) for a in x["answers"]]
            target = Counter(answers).most_common(1)[0][0]
            samples.append(Sample(name, folder / split / name, string(x["question"]), answers, target, id=name))
    return samples


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A --data folder with twelve pictures of two sizes to train on, and five others; VizWiz is a dataset."""
    monkeypatch.setitem(DATASETS, "vizwiz", Dataset("vqa", "vqa_accuracy", 10, "val", load_vizwiz))
    colours = {"red": (220, 30, 30), "green": (20, 160, 60), "blue": (30, 60, 220)}
    for split, n in ("train", 12), ("val", 5):
        folder = tmp_path / "vizwiz" / split
        folder.mkdir(parents=True)
        found = []
        for i in range(n):
            name, (colour, rgb) = f"VizWiz_{split}_{i:08d}.jpg", list(colours.items())[i % 3]
            Image.new("RGB", (48 + 16 * (i % 2), 40), tuple(c + i for c in rgb)).save(folder / name)
            answers = [{"answer": colour, "answer_confidence": "yes"}] * 7 + [{"answer": "unanswerable"}] * 3
            found.append({"image": name, "question": f"What colour is can {i}?", "answers": answers})
        (folder.parent / f"{split}.json").write_text(json.dumps(found))
    return tmp_path


def test_a_dataset_of_ones_own_is_trained_evaluated_shown_and_scored(root, tiny_folder, capsys):
    common = ["--dataset", "vizwiz", "--data", str(root), "--model", str(tiny_folder), "--device", "cpu"]
    run = root / "run"
    rows = train.main([*common, "--samples", "8", "--epochs", "1", "--shots", "1", "--compare", "1", "--num-beams", "1",
                       "--out", str(run)])
    assert [(r["method"], r["shots"], r["n"]) for r in rows] == [("icl", 1, 5), ("mimic", 0, 5)]
    said = read_predictions(run / "predictions.jsonl")
    assert [x["image_id"] for x in said] == 2 * [f"VizWiz_val_{i:08d}.jpg" for i in range(5)]

    again = evaluation.main(["--run", str(run), "--out", str(root / "again"), "--device", "cpu"])
    assert (again["dataset"], again["score"], again["n"]) == ("vizwiz", rows[1]["score"], 5)
    file, = (root / "again").glob("vizwiz_val_*_results.json")
    assert score.main([str(file), "--dataset", "vizwiz", "--data", str(root)])["score"] == again["score"]

    capsys.readouterr()
    show.main(["vizwiz", "--data", str(root), "--model", str(tiny_folder), "--batch-size", "1"])
    shown = capsys.readouterr().out
    assert "3 of 3: VizWiz_train_" in shown and "ICD 2" in shown and "sample VizWiz_train_" in shown
    show.main(["vizwiz", "--data", str(root), "--png", str(root / "sheet.png")])
    with Image.open(root / "sheet.png") as sheet:
        assert sheet.width == 1440


def test_its_mistakes_are_one_line(root):
    (root / "vizwiz/val.json").write_text('[{"image": "a.jpg", "question": "?"}]')
    with pytest.raises(InputError, match="val.json: expected questions of VizWiz with answers, found:? no 'answers'"):
        load("vizwiz", root, "val")
