"""Scores by type, official result files of any system scored without a model, the published question list, odd strings."""

import gzip
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eval as evaluation
from data import DATASETS, load
from metrics.chair import caption_objects, chair, read_synonyms, singular
from metrics.vqa import vqa_digits_articles, vqa_normalize, vqa_strip
from support.files import InputError
from support.results import read_rows, table
from tools import score

UNICODE = st.text(st.characters(exclude_categories=()), max_size=40)
COMMON = settings(max_examples=200, deadline=None)
OKVQA = ["llama2_mcan", "pica_gpt3_VinVL"]
VQAV2 = ["human_annotator_1", "prior_per_question_type", "restyled_model_strings"]


def unpack(source, target):
    """A copy that data.load can read, unzipped if need be."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(gzip.open(source).read() if source.suffix == ".gz" else source.read_bytes())


@pytest.fixture(scope="module")
def root(shared, tmp_path_factory):
    """A --data folder with the questions of the golden scores: all of OK-VQA, and 8,407 of VQA v2's train2014."""
    data, metrics = tmp_path_factory.mktemp("data"), shared / "data/metrics"
    train = shared / "data/text_only/okvqa/mscoco_train2014_annotations.json.gz"
    for source in [*(metrics / "vqa_okvqa_val").glob("*mscoco*"), train]:
        unpack(source, data / "okvqa" / source.name.removesuffix(".gz"))
    for source in (metrics / "vqa_vqav2_train2014_subset").glob("*mscoco*"):
        unpack(source, data / "vqav2" / source.name.removesuffix(".gz"))
    return data


def golden(shared, dataset, system):
    folder = shared / "data/metrics" / {"okvqa": "vqa_okvqa_val", "vqav2": "vqa_vqav2_train2014_subset"}[dataset]
    answers = json.loads((folder / f"{system}_results.json").read_text())
    scores = [json.loads(p.read_text()) for p in sorted(folder.glob(f"{system}_golden*.json"))]
    return folder / f"{system}_results.json", answers, scores


# ---- by type


@pytest.mark.parametrize("system", VQAV2)
def test_vqav2_scores_of_every_answer_and_question_type_are_the_official_ones(shared, root, system):
    path, _, (official,) = golden(shared, "vqav2", system)
    row = score.main([str(path), "--dataset", "vqav2", "--split", "train", "--data", str(root)])
    assert row["score"] == official["accuracy"]["overall"] and row["n"] == official["n_questions"]
    assert row["per_answer_type"] == official["accuracy"]["perAnswerType"]
    assert row["per_question_type"] == official["accuracy"]["perQuestionType"] and len(row["per_question_type"]) > 60


@pytest.mark.parametrize("system", OKVQA)
def test_okvqa_is_scored_stemmed_raw_and_as_the_official_tool_does(shared, root, system):
    path, answers, (official, official_raw) = golden(shared, "okvqa", system)
    samples = {s.id: s for s in load("okvqa", root, "val")}
    asked = [samples[a["question_id"]] for a in answers]
    said = [a["answer"] for a in answers]
    found = evaluation.further_scores("okvqa", asked, said, root)
    assert found["score_of"] == "stemmed"
    assert found["unstemmed_score"] == official["accuracy"]["overall"]
    assert found["raw_score"] == official_raw["accuracy"]["overall"]
    as_they_are = replace(DATASETS["okvqa"], stemmer=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS, "okvqa", as_they_are)
        found = evaluation.further_scores("okvqa", asked, said, root)
    assert found["per_question_type"] == official["accuracy"]["perQuestionType"] and "raw_score" not in found


def test_stemming_answers_as_the_official_ones_are_raises_the_score(shared, root):
    path, _, (official, _) = golden(shared, "okvqa", OKVQA[0])
    row = score.main([str(path), "--dataset", "okvqa", "--data", str(root)])
    assert row["score"] > row["unstemmed_score"] + 3 and row["unstemmed_score"] == official["accuracy"]["overall"]


def test_the_mean_over_types_weighted_by_their_questions_is_the_score(root, shared):
    path, answers, _ = golden(shared, "vqav2", VQAV2[0])
    samples = {s.id: s for s in load("vqav2", root, "train")}
    types = [samples[a["question_id"]].answer_type for a in answers]
    row = score.main([str(path), "--dataset", "vqav2", "--split", "train", "--data", str(root)])
    assert sum(row["per_answer_type"][t] for t in types) / len(types) == pytest.approx(row["score"], abs=0.01)


