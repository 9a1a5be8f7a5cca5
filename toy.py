"""The toy world: one coloured shape in a picture, and hidden rules that say how to talk about it.  No model, no torch.

A scene is four digits, (colour, shape, place, ground).  Every value has one word in each of four languages.  A hidden
*rule*, fixed within an episode, decides the language of the words and the form of the answer, so the rule can only be
learnt from demonstrations: that is in-context learning.  Three kinds of rule, named like the datasets made from them:

    toy          four made-up question words, each meaning one attribute in one language, and one answer format
    toy-named    the same with honest question words ("colour?"): only the languages and the format are hidden
    toy-caption  no question: a language for each attribute, and one of four sentence templates

A sixth of all rules is held out: pre-training never sees them, the downstream tasks are drawn from them.

    python toy.py show                                    # a contact sheet of task 0: toy.png
    python toy.py show --dataset toy-caption --task 3 --out captions.png
"""

import argparse
import functools
import hashlib
import itertools
import math
import textwrap
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# ---- words ---------------------------------------------------------------------------------------------------------

LANGUAGES = ("English", "French", "German", "Spanish")
# Values are separated by bars, a word for each language.  No word occurs twice, so a word gives away its language.
# Lower case and no punctuation on purpose: VQA and caption metrics normalise both, and must not change the answers.
_TABLE = {
    "colour": """red rouge rot rojo | yellow jaune gelb amarillo | green vert grün verde | blue bleu blau azul
        | purple violet lila morado | pink rose rosa rosado | brown marron braun pardo | black noir schwarz negro""",
    "shape": """circle cercle kreis círculo | square carré quadrat cuadrado | diamond losange raute rombo
        | star étoile stern estrella | cross croix kreuz cruz | heart cœur herz corazón | moon lune mond luna
        | ring anneau reif anillo""",
    "place": """left gauche links izquierda | right droite rechts derecha | top haut oben arriba
        | bottom bas unten abajo""",
    "ground": """plain uni einfarbig liso | striped rayé gestreift rayado | dotted pointillé gepunktet punteado
        | checked quadrillé kariert cuadriculado""",
}
ATTRIBUTES = tuple(_TABLE)
WORDS = tuple(tuple(tuple(value.split()) for value in rows.split("|")) for rows in _TABLE.values())
"""WORDS[attribute][value][language]: str"""
SIZES = tuple(len(values) for values in WORDS)  # (8, 8, 4, 4)

QUESTIONS = {"toy": ("dax?", "wug?", "blick?", "fep?"), "toy-named": tuple(f"{name}?" for name in ATTRIBUTES)}
FORMATS = ("{}", "{} it is", "{} indeed")  # the word that matters comes first: it stands right behind the question
TEMPLATES = (  # all of six words: no template is longer to read, or given away by its length
    "a {colour} {shape} {place} on {ground}",
    "{place} the {shape} is {colour} {ground}",
    "{ground} behind {shape} in {colour} {place}",
    "see {shape} {colour} over {ground} {place}",
)
PROMPT = ("Image:", "Caption:", "\n")


def vocabulary():
    """→ list of str: every token of the toy world, prompt words included, each once, in an order that never changes.
    Special tokens (<s>, <image>, …) are the tokenizer's business."""
    patterns = " ".join(FORMATS + TEMPLATES).split()
    functional = [word for word in patterns if "{" not in word]
    questions = itertools.chain(*QUESTIONS.values())
    words = (word for values in WORDS for value in values for word in value)
    return list(dict.fromkeys(itertools.chain(PROMPT, questions, functional, words)))


# ---- rules ---------------------------------------------------------------------------------------------------------

RADIX = {"toy": (16, 16, 16, 16, 3), "toy-named": (4, 4, 4, 4, 3), "toy-caption": (4, 4, 4, 4, 4)}
KINDS = tuple(RADIX)


@dataclass(frozen=True)
class Rule:
    """kind: one of KINDS; digits: five ints below RADIX[kind].  Digits 0-3 are, for 'toy', attribute * 4 + language of
    the four question words, else the language of the four attributes; the last is the answer format or the template."""

    kind: str
    digits: tuple

    def meaning(self, word):
        """→ (attribute, language) of question word 0-3; in captions of attribute 0-3."""
        return divmod(self.digits[word], 4) if self.kind == "toy" else (word, self.digits[word])


