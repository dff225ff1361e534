"""What every experiment shares: a figure with its interval, and a table to show it in.

An interval is [value, low, high]. Rows of a table are dicts of their cells by column.
"""

import numpy as np


def bootstrap(statistic, n, draws=1000):
    """[value, low, high]: a statistic of n records and its 95% interval over resamples of them.

    `statistic` is called with the indices of the records that count (n,), and returns a number.
    """
    rng = np.random.default_rng(0)
    values = []
    for _ in range(draws):
        values.append(statistic(rng.integers(n, size=n)))
    value = statistic(np.arange(n))
    # a statistic may be NaN where a resample holds no example of a class
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return [round(float(x), 4) for x in (value, low, high)]


def mean_interval(values):
    """[mean, low, high] of values (n,), one of each record."""
    return bootstrap(lambda records: values[records].mean(), len(values))


def per_token(nll, counts):
    """Losses and numbers of tokens (n,) -> the loss per token of some records, by their indices."""
    return lambda records: nll[records].sum() / counts[records].sum()


def shown(interval, digits=2):
    """[0.71, 0.64, 0.78] -> "0.71 [0.64, 0.78]"; "" where there is none."""
    if not interval:
        return ""
    value, low, high = (f"{x:.{digits}f}" for x in interval)
    return f"{value} [{low}, {high}]"


def print_table(header, rows):
    """Columns aligned on the left, each as wide as its widest cell."""
    widths = []
    for column in zip(header, *rows):
        widths.append(max(len(str(cell)) for cell in column))
    rule = ["-" * width for width in widths]
    for row in [header, rule, *rows]:
        cells = [str(cell).ljust(width) for cell, width in zip(row, widths)]
        print("  ".join(cells).rstrip())


def print_rows(rows):
    """Rows, each {column: text, number or interval} or less -> a table of all their columns.

    The column "name" has no head; one with "difference" in its name is of differences.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    header = [column.removeprefix("name") for column in columns]
    print_table(header, [[cell(row.get(column), column) for column in columns] for row in rows])


def cell(value, column):
    if isinstance(value, list):
        # 0.524, but 90.9
        text = shown(value, 1 if abs(value[0]) >= 10 else 3)
        # smaller than its interval: not told from 0
        equal = "difference" in column and value[1] <= 0 <= value[2]
        return text + " =" if equal else text
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else value
