"""MimIC without backpropagation: every layer's f and v fitted to the shift that demonstrations really cause.

    python -m experiments.layerwise --samples 50               # the toy; data, model and run as in train.py
    python train.py --init runs/toy-layerwise --epochs 1       # a little training from there

The identity (mimic.py) says what MimIC has to add at every head. So the teacher, who reads {demonstrations,
query}, and the student, who reads the query alone, go through the model layer by layer:

    1. teacher   x_T, its states before the layer;  A_T, what attention adds;  log Z1 of the demonstrations
    2. student   x_S, under the shifts of the layers below;  A_S;  q;  log Z2
    3. target    Δ = (x_T + A_T) − (x_S + A_S), which makes the student's stream the teacher's
    4. start     f by ridge regression of log Z1 on [q; 1];  v by least squares of Σ_h μ̃_h W_o^h v_h on Δ
    5. refine    f by L-BFGS on the same squared error; the best v of every f is known in closed form
    6. advance   both, the student with the layer's new shift

Forward passes only, no label in any loss. Of several draws of demonstrations for a query least squares sees
the mean alone. An interrupted fit starts again. Letters as in mimic.py; N kept tokens.
"""

import time
from pathlib import Path

import torch
from tqdm import tqdm

import models
from data import DATASETS, ICD, collate, draw, encode_images
from eval import report, sayer
from mimic import MimIC, mixing_weight
from model import KVCache, Shifts, attention, causal_mask, merge_heads, rope
from support.files import InputError, chunks, fits_into_memory, run_command
from support.options import Parser, add_common_arguments, number
from support.parallel import join, wait
from support.results import about, already_finished, begin_run
from train import choose_samples


# ---- The streams, one layer at a time
class Watch(Shifts):
    """Keeps what a layer's attention has worked with."""
    def after_attention(self, layer, q, k, out, lse):
        self.seen = q, k, out, lse
        return out


def enter(model, layer, x, rows, features):
    """The states as the layer's attention reads them: some models look at the pictures before a layer."""
    if layer not in model.text_model.crossed:
        return x
    inputs = rows.inputs(model, features)
    return model.text_model.enter(layer, x, model.pictures(inputs["input_ids"], inputs["image_features"]))


def advance(model, layer, x, rows, shifts, cache=None):
    """Step 6: the states behind the layer (B,T,d).  x (B,T,d): of the columns behind those in the cache."""
    text = model.config.text
    start = cache.lengths[layer] if cache else 0
    present = rows.attention_mask[:, :start + x.shape[1]].to(model.device)
    position_ids = (present.cumsum(-1) - 1).clamp(min=0)[:, start:]
    cos, sin = rope(position_ids, text.head_dim, text.rope_theta, model.dtype)
    mask = causal_mask(present, x.shape[1], text.sliding_window)
    return model.text_model.layers[layer](layer, x, cos, sin, mask, shifts, cache)


def watched(model, layer, x, rows, cache=None):
    """Step 2: x + A (B,T,d), fp32 as Δ is small; q (B,H,T,D), k; log Z2 (B,H,T); the output, unshifted."""
    watch = Watch()
    above = advance(model, layer, x, rows, watch, cache)
    q, k, out, log_z2 = watch.seen
    exact = torch.promote_types(x.dtype, torch.float32)
    added = model.text_model.layers[layer].self_attn.o_proj(merge_heads(out))
    return x.to(exact) + added.to(exact), q, k, log_z2, above


def teacher(model, layer, x, rows, T_q):
    """Step 1: x_T + A_T (B,T_q,d) and log Z1 (B,H,T_q) of the last columns; the layer's output (B,T,d). The
    columns before, of which nobody asks for them, go first and leave their keys in a cache."""
    cache = KVCache(layer + 1, x.shape[1])
    before = advance(model, layer, x[:, :-T_q], rows, Shifts(), cache)
    h, q, k, _, last = watched(model, layer, x[:, -T_q:], rows, cache)
    demonstrations = (rows.part == ICD).to(model.device)
    seen = causal_mask(demonstrations, T_q, model.config.text.sliding_window)
    _, log_z1 = attention(q, k, k[..., :1], seen)
    return h, log_z1, torch.cat([before, last], 1)


# ---- The regression of one layer
def f_of(weight, bias, q):
    """f(q) = weight·q + bias of every head.  weight (H,D), bias (H), q (H,N,D) → (N,H)."""
    return (torch.einsum("hnd,hd->hn", q, weight) + bias[:, None]).T


def start_f(q, log_z1, ridge=1e-3):
    """Step 4, f: ridge regressions of log Z1 on [q; 1].  q (H,N,D), log_z1 (N,H) → weight (H,D), bias (H)."""
    q_mean = q.mean(1)
    z_mean = log_z1.mean(0)
    gram = covariance(q, q_mean) * q.shape[1]
    gram.diagonal(dim1=1, dim2=2).add_(ridge * q.shape[1])
    right = (q.mT @ (log_z1 - z_mean).T.unsqueeze(-1)).squeeze(-1)      # q need not be centred where z is
    weight = torch.linalg.solve(gram.double(), right.double()).to(q.dtype)
    return weight, z_mean - (weight * q_mean).sum(-1)


