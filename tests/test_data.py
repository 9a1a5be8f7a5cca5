"""Real samples, prompts, pixels and tokens, against the published files and transformers."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import IdeficsProcessor, PreTrainedTokenizerFast
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

import data
import models
from data import Processor, Sample, collate, encode_images, load, pack, pick_icds, prompts, row, stemmer, train_dev
from models.idefics1 import Idefics1Config, Idefics1Processor, latest_picture
from support.files import InputError


@pytest.fixture(scope="module")
def processor(tiny_folder):
    return Processor.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def either(either_folder):
    """The processor of either tiny model."""
    return models.of(either_folder)[1].from_pretrained(either_folder)


@pytest.fixture(scope="module")
def words(shared):
    """Idefics1's processor at its published size, with Idefics2's words: its own are not on this machine."""
    return Idefics1Processor(Tokenizer.from_file(str(shared / "data/tokenizer/tokenizer.json")), Idefics1Config())


def test_okvqa_trains_on_the_most_common_raw_answer_and_scores_the_official_ones(shared):
    samples = load("okvqa", shared / "data", "train")
    first = json.loads((shared / "data/okvqa/mscoco_train2014_annotations.json").read_text())["annotations"]
    by_id = {a["question_id"]: a for a in first}
    assert len(samples) == 16
    for s in samples:
        raw = [x["raw_answer"] for x in by_id[s.id]["answers"]]
        assert s.answers == [x["answer"] for x in by_id[s.id]["answers"]] and len(s.answers) == 10
        assert raw.count(s.target) == max(map(raw.count, raw))
        assert s.image.name == f"COCO_train2014_{s.image_id:012d}.jpg" and s.picture().mode


def test_vqav2_trains_on_the_multiple_choice_answer_and_reads_a_split_without_annotations(shared):
    train, val = (load("vqav2", shared / "data", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (33, 5) and train[0].target == "1" and all(len(s.answers) == 10 for s in train)
    assert all(s.answers == [] for s in val)


def test_coco_has_karpathys_splits_and_trains_on_restval_too(shared):
    counts = {split: len(load("coco", shared / "data", split)) for split in ("train", "val", "test")}
    assert counts == {"train": 8 + 15, "val": 2, "test": 12}
    for s in load("coco", shared / "data", "val"):
        assert len(s.answers) >= 5 and s.target == s.answers[0] and s.question is None


def test_train_and_dev_share_no_picture_and_are_the_same_for_a_seed(shared):
    train, dev = train_dev("vqav2", shared / "data", 1000, 200, 0)
    assert len(dev) == 33 // 6 and train and not {s.image_id for s in train} & {s.image_id for s in dev}
    assert [s.id for s in train_dev("vqav2", shared / "data", 1000, 200, 0)[0]] == [s.id for s in train]
    assert len(train_dev("toy", None, 50, 20, 1)[0]) == 50 and len(train_dev("toy", None, 50, 20, 1)[1]) == 20


def samples_of(n):
    return [Sample(i, None, f"question {i}?", [], f"answer {i}", i) for i in range(n)]


def test_demonstrations_are_drawn_without_replacement_never_the_query_and_alike_for_a_seed():
    pool, counts, global_state = samples_of(10), np.zeros(10), random.getstate()
    for i in range(2000):
        picked = pick_icds(pool, pool[3], 4, f"seed {i}")
        assert len({s.id for s in picked}) == 4 and pool[3] not in picked
        counts[[s.id for s in picked]] += 1
    assert counts[3] == 0 and abs(counts[[0, 1, 2, 4, 5, 6, 7, 8, 9]] / 2000 - 4 / 9).max() < 0.06      # 5 sigma
    assert pick_icds(pool, pool[3], 4, "x") == pick_icds(pool, pool[3], 4, "x") != pick_icds(pool, pool[3], 4, "y")
    assert len(pick_icds(pool, pool[3], 9, "x")) == 9 and len(pick_icds(pool, samples_of(11)[10], 10, "x")) == 10
    with pytest.raises(InputError, match="at least 10 training samples"):
        pick_icds(pool, pool[3], 10, "x")
    assert random.getstate() == global_state


# -- tokens
def test_ids_of_19_prompts_are_those_of_the_published_processor(shared, processor, monkeypatch):
    monkeypatch.setattr(processor, "tokens_per_image", 64)                # as published; the tiny model has 4 an image
    for name, prompt in json.loads((shared / "golden/prompts.json").read_text())["idefics2"].items():
        assert processor.encode(processor.expand(prompt["prompt"])) == [i for i, n in prompt["ids_rle"] for _ in range(n)], name


def test_ids_of_19_prompts_are_those_of_transformers_idefics1_processor(shared, words):
    """On the same words (its own ids are checked below, as far as they can be without its vocabulary): one string with <s>, no
    spaces beside a picture, one <image> token a picture."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(shared / "data/tokenizer/tokenizer.json"), bos_token="<s>",
                                        eos_token="</s>", unk_token="<unk>", pad_token="<unk>", padding_side="left")
    judge = IdeficsProcessor(IdeficsImageProcessorPil(image_size=28), tokenizer)
    for name, prompt in json.loads((shared / "golden/prompts.json").read_text())["idefics1"].items():
        parts = prompt["prompt"].split("<image>")
        items = [x for part in parts for x in (part, Image.new("RGB", (9, 9)))][:-1]
        expected = judge(text=[[x for x in items if x != ""]], return_tensors="pt")
        ids = words.encode(words.expand(prompt["prompt"]))
        assert ids == expected["input_ids"][0].tolist(), name
        if prompt["n_images"]:
            sees = expected["image_attention_mask"][0]
            which = sees.argmax(-1).where(sees.any(-1), -1)
            assert torch.equal(latest_picture(torch.tensor([ids]), 32001, 2)[0], which), name


