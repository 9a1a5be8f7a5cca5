"""The toy world: what a rule is, that no downstream rule leaks into pre-training, that pictures show what is said."""

import colorsys
import hashlib
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from metrics.ptb import ptb_tokenize
from metrics.vqa import vqa_normalize
from toy import world

RULE = world.Rule("toy", (1, 7, 10, 12, 1))  # dax? colour, French; wug? shape, Spanish; blick? place, German; fep? ground
SCENE = (0, 3, 0, 2)  # a red star on the left of a dotted ground


def rng():
    return np.random.default_rng(0)


def all_rules(kind):
    return [world.Rule(kind, digits) for digits in itertools.product(*map(range, world.RADIX[kind]))]


def test_rules_worked_out_by_hand():
    said = [world.text(RULE, SCENE, word) for word in range(4)]
    assert said == [("dax?", "rouge it is"), ("wug?", "estrella it is"), ("blick?", "links it is"), ("fep?", "dotted it is")]
    assert world.describe(RULE)[1:] == ["wug? = shape in Spanish", "blick? = place in German", "fep? = ground in English",
                                        "as: {word} it is"]
    said = [world.text(world.Rule("toy-named", (2, 0, 1, 3, 2)), SCENE, word) for word in range(4)]
    assert said == [("colour?", "rot indeed"), ("shape?", "star indeed"), ("place?", "gauche indeed"),
                    ("ground?", "punteado indeed")]
    assert world.text(world.Rule("toy-caption", (1, 0, 2, 3, 0)), SCENE, 3) == (None, "a rouge star links on punteado")


def test_no_word_occurs_twice_so_every_word_shows_its_value_and_language():
    words = [word for values in world.WORDS for value in values for word in value]
    assert world.SIZES == [8, 8, 4, 4] and len(set(words)) == len(words) == 24 * 4
    assert all(len(value) == 4 for values in world.WORDS for value in values)
    assert not set(words) & set(" ".join(world.FORMATS + world.TEMPLATES).split())


def test_answers_survive_the_normalisation_of_vqa_and_caption_metrics():
    words = [word for values in world.WORDS for value in values for word in value]
    words += " ".join(world.FORMATS).replace("{}", "").split()
    assert [vqa_normalize(word) for word in words] == words == ptb_tokenize(words)


def test_different_digits_never_mean_the_same():
    for kind in "toy-named", "toy-caption":
        said = {tuple(world.text(rule, s, w) for s in (SCENE, (7, 7, 3, 3)) for w in range(4)) for rule in all_rules(kind)}
        assert len(said) == math.prod(world.RADIX[kind])


def test_the_words_of_all_texts_are_the_tokens_of_the_checkpoint():
    path = Path(__file__).resolve().parents[1] / "checkpoints/tiny/tokenizer.json"
    tokens = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]
    others = {"<unk>", "<s>", "</s>", "Image:", "Caption:", "\n", "<fake_token_around_image>", "<image>"}
    _, episodes = world.episodes(rng(), 300, 9, world.random_scenes(1000, rng()))
    texts = [text for episode in episodes for pair in episode for text in pair if text is not None]
    assert {token for text in texts for token in text.split(" ")} == tokens.keys() - others and len(tokens) == 122


@pytest.mark.parametrize("kind", world.KINDS)
def test_a_sixth_of_all_rules_is_held_out_whatever_a_digit_is(kind):
    rules = all_rules(kind)[::11 if kind == "toy" else 1]
    held_out = np.array([world.is_held_out(rule) for rule in rules])
    digits = np.array([rule.digits for rule in rules])
    assert held_out.mean() == pytest.approx(1 / 6, abs=0.03)
    for position, radix in enumerate(world.RADIX[kind]):
        shares = [held_out[digits[:, position] == digit].mean() for digit in range(radix)]
        assert shares == pytest.approx([1 / 6] * radix, abs=0.06)


@pytest.mark.parametrize("kind", world.KINDS)
def test_pre_training_draws_seen_rules_and_prefers_english(kind):
    generator = rng()
    rules = [world.random_rule(kind, generator) for _ in range(2000)]
    assert not any(world.is_held_out(rule) for rule in rules)
    assert all(0 <= digit < radix for rule in rules for digit, radix in zip(rule.digits, world.RADIX[kind], strict=True))
    languages = np.array([language for rule in rules for _, language in rule.meanings])
    assert np.bincount(languages) / len(languages) == pytest.approx([0.4, 0.2, 0.2, 0.2], abs=0.03)