# ---- result files


def test_the_file_a_run_writes_is_official_and_scores_the_same_again(tiny_folder, shared, tmp_path):
    for dataset, keys in (("okvqa", {"question_id", "answer"}), ("coco", {"image_id", "caption"})):
        common = ["--dataset", dataset, "--data", str(shared / "data"), "--out", str(tmp_path / dataset)]
        row = evaluation.main([*common, "--model", str(tiny_folder), "--limit", "6", "--num-beams", "1"])
        file, = (tmp_path / dataset).glob("*_results.json")
        assert file.name == f"{dataset}_val_zero-shot_n{row['n']}_seed0_results.json"
        content = json.loads(file.read_text())
        assert len(content) == row["n"] and all(x.keys() == keys and isinstance(x[min(keys - {"answer", "caption"})], int)
                                                for x in content)
        again = score.main([str(file), *common])
        assert {k: again[k] for k in ("metric", "score", "n")} == {k: row[k] for k in ("metric", "score", "n")}
        rows = json.loads((tmp_path / dataset / "results.json").read_text())
        assert [r["method"] for r in rows] == ["zero-shot", file.stem]


def test_a_run_writes_the_further_scores_into_its_row(tiny_folder, shared, tmp_path):
    row = evaluation.main(["--dataset", "okvqa", "--data", str(shared / "data"), "--out", str(tmp_path), "--limit", "6",
                           "--model", str(tiny_folder), "--num-beams", "1"])
    assert row["score_of"] == "stemmed" and 0 <= row["raw_score"] <= 100 and set(row["per_answer_type"]) == {"other"}
    assert json.loads((tmp_path / "results.json").read_text()) == [row]


def test_captions_of_another_system_have_pycocoevalcaps_score(shared, tmp_path, capsys):
    at = shared / "data/metrics/cider_karpathy_test_100"
    references, captions = (json.loads((at / name).read_text()) for name in ("references.json", "vinvl_results.json"))
    images = [{"cocoid": int(i), "filepath": "val2014", "filename": f"COCO_val2014_{int(i):012d}.jpg", "split": "test",
               "sentences": [{"raw": r} for r in refs]} for i, refs in sorted(references.items(), key=lambda x: int(x[0]))]
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco/dataset_coco.json").write_text(json.dumps({"images": images}))
    row = score.main([str(at / "vinvl_results.json"), "--dataset", "coco", "--split", "test",
                           "--data", str(tmp_path)])
    expected = json.loads((at / "vinvl_golden.json").read_text())["CIDEr"]
    assert row["score"] == round(100 * expected, 2) and row["n"] == len(captions) == 100
    assert "these alone" not in capsys.readouterr().out


def test_a_file_that_answers_a_part_is_scored_on_that_part_and_says_so(shared, tmp_path, capsys):
    samples = load("okvqa", shared / "data", "val")
    path = tmp_path / "mine.json"
    path.write_text(json.dumps([{"question_id": s.id, "answer": s.answers[0]} for s in reversed(samples[:5])]))
    row = score.main([str(path), "--dataset", "okvqa", "--data", str(shared / "data"), "--out", str(tmp_path)])
    assert row["n"] == 5 and row["unstemmed_score"] > 30
    assert f"answers 5 of the {len(samples)} items of okvqa val" in capsys.readouterr().out
    assert table(read_rows(tmp_path / "results.json")).split()[-3:] == ["–", "–", "–"]


def test_scoring_again_takes_the_place_of_the_older_row(shared, tmp_path):
    first, second, *_ = load("okvqa", shared / "data", "val")
    path = tmp_path / "mine.json"
    words = [str(path), "--dataset", "okvqa", "--data", str(shared / "data"), "--out", str(tmp_path)]
    for answers in [first.answers[0], "nothing"], ["nothing", "nothing"]:
        path.write_text(json.dumps([{"question_id": s.id, "answer": a} for s, a in zip((first, second), answers, strict=True)]))
        row = score.main(words)
    assert read_rows(tmp_path / "results.json") == [row] and row["score"] == 0
    said = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [(x["id"], x["prediction"], x["score"]) for x in said] == [(first.id, "nothing", 0.0), (second.id, "nothing", 0.0)]


