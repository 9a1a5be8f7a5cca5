"""MimIC without backpropagation: every layer's f and v fitted to the shift that the demonstrations really cause.

    python train.py --fit layerwise                                             # instead of training
    python train.py --init layerwise --epochs 1                                 # and a little training from there

The identity (mimic.py) says what MimIC has to add at every head. So run the original model on {demonstrations, query}, the
teacher, and the model with shifts on the query alone, the student, layer by layer, and fit each layer before going up:

    1. teacher   x_T, its states before the layer;  A_T, what attention adds to them (behind W_o);  log Z1 of the demonstrations
    2. student   x_S, under the shifts of the layers below;  A_S;  q;  log Z2
    3. target    Δ = (x_T + A_T) − (x_S + A_S):  what to add behind attention so that the student's stream is the teacher's,
                 with all that the layers below have missed
    4. start     f by ridge regression of log Z1 on [q; 1];  v by least squares of Σ_h μ̃_h W_o^h v_h on Δ
    5. refine    f by L-BFGS on the same squared error; the best v of every f is known in closed form
    6. advance   both, the student with the layer's new shift

Forward passes only: no gradient crosses the model and no label loss is used. Several draws of demonstrations for a query enter
through their mean, which is all that least squares sees of them. Letters as in mimic.py; N kept tokens.
"""
import json
import shutil
import time

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from mimic import MimIC, mixing_weight, read_adapter
from model import InputError, KVCache, Shifts, attention, causal_mask, merge_heads, rope


# ---------------------------------------------------------------------------------------------------------------------
# The streams, one layer at a time
# ---------------------------------------------------------------------------------------------------------------------
class Watch(Shifts):
    """Keeps what a layer's attention has worked with."""

    def after_attention(self, layer, q, k, out, lse):
        self.q, self.k, self.out, self.lse = q, k, out, lse
        return out


def exact(x):
    """In fp32 at least: Δ is a small difference of large states."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def geometry(model, rows):
    """cos, sin and mask of every decoder layer on these rows."""
    present, text = rows.attention_mask.to(model.device), model.config.text
    position_ids = (present.long().cumsum(-1) - 1).clamp(min=0)
    return *rope(position_ids, text.head_dim, text.rope_theta, model.dtype), causal_mask(
        present, present.shape[1], text.sliding_window)


def teacher(model, layer, x, rows, demonstrations, T_q):
    """Step 1: x_T + A_T (B,T_q,d) and log Z1 (B,H,T_q) in the last T_q columns, and the states behind the layer (B,T,d).

    demonstrations (B,T) bool, True = token of a demonstration. Only the last columns need log Z1 and A_T, so all before them
    go first, through the fused attention, and leave their keys in a cache."""
    block, (cos, sin, mask), watch = model.text_model.layers[layer], geometry(model, rows), Watch()
    T, cache = x.shape[1], KVCache(layer + 1, x.shape[1])
    before, last = slice(0, T - T_q), slice(T - T_q, T)
    above = block(layer, x[:, before], cos[:, :, before], sin[:, :, before], mask[:, :, before, before], Shifts(), cache)
    cache.length = T - T_q
    above = torch.cat([above, block(layer, x[:, last], cos[:, :, last], sin[:, :, last], mask[:, :, last], watch, cache)], 1)
    seen = mask[:, :, last] & demonstrations[:, None, None].to(mask.device)
    _, log_z1 = attention(watch.q, watch.k, watch.k[..., :1], seen)
    return exact(x[:, last]) + exact(block.self_attn.o_proj(merge_heads(watch.out))), log_z1, above


def student(model, layer, x, rows):
    """Step 2: x_S + A_S (B,T,d), q (B,H,T,D) and log Z2 (B,H,T)."""
    block, watch = model.text_model.layers[layer], Watch()
    A_S = block.self_attn(layer, block.input_layernorm(x), *geometry(model, rows), watch, None)
    return exact(x) + exact(A_S), watch.q, watch.lse


def advance(model, layer, x, rows, shifts):
    """Step 6: the states behind the layer (B,T,d)."""
    return model.text_model.layers[layer](layer, x, *geometry(model, rows), shifts, None)


# ---------------------------------------------------------------------------------------------------------------------
# The regression of one layer
# ---------------------------------------------------------------------------------------------------------------------
def f_of(weight, bias, q):
    """f(q) = weight·q + bias of every head.  weight (H,D), bias (H), q (H,N,D) → (N,H)."""
    return (torch.einsum("hnd,hd->hn", q, weight) + bias[:, None]).T


def start_f(q, log_z1, ridge=1e-3):
    """Step 4, f: each head's ridge regression of log Z1 on [q; 1].  q (H,N,D), log_z1 (N,H) → weight (H,D), bias (H)."""
    q_mean, z_mean, z = q.mean(1), log_z1.mean(0), (log_z1 - log_z1.mean(0)).T.unsqueeze(-1)       # z (H,N,1)
    gram = covariance(q, q_mean) * q.shape[1]
    gram.diagonal(dim1=1, dim2=2).add_(ridge * q.shape[1])
    right = (q.mT @ z).squeeze(-1)                                 # q need not be centred where z is
    weight = torch.linalg.solve(gram.double(), right.double()).to(q.dtype)
    return weight, z_mean - (weight * q_mean).sum(-1)


