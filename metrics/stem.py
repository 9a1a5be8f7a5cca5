"""OK-VQA's stemming, learnt from answers that are known in both forms: whole answers first, then word by word."""

from collections import Counter


def learn_stems(pairs):
    """pairs: (answer as written, stemmed answer) → a function that stems answers; a word it does not know stays as it is."""
    whole, words = {}, {}
    for raw, stem in pairs:
        whole[raw] = stem
        if len(raw.split()) == len(stem.split()):
            for r, s in zip(raw.split(), stem.split(), strict=True):
                words.setdefault(r, Counter())[s] += 1
    common = {word: stems.most_common(1)[0][0] for word, stems in words.items()}
    return lambda answer: whole.get(answer) or " ".join(common.get(w, w) for w in answer.split())
