"""Pictures and numbers of what demonstrations do inside attention, and of what a trained MimIC makes of it.

    python -m experiments.explain                # of runs/toy, which train.py makes
    python -m experiments.explain --run runs/okvqa --beside runs/okvqa-live --queries 16

approximation   does the paper's hold? f(q) against the true log Z1, μ̃·v against the true shift, head by head
mu              the true μ and MimIC's μ̃, layer by head, and μ̃ at every token of one query
distance        how far the states of every layer are from those with demonstrations

True is what the identity says (mimic.py), at the teacher's own queries; the mean over several draws of
demonstrations, for nothing that is added whatever they are can do better. Needs matplotlib.
"""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import baselines
import eval as evaluation
import models
from data import DATASETS, ICD, INSTRUCTION, QUERY, encode_images, load, train_dev
from experiments.layerwise import draw_batches, f_of, start_f
from mimic import Recorder, mixing_weight
from model import KVCache, attention, causal_mask
from support.files import InputError, chunks, make_folder, reading, run_command
from support.options import Parser, number, read_run


# ---- What happens inside
class Inside(Recorder):
    """A Recorder that also keeps q, k and lse of every layer's attention."""
    reads_attention = True

    def after_attention(self, layer, q, k, out, lse):
        self.seen.append((q, k, lse))
        return super().after_attention(layer, q, k, out, lse)


@torch.no_grad()
def inside(model, rows, features, shifts=None):
    """One pass over the rows → Inside, and the values v (B,Hkv,T,D) of every layer."""
    watch = Inside(shifts)
    watch.seen = []
    cache = KVCache(model.config.text.num_hidden_layers, rows.input_ids.shape[1])
    model.hidden_states(**rows.inputs(model, features), shifts=watch, cache=cache)
    return watch, cache.v


def demonstrations(batch):
    """(B,T) bool: what the student's prompt lacks of the teacher's; of --official the instruction, too."""
    lacks = ~(batch.student.part == INSTRUCTION).any()
    return (batch.teacher.part == ICD) | (batch.teacher.part == INSTRUCTION) & lacks


def kept(batch, x):
    """x (B,H,T,…) at the N tokens of queries and answers: (N,H,…), fp32 on the CPU."""
    return x[:, :, -batch.T_q:].transpose(1, 2)[batch.align.to(x.device)].float().cpu()


def behind_o(model, layer, x):
    """What the heads' outputs (N,H,D) are behind W_o: (N,d)."""
    return x.flatten(1) @ model.text_model.layers[layer].self_attn.o_proj.weight.float().cpu().T


@torch.no_grad()
def truth(model, batch, features):
    """What the demonstrations do → a dict a layer: true_log_z1, true_mu (N,H), true_shift (N,H,D) = μ·(SA_D −
    SA), and behind W_o, all heads together, true_added (N,d), and true_power (N), its square."""
    watch, values = inside(model, batch.teacher, features)
    mask = causal_mask(batch.teacher.attention_mask, batch.T_q, model.config.text.sliding_window)
    shown = demonstrations(batch)[:, None, None]
    layers = []
    for layer, ((q, k, _), v) in enumerate(zip(watch.seen, values, strict=True)):
        q = q[:, :, -batch.T_q:]
        SA_D, log_z1 = attention(q, k, v, (mask & shown).to(q.device))
        SA, log_z2 = attention(q, k, v, (mask & ~shown).to(q.device))
        mu = kept(batch, mixing_weight(log_z1, log_z2))
        shift = mu.unsqueeze(-1) * kept(batch, SA_D - SA)
        added = behind_o(model, layer, shift)
        layers.append({"true_log_z1": kept(batch, log_z1), "true_mu": mu, "true_shift": shift,
                       "true_added": added, "true_power": added.pow(2).sum(-1)})
    return layers


@torch.no_grad()
def learnt(model, mimic, batch, features):
    """What MimIC does in their place → a dict a layer: q (N,H,D), f, mu (N,H), and added (N,d) behind W_o."""
    layers = []
    for layer, (q, k, lse) in enumerate(inside(model, batch.student, features, mimic)[0].seen):
        mu = kept(batch, mimic.mu(layer, q, k, lse))
        added = behind_o(model, layer, mu.unsqueeze(-1) * mimic.vector[layer].float().cpu())
        layers.append({"q": kept(batch, q), "f": kept(batch, mimic.f(layer, q)), "mu": mu, "added": added})
    return layers