def covariance(q, q_mean):
    """Of the queries of every head, (H,D,D); head by head, so that no second copy of q is made."""
    return torch.stack([(x - m).T @ (x - m) / len(x) for x, m in zip(q, q_mean, strict=True)])


def normal_o(w_o):
    """W_oᵀW_o (H,D,H,D) in fp64: in fp32 the normal equations may lose their definiteness."""
    return torch.einsum("dhi,dkj->hikj", w_o.double(), w_o.double())


def best_v(mu, delta, w_o, gram_o, ridge=1e-6):
    """Step 4, v: argmin_v Σ_n ‖Σ_h μ̃_nh W_o^h v_h − Δ_n‖².  mu (N,H), delta (N,d), w_o (d,H,D), gram_o: `normal_o` → v (H,D).

    Block (h,h') of the normal equations is (Σ_n μ̃_h μ̃_h') · W_o^hᵀ W_o^h': no matrix has both N and H·D rows and columns.
    ridge: times the mean of their diagonal, so that unused heads get v = 0."""
    H, D = w_o.shape[1:]
    gram = ((mu.T.double() @ mu.double())[:, None, :, None] * gram_o).reshape(H * D, H * D)
    gram.diagonal().add_(ridge * gram.diagonal().mean().clamp(min=1e-30))
    right = torch.einsum("dhi,hd->hi", w_o, mu.T @ delta).double()
    return torch.cholesky_solve(right.view(-1, 1), torch.linalg.cholesky(gram)).view(H, D).to(mu.dtype)


def unexplained(mu, v, delta, w_o):
    """Share of Δ's squares that the shift leaves: Σ_n ‖Σ_h μ̃_h W_o^h v_h − Δ‖² / Σ_n ‖Δ‖², a scalar; by its three products."""
    u, total = torch.einsum("dhi,hi->hd", w_o, v), torch.linalg.vector_norm(delta) ** 2            # u_h = W_o^h v_h
    return (total - 2 * ((mu.T @ delta) * u).sum() + ((mu.T @ mu) * (u @ u.T)).sum()) / total


def refine(weight, bias, q, log_z2, delta, w_o, gram_o, iterations=100, penalty=1e-3):
    """Step 5: f that leaves the least of Δ, with the v that is best for it → weight (H,D), bias (H), v (H,D), μ̃ (N,H).

    The error of a pair (f, best v of f) has the gradient that it has at that v held fixed (variable projection, up to best_v's
    ridge), so L-BFGS walks over f alone; over the coordinates in which a head's queries are white, where the variance of f is a
    plain square. penalty: on that variance, mean over heads; without it heads saturate early and stay in worse minima.
    q (H,N,D) is made white in place: it is the largest tensor of a layer."""
    q_mean = q.mean(1)
    spread = covariance(q, q_mean)
    variances = spread.diagonal(dim1=1, dim2=2)
    variances.add_(1e-2 * variances.mean(-1, keepdim=True))                # directions that queries hardly take stay quiet
    lower = torch.linalg.cholesky(spread)                                                                   # (H,D,D)
    for h in range(len(q)):
        q[h] = torch.linalg.solve_triangular(lower[h], (q[h] - q_mean[h]).T, upper=False).T
    a = torch.einsum("hde,hd->he", lower, weight).requires_grad_()
    b = (bias + (weight * q_mean).sum(-1)).requires_grad_()

    def closure():
        optimiser.zero_grad()
        with torch.enable_grad():
            mu = mixing_weight(f_of(a, b, q), log_z2)
            error = unexplained(mu, best_v(mu.detach(), delta, w_o, gram_o), delta, w_o)
            loss = error + penalty * a.pow(2).sum(-1).mean()
            loss.backward()
        return loss.detach()

    optimiser = torch.optim.LBFGS([a, b], max_iter=iterations, history_size=20, line_search_fn="strong_wolfe")
    optimiser.step(closure)
    with torch.no_grad():
        mu = mixing_weight(f_of(a, b, q), log_z2)
        weight = torch.linalg.solve_triangular(lower.mT, a.unsqueeze(-1), upper=True).squeeze(-1)
        return weight, b - (weight * q_mean).sum(-1), best_v(mu, delta, w_o, gram_o), mu


