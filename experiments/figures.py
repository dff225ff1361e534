"""Pictures of a trained run, as SVG, written to docs/figures/.

    python -m experiments.figures --run out/smollm2

    voices.svg      two held-out queries, the router's weights for them, and the answers
    control.svg     how much better each expert is on each pole's held-out records

The two queries were chosen by hand for their contrast.
"""

import argparse
import re
import textwrap
from html import escape
from pathlib import Path

import numpy as np

from data import TRAITS
from experiments.answers import write_answers
from experiments.common import SHORT, activations, held_out_examples, load_experts_run
from experiments.control import control_matrix, expert_losses
from personafuse import pick_device
from plumbing.files import HERE, number, run_program, write_text
from sample import add_answering, sampling

QUERIES = [
    "my little sister is nine and asked why you cant divide by zero and her teacher said BECAUSE I "
    "SAID SO. we're outraged. we have a bag of 12 lollipops and we want answers!!",
    "first protest tomorrow, im 20, student. what do i carry, what do i wear, what do i write on "
    "my arm. be thorough, my cousin got tear gassed last time",
]
# where the names of the poles end
NAMES = 168
BLUE = "#0072b2"
ORANGE = "#d55e00"
# as narrow as a phone, where a page shows it at nearly its own size; a background of its own, for
# pages in a dark theme
PAGE = """\
<svg xmlns="http://www.w3.org/2000/svg" width="420" viewBox="0 0 420 {height}" \
font-family="Helvetica, Arial, sans-serif" font-size="13" fill="#222">
<rect width="420" height="{height}" rx="8" fill="white"/>
{shapes}
</svg>
"""


def text(x, y, words, more=""):
    # XML has no control characters, and a model may write one
    words = "".join(c for c in words if c.isprintable())
    return f'<text x="{x}" y="{y}" {more}>{escape(words)}</text>'


def box(x, y, width, height, colour, opacity=1.0):
    return (f'<rect x="{x}" y="{y}" width="{width:.1f}" height="{height}" fill="{colour}" '
            f'fill-opacity="{opacity:.2f}"/>')


def draw_voices(queries, w, answers):
    """Queries one below the other, their weights w (n, 10) and answers -> shapes, and how far down
    they reach.
    """
    shapes = []
    add = shapes.append
    y = 8
    for query, weights, answer in zip(queries, w, answers):
        if shapes:
            y += 18
            add(box(16, y, 388, 1, "#bbb"))
        for line in textwrap.wrap(f"“{query}”", 34):
            y += 19
            add(text(16, y, line, 'font-size="14" font-weight="bold"'))
        y += 6
        for trait, weight in zip(TRAITS, weights):
            y += 18
            bar = 200 * weight
            add(text(NAMES, y, trait, 'text-anchor="end"'))
            add(box(NAMES + 8, y - 10, max(bar, 1), 12, BLUE))
            add(text(round(NAMES + 14 + bar), y, f"{weight:.2f}"))
        y += 8
        for line in textwrap.wrap(answer, 52):
            y += 19
            add(text(16, y, line, 'font-size="14"'))
    return shapes, y


def draw_control(matrix):
    """matrix (10, 10) of `control_matrix`: experts in rows, poles in columns -> shapes, and how far
    down they reach.
    """
    shapes = [
        text(16, 28, "How much each expert is better than the mean one"),
        text(16, 48, "loss per token in hundredths of a nat, held-out records"),
        text(NAMES, 76, "expert", 'text-anchor="end"'),
        text(16, 342, "Columns: records that call for this pole. O+ is high openness."),
    ]
    add = shapes.append
    for i, (trait, short) in enumerate(zip(TRAITS, SHORT)):
        add(text(NAMES, 100 + 24 * i, trait, 'text-anchor="end"'))
        add(text(188 + 24 * i, 76, short, 'text-anchor="middle"'))
    strongest = np.nanmax(np.abs(matrix))
    # NaN, where no record has the pole, stays empty
    for i, j in np.argwhere(np.isfinite(matrix)):
        value = matrix[i, j]
        x = NAMES + 8 + 24 * j
        y = 84 + 24 * i
        colour = BLUE if value > 0 else ORANGE
        add(box(x, y, 23, 23, colour, 0.7 * abs(value) / strongest))
        add(text(x + 11.5, y + 16, f"{100 * value:+.0f}", 'text-anchor="middle" font-size="12"'))
    return shapes, 342


def write(path, shapes, down):
    write_text(path, PAGE.format(height=down + 16, shapes="\n".join(shapes)))
    print(path)


def whole_sentences(answer):
    """The answer up to the end of its last sentence, which is no number of a list, or all of it."""
    ended = re.match(r".*\D[.!?][\"”’')]*(?=\s|$)", answer, re.S)
    return ended[0] if ended else answer


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", required=True, metavar="DIR", help="a folder that train.py wrote")
    add("--out", default=HERE / "docs" / "figures", type=Path, metavar="DIR")
    add("--data", help="the records, where they are not found")
    add("--limit", type=number(int, 1), help="control.svg of only so many records")
    add_answering(parser, max_new_tokens=60)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.device = pick_device(args.device)
    model, settings = load_experts_run(args.run, args)
    w = model.mixing_weights(QUERIES)
    answers = write_answers(model, QUERIES, w, args.max_new_tokens, **sampling(settings, args))
    answers = [whole_sentences(answer) for answer in answers]
    write(args.out / "voices.svg", *draw_voices(QUERIES, w.tolist(), answers))
    records, examples = held_out_examples(model, settings, args)
    matrix = control_matrix(expert_losses(model, examples), activations(records))
    write(args.out / "control.svg", *draw_control(matrix))


if __name__ == "__main__":
    run_program(main)
