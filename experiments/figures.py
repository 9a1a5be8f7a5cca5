"""The pictures of experiments.explain: every function fills a figure of the common look. Needs matplotlib."""

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

GREEN, BLUE, ORANGE = "#1b9e4b", "#1b6ca8", "#d95f02"
COLOURS = {"zero-shot": "#888888", "LIVE": ORANGE, "MimIC": BLUE, "MimIC, fitted": "#6a3d9a"}
LOOK = {"font.size": 10, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
        "legend.frameon": False, "legend.fontsize": 9}


def drawn(path, height, draw, *what):
    """Writes the picture that draw(figure, *what) makes: 4 inches or 640 pixels wide, so that a phone shows
    its letters at 13 pixels or more; of 64 colours, a tenth of the bytes, and nobody sees it."""
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(4, height), dpi=160, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        draw(figure, *what)
        canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    Image.fromarray(pixels).quantize(64).save(path, optimize=True)


def mu(figure, layers, words, query):
    """Above: mean true μ and μ̃, layer x head. Below: a query, and μ̃ at its tokens, a column a head."""
    axes = figure.subplot_mosaic([["true_mu", "mu"], ["picture", "text"], ["words", "words"]],
                                 height_ratios=(1, 0.8, 2.4))
    options = {"vmin": 0, "vmax": 1, "cmap": "viridis", "aspect": "auto"}
    for name, title, label in ("true_mu", "true μ", "layer"), ("mu", "MimIC's μ̃", ""):
        axes[name].imshow(torch.stack([x[name].mean(0) for x in layers]), **options)
        axes[name].set(title=title, xlabel="head", ylabel=label)
    axes["picture"].imshow(query.picture())
    axes["picture"].axis("off")
    text = f"{query.question or ''}\n{query.target}\n\nμ̃ at its tokens:"
    axes["text"].text(0, 0.5, text, va="center", size=11)
    axes["text"].axis("off")
    L, H = len(layers), layers[0]["mu"].shape[1]
    below = axes["words"]
    image = below.imshow(torch.cat([x["mu"][:len(words)] for x in layers], 1), **options)
    below.set(yticks=range(len(words)), yticklabels=words, xlabel="heads of layer",
              xticks=np.arange(L) * H + H / 2 - 0.5, xticklabels=range(L))
    for i in range(1, L):
        below.axvline(H * i - 0.5, color="white", lw=1.5)
    figure.colorbar(image, ax=below, location="bottom", shrink=0.6, aspect=30, ticks=(0, 0.5, 1))


PANELS = {          # title and label → what is drawn, its name in the legend, its colour
    ("does f(q) follow log Z1?", "R²"):
        [("R², best linear f", "best linear f", GREEN), ("R², trained f", "trained f", BLUE)],
    ("in which direction do they go?", ""):
        [("correlation, trained f", "correlation of f, log Z1", BLUE),
         ("cosine, trained v and best v", "cosine of v, best v", ORANGE)],
    ("is μ̃·v the shift?", "share of squares"):
        [("share, true μ and best v", "true μ, best v", GREEN), ("share, trained μ̃·v", "trained", BLUE),
         ("share of a layer, trained", "trained, whole layer", "black")],
}


def approximation(figure, found):
    """A dot a head, values below −1 at −1: R² of f, direction of f and v, share of the shift."""
    axes = figure.subplots(nrows=3)
    for axis, ((title, label), groups) in zip(axes, PANELS.items(), strict=True):
        for i, (name, shown, colour) in enumerate(groups):
            L, H = found[name].shape
            x = np.arange(L)[:, None] + (i - (len(groups) - 1) / 2) * 0.27
            style = {"marker": "_", "ms": 11, "mew": 2.5}
            if H > 1:
                x = x + np.linspace(-0.08, 0.08, H)
                style = {"marker": "o", "ms": 4}
            y = found[name].clip(-1, 1)
            axis.plot(x.ravel(), y.ravel(), ls="", color=colour, alpha=0.7, label=shown, **style)
        axis.axhline(0, color="black", lw=0.8)
        axis.set(title=title, ylabel=label, ylim=(-1.1, 1.1), yticks=(-1, 0, 1), xticks=range(L))
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=len(groups), handletextpad=0.1,
                    columnspacing=1)
    axes[0].set_yticklabels(("≤ −1", "0", "1"))
    axes[2].set_yticklabels(("≤ −1", "0", "1"))
    axes[2].set_xlabel("layer", labelpad=24)


