"""Pictures of a trained run, written to docs/figures/.

    python -m experiments.figures --run out/tiny

    control.svg     how much better each expert is on each pole's records
    map.svg         the queries' h and the ten e, on two axes
    curves.svg      the losses of the three stages
    bars.svg        the router's weights for six queries
    steering.svg    the weight of one expert from 0 to 1

All but the curves are of the held-out records. matplotlib is needed: pip install matplotlib
"""

import argparse
import json
import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import TRAITS
from experiments.control import (DIAL, OPPOSITE, SHORT, activations, control_matrix, expert_losses,
                                 held_out_examples, load_experts_run, measure_steering)
from personafuse import pick_device, read_settings
from plumbing import HERE, UserError, atomic_write, read_lines, run_program

# a colour for each trait; legible on white, and told apart by most who are colour-blind
COLOURS = ["#0072b2", "#e69f00", "#cc79a7", "#009e73", "#d55e00"]
GREY = "#b8b8b8"
# a loss of metrics.jsonl -> its label and colour
LOSSES = {
    "lm": ("L_lm, per token", COLOURS[0]),
    "contrastive": ("L_contrastive", COLOURS[4]),
    "trait": ("L_trait", COLOURS[3]),
}
STAGES = {1: "stage 1: experts", 2: "stage 2: router", 3: "stage 3: joint"}
# how many last steps a curve's value is the mean of
SMOOTHED = 5


def import_pyplot():
    """matplotlib, set up for small files that say the same every time."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("the pictures need matplotlib: pip install matplotlib")
    matplotlib.use("svg")
    matplotlib.rcParams.update({
        "font.size": 9,
        "font.family": "sans-serif",
        "axes.titlesize": 10,
        "legend.fontsize": 7,
        "legend.frameon": False,
        "lines.markersize": 4,
        # text stays text: small, and searchable
        "svg.fonttype": "none",
        # no random names in the file, so that equal pictures are equal bytes
        "svg.hashsalt": "personafuse",
        # a background of its own, for pages in a dark theme
        "figure.facecolor": "white",
        "savefig.facecolor": "white",
        "axes.spines.top": False,
        "axes.spines.right": False,
    })
    from matplotlib import pyplot
    return pyplot


def make_panels(pyplot, rows, columns, width, height):
    """A figure of some inches -> it, and its panels (rows, columns), which share their axes."""
    size = (width, height)
    return pyplot.subplots(rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False)


def save(figure, path):
    with atomic_write(path) as tmp:
        # without the date, which would make equal pictures differ
        figure.savefig(tmp, format="svg", bbox_inches="tight", metadata={"Date": None})
    kilobytes = path.stat().st_size / 1000
    print(f"{path}: {kilobytes:.0f} kB")


# ------------------------------------------------------------------------------- the control matrix

def draw_control(pyplot, matrix):
    """matrix (10, 10) of `control_matrix`: experts in rows, poles in columns."""
    figure, axes = pyplot.subplots(figsize=(6.6, 5.6))
    limit = np.nanmax(np.abs(matrix))
    mesh = axes.pcolormesh(matrix, cmap="RdBu", edgecolors="white")
    mesh.set_clim(-limit, limit)
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            dark = abs(value) > 0.6 * limit
            colour = "white" if dark else "black"
            weight = "bold" if i == j else "normal"
            hundredths = f"{100 * value:+.0f}"
            axes.text(j + 0.5, i + 0.5, hundredths, color=colour, weight=weight, fontsize=8,
                      ha="center", va="center")
    centres = np.arange(len(TRAITS)) + 0.5
    axes.set_xticks(centres, SHORT)
    axes.set_yticks(centres, TRAITS)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.set_xlabel("records that call for this pole")
    axes.set_ylabel("expert, alone")
    axes.set_title("How much lower than the mean expert's is its loss?\n"
                   "hundredths of a nat a token, held-out records")
    axes.spines[:].set_visible(False)
    figure.colorbar(mesh, shrink=0.8)
    return figure


# ---------------------------------------------------------------------------------- the map of h, e

def two_axes(h, e):
    """h (n, d) and e (E, d) -> their places (n, 2), (E, 2) on the two axes along which the ten e
    differ most.

    Directions only, as in Eq. 4, each less its mean, which all have in common, and the two drawn to
    one size.
    """
    h = F.normalize(h, dim=-1)
    e = F.normalize(e, dim=-1)
    h = h - h.mean(dim=0)
    e = e - e.mean(dim=0)
    _, _, axes = torch.linalg.svd(e, full_matrices=False)               # (E, d), longest first
    places = []
    for points in (h, e):
        xy = points @ axes[:2].T
        places.append(xy / xy.square().mean().sqrt())
    return places


def draw_map(pyplot, h, e, p):
    """h (n, 2), e (10, 2) and p (n, 10): a panel for each trait, all of one projection."""
    figure, panels = make_panels(pyplot, 1, 5, 12, 2.9)
    for trait, axes in enumerate(panels.flat):
        colour = COLOURS[trait]
        high = 2 * trait
        low = high + 1
        of_high = h[p[:, high] == 1]
        of_low = h[p[:, low] == 1]
        of_neither = h[p[:, high] + p[:, low] == 0]
        # first what lies at the back
        axes.scatter(*of_neither.T, s=7, color=GREY, linewidths=0)
        axes.scatter(*of_high.T, s=16, color=colour, linewidths=0, label="high")
        axes.scatter(*of_low.T, s=14, color="white", edgecolors=colour, label="low")
        star = {"s": 150, "marker": "*"}
        axes.scatter(*e[high], color=colour, edgecolors="black", **star)
        axes.scatter(*e[low], color="white", edgecolors=colour, **star)
        axes.set_title(TRAITS[high].removeprefix("high "))
        axes.set_xticks([])
        axes.set_yticks([])
        axes.legend(loc="lower left", handletextpad=0.1)
    figure.suptitle("Dots: held-out queries, h, grey where neither pole is called for. Stars: the "
                    "embeddings e of the trait's two experts.", fontsize=9, y=-0.01)
    figure.tight_layout()
    return figure


# -------------------------------------------------------------------------------------- the curves

def read_curves(path):
    """A run's metrics.jsonl -> {stage: {name of a loss: values}}, steps only."""
    curves = {}
    for _, line in read_lines(path):
        metrics = json.loads(line)
        if "held_out" in metrics:
            continue
        stage = curves.setdefault(metrics["stage"], {})
        for name in LOSSES:
            if name in metrics:
                stage.setdefault(name, []).append(metrics[name])
    return curves


