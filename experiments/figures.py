"""The pictures of experiments.explain: every function fills a figure of the common look. Needs matplotlib."""

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

LOOK = {"font.size": 10, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
        "legend.frameon": False, "legend.fontsize": 9}


def drawn(path, height, draw, *what):
    """Writes what draw(figure, *what) makes, legible on a phone; 64 colours are a tenth of the bytes."""
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(4, height), dpi=160, layout="constrained")
        draw(figure, *what)
        figure.savefig(path)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)


def mu(figure, layers, words):
    """Above: mean true μ and μ̃, layer x head. Below: μ̃ at the tokens of a query, a column a head."""
    axes = figure.subplot_mosaic([["true_mu", "mu"], ["words", "words"]], height_ratios=(1, 2.4))
    options = {"vmin": 0, "vmax": 1, "cmap": "viridis", "aspect": "auto"}
    for name, title in ("true_mu", "true μ"), ("mu", "MimIC's μ̃"):
        axes[name].imshow(torch.stack([x[name].mean(0) for x in layers]), **options)
        axes[name].set(title=title, xlabel="head", ylabel="layer")
    L, H = len(layers), layers[0]["mu"].shape[1]
    below = axes["words"]
    image = below.imshow(torch.cat([x["mu"][:len(words)] for x in layers], 1), **options)
    below.set(yticks=range(len(words)), yticklabels=words, xlabel="heads of layer",
              xticks=np.arange(L) * H + H / 2 - 0.5, xticklabels=range(L))
    for i in range(1, L):
        below.axvline(H * i - 0.5, color="white", lw=1.5)
    figure.colorbar(image, ax=below, location="bottom", shrink=0.6, aspect=30, ticks=(0, 0.5, 1))


def approximation(figure, found):
    """A dot a head, values below −1 at −1: R² of f, direction of f and v, share of the shift."""
    panels = {
        "does f(q) follow log Z1?": ["R², best linear f", "R², trained f"],
        "in which direction do they go?": ["correlation, trained f", "cosine, trained v and best v"],
        "is μ̃·v the shift?": ["share, true μ and best v", "share, trained μ̃·v",
                              "share of a layer, trained"]}
    axes = figure.subplots(nrows=3)
    for axis, (title, names) in zip(axes, panels.items(), strict=True):
        for i, name in enumerate(names):
            L, H = found[name].shape
            x = np.arange(L)[:, None] + 0.27 * i - 0.2 + np.linspace(-0.08, 0.08, H)
            axis.plot(x.ravel(), found[name].clip(-1, 1).ravel(), "o", ms=4, alpha=0.7, label=name)
        axis.axhline(0, color="black", lw=0.8)
        axis.set(title=title, xticks=range(L), ylim=(-1.1, 1.1), yticks=(-1, 0, 1),
                 yticklabels=("≤ −1", "0", "1"))
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1))
    axes[2].set_xlabel("layer", labelpad=48)


def distance(figure, found, shots):
    axis = figure.subplots()
    for name, values in found.items():
        axis.plot(values, "o-", ms=4, label=name)
    axis.set(xlabel="layer", ylabel=f"distance from {shots}-shot states", xticks=range(len(values)))
    axis.set_ylim(0, None)
    axis.legend()
