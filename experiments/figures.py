"""Pictures of a trained run, as SVG, written to docs/figures/.

    python -m experiments.figures --run out/smollm2
    python -m experiments.figures --run out/smollm2 --query "I feel anxious" --query "We won!"

    voices.svg      two queries, the router's weights for them, and the answers
    control.svg     how much better each expert is on each pole's held-out records

Without --query the two are held-out ones, chosen by hand for their contrast.
"""

import argparse
import re
import textwrap
from html import escape
from pathlib import Path

import numpy as np

from data import TRAITS
from experiments.answers import add_answering, sampling, write_answers
from experiments.common import SHORT, activations, held_out_examples, load_experts_run
from experiments.control import control_matrix, expert_losses
from personafuse import pick_device
from plumbing.files import HERE, atomic_write, number, run_program

QUERIES = [
    "my little sister is nine and asked why you cant divide by zero and her teacher said BECAUSE I "
    "SAID SO. we're outraged. we have a bag of 12 lollipops and we want answers!!",
    "first protest tomorrow, im 20, student. what do i carry, what do i wear, what do i write on "
    "my arm. be thorough, my cousin got tear gassed last time",
]
# as narrow as a phone, where a page shows it at nearly its own size
WIDTH = 420
MARGIN = 16
# where the names of the poles end
NAMES = 168
BLUE = "#0072b2"
ORANGE = "#d55e00"
# a background of its own, for pages in a dark theme
PAGE = """\
<svg xmlns="http://www.w3.org/2000/svg" width="{width}" viewBox="0 0 {width} {height}" \
font-family="Helvetica, Arial, sans-serif" font-size="13" fill="#222">
<rect width="{width}" height="{height}" rx="8" fill="white"/>
{shapes}
</svg>
"""


# ------------------------------------------------------------------------------------------ shapes

def text(x, y, words, more=""):
    # XML has no control characters, and a model may write one
    words = "".join(c for c in words if c.isprintable())
    return f'<text x="{x}" y="{y}" {more}>{escape(words)}</text>'


def box(x, y, width, height, colour, opacity=1.0):
    return (f'<rect x="{x}" y="{y}" width="{width:.1f}" height="{height}" fill="{colour}" '
            f'fill-opacity="{opacity:.2f}"/>')


def page(shapes, height):
    return PAGE.format(width=WIDTH, height=height, shapes="\n".join(shapes))


def write(path, picture):
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as tmp:
        tmp.write_text(picture, encoding="utf-8")
    print(path)


# ------------------------------------------------------------------------------------------ voices

def draw_voices(queries, w, answers):
    """Queries one below the other, their weights w (n, 10), numpy, and answers -> SVG."""
    shapes = []
    y = 8
    for query, weights, answer in zip(queries, w, answers):
        if shapes:
            y += 18
            shapes.append(box(MARGIN, y, WIDTH - 2 * MARGIN, 1, "#bbb"))
        for line in textwrap.wrap(f"“{query}”", 34):
            y += 19
            shapes.append(text(MARGIN, y, line, 'font-size="14" font-weight="bold"'))
        y += 6
        for trait, weight in zip(TRAITS, weights):
            y += 18
            bar = 200 * weight
            shapes.append(text(NAMES, y, trait, 'text-anchor="end"'))
            shapes.append(box(NAMES + 8, y - 10, max(bar, 1), 12, BLUE))
            shapes.append(text(round(NAMES + 14 + bar), y, f"{weight:.2f}"))
        y += 8
        for line in textwrap.wrap(answer, 52):
            y += 19
            shapes.append(text(MARGIN, y, line, 'font-size="14"'))
    return page(shapes, y + MARGIN)


def whole_sentences(answer):
    """The answer up to the end of its last sentence, or all of it where none ends."""
    ended = re.match(r".*[.!?][\"”’')]*(?=\s|$)", answer, re.S)
    return ended[0] if ended else answer


def voices(model, settings, args):
    queries = args.query or QUERIES
    w = model.mixing_weights(queries)
    answers = write_answers(model, queries, w, args.max_new_tokens, **sampling(settings, args))
    return draw_voices(queries, w.cpu().numpy(), [whole_sentences(answer) for answer in answers])


# ----------------------------------------------------------------------------------------- control

def draw_control(matrix):
    """matrix (10, 10) of `control_matrix`: experts in rows, poles in columns -> SVG."""
    cell = 24
    limit = np.nanmax(np.abs(matrix))
    head = 'text-anchor="middle"'
    shapes = [
        text(MARGIN, 28, "How much each expert is better than the mean one"),
        text(MARGIN, 48, "loss per token in hundredths of a nat, held-out records"),
        text(NAMES, 76, "expert", 'text-anchor="end"'),
    ]
    for j, short in enumerate(SHORT):
        shapes.append(text(NAMES + 8 + cell * j + cell // 2, 76, short, head))
    for i, trait in enumerate(TRAITS):
        y = 84 + cell * i
        shapes.append(text(NAMES, y + 16, trait, 'text-anchor="end"'))
        for j, value in enumerate(matrix[i]):
            x = NAMES + 8 + cell * j
            # NaN, where no record has the pole, stays empty
            if np.isfinite(value):
                colour = BLUE if value > 0 else ORANGE
                shapes.append(box(x, y, cell - 1, cell - 1, colour, 0.7 * abs(value) / limit))
                shapes.append(text(x + 11.5, y + 16, f"{100 * value:+.0f}",
                                   head + ' font-size="12"'))
    y = 84 + cell * len(TRAITS) + 18
    shapes.append(text(MARGIN, y, "Columns: records that call for this pole. O+ is high openness."))
    return page(shapes, y + MARGIN)


# -------------------------------------------------------------------------------------------- main

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", required=True, metavar="DIR", help="a folder that train.py wrote")
    add("--query", action="append", metavar="TEXT", help="in place of the two; may be given again")
    add("--out", default=str(HERE / "docs" / "figures"), metavar="DIR")
    add("--data", help="the records, where they are not found")
    add("--limit", type=number(int, 1), help="control.svg of only so many records")
    add_answering(parser, max_new_tokens=60)
    args = parser.parse_args()
    args.device = pick_device(args.device)
    model, settings = load_experts_run(args.run, args)
    write(Path(args.out) / "voices.svg", voices(model, settings, args))
    records, examples = held_out_examples(model, settings, args)
    matrix = control_matrix(expert_losses(model, examples), activations(records))
    write(Path(args.out) / "control.svg", draw_control(matrix))


if __name__ == "__main__":
    run_program(main)
