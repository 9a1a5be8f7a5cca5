"""tools.show: what it prints of a batch is what the model, the alignment and the loss are given."""

import re

import pytest
import torch
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
    for block in capsys.readouterr().out.strip().split("\n\n"):
        title, head, *lines = block.splitlines()
        at = [head.index(name) for name in show.HEAD] + [None]
        cells = [[line[a:b].strip() for a, b in zip(at, at[1:], strict=False)] for line in lines]
        found.append((title, [dict(zip(show.HEAD, row, strict=True)) for row in cells]))
    return found


def expanded(rows):
    """One row a column again: `<image> x 64` is 64 of them."""
    return [row for row in rows for _ in range(int((re.search(r" x (\d+)$", row["token"]) or [0, 1])[1]))]


def parts(rows):
    return list(dict.fromkeys(row["part"] for row in rows))


@pytest.mark.parametrize("more", [[], ["--official"]])
@pytest.mark.parametrize("dataset", ["okvqa", "coco"])
def test_what_is_shown_of_real_data_is_the_batch_part_by_part(dataset, more, either_folder, shared, capsys):
    where = "--data", shared / "data", "--model", either_folder
    found = blocks(capsys, dataset, *where, "--shots", "3", "--batch-size", "2", "--seed", "5", *more)
    samples, _ = data.train_dev(dataset, shared / "data", 1000, 200, 5)
    processor = models.of(either_folder)[1].from_pretrained(either_folder)
    templates = processor.official_templates if more else processor.templates
    queries, icds = next(train.steps_of(samples, 0, 5, batch_size=2, accumulate=1, shots=3))[0]
    template = templates[data.DATASETS[dataset].task]
    batch = data.collate(queries, icds, processor, template)
    assert [title.split(",")[0] for title, _ in found] == ["teacher", "student"] * 2
    for i, (title, lines) in enumerate(found):
        b, source, rows = i // 2, batch.student if i % 2 else batch.teacher, expanded(lines)
        assert f"row {b + 1} of 2: sample {queries[b].id}" in title

        # Its columns
        read = batch.sequence if more else batch.answer
        marks = {"attention": source.attention_mask[b], "aligned": batch.align[b], "CE": read[b] if i % 2 else torch.zeros(0)}
        assert [int(row["id"]) for row in rows] == source.input_ids[b].tolist()
        for name, mark in marks.items():
            assert [row[name] == "1" for row in rows] == [False] * (len(rows) - len(mark)) + mark.tolist(), name
        separators = {(row["token"], row["attention"]) for row in rows if row["part"] == "separator"}
        assert separators == ({("<unk>", "0")} if template.separator else set())

        # Its parts, in their order, with the words of their samples
        before = [] if i % 2 else icds[b]
        shown = {f"ICD {k}": s for k, s in enumerate(before, 1)} | {"query": queries[b]}
        said = {name: processor.decode([int(r["id"]) for r in rows if r["part"] == name]) for name in parts(rows)}
        assert [name for name in said if name[0] in "Iqa" and name != "instruction"] == [*shown, "answer"]
        assert said["answer"].strip() == queries[b].target
        assert all((s.question or "Caption:") in said[name] for name, s in shown.items())

        # Its pictures
        expected = [f"{k} of {len(shown)}: {s.image_id}" for k, s in enumerate([*before, queries[b]], 1)]
        assert [row["image"] for row in rows if row["image"]] == [x for x in expected for _ in range(processor.tokens_per_image)]


def test_train_pys_options_may_stand_here(capsys):
    (_, teacher), (_, student) = blocks(capsys, "toy", "--ce-on", "sequence", "--batch-size", "1", "--lr", "1e-3")
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
            assert sheet.size == (1440, 180 + 414 * rows)
            shown = {colour for _, colour in sheet.convert("RGB").getcolors(10 ** 7)}
        for r in records[0], records[4 * rows - 1]:              # the first and the last picture
            assert {colour for _, colour in r.image.getcolors()} <= shown
        assert not {colour for _, colour in records[4 * rows].image.getcolors()} <= shown
    rule = world.describe(world.task("toy-caption", 3))
    assert capsys.readouterr().out.endswith("\n  ".join([f"{path}: toy-caption, task 3", *rule]) + "\n")


@pytest.mark.parametrize("words, message", [
    (["toy", "--lamda-ce", "1"], "did you mean --lambda-ce"), (["toy-named", "--task", "500"], "has no task"),
    (["toy", "--model", "/nowhere"], "/nowhere: expected a model folder"),
    (["toy", "--png", "a.xyz"], "a.xyz: expected a picture file")])
def test_mistakes_are_one_line(words, message):
    with pytest.raises(InputError, match=message) as error:
        show.main(words)
    assert "\n" not in str(error.value)
