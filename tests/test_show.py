"""tools.show: what it prints of a batch is what the model, the alignment and the loss are given."""

import re

import pytest
from PIL import Image

import data
import models
import train
from support.files import InputError
from tools import show
from toy import world


def blocks(capsys, *words):
    """Runs the command → a list of (title, rows: list of dicts by the names of HEAD)."""
    show.main([*map(str, words)])
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
    processor = models.of(either_folder)[1].from_pretrained(either_folder)
    queries, icds = next(train.steps_of(samples, 0, 0, batch_size=3, accumulate=1, shots=2))[0]
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


@pytest.mark.parametrize("more", [[], ["--official"]])
@pytest.mark.parametrize("dataset", ["okvqa", "coco"])
def test_each_part_holds_its_own_words(dataset, more, either_folder, shared, capsys):
    where = "--data", shared / "data", "--model", either_folder
    found = blocks(capsys, dataset, *where, "--shots", "3", "--batch-size", "1", "--seed", "5", *more)
    processor = models.of(either_folder)[1].from_pretrained(either_folder)
    samples, _ = data.train_dev(dataset, shared / "data", 1000, 200, 5)
    (query,), (icds,) = next(train.steps_of(samples, 0, 5, batch_size=1, accumulate=1, shots=3))[0]
    for title, rows in found:
        said = {name: processor.decode([int(r["id"]) for r in expanded(rows) if r["part"] == name]) for name in parts(rows)}
        shown = {"query": query} | ({f"ICD {k}": s for k, s in enumerate(icds, 1)} if title.startswith("teacher") else {})
        assert said["answer"].strip() == query.target and said["query"].endswith((":", ":<end_of_outterance>"))
        for name, s in shown.items():
            assert said[name].lstrip().startswith("Image:") and (s.question or "Caption:") in said[name]
            assert name == "query" or s.target in said[name]
        assert {name for name in said if name[0] in "Iq"} - {"instruction"} == set(shown)


def test_the_official_batch_has_masked_separators_and_a_ce_on_every_token(tiny_folder, shared, capsys):
    found = blocks(capsys, "okvqa", "--data", shared / "data", "--model", tiny_folder, "--official", "--batch-size", "1")
    for title, rows in found:
        separators = [row for row in rows if row["part"] == "separator"]
        assert {(row["token"], row["attention"], row["CE"]) for row in separators} == {("<unk>", "0", "")}
        seen = [row["CE"] == "1" for row in expanded(rows) if row["attention"] == "1"]
        assert seen == ([False] + [True] * (len(seen) - 1) if title.startswith("student") else [False] * len(seen))


def test_train_pys_options_may_stand_here(capsys):
    (_, teacher), (_, student), *more = blocks(capsys, "toy", "--ce-on", "sequence", "--batch-size", "1", "--lr", "1e-3")
    assert not more
    assert {row["CE"] for row in student[1:]} == {"1"} and {row["CE"] for row in teacher} == {""}


@pytest.mark.parametrize("dataset", world.KINDS)
def test_the_toys_need_nothing(dataset, capsys):
    found = blocks(capsys, dataset, "--task", "3")
    assert len(found) == 4 and parts(found[0][1])[-4:] == ["ICD 1", "ICD 2", "query", "answer"]
    assert any(row["token"] == "<image> x 4" for row in found[1][1])


def test_the_sheet_of_a_toy_says_its_rule_and_shows_as_many_rows_as_asked_for(capsys, tmp_path):
    path, records = tmp_path / "sheet.png", world.samples("toy-caption", 3, "train")
    for rows in 2, 3:
        show.main(["toy-caption", "--task", "3", "--png", str(path), "--rows", str(rows)])
        with Image.open(path) as sheet:
            assert sheet.size == (4 * 174 + 14, 84 + rows * 212)
            for i in 0, 4 * rows - 1:                            # the first and the last picture
                x, y = 14 + i % 4 * 174, 84 + i // 4 * 212
                enlarged = records[i].image.resize((160, 160), Image.Resampling.NEAREST)
                assert sheet.crop((x, y, x + 160, y + 160)).tobytes() == enlarged.tobytes()
    rule = world.describe(world.task("toy-caption", 3))
    assert capsys.readouterr().out.endswith("\n  ".join([f"{path}: toy-caption, task 3", *rule]) + "\n")


def test_a_sheet_of_real_samples_has_their_pictures(shared, tmp_path, capsys):
    for dataset in ("vqav2", "coco"):
        show.main([dataset, "--data", str(shared / "data"), "--png", str(tmp_path / f"{dataset}.png")])
        with Image.open(tmp_path / f"{dataset}.png") as sheet:
            assert sheet.width == 4 * 254 + 14 and len(sheet.resize((64, 64)).getcolors(4096)) > 500


@pytest.mark.parametrize("words, message", [
    ([], "required: dataset"), (["shew"], "invalid choice: 'shew'"), (["toy", "--lamda-ce", "1"], "did you mean --lambda-ce"),
    (["toy", "--shots", "-1"], "--shots: expected at least 0"), (["toy", "--task", "100000"], "has no task"),
    (["toy", "--rows", "0"], "--rows: expected at least 1"), (["okvqa", "--data", "/nowhere"], "/nowhere/okvqa.*: expected"),
    (["toy", "--model", "/nowhere"], "/nowhere: expected a model folder"),
    (["toy", "--png", "/nowhere/a.png"], "/nowhere/a.png: expected a picture file"),
    (["toy", "--png", "a.xyz"], "a.xyz: expected a picture file")])
def test_mistakes_are_one_line(words, message):
    with pytest.raises(InputError, match=message) as error:
        show.main(words)
    assert "\n" not in str(error.value)