def fit_layer(mimic, layer, q, log_z1, log_z2, delta, w_o):
    """Steps 4 and 5: sets the layer's f and v → the shares of Δ explained at the start and in the end.

    q (H,N,D), overwritten; log_z1 and log_z2 (N,H), delta (N,d), w_o (d,H,D), all in one dtype, fp32 or fp64."""
    gram_o = normal_o(w_o)
    if mimic.mu_of == "one":                                     # the control: μ̃ = 1, the vector alone
        weight, bias, mu = torch.zeros_like(q[:, 0]), torch.zeros_like(q[:, 0, 0]), torch.ones_like(log_z2)
    else:
        weight, bias = start_f(q, log_z1)
        mu = mixing_weight(f_of(weight, bias, q), log_z2)
    v = best_v(mu, delta, w_o, gram_o)
    start = end = 1 - unexplained(mu, v, delta, w_o)
    if not torch.isfinite(start):
        raise InputError(f"layer {layer}: expected a shift to fit, found one that is 0 or not finite (do the demonstrations lie "
                         "within the model's attention window?)")
    if mimic.mu_of == "head":
        *refined, mu = refine(weight, bias, q, log_z2, delta, w_o, gram_o)
        if (share := 1 - unexplained(mu, refined[2], delta, w_o)) > start:
            (weight, bias, v), end = refined, share
    for parameter, value in zip((mimic.f_weight, mimic.f_bias, mimic.vector), (weight, bias, v), strict=True):
        parameter.data[layer] = value
    return start.item(), end.item()


# ---------------------------------------------------------------------------------------------------------------------
# All layers
# ---------------------------------------------------------------------------------------------------------------------
class States:
    """The states of every chunk: in the machine's memory, or, given a folder, as bf16 files there."""

    def __init__(self, folder):
        self.folder, self.kept = folder, {}
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

    def put(self, key, x):
        if self.folder is None:
            self.kept[key] = x.cpu()
        else:
            save_file({"x": x.to(torch.bfloat16).cpu().contiguous()}, self.folder / f"{key}.safetensors")

    def get(self, key, like):
        x = self.kept[key] if self.folder is None else load_file(self.folder / f"{key}.safetensors")["x"]
        return x.to(like.device, like.dtype)


def gigabytes(text, N, columns, itemsize):
    """1e9 bytes of one layer's regression on N tokens, and of the states of all columns between two layers. text: TextConfig."""
    HD, d = text.num_attention_heads * text.head_dim, text.hidden_size
    layer = 4 * N * (HD + d) + 4 * 8 * HD ** 2                      # q and Δ in fp32; the normal equations, on the way to v
    return layer / 1e9, columns * d * itemsize / 1e9


def plan(model, chunks, image_ids, tokens, memory_gb):
    """→ the columns that count, one (B,T_q) bool a chunk, and whether the states have to lie on disk.

    chunks: a list of lists of Batch, the same queries with another draw of demonstrations each, as data.collate makes them.
    tokens: "all" of query and answer, "text" (all but image tokens) or "answer". memory_gb (1e9 bytes): for the states of all
    chunks and for one layer's regression. Raises InputError if the regression alone is larger."""
    kept = []
    for batch, *_ in chunks:
        ids, answer = (x[:, -batch.align.shape[1]:] for x in (batch.student.input_ids, batch.answer))
        text_only = batch.align & ~torch.isin(ids, torch.tensor(image_ids))
        kept.append({"all": batch.align, "text": text_only, "answer": answer}[tokens])
    N = sum(int(k.sum()) for k in kept)
    columns = sum(rows.input_ids.numel() for draws in chunks for rows in (draws[0].student, *(b.teacher for b in draws)))
    layer_gb, states_gb = gigabytes(model.config.text, N, columns, model.lm_head.weight.element_size())
    if layer_gb > memory_gb:
        raise InputError(f"--memory-gb: expected at least {layer_gb:.2g} for {N:,} tokens of one layer, found {memory_gb:g}")
    return kept, layer_gb + states_gb > memory_gb


