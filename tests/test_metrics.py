"""The scores are those of the official tools: closed forms by hand, then the tools' own outputs."""

import gzip
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics.cider import cider
from metrics.ptb import ptb_tokenize
from metrics.vqa import vqa_accuracy, vqa_digits_articles, vqa_normalize, vqa_punctuation, vqa_strip

UNICODE = st.text(st.characters(exclude_categories=()), max_size=40)  # lone surrogates as well
TRICKY = st.lists(st.sampled_from(  # what the rules are about, glued together at random
    "a b. I U.S. etc. mr. no. 5 1/2 - -- . ... , ' '' \" ` < > <b> </b> <a @ # $ & &amp; http:// www. .com :) ( ) [ ] "
    "cannot don't 'tis o'clock \xad \xa0 é ½ £ “ ’ … — \n \r \x85 /".split(" ") + [" "]), max_size=20).map("".join)
COMMON = settings(max_examples=200, deadline=None)


def load(path):
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        return json.load(file)


# ---- VQA accuracy
@pytest.mark.parametrize(("matches", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1)])
def test_n_of_ten_annotators_give_the_leave_one_out_mean(matches, score):
    assert vqa_accuracy("cat", ["cat"] * matches + ["dog"] * (10 - matches)) == pytest.approx(score)


def test_nothing_is_normalised_when_all_annotators_agree():
    assert vqa_accuracy("yes.", ["yes"] * 10) == 0
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0
    assert vqa_accuracy(" yes\n", ["yes\t"] * 10) == 1
    assert vqa_accuracy("Yes.", ["yes"] * 9 + ["no"]) == 1


def test_one_truth_has_no_others_to_match_and_no_truth_is_an_error():
    assert vqa_accuracy("yes", ["yes"]) == 0
    assert vqa_accuracy("yes", ["yes", "yes"]) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="at least 1 truth"):
        vqa_accuracy("yes", [])


@pytest.mark.parametrize(("text", "normal"), [
    ("None", "0"), ("a dog and the cat", "dog and cat"), ("ten o'clock", "10 o'clock"), ("dont", "don't"),
    ("couldnt've", "couldn't've"), ("somebody'd", "somebodyd"), ("Im", "im"),  # the table's "Im" meets lower case only
    ("t-shirt", "t shirt"), ("- t-shirt", "tshirt"), ("1,000 t-shirts", "1000 tshirts"), ("a,b", "b"),
    ("3.5", "3.5"), ("5.", "5"), ("u.s.a.", "usa"), ("." * 40, "." * 8), ("ten\nfold\t", "10 fold")])
def test_normalisation_keeps_the_quirks_of_the_official_tool(text, normal):
    assert vqa_normalize(text) == normal


def test_normalised_strings_equal_the_official_ones_step_by_step(shared):
    for text, stripped, punctuation, normal, _ in load(
            shared / "data/metrics/vqa_normalize/vqa_normalize_golden.json")["rows"]:
        assert vqa_strip(text) == stripped
        assert vqa_punctuation(stripped) == punctuation
        assert vqa_digits_articles(punctuation) == vqa_normalize(text) == normal


OKVQA = "vqa_okvqa_val", "mscoco_val2014_annotations.json"
VQAV2 = "vqa_vqav2_train2014_subset", "v2_mscoco_train2014_annotations.json.gz"
OKVQA_SYSTEMS = ["llama1_blip", "llama1_mcan", "llama2_blip", "llama2_mcan",
                 "pica_gpt3_5GT", "pica_gpt3_VinVL", "pica_gpt3_VinVLTag"]
VQAV2_SYSTEMS = ["human_annotator_1", "prior_per_question_type", "restyled_model_strings"]


@pytest.mark.parametrize(("dataset", "system", "field"), [
    *((OKVQA, s, field) for s in OKVQA_SYSTEMS for field in ("answer", "raw_answer")),
    *((VQAV2, s, "answer") for s in VQAV2_SYSTEMS)])