@pytest.mark.parametrize("kind", world.KINDS)
def test_the_first_hundred_tasks_are_held_out_distinct_and_diverse(kind):
    tasks = [world.task(kind, n) for n in range(100)]
    assert len(set(tasks)) == 100 and all(map(world.is_held_out, tasks))
    for rule in tasks:
        attributes, languages = zip(*rule.meanings, strict=True)
        assert len(set(attributes)) >= 3 and len(set(languages)) >= 2 and languages.count(0) <= 2
    assert {rule.digits[-1] for rule in tasks} == set(range(world.RADIX[kind][-1]))


def test_the_world_is_the_same_in_every_process_and_forever():
    tasks = [world.task(kind, n).digits for kind in world.KINDS for n in range(9)]
    samples = [sample[1:] for sample in world.samples("toy", 3, "dev")]
    indices, episodes = world.episodes(rng(), 50, 9, world.random_scenes(100, rng()))
    made = json.dumps([tasks, samples, indices.tolist(), episodes])
    assert hashlib.sha256(made.encode()).hexdigest()[:16] == "261fc3938029dc28"


@pytest.mark.parametrize("dataset", world.KINDS)
def test_splits_share_neither_ids_nor_pictures(dataset):
    records = [record for split in world.SPLITS for record in world.samples(dataset, 0, split)]
    records += world.samples(dataset, 1, "dev") + world.samples("toy", 7, "dev")
    assert len({record.image_id for record in records}) == len(records) == 1000 + 200 + 500 + 200 + 200
    assert len({record.image.tobytes() for record in records}) == len(records)


def test_a_dataset_speaks_by_its_one_rule_and_asks_all_four_words():
    rule, records = world.task("toy", 2), world.samples("toy", 2, "test")
    for record in records:
        assert record.image.size == (40, 40) and record.image.mode == "RGB"
        attribute, language = rule.meanings[world.QUESTIONS["toy"].index(record.question)]
        assert record.answer in [world.FORMATS[rule.digits[4]].format(value[language]) for value in world.WORDS[attribute]]
    assert min(sum(record.question == word for record in records) for word in world.QUESTIONS["toy"]) > 90
    assert all(record.question is None for record in world.samples("toy-caption", 0, "dev"))


def test_the_dataset_answers_describe_its_own_pictures():
    language = world.task("toy-caption", 0).digits[0]
    for record in world.samples("toy-caption", 0, "dev"):
        right = [colour for colour in range(8) if world.WORDS[0][colour][language] in record.answer.split()]
        assert right == [judged_colour(np.asarray(record.image))]


def test_episodes_hold_one_seen_rule_each_and_the_shares_of_kinds():
    scenes = world.random_scenes(500, rng())
    indices, episodes = world.episodes(rng(), 1000, 9, scenes)
    assert indices.shape == (1000, 9) and indices.min() >= 0 and indices.max() < 500
    kind_of = {None: "toy-caption"} | {word: kind for kind, words in world.QUESTIONS.items() for word in words}
    kinds = [kind_of[episode[0][0]] for episode in episodes]
    assert {kind: kinds.count(kind) / 1000 for kind in world.SHARES} == pytest.approx(world.SHARES, abs=0.05)
    named = [rule for rule in all_rules("toy-named") if not world.is_held_out(rule)]
    for i in [i for i, kind in enumerate(kinds) if kind == "toy-named"][:20]:       # one seen rule explains nine answers
        words = [world.QUESTIONS["toy-named"].index(asked) for asked, _ in episodes[i]]
        both = list(zip(scenes[indices[i]], words, strict=True))
        assert any([world.text(rule, scene, word) for scene, word in both] == episodes[i] for rule in named)


def object_pixels(picture):
    """(40, 40) bool: the pixels of the object, which is either vivid or black; grounds are pale and nearly grey."""
    high, low = picture.max(-1).astype(int), picture.min(-1).astype(int)
    return (high - low > 60) | (high < 70)


def judged_colour(picture):
    """Digit of the colour from hue, saturation and value of the median object pixel: plain colour names, no table."""
    r, g, b = np.median(picture[object_pixels(picture)], 0) / 255
    hue, _, value = colorsys.rgb_to_hsv(r, g, b)
    degrees = 360 * hue
    if value < 0.28:
        return 7
    if 10 <= degrees < 60 and value < 0.75:
        return 6
    bands = [(12, 0), (65, 1), (175, 2), (245, 3), (300, 4), (347, 5), (361, 0)]
    return next(colour for end, colour in bands if degrees < end)
