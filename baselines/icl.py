"""In-context learning itself: random demonstrations before the query. And the query alone."""

from data import draw


class ICL:
    """eval.py --method icl."""
    shots, least = None, 1        # demonstrations by default (None = the model's), and at least

    @staticmethod
    def prepare(model, processor, template, pool, queries, shots, seed, batch_size, dev_score):
        """→ the demonstrations of every query, and no shifts."""
        return draw(pool, queries, shots, seed), None


class ZeroShot:
    """eval.py --method zero-shot."""
    shots, least = 0, 0

    @staticmethod
    def prepare(model, processor, template, pool, queries, shots, seed, batch_size, dev_score):
        return [[]] * len(queries), None