def distance(figure, found, shots):
    axis = figure.subplots()
    for i, (name, values) in enumerate(found.items()):
        axis.plot(values, "o-", ms=4, color=COLOURS.get(name, f"C{i}"), label=name)
    axis.set(xlabel="layer", ylabel=f"distance from {shots}-shot states", xticks=range(len(values)))
    axis.set_ylim(0, None)
    axis.legend()


def loss(figure, logs):
    """logs {name: rows of log.csv}: L_align and L_gt, means over n steps, and the dev scores."""
    above, below = figure.subplots(nrows=2, sharex=True, height_ratios=(1.6, 1))
    for i, (name, rows) in enumerate(logs.items()):
        colour = COLOURS.get(name, f"C{i}")
        n = max(1, len(rows) // 40)
        for key, label, style in ("align", "L_align", "-"), ("ce", "L_gt", ":"):
            values = np.convolve([float(row[key]) for row in rows], np.ones(n) / n, "valid")
            above.plot(np.arange(len(values)) + n, values, style, color=colour, label=f"{name}: {label}")
        dev = [(int(row["step"]), float(row["dev"])) for row in rows if row["dev"]]
        if dev:
            below.plot(*zip(*dev, strict=True), "o-", ms=4, color=colour, label=name)
    above.set(yscale="log", ylabel="loss")
    above.legend(fontsize=8)
    below.set(xlabel="step", ylabel="dev score", ylim=(-5, 105))


def cost(figure, rows, metric):
    """Rows of results.json: accuracy against shots and against ms a query."""
    axes = figure.subplots(nrows=2)
    icl = sorted((r for r in rows if r["method"] in ("icl", "zero-shot")), key=lambda r: r["shots"])
    mimic = next(r for r in rows if r["method"] == "mimic")
    scores = [r["score"] for r in icl]
    labels = {"shots": "demonstrations in the prompt", "ms_per_query": "ms / query"}
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        axis.plot([r[key] for r in icl], scores, "o-", color=GREEN, label="in-context learning")
        axis.plot(mimic[key], mimic["score"], "*", ms=14, color=BLUE, label="MimIC")
        axis.set(xlabel=label, ylabel="accuracy in %" if metric == "vqa_accuracy" else metric)
        axis.legend(loc="lower right")
    for r in icl:
        axes[1].annotate(f"{r['shots']}-shot", (r["ms_per_query"], r["score"]), (4, -11), size=8,
                         textcoords="offset points")
    axes[1].set_xlim(0, None)


def grid(figure, items):
    """items: (sample, {method: its record of predictions.jsonl}), one a row."""
    axes = figure.subplots(nrows=len(items), ncols=2, width_ratios=(1, 2.4), squeeze=False)
    for (sample, said), (left, right) in zip(items, axes, strict=True):
        left.imshow(sample.picture())
        left.axis("off")
        right.axis("off")
        right.set(xlim=(0, 1), ylim=(0, len(said) + 2))
        asked = f"{sample.question or ''}   truth: {max(sample.answers, key=sample.answers.count)}"
        right.text(0, len(said) + 1.5, asked, va="center", weight="bold", size=9)
        for y, (name, record) in zip(np.arange(len(said), 0, -1) + 0.4, said.items(), strict=True):
            mark, colour = ("✓", "#1b7837") if record["score"] else ("✗", "#b2182b")
            right.text(0, y, name, va="center", color="#666666", size=9)
            right.text(0.36, y, f"{mark} {record['prediction']}", va="center", color=colour, size=9)