def together(reduce, found):
    """Lists of a dict a layer → one such list, every tensor of it `reduce` of the list of theirs."""
    layers = zip(*found, strict=True)
    return [{name: reduce([x[name] for x in layer]) for name in layer[0]} for layer in layers]


def look(model, mimic, batches, features):
    """→ a dict a layer, of all tokens: what MimIC does, and the mean of what demonstrations do."""
    found = []
    for draws in tqdm(batches, desc="look inside", unit="batch"):
        truths = [truth(model, batch, features) for batch in draws]
        true = together(lambda tensors: torch.stack(tensors).mean(0), truths)
        own = learnt(model, mimic, draws[0], features)
        found.append([a | b for a, b in zip(true, own, strict=True)])
    return together(torch.cat, found)


def common(x, n):
    """Share of what demonstrations add to a layer (squares, behind W_o) that does not depend on which they
    are: ‖mean‖² of n ≥ 2 draws, less what these leave of the variance, over the mean of ‖·‖² → scalar."""
    same = x["true_added"].pow(2).sum()
    power = x["true_power"].sum()
    return (same - (power - same) / (n - 1)) / power


def explained(found, true):
    """1 − Σ‖found − true‖² / Σ‖true‖² of every head: (N,H) or (N,H,D) → (H)."""
    def squares(x):
        return x.transpose(0, 1).flatten(1).pow(2).sum(1)
    return 1 - squares(found - true) / squares(true)


def approximation(layers, vector):
    """How good f and v are, and could be → {name: (L,H)}. Half the tokens fit, half judge. R²: of log Z1's
    variance. Shares: of the squares of the shift; of a layer, (L,1), of what all its heads add behind W_o."""
    found = []
    for x, v in zip(layers, vector, strict=True):
        half = len(x["f"]) // 2
        first = {name: y[:half] for name, y in x.items()}
        x = {name: y[half:] for name, y in x.items()}
        centre = x["true_log_z1"].mean(0)
        log_z1 = x["true_log_z1"] - centre
        fitted = start_f(first["q"].transpose(0, 1).contiguous(), first["true_log_z1"])
        best_f = f_of(*fitted, x["q"].transpose(0, 1))
        mu = first["true_mu"].unsqueeze(-1)
        best_v = (mu * first["true_shift"]).sum(0) / mu.pow(2).sum(0)                                # (H,D)
        shift = x["true_shift"]
        added = x["true_added"][:, None]
        share = {
            "R², best linear f": explained(best_f - centre, log_z1),
            "R², trained f": explained(x["f"] - centre, log_z1),
            "correlation, trained f": torch.cosine_similarity(x["f"] - x["f"].mean(0), log_z1, 0),
            "share, constant shift": explained(first["true_shift"].mean(0).expand_as(shift), shift),
            "share, true μ and best v": explained(x["true_mu"].unsqueeze(-1) * best_v, shift),
            "share, trained μ̃·v": explained(x["mu"].unsqueeze(-1) * v, shift),
            "cosine, trained v and best v": torch.cosine_similarity(v, best_v, -1),
            "share of a layer, constant": explained(first["true_added"].mean(0).expand_as(added), added),
            "share of a layer, trained": explained(x["added"][:, None], added)}
        found.append(share)
    return {name: torch.stack([x[name] for x in found]).numpy() for name in found[0]}


@torch.no_grad()
def distances(model, adapters, batches, features):
    """Mean distance of a token's state from the teacher's → {name: (L)}.  adapters {name: Shifts}."""
    sums = dict.fromkeys(adapters, 0)
    for batch in batches:
        def states(model, rows, shifts=None, batch=batch):
            layers = inside(model, rows, features, shifts)[0].layer
            return torch.stack([kept(batch, x[:, None])[:, 0] for x in layers])          # (L,N,d)

        teacher = states(model, batch.teacher)
        for name, shifts in adapters.items():
            student = states(shifts.student(model) if shifts else model, batch.student, shifts)
            sums[name] += (student - teacher).norm(dim=-1).sum(1).numpy()
    n = sum(int(batch.align.sum()) for batch in batches)
    return {name: total / n for name, total in sums.items()}