def test_vqa_accuracy_equals_the_official_one_question_by_question(shared, dataset, system, field):
    folder = shared / "data/metrics" / dataset[0]
    golden = load(folder / f"{system}_golden{'_raw_answer' if field == 'raw_answer' else ''}.json")
    answers = {row["question_id"]: row["answer"] for row in load(folder / f"{system}_results.json")}
    scores = {str(a["question_id"]): 100 * vqa_accuracy(answers[a["question_id"]], [x[field] for x in a["answers"]])
              for a in load(folder / dataset[1])["annotations"]}
    assert {question: round(score, 2) for question, score in scores.items()} == golden["evalQA"]
    assert np.mean(list(scores.values())) == pytest.approx(golden["overall_unrounded"], abs=1e-9)


@COMMON
@given(st.one_of(UNICODE, TRICKY), st.lists(st.one_of(UNICODE, TRICKY), min_size=1, max_size=12), st.randoms())
def test_any_strings_have_a_vqa_accuracy_from_0_to_1_whatever_the_order_of_the_truths(answer, truths, random):
    score = vqa_accuracy(answer, truths)
    random.shuffle(truths)
    assert 0 <= score <= 1 and vqa_accuracy(answer, truths) == pytest.approx(score)


# ---- Penn-Treebank tokens
@pytest.mark.parametrize(("text", "tokens"), [
    ("A man's dog, it can't.", "a man 's dog it ca n't"), ("I cannot wanna-be gonna", "i can not wanna-be gon na"),
    ("a t-shirt -- and/or 3,000.5%", "a t-shirt and/or 3,000.5 %"), ("Mr. Smith etc.", "mr. smith etc."),
    ("Go, Mr., now.", "go mr. now"), ("It is a street., ok", "it is a street. ok"), ("no. 5, no. But", "no. 5 no but"),
    ("the U.S. army at 5 p.m.", "the u.s. army at 5 p.m."), ("I am I. The end", "i am i the end"),
    ("(x) [y] {z}", "-lrb- x -rrb- -lsb- y -rsb- -lcb- z -rcb-"), ("8 1/2 or 2½", "8\xa01/2 or 2 1/2"),
    ("(555) 123-4567", "-lrb-555-rrb-\xa0123-4567"), ("<a href='b c'>", "<a\xa0href='b\xa0c'>"),
    ("<a b=c>", "< a b = c >"),
    ("“So” ‘it’ «is» „no’”", "so it is „ no '''"), ("AT&amp;T &lt; €5 £5 5¢", "at&t < $ 5 # 5 5 cents"),
    ("http://a.b/c. x@y.org, #tag @me www.a.org", "http://a.b/c x@y.org, #tag @me www.a.org"),
    (":-) wow!!! ... ok? :(", ":--rrb- wow !!! ok :-lrb-"), ("co\xadop \xad 10° é\U0001f600é", "coop 10 ° é é"),
    ("'tis the '90s, '95 o'clock", "'t is the '90s '95 o'clock"), ("a.py, b.c", "a.py b.c"), ("", ""), (" . ", "")])
def test_caption_tokens_by_hand(text, tokens):
    assert ptb_tokenize([text]) == [tokens]


def test_an_abbreviation_at_the_end_of_a_line_depends_on_the_next_line():
    assert ptb_tokenize(["plan d.", "A man"]) == ["plan d", "a man"]
    assert ptb_tokenize(["plan d.", "Two men"]) == ["plan d.", "two men"]


def test_a_line_break_inside_a_caption_is_a_blank():
    assert ptb_tokenize(["a\nb\r\nc\x0bd\u2028e", "f"]) == ["a b c d e", "f"]


@pytest.mark.parametrize("how", ["as one text", "one by one"])
def test_caption_tokens_equal_the_stanford_tokenizer(shared, how):
    rows = load(shared / "data/metrics/ptb/ptb_golden.json")["rows"]
    texts = [row[0] for row in rows]
    found = ptb_tokenize(texts) if how == "as one text" else [ptb_tokenize([text])[0] for text in texts]
    assert [(t, f, row[1]) for t, f, row in zip(texts, found, rows, strict=True) if f != row[1]] == []  # none remain