def is_held_out(rule):
    """True for about 1/6 of all rules, the same ones in every process; they are never used in pre-training."""
    digest = hashlib.blake2b(f"{rule.kind} {rule.digits}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 6 == 0


def random_rule(kind, rng, english=0.4, held_out=False):
    """A seen rule of this kind (with held_out=True a held-out one).  Each language is English with this probability,
    else one of the others: so a model without demonstrations has a default to be wrong with.  rng: np.random.Generator.
    """
    while True:
        digits = np.where(rng.random(4) < english, 0, rng.integers(1, 4, 4))
        if kind == "toy":
            digits += 4 * rng.integers(len(ATTRIBUTES), size=4)
        rule = Rule(kind, (*digits.tolist(), int(rng.integers(RADIX[kind][-1]))))
        if is_held_out(rule) == held_out:
            return rule


def _is_task(rule):
    """Held out and worth learning: more than one language and at most two of the four English, or the default is nearly
    right; made-up words ask for three or four different attributes, and no two of them mean the same."""
    meanings = [rule.meaning(word) for word in range(4)]
    attributes, languages = zip(*meanings, strict=True)
    diverse = len(set(attributes)) >= 3 and len(set(meanings)) == 4 and len(set(languages)) >= 2
    return diverse and languages.count(0) <= 2 and is_held_out(rule)


@functools.cache
def task(kind, n):
    """The n-th downstream rule of a kind, n ≥ 0, from a fixed shuffle of all rules (RandomState: its stream is frozen).
    Raises ValueError past the last one: there are over 100 of each kind."""
    if kind not in RADIX:
        raise ValueError(f"unknown toy dataset {kind!r}; there are {', '.join(KINDS)}")
    numbers = np.random.RandomState(0).permutation(math.prod(RADIX[kind]))
    rules = (Rule(kind, tuple(int(d) for d in np.unravel_index(number, RADIX[kind]))) for number in numbers)
    found = next(itertools.islice(filter(_is_task, rules), n, None), None) if n >= 0 else None
    if found is None:
        raise ValueError(f"{kind} has no task {n}")
    return found


def describe(rule):
    """→ list of 5 str: the rule in plain words, digit by digit."""
    lines = [f"{ATTRIBUTES[attribute]} in {LANGUAGES[language]}" for attribute, language in map(rule.meaning, range(4))]
    if rule.kind == "toy":
        lines = [f"{word} = {line}" for word, line in zip(QUESTIONS["toy"], lines, strict=True)]
    pattern = TEMPLATES[rule.digits[-1]] if rule.kind == "toy-caption" else FORMATS[rule.digits[-1]].format("{word}")
    return [*lines, f"as: {pattern}"]


# ---- texts ---------------------------------------------------------------------------------------------------------


def question(rule, word):
    """→ str, question word 0-3 of a rule, one token; None for a caption rule."""
    return QUESTIONS[rule.kind][word] if rule.kind in QUESTIONS else None


def answer(rule, scene, word):
    """→ str, the answer to question word 0-3 about a scene (four digits)."""
    attribute, language = rule.meaning(word)
    return FORMATS[rule.digits[-1]].format(WORDS[attribute][scene[attribute]][language])


def caption(rule, scene):
    """→ str, the caption of a scene (four digits) under a rule of kind toy-caption."""
    words = {name: WORDS[a][scene[a]][rule.digits[a]] for a, name in enumerate(ATTRIBUTES)}
    return TEMPLATES[rule.digits[-1]].format(**words)


def text(rule, scene, word):
    """→ (question or None, answer): what a rule of any kind says about a scene; `word` is ignored for captions."""
    if rule.kind == "toy-caption":
        return None, caption(rule, scene)
    return question(rule, word), answer(rule, scene, word)


# ---- pictures ------------------------------------------------------------------------------------------------------

SIDE = 40  # pixels
_SCALE = 4  # drawn this much larger, then averaged
_VARIANTS = 48  # of every mask and every ground
_RGB = np.array([(222, 34, 38), (250, 205, 20), (36, 158, 66), (40, 92, 220),
                 (128, 48, 178), (255, 128, 190), (134, 84, 38), (24, 24, 28)])  # fmt: skip
_CENTRE = ((-1, 0), (1, 0), (0, -1), (0, 1))  # left, right, top, bottom; y grows downwards


def _disc(radius, x=0.0):
    t = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    return radius * np.stack([np.cos(t), np.sin(t)], 1) + (x, 0)


def _heart():
    t = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y - 2.5], 1) / 15


def _star():
    t = np.arange(10) * np.pi / 5
    return np.stack([np.sin(t), -np.cos(t)], 1) * np.where(np.arange(10) % 2, 0.47, 1.15)[:, None]