@pytest.mark.parametrize("content, message", [
    ([{"question_id": 1, "answer": "a"}], "question_id 1, which is none of them"), ("twice", "every question_id once, found"),
    ([{"question_id": "2971475", "answer": "a"}], "question_id '2971475', which"), ([{"answer": "a"}], "no 'question_id'"),
    ([{"question_id": [1], "answer": "a"}], "unhashable"), ([{"question_id": 1, "answer": None}], "None in the place of text"),
    ([], "an empty one"), ({}, "an empty one"), ({"a": 1}, "indices must be integers"), ([1], "not subscriptable"),
    (5, "not iterable"), (None, "complete JSON")])
def test_a_result_file_that_does_not_fit_is_named_in_one_line(shared, tmp_path, content, message):
    path, first = tmp_path / "bad.json", load("okvqa", shared / "data", "val")[0].id
    content = [{"question_id": first, "answer": "a"}] * 2 if content == "twice" else content
    path.write_text("[" if content is None else json.dumps(content))
    with pytest.raises(InputError, match=f"bad.json: expected.*{message}") as error:
        score.main([str(path), "--dataset", "okvqa", "--data", str(shared / "data")])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("words, message", [
    (["x"], "required: --dataset"), (["x", "--dataset", "toy"], "invalid choice: 'toy'"), (["--chair", "x"], "required: FILE"),
    (["x", "--dataset", "okvqa", "--chair", "y"], "expected --dataset coco, found okvqa"),
    (["x", "--dataset", "okvqa", "--limit", "3"], "expected options that --help names, found --limit")])
def test_options_that_do_not_go_together_are_refused(words, message):
    with pytest.raises(InputError, match=message):
        score.main(words)


def test_a_split_without_annotations_cannot_be_scored(shared, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"question_id": 290843000, "answer": "grey"}]))
    with pytest.raises(InputError, match="expected annotations of vqav2 val to score against, found none"):
        score.main([str(path), "--dataset", "vqav2", "--data", str(shared / "data")])


# ---- the published list of questions


def test_vqav2_is_evaluated_on_the_10000_published_questions_whatever_else_the_files_hold(shared, tmp_path):
    ids = json.loads((shared / "data/vqav2_eval_question_ids.json").read_text())
    everything = sorted({*ids, *range(1000, 40_000), *(i + 1 for i in ids)})
    (tmp_path / "vqav2").mkdir()
    questions = [{"question_id": i, "image_id": i // 1000, "question": "?"} for i in everything]
    annotations = [{"question_id": i, "answers": [{"answer": "a"}] * 10} for i in everything]
    for name, key, records in (("v2_OpenEnded_mscoco_val2014_questions.json", "questions", questions),
                               ("v2_mscoco_val2014_annotations.json", "annotations", annotations)):
        (tmp_path / "vqav2" / name).write_text(json.dumps({key: records}))
    assert [s.id for s in load("vqav2", tmp_path, "val")] == ids and len(ids) == 10_000
    (tmp_path / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({"questions": questions[:1]}))
    with pytest.raises(InputError, match="expected samples of vqav2 val, found none"):
        load("vqav2", tmp_path, "val")


# ---- any string


@COMMON
@given(UNICODE)
def test_stripping_and_the_step_of_digits_and_articles_change_nothing_twice(text):
    for step in (vqa_strip, vqa_digits_articles):
        assert step(step(text)) == step(text)


def test_the_whole_normalisation_is_not_idempotent_and_neither_is_the_official_one():
    assert vqa_normalize("a- b-c") == "bc" and vqa_normalize("a-b-c") == "b c" and vqa_normalize("." * 40) == "." * 8


NODES = read_synonyms("dog, puppy\ntoilet\nchair, seat\nwine glass\n")


@COMMON
@given(st.lists(st.tuples(UNICODE, st.sets(st.sampled_from(["dog", "toilet", "cup"]))), min_size=1, max_size=5))
def test_any_strings_have_chair_scores_from_0_to_1(items):
    captions, truths = map(list, zip(*items, strict=True))
    assert all(0 <= x <= 1 for x in chair(captions, truths, NODES).values())


@COMMON
@given(st.one_of(UNICODE, st.sampled_from(["puppies", "seats", "glasses"])))
def test_a_singular_stays_as_it_is_and_only_nodes_are_found(text):
    assert singular(singular(text, NODES), NODES) == singular(text, NODES)
    assert set(caption_objects(text, NODES)) <= set(NODES.values())
