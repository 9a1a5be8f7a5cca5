"""Beam search and greedy search over next-token logits, whoever makes them."""

import torch


class BeamSearch:
    """Beam search over B prompts with K beams, as transformers with early_stopping=False; K = 1 is greedy.
    Every step takes the 2K (or more, if there are more end tokens) best continuations of a prompt. Those that
    end are finished hypotheses if they are among the best K; the best K others go on. A prompt is settled
    when its best running beam, at its present length, scores no more than its worst finished hypothesis."""
    NONE = -1e9                               # score of a beam or hypothesis that is not there

    def __init__(self, B, K, max_new_tokens, length_penalty, ends, banned, pad_id):
        """ends, banned: (n,) token ids that end a hypothesis, that are never made; on the logits' device."""
        self.penalty = length_penalty
        self.ends = ends
        self.banned = banned
        self.t = 0                            # tokens generated so far
        # running beams: Σ log p and tokens; at first all of a prompt are equal, so that only one counts
        self.score = torch.full((B, K), self.NONE, device=ends.device)
        self.score[:, 0] = 0
        self.ids = torch.full((B, K, max_new_tokens), pad_id, device=ends.device)
        # finished hypotheses: Σ log p / length^penalty and tokens
        self.best = torch.full_like(self.score, self.NONE)
        self.best_ids = self.ids.clone()
        self.settled = torch.zeros(B, dtype=torch.bool, device=ends.device)
        self.done = False

    def step(self, logits):
        """Logits (B,vocab), then (B·K,vocab) until .done → new tokens and the rows they continue, (B·K,)."""
        B, K, most = self.ids.shape
        vocab = logits.shape[1]
        rows = len(logits) // B               # beams of a prompt that came in: 1 at first, then K
        logp = logits.log_softmax(-1)
        logp = logp.index_fill(1, self.banned, -torch.inf)               # after the softmax: the others stay
        total = self.score[:, :rows, None] + logp.view(B, rows, vocab)
        n = min(K * max(2, 1 + len(self.ends)), rows * vocab)

        top, at = total.flatten(1).topk(n)                               # (B,n): the best continuations
        parent = at // vocab
        token = at % vocab
        ids = self.ids.take_along_dim(parent[:, :, None], 1)
        ids[:, :, self.t] = token
        self.t += 1
        ended = torch.isin(token, self.ends) | (self.t == most)

        finished = top / self.t ** self.penalty
        finished[:, K:] = self.NONE
        finished = finished.masked_fill(~ended | self.settled[:, None], self.NONE)
        self.best, keep = torch.cat([self.best, finished], 1).topk(K)
        self.best_ids = torch.cat([self.best_ids, ids], 1).take_along_dim(keep[:, :, None], 1)

        self.score, keep = top.masked_fill(ended, self.NONE).topk(K)
        self.ids = ids.take_along_dim(keep[:, :, None], 1)
        self.settled |= self.score[:, 0] / self.t ** self.penalty <= self.best[:, -1]
        self.done = bool(self.settled.all()) or self.t == most
        parents = torch.arange(B, device=at.device)[:, None] * rows + parent.gather(1, keep)
        return token.gather(1, keep).flatten(), parents.flatten()

    def result(self):
        """The best hypothesis of every prompt (B, longest), pad_id behind its end."""
        return self.best_ids[:, 0, :self.t]
