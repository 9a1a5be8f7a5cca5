"""The toy world: one coloured shape in a picture, and hidden rules that say how to talk about it.

A scene is four digits, (colour, shape, place, ground). Every value has a word in each of four languages.
A hidden *rule*, fixed within an episode, decides the language of the words and the form of the answer. It can
only be learnt from demonstrations: that is in-context learning. There are three kinds of rule:

    toy          four made-up question words, each meaning an attribute in one language, and an answer format
    toy-named    the same with honest question words ("colour?"): languages and format alone are hidden
    toy-caption  no question: a language for each attribute, and one of four sentence templates

Pre-training never sees a sixth of all rules; the downstream tasks are drawn from these.
"""

import functools
import hashlib
import itertools
from collections import namedtuple

import numpy as np
from PIL import Image, ImageDraw

# --- Words --------------------------------------------------------------------------------------------------
LANGUAGES = ["English", "French", "German", "Spanish"]
# Values are separated by bars, a word for each language. No word occurs twice, so it gives away its language.
# Lower case and no punctuation: metrics normalise both. Each is a token of checkpoints/tiny/tokenizer.json.
TABLE = {
    "colour": """red rouge rot rojo | yellow jaune gelb amarillo | green vert grün verde | blue bleu blau azul
    | purple violet lila morado | pink rose rosa rosado | brown marron braun pardo
    | black noir schwarz negro""",
    "shape": """circle cercle kreis círculo | square carré quadrat cuadrado | diamond losange raute rombo
    | star étoile stern estrella | cross croix kreuz cruz | heart cœur herz corazón | moon lune mond luna
    | ring anneau reif anillo""",
    "place": """left gauche links izquierda | right droite rechts derecha | top haut oben arriba
    | bottom bas unten abajo""",
    "ground": """plain uni einfarbig liso | striped rayé gestreift rayado
    | dotted pointillé gepunktet punteado | checked quadrillé kariert cuadriculado""",
}
ATTRIBUTES = list(TABLE)
WORDS = [[v.split() for v in row.split("|")] for row in TABLE.values()]    # [attribute][value][language]
SIZES = [len(values) for values in WORDS]                                  # [8, 8, 4, 4]

QUESTIONS = {"toy": ["dax?", "wug?", "blick?", "fep?"], "toy-named": [f"{name}?" for name in ATTRIBUTES]}
FORMATS = ["{}", "{} it is", "{} indeed"]    # the word that matters comes first, right behind the question
TEMPLATES = ["a {colour} {shape} {place} on {ground}",         # six words each: no length gives one away
             "{place} the {shape} is {colour} {ground}",
             "{ground} behind {shape} in {colour} {place}",
             "see {shape} {colour} over {ground} {place}"]


# --- Rules --------------------------------------------------------------------------------------------------
RADIX = {"toy": (16, 16, 16, 16, 3), "toy-named": (4, 4, 4, 4, 3), "toy-caption": (4, 4, 4, 4, 4)}
KINDS = list(RADIX)


class Rule(namedtuple("Rule", "kind digits")):
    """Digits 0-3 are, for "toy", attribute * 4 + language of the four question words, else the language of
    each attribute; the last is the format or the template. Each is below that of RADIX[kind]."""

    @property
    def meanings(self):
        """[(attribute, language)] of the four question words; in captions of the four attributes."""
        digits = self.digits[:4]
        return [divmod(digit, 4) for digit in digits] if self.kind == "toy" else list(enumerate(digits))