# ---- From the runs
def open_adapter(folder, model):
    """→ the adapter of a run. Raises InputError for one whose states cannot be compared token by token."""
    method = read_run(folder, baselines.adapters())["method"]
    adapter = baselines.load_adapter(Path(folder) / f"{method}.safetensors", method, model)
    if method in ("stave", "prompt-tuning") or adapter.changes_vision:
        raise InputError(f"{folder}: expected a method that leaves prompt and image features as they are, "
                         f"found {method}")
    return adapter


def print_approximation(found, layers):
    print(f"  {'over heads or layers':<28}{'median':>8}{'10%':>8}{'90%':>8}")
    for name, values in found.items():
        low, median, high = np.quantile(values, (0.1, 0.5, 0.9))
        print(f"  {name:<28}{median:>8.2f}{low:>8.2f}{high:>8.2f}")
    for name, key in ("true μ", "true_mu"), ("trained μ̃", "mu"):
        mu = torch.stack([x[key] for x in layers])
        print(f"  {name}: mean {mu.mean():.2f}, below 0.1 at {100 * (mu < 0.1).float().mean():.0f} % of "
              f"heads and tokens, above 0.9 at {100 * (mu > 0.9).float().mean():.0f} %")


def main(argv=None):
    parser = Parser(__doc__, "python -m experiments.explain")
    add = parser.add_argument
    add("--run", default="runs/toy", metavar="FOLDER", help="of train.py, method mimic (default %(default)s)")
    add("--beside", nargs="*", default=[], metavar="FOLDER", help="runs on the same data, for distance")
    add("--queries", type=number(int, 2), default=100,
        help="to look inside (default %(default)s); takes 4·L·H·(3D+4) bytes for every token of theirs")
    add("--draws", type=number(int, 2), default=5, help="of demonstrations for a query (default %(default)s)")
    add("--out", default="figures", metavar="FOLDER", help="gets FIGURE.png (default %(default)s)")
    args = parser.parse(argv)
    with reading("experiments.explain", "matplotlib (pip install matplotlib)"):
        from experiments import figures
    out = Path(args.out)

    # 1. The run, its model, the adapters
    saved = read_run(args.run, ["mimic"])
    with reading(f"{args.run}/args.json", "a number of shots"):
        shots = int(saved.get("shots") or 8)                   # 0: trained without a teacher
    run, _ = evaluation.parse(["--run", args.run])
    model, processor = models.load_model(run.model, run.device, run.dtype)
    mimic = open_adapter(args.run, model)
    beside = {folder: open_adapter(folder, model) for folder in args.beside}
    adapters = {"zero-shot": None, **beside, "MimIC": mimic}
    pool, _ = train_dev(run.dataset, run.data, run.samples, run.dev_samples, run.seed, run.task)
    samples = load(run.dataset, run.data, DATASETS[run.dataset].eval_split, run.task)[:args.queries]
    make_folder(out)

    # 2. What happens inside
    _, template = evaluation.sayer(run, model, processor)
    batches = draw_batches(pool, chunks(samples, 10), shots, args.draws, run.seed, processor, template)
    shown = [s for draws in batches for batch in draws for s in batch.teacher.samples]
    features = encode_images(model, processor, shown, {})
    layers = look(model, mimic, batches, features)

    # 3. Numbers and pictures
    found = approximation(layers, mimic.vector.detach().float().cpu())
    found["share common to all draws"] = np.array([common(x, args.draws).item() for x in layers])
    print(f"{run.dataset}, {len(layers[0]['f']):,} tokens, mean of {args.draws} draws of demonstrations")
    print_approximation(found, layers)
    figures.drawn(out / "approximation.png", 8.2, figures.approximation, found)

    first = batches[0][0].student
    ids = first.input_ids[0, first.part[0] >= QUERY].tolist()
    words = [repr(processor.tokenizer.id_to_token(i))[1:-1][:12] for i in ids]
    figures.drawn(out / "mu.png", 6.4, figures.mu, layers, words)

    found = distances(model, adapters, [draws[0] for draws in batches], features)
    print(f"mean distance from the {shots}-shot states, layer by layer")
    for name, values in found.items():
        print(f"  {name:<28}" + "".join(f"{x:>8.2f}" for x in values))
    figures.drawn(out / "distance.png", 3.2, figures.distance, found, shots)


if __name__ == "__main__":
    run_command(main)
