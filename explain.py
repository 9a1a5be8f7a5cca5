"""Pictures of what demonstrations do inside the attention, and of what a trained MimIC makes of it.

    python explain.py                                          # of the toy runs, which are made first if they are not there
    python explain.py --out docs                               # those of the README and the lesson
    python explain.py --run runs/okvqa --beside runs/okvqa-live --queries 16 --only approximation distance

grid            questions with the answers of the methods
mu              the true μ and MimIC's μ̃, layer by head, and μ̃ at every token of one query
approximation   does the paper's approximation hold? f(q) against the true log Z1, μ̃·v against the true shift, head by head
distance        how far the states of every layer are from those with demonstrations
loss            the losses of the training, and the dev score
cost            accuracy against shots, and against milliseconds a query (runs with --compare, as the toy's)

True is what the identity says (mimic.py), at the teacher's own queries: Z1 over its demonstrations' keys, the shift
μ·(SA(q,K_D,V_D) − SA(q,K,V)); the mean over several draws of demonstrations, for nothing that is added whatever they are can do
better. Needs matplotlib. The numbers behind the pictures are printed.
"""

import argparse
import csv
import importlib.util
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import train
from data import DATASETS, collate, load, pick_icds, train_dev
from eval import ADAPTERS, check_fits, load_model, resolve, run_arguments, run_command, template_of
from features import encode_images, gather, sees_alike
from fit import f_of, is_demonstration, start_f
from mimic import MimIC
from model import InputError, Shifts, attention, causal_mask, split_heads
from results import read_predictions, read_rows

RUNS = {"runs/toy": [], "runs/toy-live": ["--method", "live", "--compare"],
        "runs/toy-layerwise-1000": ["--fit", "layerwise", "--compare"]}
NAMES = {"runs/toy": "MimIC", "runs/toy-live": "LIVE", "runs/toy-layerwise-1000": "MimIC, fitted"}
WIDTH, DPI = 4.0, 160                 # inches, dots an inch: 640 pixels, with letters that a phone shows at 13 pixels or more


# ---------------------------------------------------------------------------------------------------------------------
# What happens inside
# ---------------------------------------------------------------------------------------------------------------------
class Inside(Shifts):
    """Keeps q, k, v, lse of every layer's attention and every layer's output of one pass under `inner`'s shifts."""

    def __init__(self, model, pictures, inner=None):
        self.text_model, self.pictures = model.text_model, pictures
        self.inner, self.seen, self.states = inner if inner is not None else Shifts(), [], []

    def after_embedding(self, input_ids, x):
        self.x = self.inner.after_embedding(input_ids, x)
        return self.x

    def after_attention(self, layer, q, k, out, lse):
        block, x = self.text_model.layers[layer], self.x
        x = self.text_model.enter(layer, x, self.pictures) if layer in self.text_model.crossed else x
        v = split_heads(block.self_attn.v_proj(block.input_layernorm(x)), k.shape[1])
        self.seen.append((q, k, v, lse))
        return self.inner.after_attention(layer, q, k, out, lse)

    def after_ffn(self, layer, ffn_out):
        return self.inner.after_ffn(layer, ffn_out)

    def after_layer(self, layer, hidden_states):
        self.x = self.inner.after_layer(layer, hidden_states)
        self.states.append(self.x)
        return self.x


@torch.no_grad()
def inside(model, rows, features, shifts=None):
    """One pass over the rows → Inside."""
    ids, mask, images = rows.input_ids.to(model.device), rows.attention_mask.to(model.device), gather(features, rows.samples)
    watch = Inside(model, model.pictures(ids, images), shifts)
    model.hidden_states(ids, mask, images, watch, None if rows.position_ids is None else rows.position_ids.to(model.device))
    return watch