def draw_curves(pyplot, curves):
    """curves of `read_curves`: a panel for each stage, pale the steps, dark their running mean."""
    # axes of their own: the stages have different losses
    figure, panels = pyplot.subplots(1, 3, figsize=(10.2, 2.7))
    window = np.ones(SMOOTHED) / SMOOTHED
    for stage, axes in enumerate(panels, 1):
        for name, values in curves.get(stage, {}).items():
            steps = np.arange(1, len(values) + 1)
            label, colour = LOSSES[name]
            axes.plot(steps, values, color=colour, alpha=0.25)
            if len(values) >= SMOOTHED:
                smooth = np.convolve(values, window, mode="valid")
                axes.plot(steps[SMOOTHED - 1:], smooth, color=colour, label=label)
                axes.legend()
        axes.set_title(STAGES[stage])
        axes.set_xlabel("step")
    figure.tight_layout()
    return figure


# ---------------------------------------------------------------------------------------- the bars

def telling_queries(w, count=6):
    """The queries with the largest weights, one for each of `count` experts -> their indices.

    Whether the weight is right plays no part in the choice. w (n, 10), numpy.
    """
    chosen = {}
    for i in np.argsort(-w.max(axis=1)):
        expert = w[i].argmax()
        chosen.setdefault(expert, i)
    return list(chosen.values())[:count]


def draw_bars(pyplot, queries, w, p):
    """Queries (6 strings), their weights (6, 10) and p (6, 10)."""
    figure, panels = make_panels(pyplot, 2, 3, 11, 5.4)
    places = np.arange(len(TRAITS))
    uniform = 1 / len(TRAITS)
    for axes, query, weights, active in zip(panels.flat, queries, w, p):
        bars = axes.barh(places, weights, color=GREY)
        for i in np.flatnonzero(active):
            bars[i].set_color(COLOURS[i // 2])
        axes.axvline(uniform, color="black", linewidth=0.6, linestyle=":")
        title = textwrap.fill(query, 46, max_lines=3, placeholder=" ...")
        # a dollar sign would begin a formula
        title = title.replace("$", r"\$")
        axes.set_title(title, fontsize=8, loc="left")
        axes.set_yticks(places, TRAITS)
        axes.tick_params(axis="y", length=0)
    panels[0][0].invert_yaxis()
    figure.suptitle("The router's weights. Coloured: the poles of the record; dotted: uniform "
                    "weights.", fontsize=9, y=0.0)
    figure.tight_layout()
    return figure


# ----------------------------------------------------------------------------------------- the dial

def draw_steering(pyplot, dials):
    """dials of `measure_steering`: a panel for each pole."""
    figure, panels = make_panels(pyplot, 2, 5, 12, 4.8)
    for i, (pole, dial) in enumerate(dials.items()):
        axes = panels[i % 2][i // 2]
        colour = COLOURS[i // 2]
        opposite = TRAITS[OPPOSITE[i]]
        axes.plot(DIAL, dial["own"], "o-", color=colour, label=pole)
        axes.plot(DIAL, dial["opposite"], "o--", color=GREY, label=opposite)
        axes.set_title(f"expert: {pole}")
        axes.legend(title="records of", title_fontsize=7)
    for axes in panels[1]:
        axes.set_xlabel("weight of the expert")
    for axes in panels[:, 0]:
        axes.set_ylabel("loss per token")
    figure.tight_layout()
    return figure


# --------------------------------------------------------------------------------------------- main

def draw_all(args):
    pyplot = import_pyplot()
    base = read_settings(args.run)["base"]
    device = pick_device(args.device, base)
    model, settings = load_experts_run(args.run, device, args.dtype)
    records, examples = held_out_examples(model, settings)
    p = activations(records)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    curves = read_curves(Path(args.run) / "metrics.jsonl")
    save(draw_curves(pyplot, curves), out / "curves.svg")
    if model.router:
        h = model.embed([example.query for example in examples])
        places = two_axes(h, model.router.e)
        places = [xy.cpu().numpy() for xy in places]
        figure = draw_map(pyplot, *places, p)
        save(figure, out / "map.svg")
        w = model.router.weights(h).cpu().numpy()
        chosen = telling_queries(w)
        queries = [records[i]["query"] for i in chosen]
        figure = draw_bars(pyplot, queries, w[chosen], p[chosen])
        save(figure, out / "bars.svg")
    matrix = control_matrix(expert_losses(model, examples), p)
    save(draw_control(pyplot, matrix), out / "control.svg")
    dials = measure_steering(model, examples, p)
    save(draw_steering(pyplot, dials), out / "steering.svg")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", required=True, metavar="DIR", help="a folder that train.py wrote")
    add("--out", default=str(HERE / "docs" / "figures"), metavar="DIR",
        help="where the pictures go (default: docs/figures)")
    add("--device", default="auto")
    add("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    draw_all(parser.parse_args())


if __name__ == "__main__":
    run_program(main)
