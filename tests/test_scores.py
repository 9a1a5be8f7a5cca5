"""Scores by type, official result files of any system scored without a model, the published question list, odd strings."""

import gzip
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eval as evaluation
from data import DATASETS, load
from metrics.chair import chair, read_synonyms
from support.files import InputError
from tools import score

UNICODE = st.text(st.characters(exclude_categories=()), max_size=40)
COMMON = settings(max_examples=200, deadline=None)


@pytest.fixture(scope="module")
def root(shared, tmp_path_factory):
    """A --data folder with the questions of the golden scores: all of OK-VQA, and 8,407 of VQA v2's train2014."""
    data, metrics = tmp_path_factory.mktemp("data"), shared / "data/metrics"
    train = shared / "data/text_only/okvqa/mscoco_train2014_annotations.json.gz"
    for dataset, sources in (("okvqa", [*(metrics / "vqa_okvqa_val").glob("*mscoco*"), train]),
                             ("vqav2", (metrics / "vqa_vqav2_train2014_subset").glob("*mscoco*"))):
        (data / dataset).mkdir()
        for source in sources:
            content = gzip.open(source).read() if source.suffix == ".gz" else source.read_bytes()
            (data / dataset / source.name.removesuffix(".gz")).write_bytes(content)
    return data


def golden(shared, folder, system):
    """→ path of a system's answers, and what the official tools say of them."""
    folder = shared / "data/metrics" / folder
    scores = [json.loads(p.read_text()) for p in sorted(folder.glob(f"{system}_golden*.json"))]
    return folder / f"{system}_results.json", *scores


def score_file(path, dataset, root, *more):
    return score.main([str(path), "--dataset", dataset, "--data", str(root), *map(str, more)])


def test_vqav2_scores_of_every_answer_and_question_type_are_the_official_ones(shared, root):
    path, official = golden(shared, "vqa_vqav2_train2014_subset", "human_annotator_1")
    row = score_file(path, "vqav2", root, "--split", "train")
    assert row["score"] == official["accuracy"]["overall"] and row["n"] == official["n_questions"]
    assert row["per_answer_type"] == official["accuracy"]["perAnswerType"]
    assert row["per_question_type"] == official["accuracy"]["perQuestionType"] and len(row["per_question_type"]) > 60


def test_okvqa_is_scored_stemmed_raw_and_as_the_official_tool_does(shared, root, monkeypatch):
    path, official, official_raw = golden(shared, "vqa_okvqa_val", "pica_gpt3_VinVL")
    row = score_file(path, "okvqa", root)
    assert row["score_of"] == "stemmed" and row["score"] > row["unstemmed_score"] + 3
    assert row["unstemmed_score"] == official["accuracy"]["overall"]
    assert row["raw_score"] == official_raw["accuracy"]["overall"]
    monkeypatch.setitem(DATASETS, "okvqa", replace(DATASETS["okvqa"], stemmer=None))
    row = score_file(path, "okvqa", root)
    assert row["per_question_type"] == official["accuracy"]["perQuestionType"] and "raw_score" not in row


def test_the_file_a_run_writes_is_official_and_scores_the_same_again(tiny_folder, shared, tmp_path):
    for dataset, keys in (("okvqa", {"question_id", "answer"}), ("coco", {"image_id", "caption"})):
        common = ["--dataset", dataset, "--data", str(shared / "data")]
        row = evaluation.main([*common, "--out", str(tmp_path / dataset), "--model", str(tiny_folder), "--limit", "6",
                               "--num-beams", "1"])
        file, = (tmp_path / dataset).glob("*_results.json")
        assert file.name == f"{dataset}_val_zero-shot_n{row['n']}_seed0_results.json"
        content = json.loads(file.read_text())
        assert len(content) == row["n"] and all(x.keys() == keys and isinstance(x[min(keys - {"answer", "caption"})], int)
                                                for x in content)
        again = score.main([str(file), *common])
        further = {"metric", "score", "n", "raw_score", "unstemmed_score", "per_answer_type"} & row.keys()
        assert all(again[k] == row[k] for k in further) and len(further) == (6 if dataset == "okvqa" else 3)


