"""The held-out records: what runs of one base lose on them and have forgotten, and how well their
routers rank.

    python -m experiments.evaluate --run out/tiny --run out/tiny-direct
    python -m experiments.evaluate --run out/tiny --forgetting --text english.txt

A row of a table is a model and a way to mix its experts; n records, E experts.
"""

import math
import re
from dataclasses import replace
from pathlib import Path

from data import Example
from experiments.answers import cot_prompt
from experiments.common import (COT, SHORT, activations, auc_interval, break_ties,
                                fitting_examples, measure_rows, response_losses, run_records)
from experiments.statistics import bootstrap, mean_interval, per_token
from personafuse import read_settings
from plumbing.files import read_lines
from router import average_precision, pole_auc

ANSWERS = ("response", "naive_response")
ROUTES = ("cot", "random1", "random2", "random5", "uniform", "oracle")


def held_out_records(args):
    """The held-out records of the first run that fit into its --max-length."""
    settings = read_settings(args.run[0])
    _, held = run_records(settings, ANSWERS, args.data, args.limit)
    return held


COMPARISON = """
Held-out records; in brackets 95% intervals, by bootstrap over the records. The difference is that
of the loss to the first run's, paired; = marks one smaller than its interval: not told from 0 by
these records."""


def comparison(args):
    """Runs of one base on its held-out records, beside the bare base, Persona-CoT prompting, Random
    Route, uniform weights and an oracle that mixes by p/|p|.
    """
    held = held_out_records(args)

    def measure(model, settings, w, name):
        good, naive = examples_of