def is_held_out(rule):
    """True for about 1/6 of all rules, the same ones in every process; pre-training never uses them."""
    digest = hashlib.blake2b(f"{rule.kind} {rule.digits}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 6 == 0


def random_rule(kind, rng):
    """For pre-training. Four words in ten are English: without demonstrations, a default to be wrong with."""
    while True:
        digits = np.where(rng.random(4) < 0.4, 0, rng.integers(1, 4, 4))
        if kind == "toy":
            digits += 4 * rng.integers(len(ATTRIBUTES), size=4)
        rule = Rule(kind, (*digits.tolist(), int(rng.integers(RADIX[kind][-1]))))
        if not is_held_out(rule):
            return rule


def is_task(rule):
    """Held out and worth learning: more than one language and at most two of the four English, or the default
    is nearly right; made-up words ask for at least three attributes, and no two of them mean the same."""
    attributes, languages = zip(*rule.meanings, strict=True)
    diverse = len(set(attributes)) >= 3 and len(set(rule.meanings)) == 4 and len(set(languages)) >= 2
    return diverse and languages.count(0) <= 2 and is_held_out(rule)


@functools.cache
def task(kind, n):
    """The n-th downstream rule of a kind, of over 100. Raises ValueError past the last one."""
    numbers = np.random.RandomState(0).permutation(np.prod(RADIX[kind]))         # a stream that never changes
    rules = (Rule(kind, tuple(map(int, np.unravel_index(number, RADIX[kind])))) for number in numbers)
    for found in itertools.islice(filter(is_task, rules), n, None):
        return found
    raise ValueError(f"{kind} has no task {n}")


def describe(rule):
    """→ list of 5 str: the rule in plain words, digit by digit."""
    lines = [f"{ATTRIBUTES[attribute]} in {LANGUAGES[language]}" for attribute, language in rule.meanings]
    if rule.kind == "toy":
        lines = [f"{word} = {line}" for word, line in zip(QUESTIONS["toy"], lines, strict=True)]
    forms = TEMPLATES if rule.kind == "toy-caption" else FORMATS
    return [*lines, "as: " + forms[rule.digits[-1]].replace("{}", "{word}")]


def text(rule, scene, word):
    """→ (question, answer): what a rule says of a scene, four digits. word: which question, if any."""
    if rule.kind == "toy-caption":
        words = {ATTRIBUTES[a]: WORDS[a][scene[a]][language] for a, language in rule.meanings}
        return None, TEMPLATES[rule.digits[-1]].format(**words)
    attribute, language = rule.meanings[word]
    said = WORDS[attribute][scene[attribute]][language]
    return QUESTIONS[rule.kind][word], FORMATS[rule.digits[-1]].format(said)


# --- Pictures -----------------------------------------------------------------------------------------------
SIDE = 40                    # pixels
SCALE = 4                    # drawn this much larger, then averaged
VARIANTS = 48                # of every mask and every ground
RGB = [(222, 34, 38), (250, 205, 20), (36, 158, 66), (40, 92, 220),
       (128, 48, 178), (255, 128, 190), (134, 84, 38), (24, 24, 28)]
CENTRE = [(-1, 0), (1, 0), (0, -1), (0, 1)]                      # left, right, top, bottom; y grows downwards

T = np.linspace(0, 2 * np.pi, 60, endpoint=False)
CIRCLE = np.stack([np.cos(T), np.sin(T)], 1)
HEART_Y = 13 * np.cos(T) - 5 * np.cos(2 * T) - 2 * np.cos(3 * T) - np.cos(4 * T)
HEART = np.stack([16 * np.sin(T) ** 3, -HEART_Y - 2.5], 1) / 15
TIPS = np.arange(10) * np.pi / 5
STAR = np.stack([np.sin(TIPS), -np.cos(TIPS)], 1) * np.array([1.15, 0.47] * 5)[:, None]
ARM = 0.34                   # half the width of an arm of the cross
CROSS = [(-ARM, -1), (ARM, -1), (ARM, -ARM), (1, -ARM), (1, ARM), (ARM, ARM),
         (ARM, 1), (-ARM, 1), (-ARM, ARM), (-1, ARM), (-1, -ARM), (-ARM, -ARM)]
SQUARE = [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
DIAMOND = [(0, -1.15), (0.8, 0), (0, 1.15), (-0.8, 0)]
SHAPES = [[0.97 * CIRCLE], [SQUARE], [DIAMOND], [STAR], [CROSS], [HEART],       # in the order of WORDS:
          [1.05 * CIRCLE, 0.9 * CIRCLE + (0.55, 0)], [1.05 * CIRCLE, 0.56 * CIRCLE]]       # outline, hole


def draw_mask(shape, place, rng):
    """(40,40) uint8, 255 inside the object: jittered in place, size and angle (± 8 degrees)."""
    radius = rng.uniform(7.3, 9.0)
    angle = rng.uniform(-0.14, 0.14)
    along = rng.uniform(8.6, 9.4)
    across = rng.uniform(-2.5, 2.5)
    x, y = CENTRE[place]
    turn = np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])
    centre = SIDE / 2 + along * np.array([x, y]) + across * np.array([y, x])
    image = Image.new("L", (SIDE * SCALE, SIDE * SCALE))
    for points, fill in zip(SHAPES[shape], (255, 0), strict=False):
        outline = SCALE * (centre + radius * np.array(points) @ turn)
        ImageDraw.Draw(image).polygon([tuple(p) for p in outline], fill=fill)
    return np.asarray(image.reduce(SCALE))


