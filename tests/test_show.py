"""data.py show: what it prints of a batch is what the model, the alignment and the loss are given."""

import re

import pytest
from PIL import Image, ImageChops

import data
import show
import toy
from eval import classes_of
from model import InputError


def blocks(capsys, *words):
    """Runs the command → a list of (title, rows: list of dicts by the names of HEAD)."""
    data.main(["show", *map(str, words)])
    found = []
    for block in filter(str.strip, capsys.readouterr().out.split("\n\n")):
        title, *lines = block.strip().splitlines()
        if lines:
            at = [lines[0].index(name) for name in show.HEAD] + [None]
            cells = [[line[a:b].strip() for a, b in zip(at, at[1:], strict=False)] for line in lines[1:]]
            found.append((title, [dict(zip(show.HEAD, row, strict=True)) for row in cells]))
    return found


def expanded(rows):
    """One row a column again: `<image> x 64` is 64 of them."""
    return [row for row in rows for _ in range(int((re.search(r" x (\d+)$", row["token"]) or [0, 1])[1]))]


def parts(rows):
    return list(dict.fromkeys(row["part"] for row in rows))


@pytest.mark.parametrize("dataset", ["okvqa", "coco"])
def test_parts_attention_alignment_and_ce_of_real_data_are_those_of_the_batch(dataset, either_folder, shared, capsys):
    found = blocks(capsys, dataset, "--data", shared / "data", "--model", either_folder, "--shots", "2", "--batch-size", "3")
    samples, _ = data.train_dev(dataset, shared / "data", 1000, 200, 0)
    processor = classes_of(either_folder)[1].from_pretrained(either_folder)
    args = type("args", (), {"seed": 0, "batch_size": 3, "shots": 2})
    queries, icds = show.first_batch(samples, args)
    batch = data.collate(queries, icds, processor, processor.templates[data.DATASETS[dataset].task])
    assert [title.split(",")[0] for title, _ in found] == ["teacher", "student"] * 3
    for i, (title, rows) in enumerate(found):
        b, source, rows = i // 2, batch.student if i % 2 else batch.teacher, expanded(rows)
        assert f"row {b + 1} of 3: sample {queries[b].id}" in title
        assert [int(row["id"]) for row in rows] == source.input_ids[b].tolist()
        assert [row["attention"] == "1" for row in rows] == source.attention_mask[b].tolist()
        n = batch.align.shape[1]
        assert [row["aligned"] == "1" for row in rows] == [False] * (len(rows) - n) + batch.align[b].tolist()
        assert [row["CE"] == "1" for row in rows] == (batch.answer[b].tolist() if i % 2 else [False] * len(rows))
        shown = [name for name in parts(rows) if name != "padding"]
        assert shown == ["<s>", "instruction", *([] if i % 2 else ["ICD 1", "ICD 2"]), "query", "answer"]
        pictures = [row["image"] for row in rows if row["image"]]
        names = queries[b:b + 1] if i % 2 else [*icds[b], queries[b]]
        assert list(dict.fromkeys(pictures)) == [f"{k + 1} of {len(names)}: {s.image_id}" for k, s in enumerate(names)]
        assert len(pictures) == processor.tokens_per_image * len(names)


def test_each_part_holds_its_own_words(tiny_folder, shared, capsys):
    found = blocks(capsys, "okvqa", "--data", shared / "data", "--model", tiny_folder, "--shots", "1", "--batch-size", "1")
    processor = data.Processor.from_pretrained(tiny_folder)
    samples = {s.id: s for s in data.load("okvqa", shared / "data", "train")}
    query = samples[int(re.search(r"sample (\d+)", found[0][0])[1])]
    for _, rows in found:
        said = {name: processor.decode([int(r["id"]) for r in rows if r["part"] == name]) for name in parts(rows)}
        assert said["answer"].strip() == query.target and query.question in said["query"]
        assert said["query"].endswith("Answer:") and said["instruction"].startswith("Instruction:")


def test_the_official_batch_has_masked_separators_and_a_ce_on_every_token(tiny_folder, shared, capsys):
    found = blocks(capsys, "okvqa", "--data", shared / "data", "--model", tiny_folder, "--official", "--batch-size", "1")
    for title, rows in found:
        separators = [row for row in rows if row["part"] == "separator"]
        assert {(row["token"], row["attention"], row["CE"]) for row in separators} == {("<unk>", "0", "")}
        seen = [row["CE"] == "1" for row in expanded(rows) if row["attention"] == "1"]
        assert seen == ([False] + [True] * (len(seen) - 1) if title.startswith("student") else [False] * len(seen))


@pytest.mark.parametrize("dataset", toy.KINDS)
def test_the_toys_need_nothing_and_their_sheet_is_the_toys_own(dataset, capsys, tmp_path):
    found = blocks(capsys, dataset, "--task", "3", "--png", tmp_path / "sheet.png")
    assert len(found) == 4 and parts(found[0][1])[-4:] == ["ICD 1", "ICD 2", "query", "answer"]
    assert any(row["token"] == "<image> x 4" for row in found[1][1])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert ImageChops.difference(sheet, toy.contact_sheet(dataset, 3)).getbbox() is None


def test_a_sheet_of_real_samples_has_their_pictures(tiny_folder, shared, tmp_path, capsys):
    for dataset in ("vqav2", "coco"):
        blocks(capsys, dataset, "--data", shared / "data", "--model", tiny_folder, "--png", tmp_path / f"{dataset}.png")
        with Image.open(tmp_path / f"{dataset}.png") as sheet:
            assert sheet.width == 4 * 254 + 14 and len(sheet.resize((64, 64)).getcolors(4096)) > 500


@pytest.mark.parametrize("words, message", [
    (["toy", "--shots", "-1"], "--shots: expected at least 0"), (["toy", "--task", "100000"], "has no task"),
    (["okvqa", "--data", "/nowhere"], "/nowhere: expected a folder"),
    (["toy", "--model", "/nowhere"], "/nowhere: expected a model folder"),
    (["toy", "--png", "/nowhere/a.png"], "/nowhere/a.png: expected a picture file")])
def test_mistakes_are_one_line(words, message):
    with pytest.raises(InputError, match=message):
        data.main(["show", *words])


@pytest.mark.parametrize("words", [[], ["shew", "toy"]])
def test_another_word_than_fetch_and_show_is_refused(words):
    with pytest.raises(InputError, match="expected `fetch` or `show` and a dataset, found"):
        data.main(words)