@torch.no_grad()
def compare(model, mimic, batch, features):
    """Teacher and MimIC on one batch → one dict a layer, tensors over the N tokens of queries and answers, fp32 on the CPU:
    q (H,N,D), f, mu (N,H) of MimIC; true_log_z1, true_mu (N,H), true_shift (N,H,D) = μ·(SA_D − SA) of the teacher; and behind
    W_o, all heads together, added and true_added (N,d), what MimIC and the demonstrations add, and true_power (N), its square."""
    teacher, student = inside(model, batch.teacher, features), inside(model, batch.student, features, mimic)
    T_q, keep = batch.align.shape[1], batch.align.to(model.device)
    mask = causal_mask(batch.teacher.attention_mask.to(model.device), T_q, model.config.text.sliding_window)
    demonstrations, layers = is_demonstration(batch)[:, None, None].to(model.device), []

    def kept(x):
        return x[:, :, -T_q:].transpose(1, 2)[keep].float().cpu()                     # (B,H,T,…) → (N,H,…)

    for layer, ((q, k, v, _), (q_S, k_S, _, lse_S)) in enumerate(zip(teacher.seen, student.seen, strict=True)):
        W_o = model.text_model.layers[layer].self_attn.o_proj.weight.float().cpu()
        SA_D, log_z1 = attention(q[:, :, -T_q:], k, v, mask & demonstrations)
        SA, log_z2 = attention(q[:, :, -T_q:], k, v, mask & ~demonstrations)
        x = {"q": kept(q_S).transpose(0, 1), "f": kept(mimic.f(layer, q_S)), "mu": kept(mimic.mu(layer, q_S, k_S, lse_S)),
             "true_log_z1": kept(log_z1), "true_mu": kept(torch.sigmoid(log_z1 - log_z2))}
        x["true_shift"] = x["true_mu"].unsqueeze(-1) * kept(SA_D - SA)
        x["added"] = (x["mu"].unsqueeze(-1) * mimic.vector[layer].float().cpu()).flatten(1) @ W_o.T
        x["true_added"] = x["true_shift"].flatten(1) @ W_o.T
        x["true_power"] = x["true_added"].pow(2).sum(-1)
        layers.append(x)
    return layers


def joined(draws):
    """draws: for every batch what `compare` says of it with each of several draws of demonstrations → the same dicts, of all
    tokens. What is true is the mean over the draws: nothing that does not know the demonstrations can be closer to all."""
    batches = [[{name: torch.stack([d[layer][name] for d in batch]).mean(0) for name in batch[0][layer]}
                for layer in range(len(batch[0]))] for batch in draws]
    return [{name: torch.cat([b[layer][name] for b in batches], 1 if name == "q" else 0) for name in batches[0][layer]}
            for layer in range(len(batches[0]))]


def common(x, n):
    """Share of what demonstrations add to a layer (squares, behind W_o) that does not depend on which they are: ‖mean‖² of n
    draws, less what n draws leave of the variance, over the mean of ‖·‖².  x: a dict of `joined`, n ≥ 2 → scalar."""
    mean, power = x["true_added"].pow(2).sum(), x["true_power"].sum()
    return (mean - (power - mean) / (n - 1)) / power


def explained(found, true):
    """1 − Σ‖found − true‖² / Σ‖true‖² over all but the head's dimension 1: (N,H) or (N,H,D) → (H)."""
    def squares(x):
        return x.pow(2).sum([i for i in range(x.ndim) if i != 1])
    return 1 - squares(found - true) / squares(true)


