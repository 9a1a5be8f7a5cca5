"""OK-VQA's stemming, learnt from answers known in both forms: whole answers first, then word by word."""

from collections import Counter


def learn_stems(pairs):
    """pairs: (answer as written, stemmed answer) → a function that stems answers; unknown words stay."""
    whole = {}
    words = {}
    for raw, stem in pairs:
        whole[raw] = stem
        if len(raw.split()) == len(stem.split()):
            for word, short in zip(raw.split(), stem.split(), strict=True):
                words.setdefault(word, Counter())[short] += 1
    common = {word: stems.most_common(1)[0][0] for word, stems in words.items()}

    def stemmed(answer):
        return whole.get(answer) or " ".join(common.get(word, word) for word in answer.split())
    return stemmed