def covariance(q, q_mean):
    """Of the queries of every head, (H,D,D); head by head, so that no second copy of q is made."""
    return torch.stack([(x - m).T @ (x - m) / len(x) for x, m in zip(q, q_mean, strict=True)])


def normal_o(w_o):
    """W_oᵀW_o (H,D,H,D) in fp64: in fp32 the normal equations may lose their definiteness."""
    return torch.einsum("dhi,dkj->hikj", w_o.double(), w_o.double())


def best_v(mu, delta, w_o, gram_o, ridge=1e-6):
    """Step 4, v: argmin_v Σ_n ‖Σ_h μ̃_nh W_o^h v_h − Δ_n‖².  mu (N,H), delta (N,d), w_o (d,H,D), gram_o:
    `normal_o` → v (H,D). Block (h,h') of the normal equations is (Σ_n μ̃_h μ̃_h') · W_o^hᵀ W_o^h'. ridge:
    times the mean of their diagonal; unused heads get v = 0."""
    H, D = w_o.shape[1:]
    gram = ((mu.T.double() @ mu.double())[:, None, :, None] * gram_o).reshape(H * D, H * D)
    gram.diagonal().add_(ridge * gram.diagonal().mean().clamp(min=1e-30))
    right = torch.einsum("dhi,hd->hi", w_o, mu.T @ delta).double()
    return torch.cholesky_solve(right.view(-1, 1), torch.linalg.cholesky(gram)).view(H, D).to(mu.dtype)


def unexplained(mu, v, delta, w_o):
    """Share of Δ's squares that the shift leaves: Σ_n ‖Σ_h μ̃_h W_o^h v_h − Δ‖² / Σ_n ‖Δ‖², a scalar."""
    u = torch.einsum("dhi,hi->hd", w_o, v)                      # W_o^h v_h; below, the square multiplied out
    total = torch.linalg.vector_norm(delta) ** 2
    return (total - 2 * ((mu.T @ delta) * u).sum() + ((mu.T @ mu) * (u @ u.T)).sum()) / total


@torch.no_grad()
def refine(weight, bias, q, log_z2, delta, w_o, gram_o, iterations=100, penalty=1e-3):
    """Step 5: f that leaves the least of Δ, with the v that is best for it → weight, bias, v, share of Δ.

    The error of (f, best v of f) has the gradient that it has at that v held fixed (variable projection), so
    L-BFGS walks over f alone, in coordinates in which a head's queries are white: q (H,N,D) is made so in
    place. penalty: on the variance of f; without it heads saturate early and stay in worse minima."""
    q_mean = q.mean(1)
    spread = covariance(q, q_mean)
    variances = spread.diagonal(dim1=1, dim2=2)
    variances.add_(1e-2 * variances.mean(-1, keepdim=True))     # rare directions of the queries stay quiet
    lower = torch.linalg.cholesky(spread)                       # (H,D,D)
    for h in range(len(q)):
        q[h] = torch.linalg.solve_triangular(lower[h], (q[h] - q_mean[h]).T, upper=False).T
    a = torch.einsum("hde,hd->he", lower, weight).requires_grad_()
    b = (bias + (weight * q_mean).sum(-1)).requires_grad_()

    def closure():
        optimiser.zero_grad()
        mu = mixing_weight(f_of(a, b, q), log_z2)
        v = best_v(mu.detach(), delta, w_o, gram_o)
        loss = unexplained(mu, v, delta, w_o) + penalty * a.pow(2).sum(-1).mean()
        loss.backward()
        return loss

    optimiser = torch.optim.LBFGS([a, b], max_iter=iterations, history_size=20, line_search_fn="strong_wolfe")
    optimiser.step(closure)                                     # it turns gradients on for the closure
    mu = mixing_weight(f_of(a, b, q), log_z2)
    v = best_v(mu, delta, w_o, gram_o)
    weight = torch.linalg.solve_triangular(lower.mT, a.unsqueeze(-1), upper=True).squeeze(-1)
    return weight, b - (weight * q_mean).sum(-1), v, 1 - unexplained(mu, v, delta, w_o)


def fit_layer(mimic, layer, q, log_z1, log_z2, delta, w_o):
    """Steps 4 and 5: sets the layer's f and v → the shares of Δ explained at the start and in the end.  q
    (H,N,D), overwritten; log_z1, log_z2 (N,H); delta (N,d); w_o (d,H,D): fp32 or fp64, all alike."""
    gram_o = normal_o(w_o)
    weight, bias = start_f(q, log_z1)
    mu = mixing_weight(f_of(weight, bias, q), log_z2)
    if mimic.mu_of == "one":                                    # the control: the vector alone, f is not read
        mu = torch.ones_like(mu)
    v = best_v(mu, delta, w_o, gram_o)
    start = end = 1 - unexplained(mu, v, delta, w_o)
    if mimic.mu_of == "head":
        *refined, share = refine(weight, bias, q, log_z2, delta, w_o, gram_o)
        if share > start:
            weight, bias, v = refined
            end = share
    mimic.f_weight.data[layer] = weight
    mimic.f_bias.data[layer] = bias
    mimic.vector.data[layer] = v
    return start.item(), end.item()