def approximation(layers, vector):
    """How good f and v are, and how good they could be → {name: (L,H)}. Of the tokens the first half fits, the second judges.

    R² of f: of log Z1's variance. Shares of the shift: of the squares of μ·(SA_D − SA), by a constant vector, by the true μ times
    the best v of the head, and by the trained μ̃·v; cosine: of the trained v with that best v. Last, (L,1): the shares of what a
    layer adds, all heads together behind W_o, by a constant vector and by the trained heads. true: the mean over the draws."""
    found = {name: [] for name in ("R², best linear f", "R², trained f", "correlation, trained f", "share, constant shift",
                                   "share, true μ and best v", "share, trained μ̃·v", "cosine, trained v and best v",
                                   "share of a layer, constant", "share of a layer, trained")}
    for x, v in zip(layers, vector, strict=True):
        half = len(x["f"]) // 2
        log_z1, f, mu, true_mu = (x[name][half:] for name in ("true_log_z1", "f", "mu", "true_mu"))
        weight, bias = start_f(x["q"][:, :half].contiguous(), x["true_log_z1"][:half])
        linear = f_of(weight, bias, x["q"][:, half:])
        centred = log_z1 - log_z1.mean(0)
        shift, added = x["true_shift"], x["true_added"][:, None]
        best_v = (x["true_mu"].unsqueeze(-1) * shift)[:half].sum(0) / x["true_mu"][:half].pow(2).sum(0).unsqueeze(-1)     # (H,D)
        rows = (explained(linear - log_z1.mean(0), centred), explained(f - log_z1.mean(0), centred),
                torch.cosine_similarity(f - f.mean(0), centred, dim=0),
                explained(shift[:half].mean(0).expand_as(shift[half:]), shift[half:]),
                explained(true_mu.unsqueeze(-1) * best_v, shift[half:]), explained(mu.unsqueeze(-1) * v, shift[half:]),
                torch.cosine_similarity(v, best_v, dim=-1),
                explained(added[:half].mean(0).expand_as(added[half:]), added[half:]),
                explained(x["added"][half:, None], added[half:]))
        for name, row in zip(found, rows, strict=True):
            found[name].append(row)
    return {name: torch.stack(rows).numpy() for name, rows in found.items()}


@torch.no_grad()
def distances(model, adapters, batches, features):
    """Mean Euclidean distance of a token's state from the teacher's after every layer → {name: (L)}, adapters {name: Shifts}."""
    sums, n = {name: 0 for name in adapters}, 0
    students = {name: model if shifts is None else shifts.student(model) for name, shifts in adapters.items()}
    for batch in batches:
        T_q, keep = batch.align.shape[1], batch.align.to(model.device)
        teacher, n = inside(model, batch.teacher, features).states, n + int(batch.align.sum())
        for name, shifts in adapters.items():
            states = inside(students[name], batch.student, features, shifts).states
            sums[name] += np.array([(s[:, -T_q:] - t[:, -T_q:])[keep].float().norm(dim=-1).sum().item()
                                    for s, t in zip(states, teacher, strict=True)])
    return {name: total / n for name, total in sums.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------
COLOURS = {"zero-shot": "#888888", "LIVE": "#d95f02", "MimIC": "#1b6ca8", "MimIC, fitted": "#6a3d9a", "ICL": "#1b9e4b"}


def colour_of(name, i):
    return COLOURS.get(name, f"C{i}")


def new(height, mosaic=None, **options):
    """A figure of the common width and this height in inches → figure, axes: as plt.subplots, or with a mosaic subplot_mosaic."""
    from matplotlib import pyplot as plt
    plt.rcParams.update({"font.size": 10, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
                         "legend.frameon": False, "legend.fontsize": 9})
    options |= {"figsize": (WIDTH, height), "dpi": DPI, "layout": "constrained"}
    return plt.subplots(**options) if mosaic is None else plt.subplot_mosaic(mosaic, **options)


def save(figure, path):
    """A PNG of 64 colours: a tenth of the bytes, and nobody sees it."""
    from matplotlib import pyplot as plt
    figure.canvas.draw()
    Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3]).quantize(64).save(path, optimize=True)
    plt.close(figure)