_ARM = 0.34  # half the width of an arm of the cross
_SHAPES = (  # (outline, hole or None) in units of the radius, in the order of WORDS
    (_disc(0.97), None),
    (np.array([(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]), None),
    (np.array([(0, -1.15), (0.8, 0), (0, 1.15), (-0.8, 0)]), None),
    (_star(), None),
    (np.array([(-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
               (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)]), None),
    (_heart(), None),
    (_disc(1.05), _disc(0.9, x=0.55)),
    (_disc(1.05), _disc(0.56)),
)  # fmt: skip


def _mask(shape, place, rng):
    """(40, 40) uint8, 255 inside the object: jittered in place, size and angle (± 8 degrees)."""
    radius, angle = rng.uniform(7.3, 9.0), rng.uniform(-0.14, 0.14)
    along, across = rng.uniform(8.6, 9.4), rng.uniform(-2.5, 2.5)
    (x, y), turn = _CENTRE[place], np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])
    centre = SIDE / 2 + along * np.array([x, y]) + across * np.array([y, x])
    image = Image.new("L", (SIDE * _SCALE, SIDE * _SCALE))
    for points, fill in zip(_SHAPES[shape], (255, 0), strict=True):
        if points is not None:
            ImageDraw.Draw(image).polygon([tuple(p) for p in _SCALE * (centre + radius * points @ turn)], fill=fill)
    return np.asarray(image.reduce(_SCALE))


