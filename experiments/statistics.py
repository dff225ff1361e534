"""What every experiment shares: a figure with its interval, and a table to show it in.

An interval is [value, low, high]. Rows of a table are dicts of their cells by column.
"""

import numpy as np


def bootstrap(statistic, n):
    """[value, low, high]: a statistic of n records and its 95% interval over resamples of them.

    `statistic` is called with the indices of the records that count (n,), and returns a number, or
    NaN where they hold no example of a class.
    """
    rng = np.random.default_rng(0)
    values = []
    with np.errstate(invalid="ignore"):
        value = statistic(np.arange(n))
        if np.isnan(value):                     # then it is NaN of any of them
            return [np.nan] * 3
        for _ in range(1000):
            values.append(statistic(rng.integers(n, size=n)))
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return [round(float(x), 4) for x in (value, low, high)]


def mean_interval(values):
    """[mean, low, high] of values (n,), one of each record."""
    return bootstrap(lambda records: values[records].mean(), len(values))


def per_token(nll, counts):
    """Losses and numbers of tokens (n,) -> the loss per token of some records, by their indices."""
    return lambda records: nll[records].sum() / counts[records].sum()


def shown(interval, digits=2):
    """[0.71, 0.64, 0.78] -> "0.71 [0.64, 0.78]"."""
    value, low, high = (f"{x:.{digits}f}" for x in interval)
    return f"{value} [{low}, {high}]"


def print_rows(rows):
    """Rows, each {column: text, number or interval} or less -> a table of all their columns.

    The column "name" has no head; one with "difference" in its name is of differences.
    """
    columns = []
    for name in dict.fromkeys(name for row in rows for name in row):
        texts = [cell(row.get(name), name) for row in rows]
        texts.insert(0, name.removeprefix("name"))
        width = max(map(len, texts))
        texts.insert(1, "-" * width)
        columns.append([text.ljust(width) for text in texts])
    for line in zip(*columns):
        print("  ".join(line).rstrip())


def cell(value, column):
    if isinstance(value, list):
        # 0.524, but 90.9
        text = shown(value, 1 if abs(value[0]) >= 10 else 3)
        if "difference" in column and value[1] <= 0 <= value[2]:
            # smaller than its interval: not told from 0
            text += " ="
        return text
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
