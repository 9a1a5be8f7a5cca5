"""CIDEr-D: how alike a caption is to its references, in n-grams of 1 to 4 words; rare n-grams count more.

    CIDEr-D(c) = 10 · mean_n mean_r  e^{-(l_c - l_r)² / 2σ²} · <min(g_c, g_r), g_r> / (|g_c| |g_r|)
    g(w)       = count(w) · (log N - log max(1, df(w))),    df(w): how many of N pictures' references have w

Vedantam et al. 2015; as pycocoevalcap, whose lengths l count bigrams; σ = 6. 1.0 is "100" in papers.
"""

import math
from collections import Counter
from itertools import chain

import numpy as np


def ngrams(words, n):
    """Every n words in a row, joined by blanks."""
    return [" ".join(words[i:i + n]) for i in range(len(words) - n + 1)]


def weigh(grams, df, rarity):
    """g of a caption's n-grams, {w: g(w)}. rarity[i]: log N - log max(1, i)."""
    g = {}
    for w in grams:
        g[w] = g.get(w, 0.0) + rarity[df[w]]
    return g


def cosine(c, r):
    """<min(c, r), r> / (|c| |r|): saying a word more often than the reference does not help."""
    dot = 0.0
    for w, weight in c.items():
        if w in r:
            dot += min(weight, r[w]) * r[w]
    if dot == 0:
        return 0.0
    return dot / (math.hypot(*c.values()) * math.hypot(*r.values()))


def cider(candidates: list[str], references: list[list[str]]) -> tuple[float, np.ndarray]:
    """N captions, N lists of references → the corpus score, which is the mean, and the N scores; df is of all
    N, so that N = 1 scores 0. Raises ValueError without candidates, or for one without references."""
    from metrics.ptb import ptb_tokenize
    N = len(candidates)
    if not N or len(references) != N or not all(references):
        raise ValueError(f"cider needs 1 or more references for each of {N} candidates: got "
                         f"{len(references)} lists of references, {references.count([])} of them empty")
    lines = iter(ptb_tokenize(list(chain(*references))))
    groups = []                                             # of a picture: candidate, reference, …, as words
    for candidate, refs in zip(ptb_tokenize(candidates), references, strict=True):
        group = [candidate, *(next(lines) for _ in refs)]
        groups.append([caption.split() for caption in group])
    lengths = [[max(0, len(caption) - 1) for caption in group] for group in groups]
    penalties = [[math.exp(-(c - r) ** 2 / (2 * 6 ** 2)) for r in refs] for c, *refs in lengths]

    rarity = [math.log(N) - math.log(max(1, i)) for i in range(N + 1)]
    scores = np.zeros(N)
    for n in range(1, 5):
        grams = [[ngrams(caption, n) for caption in group] for group in groups]
        df = Counter()
        for _, *refs in grams:
            df.update(set().union(*refs))
        for i, group in enumerate(grams):
            c, *refs = [weigh(caption, df, rarity) for caption in group]
            alike = [penalty * cosine(c, r) for r, penalty in zip(refs, penalties[i], strict=True)]
            scores[i] += 10 / 4 * sum(alike) / len(alike)
    return float(scores.mean()), scores