@torch.no_grad()
def fit(model, mimic, chunks, kept, on_disk, embed, folder, pictures=None):
    """Fits every layer of `mimic` (already on the model's device) → the shares of Δ that each layer explains.

    chunks, kept, on_disk: as of `plan`; embed(rows) → embeddings (B,T,d), images in place, and pictures(rows) → what the decoder
    sees of them beside these (for a model that looks at them between its layers). on_disk: the states of all chunks lie
    in folder/states, as bf16. After each layer the adapter is written to folder/fit.safetensors; a fit that finds one there
    goes on behind its last layer."""
    text, text_model, path, shares = model.config.text, model.text_model, folder / "fit.safetensors", []
    began = time.perf_counter() - seconds_of(folder)
    L, H, D, d, dtype = text.num_hidden_layers, text.num_attention_heads, text.head_dim, text.hidden_size, mimic.vector.dtype
    if path.exists():
        mimic.load_state_dict(MimIC.load(path).state_dict())
        shares = shares_in(path, text.num_hidden_layers)
    done = len(shares)
    if done == L:
        return shares
    states, N = States(folder / "states" if on_disk else None), sum(int(k.sum()) for k in kept)
    demonstrations = [[is_demonstration(batch) for batch in draws] for draws in chunks]

    def put(key, layer, x, rows):                                            # states wait where the layer's attention reads them
        states.put(key, text_model.enter(layer, x, pictures(rows)) if layer in text_model.crossed else x)

    for c, draws in enumerate(chunks):
        put(f"student-{c}", 0, embed(draws[0].student), draws[0].student)
        for n, batch in enumerate(draws):
            put(f"teacher-{c}-{n}", 0, embed(batch.teacher), batch.teacher)
    with tqdm(total=L * len(chunks), desc="fit", unit="chunk") as bar:
        for layer in range(L):
            w_o, at = text_model.layers[layer].self_attn.o_proj.weight, 0
            q, log_z1, log_z2, delta = (torch.empty(*shape, dtype=dtype, device=model.device)
                                        for shape in ((H, N, D), (N, H), (N, H), (N, d)))
            for c, draws in enumerate(chunks):
                T_q, keep = kept[c].shape[1], kept[c].to(model.device)
                here = slice(at, at := at + int(keep.sum()))
                h_T = z1 = 0.0
                for n, batch in enumerate(draws):                            # 1. teacher: the mean over its draws
                    h, z, above = teacher(
                        model, layer, states.get(f"teacher-{c}-{n}", w_o), batch.teacher, demonstrations[c][n], T_q)
                    put(f"teacher-{c}-{n}", layer + 1, above, batch.teacher)
                    h_T, z1 = h_T + h.to(dtype) / len(draws), z1 + z / len(draws)
                if layer >= done:
                    h_S, queries, z2 = student(model, layer, states.get(f"student-{c}", w_o), draws[0].student)   # 2. student
                    delta[here] = (h_T - h_S[:, -T_q:])[keep]                                                     # 3. target
                    q[:, here] = queries[:, :, -T_q:].transpose(0, 1)[:, keep].to(dtype)
                    log_z1[here], log_z2[here] = (x[:, :, -T_q:].transpose(1, 2)[keep].to(dtype) for x in (z1, z2))
                bar.update()
            if layer >= done:                                                # 4. start and 5. refine
                shares.append(fit_layer(mimic, layer, q, log_z1, log_z2, delta, w_o.to(dtype).view(d, H, D))[1])
                mimic.save(path, shares=json.dumps(shares), seconds=time.perf_counter() - began)
                bar.set_postfix(explained=" ".join(f"{x:.2f}" for x in shares[-6:]))
            for c, draws in enumerate(chunks if layer + 1 < L else ()):      # 6. advance
                x = advance(model, layer, states.get(f"student-{c}", w_o), draws[0].student, mimic)
                put(f"student-{c}", layer + 1, x, draws[0].student)
    shutil.rmtree(folder / "states", ignore_errors=True)
    return shares


def shares_in(path, n_layers):
    """What each fitted layer of a fit.safetensors explains. Raises InputError."""
    try:
        shares = json.loads(read_adapter(path, "MimIC")[1].get("shares", ""))
        if len(shares) <= n_layers and all(isinstance(x, float) for x in shares):
            return shares
    except (ValueError, TypeError):
        pass
    raise InputError(f"{path}: expected a fit to go on with, with its shares, found none; delete it to start anew")


def seconds_of(folder):
    """What the fit that goes on from the folder's fit.safetensors, if it is there, has taken so far."""
    path = folder / "fit.safetensors"
    return float(read_adapter(path, "MimIC")[1].get("seconds", 0)) if path.exists() else 0.0


def is_demonstration(batch):
    """(B,T) bool over the teacher's columns: True between what both prompts begin with (<s>, instruction) and the query."""
    def first(mask):                       # column of the first token; the masks' sums would miss --official's masked separators
        return mask.int().argmax(1)

    T, n_query = batch.teacher.input_ids.shape[1], batch.align.shape[1] - first(batch.align)
    n_common = batch.student.input_ids.shape[1] - first(batch.student.attention_mask) - n_query
    start, column = first(batch.teacher.attention_mask) + n_common, torch.arange(T)
    return (start[:, None] <= column) & (column < (T - n_query)[:, None])