def draw_mu(path, layers, tokens, at, query):
    """Above: mean true μ and μ̃, layer x head. Below: a query, and μ̃ at its tokens (rows `at`), a column for every head."""
    true, mimic = (np.array([x[name].mean(0).numpy() for x in layers]) for name in ("true_mu", "mu"))                 # (L,H)
    one, (L, H) = np.stack([x["mu"][at].numpy() for x in layers], 1), true.shape                                      # (T,L,H)
    figure, axes = new(6.4, [["true", "mimic"], ["picture", "text"], ["tokens", "tokens"]], height_ratios=(1, 0.8, 2.4))
    options = {"vmin": 0, "vmax": 1, "cmap": "viridis", "aspect": "auto"}
    for name, values, title in ("true", true, "true μ"), ("mimic", mimic, "MimIC's μ̃"):
        axes[name].imshow(values, **options)
        axes[name].set(title=title, xlabel="head", ylabel="layer" if name == "true" else "")
    axes["picture"].imshow(query.picture())
    axes["text"].text(0, 0.5, f"{query.question or ''}\n{query.target}\n\nμ̃ at its tokens:", va="center", fontsize=11)
    for name in "picture", "text":
        axes[name].axis("off")
    image = axes["tokens"].imshow(one.reshape(len(one), -1), **options)
    axes["tokens"].set(yticks=range(len(tokens)), yticklabels=tokens, xlabel="heads of layer",
                       xticks=[H * i + H / 2 - 0.5 for i in range(L)], xticklabels=range(L))
    for i in range(1, L):
        axes["tokens"].axvline(H * i - 0.5, color="white", lw=1.5)
    figure.colorbar(image, ax=axes["tokens"], location="bottom", shrink=0.6, aspect=30, ticks=(0, 0.5, 1))
    save(figure, path)


def draw_approximation(path, found):
    """A dot a head, layer by layer, values below −1 at −1: R² of f, direction of f and v, share of the shift."""
    green, blue, orange = "#1b9e4b", "#1b6ca8", "#d95f02"
    panels = [                                           # title, label, [(name in found, name shown, colour)]
        ("does f(q) follow log Z1?", "R²", [("R², best linear f", "best linear f", green), ("R², trained f", "trained f", blue)]),
        ("in which direction do they go?", "", [("correlation, trained f", "correlation of f, log Z1", blue),
                                                ("cosine, trained v and best v", "cosine of v, best v", orange)]),
        ("is μ̃·v the shift?", "share of squares", [("share, true μ and best v", "true μ, best v", green),
                                                   ("share, trained μ̃·v", "trained", blue),
                                                   ("share of a layer, trained", "trained, whole layer", "black")])]
    figure, axes = new(8.2, nrows=3)
    for axis, (title, label, groups) in zip(axes, panels, strict=True):
        for i, (name, shown, colour) in enumerate(groups):
            L, H = found[name].shape
            x = np.arange(L)[:, None] + (i - (len(groups) - 1) / 2) * 0.27 + (np.linspace(-0.08, 0.08, H) if H > 1 else 0)
            marker = {"marker": "o", "ms": 4} if H > 1 else {"marker": "_", "ms": 11, "mew": 2.5}
            axis.plot(x.ravel(), found[name].clip(-1, 1).ravel(), ls="", color=colour, alpha=0.7, label=shown, **marker)
        axis.axhline(0, color="black", lw=0.8)
        axis.set(title=title, ylabel=label, ylim=(-1.1, 1.1), yticks=(-1, 0, 1), xticks=range(L))
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=len(groups), handletextpad=0.1, columnspacing=1)
    axes[0].set_yticks((-1, 0, 1), ("≤ −1", "0", "1"))
    axes[2].set_yticks((-1, 0, 1), ("≤ −1", "0", "1"))
    axes[2].set_xlabel("layer", labelpad=24)
    save(figure, path)


def draw_distance(path, found, shots):
    figure, axis = new(3.2)
    for i, (name, values) in enumerate(found.items()):
        axis.plot(range(len(values)), values, "o-", ms=4, color=colour_of(name, i), label=name)
    axis.set(xlabel="layer", ylabel=f"distance from {shots}-shot states", xticks=range(len(values)), ylim=(0, None))
    axis.legend()
    save(figure, path)