def test_texts_that_depend_on_their_surroundings_give_one_of_the_known_results(shared):
    for row in load(shared / "data/metrics/ptb/ptb_context_dependent.json"):
        assert {ptb_tokenize([row["caption"], following])[0] for following in ("A x", "x")} <= set(row["variants"])


@COMMON
@given(st.lists(st.one_of(UNICODE, TRICKY), max_size=5))
def test_any_strings_have_one_line_of_lower_case_tokens_each(texts):
    lines = ptb_tokenize(texts)
    assert len(lines) == len(texts)
    assert all(line == " ".join(filter(None, line.split(" "))) and "\n" not in line for line in lines)
    assert not {".", ",", "''", "``", "-", "--", "...", "?", "!"} & {w for line in lines for w in line.split(" ")}


# ---- CIDEr-D
def test_a_caption_equal_to_its_only_reference_scores_10_if_it_has_4_words_and_less_if_fewer():
    score, each = cider(["w x y z", "k l m", "q"], [["w x y z"], ["k l m"], ["q"]])
    assert each == pytest.approx([10, 7.5, 2.5])
    assert score == pytest.approx(20 / 3)


def test_counts_are_clipped_at_those_of_the_reference():
    _, each = cider(["dog dog", "u"], [["dog cat"], ["q k"]])
    assert each == pytest.approx([10 / 4 / (2 * math.sqrt(2)), 0])  # min(2, 1) · 1 / (2 · √2), unigrams only


def test_length_is_punished_by_a_gaussian_of_the_difference():
    _, each = cider(["w x y z", "q"], [["w x y z k l m"], ["g"]])
    cosines = sum(m / math.sqrt(m * (m + 3)) for m in (4, 3, 2, 1))
    assert each[0] == pytest.approx(10 / 4 * math.exp(-9 / 72) * cosines)


def test_words_of_every_document_and_captions_without_words_count_nothing():
    assert cider(["w x y z"], [["w x y z"]])[0] == 0                              # one item alone
    assert cider(["", "dog"], [["dog"], ["dog", ""]])[1].tolist() == [0, 0]


def test_cider_refuses_lists_that_do_not_fit():
    for candidates, references in (([], []), (["w"], []), (["w", "x"], [["w"]]), (["w"], [[]])):
        with pytest.raises(ValueError, match="1 or more references"):
            cider(candidates, references)


@COMMON
@given(st.lists(st.tuples(st.one_of(UNICODE, TRICKY), st.lists(st.one_of(UNICODE, TRICKY), min_size=1, max_size=3)),
                min_size=1, max_size=4))
def test_any_strings_have_a_cider_from_0_to_10(items):
    candidates, references = map(list, zip(*items, strict=True))
    score, each = cider(candidates, references)
    assert each.shape == (len(items),) and (each >= 0).all() and (each <= 10 + 1e-9).all() and 0 <= score <= 10 + 1e-9


KARPATHY = ["clipretrieval", "contrastive", "magic", "nucleus", "topk", "vinvl", "zerocap"]


@pytest.mark.parametrize(("folder", "system"), [
    *(("cider_karpathy_test", s) for s in KARPATHY),
    *(("cider_karpathy_test_100", s) for s in ("magic", "vinvl", "zerocap")),
    ("cider_val2017", "vinvl_val2014"), ("cider_fakecap", "captions_val2014_fakecap")])
def test_cider_equals_pycocoevalcap_caption_by_caption(shared, folder, system):
    at = shared / "data/metrics" / folder
    golden = load(at / f"{system}_golden.json")
    captions = {str(row["image_id"]): row["caption"] for row in load(at / f"{system}_results.json")}
    if folder == "cider_val2017":
        references = {}
        for row in load(shared / "data/text_only/coco/captions_val2017.json.gz")["annotations"]:
            references.setdefault(str(row["image_id"]), []).append(row["caption"])
    else:
        references = load(at / "references.json")
    images = sorted(golden["CIDEr_per_image"], key=int)
    score, each = cider([captions[i] for i in images], [references[i] for i in images])
    assert score == pytest.approx(golden["CIDEr"], abs=1e-12)
    assert each == pytest.approx([golden["CIDEr_per_image"][i] for i in images], abs=1e-12)
