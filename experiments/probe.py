"""What the encoder learned (Table 6 of the paper): a linear classifier reads labels off h, for the
trained encoder and for the one that it started from.

n texts, d the encoder's width.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F

from data import held_out
from experiments.statistics import bootstrap, print_table, shown, shown_difference
from experiments.tasks.utils import read
from personafuse import build, load_run
from plumbing import UserError


# ----------------------------------------------------------------------------------- labelled texts

def labelled(path):
    """A labelled file -> its (text, label) pairs for training, and those for the test.

    Either CLINC150's data_full.json or a CSV with columns text and label.
    """
    path = Path(path)
    records = read(path)
    try:
        if isinstance(records, dict):
            train, test = read_clinc(path, records)
        else:
            train, test = read_csv(records)
        if len({label for _, label in train}) < 2 or not test:
            raise ValueError("fewer than two labels, or no test texts")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: neither CLINC150's data_full.json nor a CSV with columns text "
                        f"and label ({error})")
    return train, test


def read_clinc(path, records):
    """CLINC150 comes with its split. domains.json beside it makes ten domains and out-of-scope of
    its 150 intents: the paper's 11 classes.
    """
    domain_of = {}
    domains = path.with_name("domains.json")
    if domains.exists():
        for domain, intents in read(domains).items():
            for intent in intents:
                domain_of[intent] = domain
    sides = []
    for side in ("train", "test"):
        pairs = records[side] + records[f"oos_{side}"]
        sides.append([(text, domain_of.get(intent, intent)) for text, intent in pairs])
    return sides


def read_csv(records):
    """Of a CSV file the texts that `held_out` picks are the test."""
    train = []
    test = []
    for record in records:
        text = record["text"]
        if not text:
            continue
        side = test if held_out(text) else train
        side.append((text, record["label"]))
    return train, test


# ----------------------------------------------------------------------------------- the classifier

def softmax_regression(h, y, h_test, decay=1e-4):
    """Fit p(y | h) = softmax(W h + b) to h (n, d), y (n,), standardised -> classes of h_test."""
    mean = h.mean(dim=0)
    std = h.std(dim=0) + 1e-6
    h = (h - mean) / std
    h_test = (h_test - mean) / std
    classes = int(y.max()) + 1
    W = torch.zeros(classes, h.shape[1], device=h.device, requires_grad=True)
    b = torch.zeros(classes, device=h.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([W, b], max_iter=300, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(h @ W.T + b, y) + decay * W.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return (h_test @ W.T + b).argmax(dim=1)


def embed_texts(model, pairs):
    """The texts of (text, label) pairs -> h (n, d)."""
    context = model.router.encoder.config.max_position_embeddings
    queries = [model.encoder_tokenizer.encode_query(text)[:context] for text, _ in pairs]
    return model.embed(queries)


def class_indices(train, test, device):
    """The labels of (text, label) pairs as indices: y (n,), and y of the test texts, -1 for a label
    that training does not have.
    """
    names = sorted({label for _, label in train})
    index = {name: k for k, name in enumerate(names)}
    y = [index[label] for _, label in train]
    y_test = [index.get(label, -1) for _, label in test]
    return torch.tensor(y, device=device), torch.tensor(y_test, device=device)


# -------------------------------------------------------------------------------------- the program

def probe(args, device, dtype):
    """Every run of --run, beside the encoder that it started from."""
    train, test = labelled(args.probe)
    right = {}              # name of an encoder -> which of the test texts it gets right
    accuracy = {}           # row of the table -> [value, low, high]
    for run in args.run:
        model, settings = load_run(run, device, dtype)
        if model.router is None:
            raise UserError(f"{run} has no trained router to probe")
        before = f"{Path(settings['encoder']).name}, untrained, {settings['pooling']} pooling"
        after = Path(run).name
        # runs may share the encoder that they started from
        if before not in right:
            untrained = build(settings, device, dtype)
            right[before] = classified_right(untrained, train, test)
        if after not in right:
            right[after] = classified_right(model, train, test)
        accuracy[before] = percentage(right[before])
        accuracy[after] = percentage(right[after])
        accuracy[f"gain of {after}"] = percentage(right[after] - right[before])

    y, y_test = class_indices(train, test, device)
    classes = int(y.max()) + 1
    if args.json:
        sizes = {"train": len(train), "test": len(test), "classes": classes}
        print(json.dumps({**sizes, "accuracy": accuracy}))
        return
    commonest = y.bincount().argmax()
    share = (y_test == commonest).double().mean().item()
    print(f"{len(train)} training, {len(test)} test texts, {classes} classes; "
          f"always the commonest {100 * share:.1f}%\n")
    lines = []
    for name, interval in accuracy.items():
        show = shown_difference if name.startswith("gain") else shown
        lines.append((name, show(interval, 1)))
    print_table(["", "accuracy in %, 95% interval"], lines)


def classified_right(model, train, test):
    """Which of the test texts a classifier on this model's h gets right -> zeros and ones (n,)."""
    y, y_test = class_indices(train, test, model.device)
    h = embed_texts(model, train)
    h_test = embed_texts(model, test)
    predicted = softmax_regression(h, y, h_test)
    return (predicted == y_test).double().cpu().numpy()


def percentage(values):
    return bootstrap(lambda records: 100 * values[records].mean(), len(values))