# ---- All layers
def draw_batches(pool, groups, shots, draws, seed, processor, template):
    """→ for every group of queries a list of Batch, each with another draw of demonstrations."""
    def batch(queries, n):
        return collate(queries, draw(pool, queries, shots, f"{seed}-{n}"), processor, template)
    return [[batch(queries, n) for n in range(draws)] for queries in groups]


@torch.no_grad()
def fit(model, mimic, drawn, features):
    """Fits the layers → the share of Δ that each explains.  drawn: of draw_batches; features {id: x}."""
    def embed(rows):
        inputs = rows.inputs(model, features)
        return model.embed(inputs["input_ids"], inputs["image_features"])

    dtype = mimic.vector.dtype
    x_S = [embed(batches[0].student) for batches in drawn]
    x_T = [[embed(batch.teacher) for batch in batches] for batches in drawn]
    shares = []
    for layer in tqdm(range(len(mimic.vector)), desc="fit", unit="layer"):
        found = []
        for c, batches in enumerate(drawn):
            # 1. Teacher: the mean over its draws.
            kept = batches[0].align.to(model.device)
            T_q = batches[0].T_q
            h_T = z1 = 0.0
            for n, batch in enumerate(batches):
                x = enter(model, layer, x_T[c][n], batch.teacher, features)
                h, z, x_T[c][n] = teacher(model, layer, x, batch.teacher, T_q)
                h_T = h_T + h / len(batches)
                z1 = z1 + z / len(batches)

            # 2. Student, and 3. target: of the tokens that are kept.
            rows = batches[0].student
            x_S[c] = enter(model, layer, x_S[c], rows, features)
            h_S, q, _, z2, _ = watched(model, layer, x_S[c], rows)
            q = q[:, :, -T_q:].transpose(0, 1)[:, kept]                                         # (H,n,D)
            z1, z2 = (z[:, :, -T_q:].transpose(1, 2)[kept] for z in (z1, z2))                   # (n,H)
            delta = (h_T - h_S[:, -T_q:])[kept]                                                 # (n,d)
            found.append([x.to(dtype) for x in (q, z1, z2, delta)])

        # 4. Start, and 5. refine.
        q, *others = zip(*found, strict=True)
        attn = model.text_model.layers[layer].self_attn
        w_o = attn.o_proj.weight.to(dtype).unflatten(1, (attn.n_heads, -1))
        shares += fit_layer(mimic, layer, torch.cat(q, 1), *map(torch.cat, others), w_o)[1:]

        # 6. Advance.
        for c, batches in enumerate(drawn):
            x_S[c] = advance(model, layer, x_S[c], batches[0].student, mimic)
    return shares


# ---- Command line
def main(argv=None):
    parser = Parser(__doc__, "python -m experiments.layerwise")
    add_common_arguments(parser, argv, DATASETS)
    add = parser.add_argument_group("fit").add_argument
    add("--shots", type=number(int, 1), help="demonstrations of the teacher (default: as in train.py)")
    add("--draws", type=number(int, 0), default=0, metavar="N",
        help="sets of demonstrations that a query meets (default: 1,000 / samples, 10 at most)")
    add("--mu", dest="mu_of", choices=("head", "one"), default="head",
        help="one μ̃ a head (default), or μ̃ = 1, the vectors alone")
    parser.set_defaults(method="mimic", z2="masked", compare=[])
    args = parser.parse(argv)
    if args.official:
        raise InputError("--official: a fit needs the paper's MimIC; leave the option out")
    args.shots = args.shots or models.of(args.model)[0].shots
    args.out = args.out or f"runs/{args.dataset}-layerwise"
    folder = Path(args.out)
    device = join(args.device)

    # 1. Samples, model, features
    samples, _, asked, split = choose_samples(args)
    if begin_run(folder, vars(args), args.resume):
        return already_finished(folder)
    model, processor = models.load_model(args.model, device, args.dtype)
    say, template = sayer(args, model, processor)
    features = encode_images(model, processor, samples, {}, "encode images")

    # 2. The fit
    began = time.perf_counter()
    mimic = MimIC.for_model(model, mu_of=args.mu_of)
    draws = args.draws or max(1, min(10, round(1000 / len(samples))))
    drawn = draw_batches(samples, chunks(samples, 4), args.shots, draws, args.seed, processor, template)
    with fits_into_memory("--samples", len(samples)):
        shares = fit(model, mimic, drawn, features)
    seconds = time.perf_counter() - began
    print("explained of the shift, layer by layer: " + " ".join(f"{x:.2f}" for x in shares))
    mimic.save(folder / "mimic.safetensors", **about(args))
    wait()                                                     # until process 0 has written the file

    # 3. Evaluation
    return report(args, folder, say, samples, asked, split, mimic, features, seconds)


if __name__ == "__main__":
    run_command(main)
