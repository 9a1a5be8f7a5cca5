"""The judge of the derivation tests: attention as the paper writes it, in plain Python floats, with loops and no tensors."""

import math


def attend(q, keys, values, allowed):
    """One query vector over lists of key and value vectors → (output, log Σ exp(q·k/√D)) over the allowed ones."""
    keys = [k for k, ok in zip(keys, allowed, strict=True) if ok]
    scores = [sum(a * b for a, b in zip(q, k, strict=True)) / math.sqrt(len(q)) for k in keys]
    values = [v for v, ok in zip(values, allowed, strict=True) if ok]
    if not scores:
        return [0.0] * len(q), -math.inf
    top = max(scores)
    weights = [math.exp(s - top) for s in scores]
    z = sum(weights)
    out = [sum(w * v[i] for w, v in zip(weights, values, strict=True)) / z for i in range(len(values[0]))]
    return out, top + math.log(z)


def attention(q, k, v, mask):
    """`model.attention` in loops: q (B,H,T,D), k and v (B,Hkv,S,D), mask (B,1,T,S), nested lists or tensors → nested lists."""
    q, k, v, mask = (x.tolist() for x in (q, k, v, mask))
    group = len(q[0]) // len(k[0])
    both = [[[attend(q[b][h][t], k[b][h // group], v[b][h // group], mask[b][0][t]) for t in range(len(q[b][h]))]
             for h in range(len(q[b]))] for b in range(len(q))]
    return [[[x[0] for x in head] for head in row] for row in both], [[[x[1] for x in head] for head in row] for row in both]