def test_special_tokens_and_pictures_of_idefics1_prompts_are_the_recorded_ones(shared, words):
    """The recorded ids are of its own vocabulary, ours of another: equal up to the words between the special tokens."""
    def skeleton(ids):
        kinds = [i if i in (0, 1, 2, 32000, 32001) else "words" for i in ids]
        return [k for k, before in zip(kinds, [None, *kinds], strict=False) if k != "words" or before != "words"]

    for name, prompt in json.loads((shared / "golden/prompts.json").read_text())["idefics1"].items():
        ids, sees = ([i for i, n in prompt[key] for _ in range(n)] for key in ("ids_rle", "attended_image_rle"))
        assert skeleton(words.encode(words.expand(prompt["prompt"]))) == skeleton(ids), name
        assert latest_picture(torch.tensor([ids]), 32001, 2)[0].tolist() == sees, name


@pytest.mark.parametrize("task", ["vqa", "caption"])
def test_idefics1_has_the_official_prompts_of_its_own(shared, words, task):
    """Question and answer on the picture's line, and in training <unk> before query and answer and </s> behind it."""
    recorded = json.loads((shared / "golden/prompts.json").read_text())["idefics1"]
    icds = {"vqa": [("What color is the cat?", "black"), ("How many dogs?", "2")],
            "caption": [(None, "A black cat sitting on a mat."), (None, "Two dogs running in a field.")]}[task]
    asked = {"vqa": ("Is it sunny?", "yes"), "caption": (None, "A man riding a wave on top of a surfboard.")}[task]
    *icds, query = (Sample(i, None, question, [], answer, i) for i, (question, answer) in enumerate([*icds, asked]))
    short = {"vqa": "vqa", "caption": "cap"}[task]
    ids, _ = row(words, words.templates[task], icds, query, with_answer=False)
    assert ids == words.encode(words.expand(recorded[f"{short}2shot"]["prompt"]))
    template = words.official_templates[task]
    batch = collate([query], [icds], words, template)
    for rows, name in ((batch.teacher, "train_full"), (batch.student, "train_query_answer")):
        expected = words.encode(words.expand(recorded[f"{short}_{name}"]["prompt"]))
        assert rows.input_ids[0].tolist() == expected and rows.position_ids is None, name


def test_ids_of_2495_real_texts_are_those_of_the_published_tokenizer(shared, processor):
    rows = json.loads((shared / "data/metrics/tokenizer/mistral_idefics2_tokenizer_golden.json").read_text())["rows"]
    assert len(rows) == 2495 and [t for t, ids in rows if processor.encode(t) != ids] == []


def test_decoding_gives_the_text_back_without_special_tokens(processor):
    for text in ("a man riding a wave", "Café à Zürich — 東京", "2 dogs"):
        assert processor.decode([*processor.encode(text), 2]) == text


