"""The toy world: what a rule is, that no downstream rule leaks into pre-training, that pictures show what is said."""

import colorsys
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from toy import world

RULE = world.Rule("toy", (1, 7, 10, 12, 1))  # dax? colour, French; wug? shape, Spanish; blick? place, German; fep? ground
SCENE = (0, 3, 0, 2)  # a red star on the left of a dotted ground


def rng():
    return np.random.default_rng(0)


def all_rules(kind):
    return [world.Rule(kind, digits) for digits in itertools.product(*map(range, world.RADIX[kind]))]


# ---- words and rules ----


def test_a_rule_worked_out_by_hand():
    said = [world.text(RULE, SCENE, word) for word in range(4)]
    assert said == [("dax?", "rouge it is"), ("wug?", "estrella it is"), ("blick?", "links it is"), ("fep?", "dotted it is")]
    assert world.describe(RULE)[1] == "wug? = shape in Spanish"


def test_a_named_rule_keeps_the_attributes_and_hides_the_languages():
    rule = world.Rule("toy-named", (2, 0, 1, 3, 2))
    said = [world.text(rule, SCENE, word) for word in range(4)]
    assert said == [("colour?", "rot indeed"), ("shape?", "star indeed"),
                    ("place?", "gauche indeed"), ("ground?", "punteado indeed")]  # fmt: skip


def test_a_caption_rule_is_a_template_and_four_languages():
    rule = world.Rule("toy-caption", (1, 0, 2, 3, 0))
    assert world.text(rule, SCENE, 3) == (None, "a rouge star links on punteado")
    orders = {tuple(part for part in template.split() if "{" in part) for template in world.TEMPLATES}
    assert len(orders) == 4  # four word orders, each of all four attributes
    assert all(sorted(order) == sorted(f"{{{name}}}" for name in world.ATTRIBUTES) for order in orders)


def test_no_word_occurs_twice_so_every_word_shows_its_value_and_language():
    words = [word for values in world.WORDS for value in values for word in value]
    assert [len(values) for values in world.WORDS] == list(world.SIZES) == [8, 8, 4, 4]
    assert all(len(value) == 4 for values in world.WORDS for value in values)
    assert len(set(words)) == len(words) == 24 * 4
    assert not set(words) & set(" ".join(world.FORMATS + world.TEMPLATES).split())


def test_answers_survive_the_normalisation_of_vqa_and_caption_metrics():
    texts = [word for values in world.WORDS for value in values for word in value]
    texts += [word for pattern in world.FORMATS for word in pattern.replace("{}", "").split()]
    changed_by_metrics = {"a", "an", "the", "none", "zero", "one", "two", "three"}
    assert all(text.isalpha() and text == text.casefold().replace("weiss", "weiß") for text in texts)
    assert not changed_by_metrics & set(texts)


def test_different_digits_never_mean_the_same():
    for kind in ("toy-named", "toy-caption"):
        scenes = [SCENE, (7, 7, 3, 3)]
        said = {tuple(world.text(rule, s, w) for s in scenes for w in range(4)) for rule in all_rules(kind)}
        assert len(said) == math.prod(world.RADIX[kind])


def test_every_text_splits_into_vocabulary_tokens():
    vocabulary, texts = world.vocabulary(), []
    assert len(vocabulary) == len(set(vocabulary)) == 117
    _, questions, answers = world.episodes(rng(), 300, 9, world.random_scenes(1000, rng()))
    for asked, said in zip(questions, answers, strict=True):
        texts += [text for text in asked + said if text is not None]
    used = {token for text in texts for token in text.split(" ")}
    assert used == set(vocabulary) - set(world.PROMPT)


# ---- held-out rules ----


@pytest.mark.parametrize("kind", world.KINDS)
def test_a_sixth_of_all_rules_is_held_out_whatever_a_digit_is(kind):
    rules = all_rules(kind)[:: 11 if kind == "toy" else 1]
    held_out, digits = np.array([world.is_held_out(rule) for rule in rules]), np.array([rule.digits for rule in rules])
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
    languages = np.array([rule.meaning(word)[1] for rule in rules for word in range(4)])
    assert np.bincount(languages) / len(languages) == pytest.approx([0.4, 0.2, 0.2, 0.2], abs=0.03)
    assert world.is_held_out(world.random_rule(kind, generator, held_out=True))


