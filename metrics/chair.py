"""CHAIR, Rohrbach et al. 2018: objects that a caption mentions and the picture does not have.

    CHAIRs = captions that invent / captions      CHAIRi = invented mentions / mentions
    recall = Σ |truth ∩ mentioned| / Σ |truth|

A caption mentions an object by a word or pair of words of a synonym list with lines `node, synonym, …`.
"""

import re

ALIKE = "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub".split()
TWO_WORDS = [                         # read as one, so that a "hot dog" is no dog and "home plate" no plate
    "air plane", "motor bike", "motor cycle", "train track", "traffic light", "traffic signal",
    "street light", "stop light", "stop sign", "fire hydrant", "parking meter", "suit case",
    "sports ball", "baseball bat", "baseball glove", "home plate", "tennis racket", "wine glass", "hot dog",
    "cell phone", "mobile phone", "laptop computer", "teddy bear", "hair drier", "potted plant",
]
PAIRS = {pair: pair for pair in TWO_WORDS}
PAIRS |= {f"{age} {name}": name for age in ("baby", "adult") for name in ALIKE}    # this baby is no person,
PAIRS |= {"passenger jet": "jet", "passenger train": "train"}                     # nor is this passenger,
PAIRS |= {"bow tie": "tie", "toilet seat": "toilet", "sport ball": "sports ball"}  # and this seat no chair
PLURALS = [                           # endings in the plural and in the singular; the first that fits counts
    ("people", "person"), ("children", "child"), ("men", "man"), ("mice", "mouse"), ("geese", "goose"),
    ("oxen", "ox"), ("s", ""), ("xes", "x"), ("ches", "ch"), ("shes", "sh"), ("sses", "ss"), ("buses", "bus"),
    ("oes", "o"), ("ies", "y"), ("ves", "f"), ("ves", "fe"),
]


def read_synonyms(text: str) -> dict[str, str]:
    """The synonym list → {word or pair of words: its node, the first of its line}; of two lines the later."""
    nodes = {}
    for line in text.splitlines():
        words = [word.strip() for word in line.split(",") if word.strip()]
        nodes |= {word: words[0] for word in words}
    return nodes


def singular(word: str, known: set[str]) -> str:
    """The singular of a word in lower case if it is one of the `known` words, else the word as it is."""
    if word in known or len(word) < 3:
        return word
    for plural, one in PLURALS:
        if word.endswith(plural) and word.removesuffix(plural) + one in known:
            return word.removesuffix(plural) + one
    return word


def caption_objects(caption: str, nodes: dict[str, str]) -> list[str]:
    """The nodes that a caption mentions, in its order, repeats included. nodes: of `read_synonyms`."""
    known = nodes.keys() | set(" ".join(PAIRS).split())
    text = re.sub("['\u2019]", " ", caption.lower())                                   # man's: man, s
    words = re.findall(r"[^\W_]+(?:[-/.][^\W_]+)*|[^\w\s]", text)
    words = [singular(word, known) for word in words]
    merged = []
    while words:
        pair = " ".join(words[:2])
        merged.append(PAIRS.get(pair, words[0]))
        words = words[2:] if pair in PAIRS else words[1:]
    if "toilet" in merged:
        merged = [word for word in merged if word != "seat"]
    return [nodes[word] for word in merged if word in nodes]


def chair(captions: list[str], truths: list[set[str]], nodes: dict[str, str]) -> dict[str, float]:
    """→ CHAIRs, CHAIRi and recall in [0, 1], 0 without any mention or truth. truths: each picture's nodes, of
    instance annotations and reference captions. Raises ValueError unless there is one a caption."""
    said = [caption_objects(caption, nodes) for caption in captions]
    both = list(zip(said, truths, strict=True))
    invented = [[node for node in mentioned if node not in truth] for mentioned, truth in both]
    found = sum(len(truth & set(mentioned)) for mentioned, truth in both)
    return {"chair_s": sum(map(bool, invented)) / len(captions),
            "chair_i": sum(map(len, invented)) / max(1, sum(map(len, said))),
            "recall": found / max(1, sum(map(len, truths)))}