def test_a_token_without_a_row_in_the_model_is_refused_by_name(processor):
    with pytest.raises(InputError, match=r"expected ids below the model's 32002, found <end_of_utterance> = 32002"):
        ids = processor.encode("yes<end_of_utterance>")
        pack([(ids, [data.QUERY] * len(ids))], [], processor)


# -- pixels
def judge(pictures, processor):
    """transformers' PIL processor → pixel_values (N,3,H,W), pixel_mask (N,H,W)."""
    if isinstance(processor, Idefics1Processor):
        values = IdeficsImageProcessorPil()(images=pictures, return_tensors="pt")
        return values, torch.ones_like(values[:, 0]).bool()
    out = Idefics2ImageProcessorPil(do_image_splitting=False)(images=[pictures], return_tensors="pt")
    return out["pixel_values"][0], out["pixel_attention_mask"][0].bool()


@pytest.fixture(params=["processor", "words"], ids=["idefics2", "idefics1"])
def eyes(request):
    return request.getfixturevalue(request.param)


def test_every_jpeg_becomes_the_same_pixels_bit_by_bit(shared, eyes):
    for path in sorted((shared / "data/coco").glob("*/*.jpg")):
        picture = Image.open(path)
        for found, expected in zip(eyes.images([picture]), judge([picture], eyes), strict=True):
            assert torch.equal(found, expected), path


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "LA", "RGBA", "CMYK", "I;16", "I", "F"])
@pytest.mark.parametrize("size", [(1, 1), (50, 31), (981, 980), (100, 1100)])
def test_any_picture_becomes_the_same_pixels_bit_by_bit(eyes, mode, size):
    r = np.random.default_rng(0)
    if mode == "I;16":
        picture = Image.fromarray(r.integers(0, 65536, size[::-1], dtype=np.uint16))
    elif mode in ("RGB", "RGBA"):
        picture = Image.fromarray(r.integers(0, 256, (*size[::-1], len(mode)), dtype=np.uint8))
    else:
        picture = Image.fromarray(r.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).convert(
            {"LA": "RGB"}.get(mode, mode)).convert(mode if mode != "LA" else "L").convert(mode)
    assert picture.mode == mode
    for found, expected in zip(eyes.images([picture]), judge([picture], eyes), strict=True):
        assert torch.equal(found, expected)


def test_pictures_of_different_sizes_are_padded_below_and_on_the_right(processor):
    pictures = [Image.new("RGB", size, (9, 99, 199)) for size in ((640, 480), (400, 700))]
    for found, expected in zip(processor.images(pictures), judge(pictures, processor), strict=True):
        assert torch.equal(found, expected)


# -- batches
def batch_of(processor, task="vqa", lengths=(1, 3, 9)):
    samples = [Sample(i, None, "why " * n + "?", [], "because " * n + "so", i) for i, n in enumerate(lengths)]
    queries, icds = samples, [pick_icds(samples, q, 2, "0") for q in samples]
    return queries, icds, collate(queries, icds, processor, processor.templates[task])


@pytest.mark.parametrize("task", ["vqa", "caption"])
def test_the_last_columns_of_teacher_and_student_are_the_same_tokens(either, task):
    _, _, batch = batch_of(either, task)
    T_q = batch.align.shape[1]
    for t, s, keep in zip(batch.teacher.input_ids, batch.student.input_ids, batch.align, strict=True):
        assert torch.equal(t[-T_q:][keep], s[-T_q:][keep]) and keep[-1] and keep.sum() > 5
        assert either.decode(s[-T_q:][keep]).startswith("Image:")
    assert batch.align.all(1).any()                                       # no wider than the longest query


def test_rows_are_padded_on_the_left_only(either):
    for rows in batch_of(either)[2].teacher, batch_of(either)[2].student:
        assert (rows.attention_mask.int().diff(dim=1) >= 0).all() and rows.attention_mask[:, -1].all()
        assert (rows.input_ids[~rows.attention_mask] == either.pad_id).all() and rows.position_ids is None