def _ground(ground, rng):
    """(40, 40) uint8, 0 = light and 255 = dark tone: plain, striped, dotted or checked, with a random phase."""
    grid = (np.arange(SIDE * _SCALE) + 0.5) / _SCALE
    period, phase = rng.uniform(7.0, 9.0), rng.uniform(0, 1, 2)
    u, v = grid[None, :] / period + phase[0], grid[:, None] / period + phase[1]
    slope = rng.choice((-1, 1))
    pattern = (
        np.zeros((len(grid), len(grid)), bool),
        (0.75 * (u + slope * v)) % 1 < 0.5,
        (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.27**2,
        (u % 1 < 0.5) ^ (v % 1 < 0.5),
    )[ground]
    return np.asarray(Image.fromarray(pattern.astype(np.uint8) * 255).reduce(_SCALE))


@functools.cache
def _bank():
    """Drawn once: masks (8, 4, variants, 40, 40) by shape and place, grounds (4, variants, 40, 40); uint16 0…256."""
    rng = np.random.default_rng(0)
    n = range(_VARIANTS)
    masks = [[[_mask(shape, place, rng) for _ in n] for place in range(4)] for shape in range(8)]
    grounds = [[_ground(ground, rng) for _ in n] for ground in range(4)]
    return tuple(bank + (bank >> 7) for bank in (np.array(masks, np.uint16), np.array(grounds, np.uint16)))


def _blend(under, over, weight):
    """uint16 all: under where weight = 0, over where weight = 256.  255 * 256 still fits into 16 bits."""
    return (under * (256 - weight) + over * weight) >> 8


def draw(scenes, rng, chunk=512):
    """scenes (N, 4) int, rng np.random.Generator → pictures (N, 40, 40, 3) uint8.  Colour, tints, place, size, angle
    and pattern jitter; the same scenes and rng state give the same pictures."""
    scenes, (masks, grounds) = np.asarray(scenes), _bank()
    n = len(scenes)
    variants = rng.integers(_VARIANTS, size=(2, n))
    light = rng.integers(214, 240, (n, 1)) + rng.integers(-9, 10, (n, 3))  # muted: every ground is nearly grey
    dark = light - rng.integers(44, 66, (n, 1))
    colour = _RGB[scenes[:, 0]] + rng.integers(-14, 15, (n, 1)) + rng.integers(-10, 11, (n, 3))
    tones = np.stack([light, dark, colour]).clip(0, 255).astype(np.uint16)[:, :, None, None, :]
    pictures = np.empty((n, SIDE, SIDE, 3), np.uint8)
    for s in (slice(start, start + chunk) for start in range(0, n, chunk)):  # small chunks stay in the cache
        _, shape, place, ground = scenes[s].T
        background = _blend(tones[0, s], tones[1, s], grounds[ground, variants[1, s], ..., None])
        pictures[s] = _blend(background, tones[2, s], masks[shape, place, variants[0, s], ..., None])
    return pictures


def random_scenes(n, rng):
    """→ (n, 4) int64, uniform over the 8 x 8 x 4 x 4 scenes."""
    return rng.integers(SIZES, size=(n, len(SIZES)))


# ---- datasets and episodes -----------------------------------------------------------------------------------------

SPLITS = {"train": 1000, "dev": 200, "test": 500}


class Record(NamedTuple):
    """One sample: image 40x40 RGB; image_id unique over splits, tasks and datasets; question None in captions."""

    image: Image.Image
    image_id: int
    question: str | None
    answer: str


def samples(dataset, task_number, split):
    """→ list of Record, all under the one held-out rule task(dataset, task_number), pictures and questions drawn from a
    seed of their own for every (dataset, task, split).  Raises ValueError for a name or number that does not exist."""
    rule = task(dataset, task_number)
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of {dataset}; there are {', '.join(SPLITS)}")
    n, split_number = SPLITS[split], list(SPLITS).index(split)
    rng = np.random.default_rng([KINDS.index(dataset), task_number, split_number])
    scenes, words = random_scenes(n, rng), rng.integers(4, size=n).tolist()
    pictures = draw(scenes, rng)
    first = (task_number * len(KINDS) + KINDS.index(dataset)) * 10_000 + split_number * 1000
    texts = [text(rule, scene, word) for scene, word in zip(scenes.tolist(), words, strict=True)]
    return [Record(Image.fromarray(pictures[i]), first + i, *texts[i]) for i in range(n)]


SHARES = {"toy-named": 0.25, "toy-caption": 0.20, "toy": 0.55}


def episodes(rng, n, length, scenes, shares=SHARES, english=0.4, held_out=False):
    """Pre-training: n episodes of `length` examples, each under one random seen rule (with held_out=True, to test, a
    held-out one), about pictures drawn uniformly from a bank whose scenes (M, 4) are given; shares: P(kind).
    → picture indices (n, length) int64, questions and answers: n lists of `length` str (questions None in captions)."""
    kinds = rng.choice(list(shares), n, p=list(shares.values())).tolist()
    rules = [random_rule(kind, rng, english, held_out) for kind in kinds]
    indices, words = rng.integers(len(scenes), size=(n, length)), rng.integers(4, size=(n, length))
    rows = zip(rules, scenes[indices].tolist(), words.tolist(), strict=True)
    texts = [list(zip(*map(text, itertools.repeat(rule), row, word), strict=True)) for rule, row, word in rows]
    return indices, [list(questions) for questions, _ in texts], [list(answers) for _, answers in texts]


# ---- command line --------------------------------------------------------------------------------------------------


def _font(size):
    """A system font where there is one: Pillow's own has no accented letters."""
    for name in ("DejaVuSans.ttf", "Arial.ttf", "arial.ttf"):
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def sheet(title, subtitle, items, columns=4, cell=SIDE * 4, below=52):
    """items: (PIL image, question or None, answer) → PIL.Image, `columns` of them in a row with their texts under them.
    cell, below: width and height of a picture, and height of its texts, in pixels."""
    big, small, gap, head = _font(16), _font(13), 14, 84
    step, letters = cell + below, cell * 21 // 160
    sheet = Image.new("RGB", (columns * (cell + gap) + gap, head + -(-len(items) // columns) * step), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((gap, 10), title, "black", big)
    pen.multiline_text((gap, 34), subtitle, "#666666", small)
    for i, (image, question, answer) in enumerate(items):
        x, y = gap + i % columns * (cell + gap), head + i // columns * step
        scale = cell / max(image.size)
        resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        sheet.paste(image.resize([max(1, round(side * scale)) for side in image.size], resample), (x, y))
        if question:
            lines = textwrap.wrap(question, letters)
            pen.multiline_text((x, y + cell + 4), "\n".join(lines), "#888888", small, spacing=3)
            pen.text((x, y + cell + 4 + 16 * len(lines)), answer, "black", big)
        else:
            pen.multiline_text((x, y + cell + 5), textwrap.fill(answer, letters), "black", small, spacing=3)
    return sheet


def contact_sheet(dataset, task_number, columns=4, rows=6):
    """→ PIL.Image: the hidden rule, then the first training samples, four times enlarged, with their texts."""
    records, lines = samples(dataset, task_number, "train")[: columns * rows], describe(task(dataset, task_number))
    whole = "  ·  ".join(line.replace(" ", "\u00a0") for line in lines)  # so that lines break between phrases only
    items = [(record.image, record.question, record.answer) for record in records]
    return sheet(f"{dataset}, task {task_number}", textwrap.fill(whole, 92), items, columns)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    show = parser.add_subparsers(dest="command", required=True).add_parser("show", help="write a contact sheet as PNG")
    show.add_argument("--dataset", choices=KINDS, default="toy", help="kind of hidden rule (default %(default)s)")
    show.add_argument("--task", type=int, default=0, metavar="N", help="number of the held-out rule (default 0)")
    show.add_argument("--rows", type=int, default=6, metavar="N", help="rows of four pictures (default %(default)s)")
    show.add_argument("--out", default="toy.png", metavar="FILE", help="PNG to write (default %(default)s)")
    args = parser.parse_args(argv)
    try:
        contact_sheet(args.dataset, args.task, rows=args.rows).save(args.out)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{args.out}: {args.dataset}, task {args.task}\n  " + "\n  ".join(describe(task(args.dataset, args.task))))


if __name__ == "__main__":
    main()