def draw_ground(ground, rng):
    """(40,40) uint8, 0 = light, 255 = dark tone: plain, striped, dotted or checked, with a random phase."""
    grid = (np.arange(SIDE * SCALE) + 0.5) / SCALE
    period = rng.uniform(7.0, 9.0)
    phase = rng.uniform(0, 1, 2)
    slope = rng.choice((-1, 1))
    u = grid[None, :] / period + phase[0]
    v = grid[:, None] / period + phase[1]
    patterns = [np.zeros((len(grid), len(grid)), bool),
                (0.75 * (u + slope * v)) % 1 < 0.5,
                (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.27**2,
                (u % 1 < 0.5) ^ (v % 1 < 0.5)]
    return np.asarray(Image.fromarray(patterns[ground].astype(np.uint8) * 255).reduce(SCALE))


@functools.cache
def bank():
    """Drawn once: masks (8,4,variants,40,40) by shape and place, grounds (4,variants,40,40); uint16."""
    rng = np.random.default_rng(0)
    n = range(VARIANTS)
    masks = [[[draw_mask(shape, place, rng) for _ in n] for place in range(4)] for shape in range(8)]
    grounds = [[draw_ground(ground, rng) for _ in n] for ground in range(4)]
    return [x + (x >> 7) for x in (np.array(masks, np.uint16), np.array(grounds, np.uint16))]


def blend(under, over, weight):
    """uint16 all: under where weight = 0, over where weight = 256. 255 * 256 still fits into 16 bits."""
    return (under * (256 - weight) + over * weight) >> 8


def draw(scenes, rng):
    """scenes (N,4) int, rng np.random.Generator → pictures (N,40,40,3) uint8, each with its own jitter."""
    masks, grounds = bank()
    n = len(scenes)
    variants = rng.integers(VARIANTS, size=(2, n))
    light = rng.integers(214, 240, (n, 1)) + rng.integers(-9, 10, (n, 3))     # muted: grounds are nearly grey
    dark = light - rng.integers(44, 66, (n, 1))
    colour = np.array(RGB)[scenes[:, 0]] + rng.integers(-14, 15, (n, 1)) + rng.integers(-10, 11, (n, 3))
    tones = np.stack([light, dark, colour]).clip(0, 255).astype(np.uint16)[:, :, None, None, :]
    _, shape, place, ground = scenes.T
    background = blend(tones[0], tones[1], grounds[ground, variants[1], ..., None])
    return blend(background, tones[2], masks[shape, place, variants[0], ..., None]).astype(np.uint8)


def random_scenes(n, rng):
    """→ (n,4) int64, uniform over the 8 x 8 x 4 x 4 scenes."""
    return rng.integers(SIZES, size=(n, len(SIZES)))


# --- Datasets and episodes ----------------------------------------------------------------------------------
SPLITS = {"train": 1000, "dev": 200, "test": 500}
SHARES = {"toy-named": 0.25, "toy-caption": 0.20, "toy": 0.55}         # of pre-training

Record = namedtuple("Record", "image image_id question answer")


def samples(dataset, task_number, split):
    """→ list of Record (a PIL image, a number unique in all splits, tasks and datasets, question or None,
    answer), all under the rule task(dataset, task_number). Raises ValueError for an unknown split."""
    rule = task(dataset, task_number)
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of {dataset}; there are {', '.join(SPLITS)}")
    n = SPLITS[split]
    kind, part = KINDS.index(dataset), list(SPLITS).index(split)
    rng = np.random.default_rng([kind, task_number, part])
    scenes = random_scenes(n, rng)
    words = rng.integers(4, size=n)
    pictures = draw(scenes, rng)
    first = (task_number * len(KINDS) + kind) * 10_000 + part * 1000
    texts = [text(rule, scene, word) for scene, word in zip(scenes, words, strict=True)]
    return [Record(Image.fromarray(pictures[i]), first + i, *texts[i]) for i in range(n)]


def episodes(rng, n, length, scenes):
    """n episodes of `length` examples about pictures of a bank with these scenes (M,4), each under one random
    rule → picture indices (n,length) int64, and n lists of `length` pairs (question or None, answer)."""
    kinds = rng.choice(list(SHARES), n, p=list(SHARES.values())).tolist()
    rules = [random_rule(kind, rng) for kind in kinds]
    indices = rng.integers(len(scenes), size=(n, length))
    words = rng.integers(4, size=(n, length))
    said = [[text(rule, scene, word) for scene, word in zip(*both, strict=True)]
            for rule, *both in zip(rules, scenes[indices], words, strict=True)]
    return indices, said