def draw_loss(path, logs):
    """logs {name: rows of log.csv}. L_align and L_gt, and the dev score of every epoch."""
    figure, axes = new(4.6, nrows=2, sharex=True, height_ratios=(1.6, 1))
    for i, (name, rows) in enumerate(logs.items()):
        n, colour = max(1, len(rows) // 40), colour_of(name, i)
        for key, style in ("align", "-"), ("ce", ":"):
            values = np.convolve([float(row[key]) for row in rows], np.ones(n) / n, "valid")          # means over n steps
            axes[0].plot(np.arange(len(values)) + n, values, style, color=colour,
                         label=f"{name}: {'L_align' if key == 'align' else 'L_gt'}")
        dev = [(int(row["step"]), float(row["dev"])) for row in rows if row["dev"]]
        if dev:
            axes[1].plot(*zip(*dev, strict=True), "o-", ms=4, color=colour, label=name)
    axes[0].set(yscale="log", ylabel="loss")
    axes[0].legend(fontsize=8)
    axes[1].set(xlabel="step", ylabel="dev score", ylim=(-5, 105))
    save(figure, path)


def draw_cost(path, rows, metric):
    """Rows of results.json: accuracy against shots and against ms a query."""
    figure, axes = new(5.6, nrows=2)
    icl = sorted((r for r in rows if r["method"] in ("icl", "zero-shot")), key=lambda r: r["shots"])
    mimic = next(r for r in rows if r["method"] == "mimic")
    for axis, key, label in (axes[0], "shots", "demonstrations in the prompt"), (axes[1], "ms_per_query", "ms / query"):
        axis.plot([r[key] for r in icl], [r["score"] for r in icl], "o-", color=COLOURS["ICL"], label="in-context learning")
        axis.plot(mimic[key], mimic["score"], "*", ms=14, color=COLOURS["MimIC"], label="MimIC")
        axis.set(xlabel=label, ylabel={"vqa_accuracy": "accuracy in %"}.get(metric, metric))
        axis.legend(loc="lower right")
    for r in icl:
        axes[1].annotate(f"{r['shots']}-shot", (r["ms_per_query"], r["score"]), (4, -11), textcoords="offset points", fontsize=8)
    axes[1].set_xlim(0, None)
    save(figure, path)


def draw_grid(path, items):
    """items: (picture, question, [(name, answer, score)], truth), one a row."""
    figure, axes = new(1.25 * len(items), nrows=len(items), ncols=2, width_ratios=(1, 2.4))
    for (picture, text, answers, truth), (left, right) in zip(items, np.atleast_2d(axes), strict=True):
        left.imshow(picture)
        left.axis("off")
        right.axis("off")
        right.set(xlim=(0, 1), ylim=(0, len(answers) + 2))
        right.text(0, len(answers) + 1.5, f"{text or ''}   truth: {truth}", va="center", weight="bold", fontsize=9)
        for i, (name, said, right_or_wrong) in enumerate(answers):
            y = len(answers) + 0.4 - i
            right.text(0, y, name, va="center", color="#666666", fontsize=9)
            right.text(0.36, y, f"{'✓' if right_or_wrong else '✗'} {said}", va="center", fontsize=9,
                       color="#1b7837" if right_or_wrong else "#b2182b")
    save(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# From the runs
# ---------------------------------------------------------------------------------------------------------------------
def open_run(folder):
    """→ the run's arguments and its adapter. Raises InputError if the folder is no run of train.py."""
    if not (Path(folder) / "args.json").exists():
        if folder not in RUNS:
            raise InputError(f"{folder}: expected a run of train.py, found no args.json")
        print(f"{folder}: not there yet, python train.py {' '.join(RUNS[folder])}")
        train.main(["--out", folder, *RUNS[folder]])
    args = argparse.Namespace(**run_arguments(folder))
    return args, ADAPTERS[args.method].load(Path(folder) / f"{args.method}.safetensors")


def grid_items(folder, args, samples, n):
    """The first n questions that zero-shot gets wrong: what each method of predictions.jsonl said."""
    said, by_id = {}, {s.id: s for s in samples}
    for p in read_predictions(Path(folder) / "predictions.jsonl"):
        if p["dataset"] == args.dataset and p["method"] in ("zero-shot", "icl", "mimic") and p["id"] in by_id:
            said.setdefault(p["id"], {})[f"{p['shots']}-shot" if p["shots"] else p["method"]] = p
    names = {"zero-shot": "zero-shot", f"{args.shots}-shot": f"{args.shots}-shot", "mimic": "MimIC"}
    items = []
    for i, by in said.items():
        answers = [(shown, by[name]["prediction"], bool(by[name]["score"])) for name, shown in names.items() if name in by]
        if len(items) < n and by.get("zero-shot", {}).get("score", 0) == 0:
            items.append((by_id[i].picture(), by_id[i].question, answers, max(by_id[i].answers, key=by_id[i].answers.count)))
    return items


FIGURES = ("grid", "mu", "approximation", "distance", "loss", "cost")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog=__doc__.split("\n\n", 1)[1])
    parser.add_argument("--run", default="runs/toy", metavar="FOLDER",
                        help="a run of train.py, method mimic (default %(default)s)")
    parser.add_argument("--beside", nargs="*", default=None, metavar="FOLDER",
                        help="runs on the same data, for distance and loss (default: LIVE's and the layer-wise fit's on the toy)")
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=FIGURES, metavar="FIGURE",
                        help=f"some of {' '.join(FIGURES)} (default: all)")
    parser.add_argument("--queries", type=int, default=100, help="of the evaluation split, to look inside (default %(default)s; "
                        "kept in memory: 4·L·H·(3D+4) bytes for every token of theirs)")
    parser.add_argument("--draws", type=int, default=5,
                        help="of demonstrations for every query: f and v are compared with the mean of what these do "
                             "(default %(default)s)")
    parser.add_argument("--out", default="figures", metavar="FOLDER", help="gets FIGURE.png (default %(default)s)")
    args = parser.parse_args(argv)
    if not importlib.util.find_spec("matplotlib"):
        raise InputError("explain.py: expected matplotlib (pip install matplotlib), found none")
    for name, least in ("queries", 2), ("draws", 1):
        if getattr(args, name) < least:
            raise InputError(f"--{name}: expected at least {least}, found {getattr(args, name)}")
    beside = [r for r in RUNS if r != "runs/toy"] if args.beside is None and args.run == "runs/toy" else args.beside or []
    run, mimic = open_run(args.run)
    if not isinstance(mimic, MimIC):
        raise InputError(f"--run {args.run}: expected a run of --method mimic, found {run.method}")
    others = {NAMES.get(folder, Path(folder).name): (folder, *open_run(folder)) for folder in beside}
    run.device = None                                          # this machine's, whatever the run was made on
    resolve(run)
    model, processor = load_model(run.model, run.device, run.dtype)
    adapters = {"zero-shot": None, **{name: adapter.to(model.device) for name, (_, _, adapter) in others.items()},
                "MimIC": mimic.to(model.device)}
    for folder, adapter in (args.run, mimic), *((folder, adapter) for folder, _, adapter in others.values()):
        check_fits(adapter, model, folder)
    for name, (folder, other, _) in others.items():
        if "distance" in args.only and (other.method in ("stave", "prompt-tuning")
                                        or not sees_alike(model, adapters[name].student(model))):
            raise InputError(f"--beside {folder}: expected, for distance, a method that leaves prompt and image features as they "
                             f"are, found {other.method}")
    pool, _ = train_dev(run.dataset, run.data, run.samples, run.dev_samples, run.seed, run.task)
    samples = load(run.dataset, run.data, DATASETS[run.dataset].eval_split, run.task)
    out, shots = Path(args.out), run.shots or 8
    out.mkdir(parents=True, exist_ok=True)
    run.shots = shots

    if {"mu", "approximation", "distance"} & set(args.only):
        features, draws = {}, args.draws if {"mu", "approximation"} & set(args.only) else 1
        batches = [[collate(queries, [pick_icds(pool, q, shots, f"{run.seed}-{draw}-{q.id}") for q in queries], processor,
                            template_of(run, processor)) for draw in range(draws)]
                   for queries in (samples[i:i + 10][:args.queries - i] for i in range(0, min(args.queries, len(samples)), 10))]
        encode_images(model, processor, [s for b in batches for d in b for s in d.teacher.samples], features, "encode images")
    if {"mu", "approximation"} & set(args.only):
        layers = joined([[compare(model, mimic, draw, features) for draw in batch]
                         for batch in tqdm(batches, desc="look inside", unit="batch")])
    if "approximation" in args.only:
        found = approximation(layers, mimic.vector.detach().float().cpu())
        print(f"{run.dataset}, {len(layers[0]['f']):,} tokens, mean of {draws} draws of demonstrations")
        print(f"  {'over heads or layers':<28}{'median':>8}{'10%':>8}{'90%':>8}")
        if draws > 1:
            found["share common to all draws"] = np.array([[common(x, draws).item()] for x in layers])
        for name, values in found.items():
            print(f"  {name:<28}{np.median(values):>8.2f}{np.quantile(values, 0.1):>8.2f}{np.quantile(values, 0.9):>8.2f}")
        for name, values in ("true μ", "true_mu"), ("trained μ̃", "mu"):
            mu = torch.stack([x[values] for x in layers])
            low, high = (100 * share.float().mean() for share in (mu < 0.1, mu > 0.9))
            print(f"  {name}: mean {mu.mean():.2f}, below 0.1 at {low:.0f} % of heads and tokens, above 0.9 at {high:.0f} %")
        draw_approximation(out / "approximation.png", found)
    if "mu" in args.only:
        n, query = int(batches[0][0].align[0].sum()), samples[0]
        ids = batches[0][0].student.input_ids[0, -n:].tolist()
        tokens = [str(processor.tokenizer.id_to_token(i)).replace("<fake_token_around_image>", "<fake>") for i in ids]
        draw_mu(out / "mu.png", layers, [t.replace("\n", "\\n") for t in tokens], slice(0, n), query)
    if "distance" in args.only:
        found = distances(model, adapters, [batch[0] for batch in batches], features)
        print(f"mean distance from the {shots}-shot states, after layer " + " ".join(f"{i:>7}" for i in range(len(mimic.vector))))
        for name, values in found.items():
            print(f"  {name:<44}" + " ".join(f"{x:>7.2f}" for x in values))
        draw_distance(out / "distance.png", found, shots)
    if "loss" in args.only:
        logs = {"MimIC": args.run, **{name: folder for name, (folder, *_) in others.items()}}
        logs = {name: Path(folder) / "log.csv" for name, folder in logs.items()}
        draw_loss(out / "loss.png", {name: list(csv.DictReader(path.open())) for name, path in logs.items() if path.exists()})
    rows = read_rows(Path(args.run) / "results.json") if "cost" in args.only else []
    if len(rows) > 2 and any(r["method"] == "mimic" for r in rows):
        draw_cost(out / "cost.png", rows, DATASETS[run.dataset].metric)
    if "grid" in args.only and (items := grid_items(args.run, run, samples, 5)):
        draw_grid(out / "grid.png", items)
    print(f"{out}: " + ", ".join(name for name in args.only))


if __name__ == "__main__":
    run_command(main)