def test_every_token_knows_which_part_of_the_prompt_it_is(either):
    queries, icds, batch = batch_of(either)
    template = either.templates["vqa"]
    for query, shown, ids, part in zip(queries, icds, batch.teacher.input_ids, batch.teacher.part, strict=True):
        def said(*kinds, ids=ids, part=part):
            return either.decode(ids[torch.isin(part, torch.tensor(kinds))])

        assert (part.diff() >= 0).all() and ids[part == data.START].tolist() == [either.bos_id]       # in their order
        assert set(ids[part == data.PADDING].tolist()) <= {either.pad_id}
        assert said(data.INSTRUCTION) == template.instruction
        assert said(data.ANSWER) == f"{query.target}\n"
        cue = template.query.split("<image>")[1].strip()
        assert said(data.QUERY).endswith(cue.format(question=query.question)) and said(data.ICD).count("Question: why") == 2
        assert all(f"{cue.format(question=d.question)} {d.target}\n" in said(data.ICD) for d in shown)


def test_official_separators_are_masked_and_of_no_part(either):
    sample = Sample(0, None, "why?", [], "so", 0)
    batch = collate([sample], [[sample]], either, either.official_templates["vqa"])
    for rows, n in (batch.teacher, 2), (batch.student, 1):
        separators = rows.part == data.SEPARATOR
        assert rows.input_ids[separators].tolist() == [0] * n and not rows.attention_mask[separators].any()
    assert not (batch.student.part == data.INSTRUCTION).any() and batch.sequence.sum() == batch.student.attention_mask.sum() - 1


def test_what_is_trained_begins_with_what_is_prompted_at_evaluation(either):
    queries, icds, batch = batch_of(either)
    for demonstrations, rows in ((icds, batch.teacher), ([[]] * 3, batch.student)):
        prompt = prompts(queries, demonstrations, either, either.templates["vqa"])
        for b in range(3):
            asked, trained = (r.input_ids[b][r.attention_mask[b]].tolist() for r in (prompt, rows))
            assert trained[:len(asked)] == asked


def test_images_come_in_the_order_of_their_tokens(either):
    queries, icds, batch = batch_of(either)
    assert [s.id for s in batch.teacher.samples] == [s.id for q, d in zip(queries, icds, strict=True) for s in (*d, q)]
    assert batch.student.samples == queries
    n = (batch.teacher.input_ids == either.image_ids[1]).sum()
    assert n == len(batch.teacher.samples) * either.tokens_per_image


def test_each_picture_is_encoded_once_and_beside_pictures_of_its_size(either_folder):
    model, processor = models.load_model(either_folder, "cpu", "float64")
    sizes = [(400, 400), (400, 400), (500, 380), (400, 400), (378, 378)]
    samples = [Sample(i, Image.new("RGB", size, (40 * i, 9, 9)), None, [], id=i) for i, size in enumerate(sizes)]
    encoded = []

    def encode(values, mask):
        encoded.append(len(values))
        assert mask.all()                                                 # nothing is padded
        return model.encode_images(values, mask)

    features = {3: torch.zeros(1)}
    assert encode_images(model, processor, [*samples, *samples], features, encode=encode) is features
    assert sum(encoded) == 4 and features.pop(3) == 0
    for s in (samples[i] for i in features):
        torch.testing.assert_close(features[s.image_id], model.encode_images(*processor.images([s.image]))[0])
    encode_images(model, processor, samples[:3], features, encode=encode)
    assert set(features) == {0, 1, 2, 4} and sum(encoded) == 4


def test_special_tokens_written_in_a_question_are_not_special(either):
    evil = Sample(0, None, "is <image> or </s><s> {question} {0} a tag?", [], "<unk>yes", 0)
    batch = collate([evil], [[evil]], either, either.templates["vqa"])
    assert (batch.student.input_ids == either.image_ids[1]).sum() == either.tokens_per_image
    assert "{question} {0} a tag?" in either.decode(batch.student.input_ids[0])


def test_okvqa_answers_are_stemmed_as_the_official_ones_are(shared, tmp_path):
    """Learnt from the published training annotations alone, judged on pairs of the whole data set."""
    import gzip
    (tmp_path / "okvqa").mkdir()
    whole = gzip.decompress((shared / "data/text_only/okvqa/mscoco_train2014_annotations.json.gz").read_bytes())
    (tmp_path / "okvqa/mscoco_train2014_annotations.json").write_bytes(whole)
    stem = stemmer(tmp_path)
    pairs = json.loads((shared / "data/metrics/okvqa_stem/okvqa_stem_pairs.json").read_text())
    pairs = pairs["rows"]
    right = sum(stem(raw) == official for raw, official in pairs) / len(pairs)
    unstemmed = sum(raw == official for raw, official in pairs) / len(pairs)
    assert right > 0.95 > unstemmed
