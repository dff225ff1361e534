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
from experiments.common import SHORT, activations, held_out_examples, load_experts_run
from experiments.control import (DIAL, OPPOSITE, control_matrix, expert_losses, measure_dial,
                                 turn_dial)
from personafuse import pick_device
from plumbing.files import HERE, UserError, atomic_write, read_lines, run_program

# a colour for each trait; legible on white, and told apart by most who are colour-blind
COLOURS = ["#0072b2", "#e69f00", "#cc79a7", "#009e73", "#d55e00"]
GREY = "#b8b8b8"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 7,
    "legend.frameon": False,
    # text stays text: small, and searchable
    "svg.fonttype": "none",
    # no random names in the file, so that equal pictures are equal bytes
    "svg.hashsalt": "personafuse",
    # a background of its own, for pages in a dark theme
    "savefig.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def import_pyplot():
    try:
        import matplotlib
    except ImportError:
        raise UserError("the pictures need matplotlib: pip install matplotlib")
    matplotlib.use("svg")
    matplotlib.rcParams.update(STYLE)
    from matplotlib import pyplot
    return pyplot


def draw_control(pyplot, matrix):
    """matrix (10, 10) of `control_matrix`: experts in rows, poles in columns."""
    figure, axes = pyplot.subplots(figsize=(6.6, 5.6))
    limit = np.nanmax(np.abs(matrix))
    mesh = axes.pcolormesh(matrix, cmap="RdBu", vmin=-limit, vmax=limit)
    for (i, j), value in np.ndenumerate(matrix):
        colour = "white" if abs(value) > 0.6 * limit else "black"
        axes.text(j + 0.5, i + 0.5, f"{100 * value:+.0f}", color=colour, ha="center", va="center")
    centres = np.arange(len(TRAITS)) + 0.5
    axes.set_xticks(centres, SHORT)
    axes.set_yticks(centres, TRAITS)
    axes.invert_yaxis()
    axes.set(xlabel="records that call for this pole", ylabel="expert, alone",
             title="How much lower than the mean expert's is its loss?\n"
                   "hundredths of a nat a token, held-out records")
    figure.colorbar(mesh, shrink=0.8)
    return figure


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
    figure, panels = pyplot.subplots(1, 5, figsize=(12, 2.9), sharex=True, sharey=True)
    for trait, axes in enumerate(panels):
        axes.scatter(*h.T, s=7, color=GREY)
        for i, fill in ((2 * trait, COLOURS[trait]), (2 * trait + 1, "white")):
            look = {"color": fill, "edgecolors": COLOURS[trait], "label": TRAITS[i]}
            axes.scatter(*h[p[:, i] == 1].T, s=14, **look)
            axes.scatter(*e[i], s=150, marker="*", **look)
        axes.legend(loc="lower left")
    figure.suptitle("Dots: held-out queries, h, grey where neither pole is called for. Stars: the "
                    "embeddings e of the trait's two experts.", y=-0.01)
    return figure


def draw_curves(pyplot, path):
    """The metrics.jsonl of a run: a panel for each stage."""
    figure, panels = pyplot.subplots(1, 3, figsize=(10.2, 2.7))
    steps = [json.loads(line) for _, line in read_lines(path)]
    for stage, axes in enumerate(panels, 1):
        own = [step for step in steps if step["stage"] == stage and "held_out" not in step]
        for name in ("lm", "contrastive", "trait"):
            values = [step[name] for step in own if name in step]
            if values:
                axes.plot(range(1, len(values) + 1), values, label=f"L_{name}")
                axes.legend()
        axes.set(title=f"stage {stage}", xlabel="step")
    return figure


def telling_queries(w, count=6):
    """The queries with the largest weights, one for each of `count` experts -> their indices.

    Whether the weight is right plays no part in the choice. w (n, 10), numpy.
    """
    chosen = {}
    for i in np.argsort(-w.max(axis=1)):
        chosen.setdefault(w[i].argmax(), i)
    return list(chosen.values())[:count]


def draw_bars(pyplot, queries, w, p):
    """Queries (6 strings), their weights (6, 10) and p (6, 10)."""
    figure, panels = pyplot.subplots(2, 3, figsize=(11, 5.4), sharex=True, sharey=True)
    for axes, query, weights, active in zip(panels.flat, queries, w, p):
        colours = [COLOURS[i // 2] if active[i] else GREY for i in range(len(TRAITS))]
        axes.barh(TRAITS, weights, color=colours)
        title = textwrap.fill(query, 46, max_lines=3, placeholder=" ...")
        # a dollar sign would begin a formula
        axes.set_title(title.replace("$", r"\$"), loc="left")
    panels[0, 0].invert_yaxis()
    figure.suptitle("The router's weights. Coloured: the poles of the record.", y=0.0)
    figure.tight_layout()
    return figure


def draw_steering(pyplot, model, examples, p):
    """A panel for each pole, own records and opposite's, as its expert's weight grows."""
    figure, panels = pyplot.subplots(2, 5, figsize=(12, 4.8), sharex=True, sharey=True)
    for i, axes in enumerate(panels.T.flat):
        opposite = OPPOSITE[i]
        losses = turn_dial(model, examples, i, p)
        own_curve, opposite_curve, *_ = measure_dial(losses, p[:, i], p[:, opposite])
        axes.plot(DIAL, own_curve, "o-", color=COLOURS[i // 2], label=TRAITS[i])
        axes.plot(DIAL, opposite_curve, "o--", color=GREY, label=TRAITS[opposite])
        axes.set(title=f"expert: {TRAITS[i]}", xlabel="its weight", ylabel="loss per token")
        axes.legend(title="records of")
    figure.tight_layout()
    return figure


def draw_all(args):
    pyplot = import_pyplot()
    args.device = pick_device(args.device)
    model, settings = load_experts_run(args.run, args)
    records, examples = held_out_examples(model, settings, args)
    p = activations(records)
    figures = {"curves": draw_curves(pyplot, Path(args.run) / "metrics.jsonl")}
    if model.router:
        h = model.embed([example.query for example in examples]).detach()
        places = [xy.cpu().numpy() for xy in two_axes(h, model.router.e)]
        figures["map"] = draw_map(pyplot, *places, p)
        w = model.router.weights(h).cpu().numpy()
        chosen = telling_queries(w)
        queries = [records[i]["query"] for i in chosen]
        figures["bars"] = draw_bars(pyplot, queries, w[chosen], p[chosen])
    figures["control"] = draw_control(pyplot, control_matrix(expert_losses(model, examples), p))
    figures["steering"] = draw_steering(pyplot, model, examples, p)

    Path(args.out).mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        path = Path(args.out) / f"{name}.svg"
        with atomic_write(path) as tmp:
            # without the date, which would make equal pictures differ
            figure.savefig(tmp, format="svg", bbox_inches="tight", metadata={"Date": None})
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", required=True, metavar="DIR", help="a folder that train.py wrote")
    add("--out", default=str(HERE / "docs" / "figures"), metavar="DIR")
    add("--data", help="the records, where they are not found")
    add("--limit", type=int, help="only so many held-out records")
    add("--device", default="auto")
    add("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    draw_all(parser.parse_args())


if __name__ == "__main__":
    run_program(main)