@pytest.mark.parametrize("kind", world.KINDS)
def test_the_first_hundred_tasks_are_held_out_distinct_and_diverse(kind):
    tasks = [world.task(kind, n) for n in range(100)]
    assert len(set(tasks)) == 100 and all(map(world.is_held_out, tasks))
    for rule in tasks:
        attributes, languages = zip(*map(rule.meaning, range(4)), strict=True)
        assert len(set(attributes)) >= 3 and len(set(languages)) >= 2 and languages.count(0) <= 2
    assert {rule.digits[-1] for rule in tasks} == set(range(world.RADIX[kind][-1]))


def test_errors_name_what_was_asked_and_what_there_is():
    for asked, message in [(("toys", 0, "dev"), "toy-named"), (("toy", 0, "val"), "train, dev, test"),
                           (("toy", -1, "dev"), "no task -1"), (("toy-named", 500, "dev"), "no task 500")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            world.samples(*asked)


# ---- datasets and episodes ----

DIGEST = """
import hashlib, json, numpy as np
from toy import world
tasks = [world.task(kind, n).digits for kind in world.KINDS for n in range(9)]
digest = hashlib.sha256(json.dumps([world.vocabulary(), tasks]).encode())
for record in world.samples("toy", 3, "dev"):
    digest.update(record.image.tobytes() + f"{record[1:]}".encode())
rng = np.random.default_rng(5)
indices, *texts = world.episodes(rng, 50, 9, world.random_scenes(100, rng))
digest.update(indices.astype("<i8").tobytes() + json.dumps(texts).encode())
print(digest.hexdigest())
"""


def test_every_process_makes_the_same_world():
    root = Path(world.__file__).parents[1]
    environments = [os.environ | {"PYTHONHASHSEED": seed} for seed in ("1", "2")]
    runs = [subprocess.run([sys.executable, "-c", DIGEST], cwd=root, env=e, capture_output=True) for e in environments]
    assert runs[0].stdout == runs[1].stdout != b"", runs[0].stderr.decode()


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
        attribute, language = rule.meaning(world.QUESTIONS["toy"].index(record.question))
        said = {world.FORMATS[rule.digits[4]].format(value[language]) for value in world.WORDS[attribute]}
        assert record.answer in said
    counts = [sum(record.question == word for record in records) for word in world.QUESTIONS["toy"]]
    assert min(counts) > 90
    assert all(record.question is None for record in world.samples("toy-caption", 0, "dev"))


def test_the_dataset_answers_describe_its_own_pictures():
    records = world.samples("toy-caption", 0, "dev")
    rule = world.task("toy-caption", 0)
    for record in records:
        right = [colour for colour in range(8) if world.WORDS[0][colour][rule.digits[0]] in record.answer.split()]
        assert right == [judged_colour(np.asarray(record.image))]


def test_episodes_hold_one_seen_rule_each_and_the_shares_of_kinds():
    scenes = world.random_scenes(500, rng())
    indices, questions, answers = world.episodes(rng(), 1000, 9, scenes)
    assert indices.shape == (1000, 9) and indices.min() >= 0 and indices.max() < 500
    kind_of = dict.fromkeys(world.QUESTIONS["toy"], "toy") | dict.fromkeys(world.QUESTIONS["toy-named"], "toy-named")
    kinds = [kind_of.get(row[0], "toy-caption") for row in questions]
    shares = {kind: kinds.count(kind) / 1000 for kind in world.SHARES}
    assert shares == pytest.approx(world.SHARES, abs=0.05)
    named = [rule for rule in all_rules("toy-named") if not world.is_held_out(rule)]
    for i in [i for i, kind in enumerate(kinds) if kind == "toy-named"][:20]:  # one seen rule explains nine answers
        asked = [world.QUESTIONS["toy-named"].index(word) for word in questions[i]]
        rows = scenes[indices[i]].tolist()
        assert any([world.text(rule, s, w)[1] for s, w in zip(rows, asked, strict=True)] == answers[i] for rule in named)


def test_episodes_of_held_out_rules_of_one_kind_can_be_asked_for():
    scenes = world.random_scenes(64, rng())
    _, questions, answers = world.episodes(rng(), 20, 3, scenes, shares={"toy-caption": 1.0}, held_out=True)
    assert all(word is None for row in questions for word in row)
    assert all(len(answer.split()) == 6 for row in answers for answer in row)


# ---- pictures, judged by code that shares nothing with the drawing ----


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


def judged_place(picture):
    """Digit of the place from the centre of mass of the object, relative to the centre of the picture."""
    y, x = np.argwhere(object_pixels(picture)).mean(0) - 19.5
    return (0 if x < 0 else 1) if abs(x) > abs(y) else (2 if y < 0 else 3)


def test_colour_and_place_can_be_read_from_the_pixels():
    scenes = world.random_scenes(400, rng())
    pictures = world.draw(scenes, rng())
    assert pictures.shape == (400, 40, 40, 3) and pictures.dtype == np.uint8
    judged = np.array([(judged_colour(picture), judged_place(picture)) for picture in pictures])
    assert (judged == scenes[:, [0, 2]]).mean(0).tolist() == [1.0, 1.0]


def test_shapes_can_be_read_by_matching_the_outlines():
    """Nearest neighbour among 15 of each shape: the object's pixels within their bounding box, and its proportions."""
    def outline(picture):
        points = np.argwhere(object_pixels(picture))
        low, high = points.min(0), points.max(0)
        grid = np.stack(np.meshgrid(*[np.linspace(0, 1, 16)] * 2, indexing="ij"), -1) * (high - low) + low
        stretched = object_pixels(picture)[tuple(grid.round().astype(int).reshape(-1, 2).T)]
        ratio = (high - low)[1] / (high - low)[0]
        return np.append(stretched.astype(float), 20 * ratio)

    def batch(shapes, generator):
        scenes = world.random_scenes(len(shapes), generator)
        scenes[:, 1] = shapes
        return np.array([outline(picture) for picture in world.draw(scenes, generator)])

    generator = rng()
    known, asked = np.repeat(np.arange(8), 15), np.tile(np.arange(8), 40)
    distance = ((batch(asked, generator)[:, None] - batch(known, generator)[None]) ** 2).sum(-1)
    assert (known[distance.argmin(1)] == asked).mean() > 0.98


def test_grounds_can_be_read_from_how_brightness_repeats():
    """Plain: flat.  Striped: alike along one diagonal, not the other.  Dotted: few dark pixels.  Checked: the rest."""
    scenes = world.random_scenes(400, rng())
    pictures, right = world.draw(scenes, rng()).astype(float).mean(-1), 0
    for picture, (_, _, place, ground) in zip(pictures, scenes, strict=True):
        ys, xs = [((0, 40), (24, 40)), ((0, 40), (0, 16)), ((24, 40), (0, 40)), ((0, 16), (0, 40))][place]
        half = picture[slice(*ys), slice(*xs)]  # the strip far from the object
        if np.ptp(half) < 12:
            judged = 0
        else:
            dark = (half < (half.max() + half.min()) / 2) * 2.0 - 1
            down, up = (dark[3:, 3:] * dark[:-3, :-3]).mean(), (dark[3:, :-3] * dark[:-3, 3:]).mean()
            judged = 1 if abs(down - up) > 0.8 else 2 if (dark > 0).mean() < 0.37 else 3
        right += judged == ground
    assert right / 400 > 0.97


def test_the_object_lies_inside_the_picture():
    pictures = world.draw(world.random_scenes(400, rng()), rng())
    border = np.ones((40, 40), bool)
    border[1:-1, 1:-1] = False
    assert np.mean([object_pixels(picture)[border].sum() for picture in pictures]) < 1