def test_captions_of_another_system_have_pycocoevalcaps_score(shared, tmp_path, capsys):
    at = shared / "data/metrics/cider_karpathy_test_100"
    references, captions = (json.loads((at / name).read_text()) for name in ("references.json", "vinvl_results.json"))
    images = [{"cocoid": int(i), "filepath": "val2014", "filename": f"COCO_val2014_{int(i):012d}.jpg", "split": "test",
               "sentences": [{"raw": r} for r in refs]} for i, refs in sorted(references.items(), key=lambda x: int(x[0]))]
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco/dataset_coco.json").write_text(json.dumps({"images": images}))
    row = score_file(at / "vinvl_results.json", "coco", tmp_path, "--split", "test")
    expected = json.loads((at / "vinvl_golden.json").read_text())["CIDEr"]
    assert row["score"] == round(100 * expected, 2) and row["n"] == len(captions) == 100
    assert "these alone" not in capsys.readouterr().out


def test_a_part_is_scored_alone_which_is_said(shared, tmp_path, capsys):
    samples, path = load("okvqa", shared / "data", "val"), tmp_path / "mine.json"
    for answers, least in ([samples[0].answers[0], "nothing"], 15), (["nothing", "nothing"], 0):
        records = [{"question_id": s.id, "answer": said} for s, said in zip(samples, answers, strict=False)]
        path.write_text(json.dumps(records[::-1]))
        row = score_file(path, "okvqa", shared / "data")
        assert row["n"] == 2 and row["score"] >= row["unstemmed_score"] >= least
        assert f"answers 2 of the {len(samples)} items of okvqa val" in capsys.readouterr().out
    assert row["score"] == 0


@pytest.mark.parametrize("content, message", [
    ([{"question_id": "2971475", "answer": "a"}], "question_id '2971475', which"), ([{"answer": "a"}], "no 'question_id'"),
    ([{"question_id": 1, "answer": None}], "None in the place of text"), ("twice", "a question_id twice"),
    ([], "an empty one"), (None, "complete JSON")])
def test_a_result_file_that_does_not_fit_is_named_in_one_line(shared, tmp_path, content, message):
    path, first = tmp_path / "bad.json", load("okvqa", shared / "data", "val")[0].id
    content = [{"question_id": first, "answer": "a"}] * 2 if content == "twice" else content
    path.write_text("[" if content is None else json.dumps(content))
    with pytest.raises(InputError, match=f"bad.json: expected.*{message}") as error:
        score_file(path, "okvqa", shared / "data")
    assert "\n" not in str(error.value)


def test_what_has_no_such_score_is_refused(shared, tmp_path):
    for words, message in (["toy"], "invalid choice: 'toy'"), (["okvqa", "--chair", "y"], "expected --dataset coco, found okvqa"):
        with pytest.raises(InputError, match=message):
            score.main(["x", "--dataset", *words])
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"question_id": 290843000, "answer": "grey"}]))
    with pytest.raises(InputError, match="expected annotations of vqav2 val to score against, found none"):
        score_file(path, "vqav2", shared / "data")


def test_vqav2_is_evaluated_on_the_10000_published_questions_whatever_else_the_files_hold(shared, tmp_path):
    ids = json.loads((shared / "data/vqav2_eval_question_ids.json").read_text())
    everything = sorted({*ids, *range(1000, 40_000), *(i + 1 for i in ids)})
    (tmp_path / "vqav2").mkdir()
    questions = [{"question_id": i, "image_id": i // 1000, "question": "?"} for i in everything]
    path = tmp_path / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json"
    path.write_text(json.dumps({"questions": questions}))
    assert [s.id for s in load("vqav2", tmp_path, "val")] == ids and len(ids) == 10_000
    path.write_text(json.dumps({"questions": questions[:1]}))
    with pytest.raises(InputError, match="expected samples of vqav2 val, found none"):
        load("vqav2", tmp_path, "val")


NODES = read_synonyms("dog, puppy\ntoilet\nchair, seat\nwine glass\n")


@COMMON
@given(st.lists(st.tuples(UNICODE, st.sets(st.sampled_from(["dog", "toilet", "cup"]))), min_size=1, max_size=5))
def test_any_strings_have_chair_scores_from_0_to_1(items):
    captions, truths = map(list, zip(*items, strict=True))
    assert all(0 <= x <= 1 for x in chair(captions, truths, NODES).values())
