"""Does it work? The paper's comparisons (section 6), for any runs of train.py that share a base.

    python evaluate.py --run out/tiny --run out/tiny-direct                             held-out records: losses and router
    python evaluate.py --run out/tiny --tasks emobench,gsm8k --data DIR --limit 20      the paper's benchmarks, by lm-eval
    python evaluate.py --run out/tiny --tasks mentalchat --data DIR --judge URL --judge-model NAME      a judge's opinion
    python evaluate.py --run out/tiny --probe data_full.json                            what the encoder learned (Table 6)
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import TRAITS, UserError, held_out, load_records, run_program, split, tokenize
from personafuse import build, find_model, load_run, pick_device, pick_dtype, read_settings
from router import average_precision, keep_top, pole_auc
from tasks.harness import TASKS, ask_model, cot_prompt, load_tasks, run_benchmark
from tasks.judged import JUDGED, compare_pairs, judge, questions
from tasks.utils import read

ROUTES = ["learned", "uniform", "random1", "random2", "random5", "none", "cot"]


def bootstrap(statistic, n, draws=1000):
    """[value, low, high]: a statistic of n records (given their indices) and its 95% interval over resamples of them."""
    rng = np.random.default_rng(0)
    values = [statistic(rng.integers(n, size=n)) for _ in range(draws)]
    return [round(float(x), 4) for x in (statistic(np.arange(n)), *np.nanpercentile(values, [2.5, 97.5]))]


def shown(interval, digits=2):
    return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*interval, d=digits) if interval else ""


def print_table(header, rows):
    widths = [max(len(str(row[k])) for row in [header, *rows]) for k in range(len(header))]
    for row in [header, ["-" * w for w in widths], *rows]:
        print("  ".join(str(x).ljust(w) for x, w in zip(row, widths)).rstrip())


# ------------------------------------------------------------------------------------------------- the held-out records

def measure(name, model, good, naive, w, ranking=None):
    """A row of the comparison: losses of good (Persona-CoT) and naive examples at weights w (n, E), and how well `ranking`
    (n, E), if any, ranks the experts."""
    nll, counts, nll2, counts2 = (t.double().cpu().numpy()
                                  for side in (good, naive) for t in model.response_nll(side, w)[:2])
    prefers, n = nll / counts < nll2 / counts2, len(good)
    row = {"name": name, "nll": nll, "counts": counts, "loss": bootstrap(lambda i: nll[i].sum() / counts[i].sum(), n),
           "prefers": bootstrap(lambda i: 100 * prefers[i].mean(), n)}
    if ranking is not None:
        p = np.array([r["p"] for r in good])                                                        # (n, E)
        ranks = ranking.double().cpu().numpy() + 1e-9 * np.random.default_rng(0).random(p.shape)    # ties in random order
        precision = average_precision(ranks, p)
        row["map"] = bootstrap(lambda i: precision[i].mean(), n)
        row["auc"] = bootstrap(lambda i: np.nanmean(pole_auc(ranks[i], p[i])), n, draws=300)
        row["auc_by_pole"] = dict(zip(TRAITS, pole_auc(ranks, p).round(4).tolist()))
    return row


def compare(s, device, dtype):
    """Runs of one base on its held-out records, beside the bare base, Persona-CoT prompting, Random Route, uniform weights
    and an oracle that mixes by p/|p|."""
    rows, first = [], read_settings(s.run[0])
    _, records = split(load_records(first["data"], ("response", "naive_response")))
    length = first["max_length"]
    for run in s.run:
        model = None                                            # two large ones need not fit at once
        model, _ = load_run(run, device, dtype)
        sides = [tokenize(records, model.chat, model.encoder_chat, length, key)
                 for key in ("response", "naive_response")]
        kept = [r for r in records if len(model.chat.prompt(r["query"])) < length]       # those that tokenize kept
        queries, p = [r["query"] for r in kept], torch.tensor([r["p"] for r in kept], dtype=torch.float32, device=device)
        if not rows:
            rows.append(measure("bare base", model, *sides, None))
            asked = [model.chat.prompt(cot_prompt(q)) for q in queries]
            sides_cot = [[{**r, "prompt": a} for r, a in zip(side, asked)] for side in sides]
            context = model.base.config.max_position_embeddings
            if all(len(r["prompt"]) + len(r["answer"]) <= context for side in sides_cot for r in side):
                rows.append(measure("Persona-CoT prompting", model, *sides_cot, None))
            else:
                print(f"left out: Persona-CoT prompting, longer than the base's {context} tokens", file=sys.stderr)
        name, mixes = Path(run).name, model.experts > 1
        if model.router or not mixes:
            w = model.mixing_weights(queries)
            rows.append(measure(name, model, *sides, keep_top(w, s.top_k) if mixes and s.top_k else w, w if mixes else None))
        if mixes:
            for route in ("random1", "random2", "random5", "uniform"):
                w = model.mixing_weights(queries, route, seed=s.seed)
                rows.append(measure(f"{name}, {route}", model, *sides, w, None if route == "uniform" else w))
            rows.append(measure(f"{name}, oracle", model, *sides, p / p.sum(dim=1, keepdim=True), p))
    n, reference = len(queries), next((r for r in rows if r["name"] == Path(s.run[0]).name), rows[0])

    def loss(r, i):
        return r["nll"][i].sum() / r["counts"][i].sum()
    for r in rows:                                              # the same records for both: the interval is a paired one
        r["difference"] = r is not reference and bootstrap(lambda i: loss(r, i) - loss(reference, i), n)
    rows = [{k: v for k, v in r.items() if k not in ("nll", "counts") and v is not False} for r in rows]
    if s.json:
        return print(json.dumps({"records": n, "reference": reference["name"], "rows": rows}, indent=1))
    print(f"{n} held-out records; in brackets 95% intervals, by bootstrap over the records. The difference is that of the\n"
          f"loss to {reference['name']}, paired; = marks one smaller than its interval: not told from 0 by these records.\n")
    print_table(["", "loss per token", "difference", "% prefers Persona-CoT", "router mAP", "mean AUC"], [
        [r["name"], shown(r["loss"], 3), shown(r.get("difference"), 3) + smaller(r.get("difference")),
         shown(r["prefers"], 0), shown(r.get("map")), shown(r.get("auc"))] for r in rows])
    ranked = [r for r in rows if "auc" in r and not re.search("random[25]", r["name"])]
    if ranked:
        print("\nAUC by pole")
        print_table(["", *[r["name"] for r in ranked]],
                    [[t, *[f"{r['auc_by_pole'][t]:.2f}" for r in ranked]] for t in TRAITS])


def smaller(difference):
    return " =" if difference and difference[1] <= 0 <= difference[2] else ""


# ----------------------------------------------------------------------------------------------------------- benchmarks

def run_tasks(s, device, dtype):
    """Every run of --run on every benchmark of --tasks; one table, a row for each score."""
    names = s.tasks.split(",")
    for name in names:
        if name not in TASKS and name not in JUDGED:
            raise UserError(f"unknown task {name!r}; there are {', '.join([*TASKS, *JUDGED])}")
        if name in JUDGED and name != "shop_mmlu" and not (s.judge and s.judge_model):
            raise UserError(f"{name} needs a judge: --judge URL of an OpenAI-compatible endpoint, and --judge-model NAME")
    tasks = {}
    if any(name in TASKS for name in names):
        tasks = load_tasks([name for name in names if name in TASKS], s.data)
    asked = {name: questions(name, s.data, s.limit) for name in names if JUDGED.get(name)}
    columns, said = {}, {}
    for run in s.run:
        model = None
        model, settings = load_run(run, device, dtype)
        label = Path(run).name + ("" if s.route == "learned" else f", {s.route}")
        rows = columns[label] = {}
        for name in names:
            if name in tasks:
                rows |= run_benchmark(name, tasks[name], model, s, find_model(settings["base"]))
            elif name in asked:
                rows |= judge(name, asked[name], ask_model(model, [q for q, _ in asked[name]], s, s.max_new_tokens), s)
            else:                                               # pairwise: the held-out queries, against all before it
                _, records = split(load_records(settings["data"]))
                queries = [r["query"] for r in records][:s.limit]
                if not said:
                    plain = argparse.Namespace(**vars(s) | {"route": "none"})
                    said["bare base"] = ask_model(model, queries, plain, s.max_new_tokens)
                ours = ask_model(model, queries, s, s.max_new_tokens)
                for other, theirs in said.items():
                    points, weights, unusable = compare_pairs(s, queries, ours, theirs)
                    rows[f"pairwise, wins over {other}"] = (100 * points, weights, 50, unusable)
                said[label] = ours
    table = {}
    for label, rows in columns.items():
        for row, (points, weights, chance, unusable) in rows.items():
            score = bootstrap(lambda i: points[i].sum() / weights[i].sum(), len(points)) if sum(weights) else None
            table.setdefault(row, {})[label] = {"score": score, "n": len(points), "chance": chance, "unusable": unusable}
    if s.json:
        return print(json.dumps(table, indent=1))
    print("Scores from 0 to 100 where no other scale is named; in brackets 95% intervals, by bootstrap over the questions;\n"
          "behind / the answers that could not be used (wrong, or guessed for, as the benchmark's authors do).\n")
    lines = []
    for row, cells in table.items():
        n, chance = (next(iter(cells.values()))[key] for key in ("n", "chance"))
        lines.append([row, n, "" if chance is None else f"{chance:.1f}",
                      *[f"{shown(cells[k]['score'], 1)} / {cells[k]['unusable']}" if k in cells else "" for k in columns]])
    print_table(["", "n", "chance", *columns], lines)


# ---------------------------------------------------------------------------------------------------- the encoder probe

def labelled(path):
    """A labelled file -> (training texts, labels, test texts, labels). CLINC150's data_full.json comes with its split (and
    domains.json beside it makes ten domains and out-of-scope of its 150 intents, the paper's 11 classes); of a CSV
    with columns text and label the texts that data.held_out picks are the test."""
    records = read(Path(path))
    try:
        if isinstance(records, dict):
            domains = Path(path).with_name("domains.json")
            of = {i: domain for domain, intents in read(domains).items() for i in intents} if domains.exists() else {}
            train, test = ([(t, of.get(y, y)) for t, y in records[k] + records["oos_" + k]] for k in ("train", "test"))
        else:
            pairs = [(r["text"], r["label"]) for r in records if r["text"]]
            train, test = ([pair for pair in pairs if held_out(pair[0]) == side] for side in (False, True))
        if len({y for _, y in train}) < 2 or not test:
            raise ValueError("fewer than two labels, or no test texts")
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"{path}: neither CLINC150's data_full.json nor a CSV with columns text and label ({e})")
    return *zip(*train), *zip(*test)


def softmax_regression(h, y, h_test, decay=1e-4):
    """Fit p(y | h) = softmax(W h + b) to h (n, d), y (n,), standardised, by L-BFGS -> predictions for h_test."""
    mean, std = h.mean(dim=0), h.std(dim=0) + 1e-6
    h, h_test = (h - mean) / std, (h_test - mean) / std
    W = torch.zeros(int(y.max()) + 1, h.shape[1], device=h.device, requires_grad=True)
    b = torch.zeros(len(W), device=h.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([W, b], max_iter=300, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(h @ W.T + b, y) + decay * W.square().sum()
        value.backward()
        return value
    optimizer.step(loss)
    return (h_test @ W.T + b).argmax(dim=1)


def probe(s, device, dtype):
    """Table 6: how well a linear classifier reads labels off h, for the trained encoder and the one that it started from."""
    train, y, test, y_test = labelled(s.probe)
    classes = {label: k for k, label in enumerate(sorted(set(y)))}
    y, y_test = (torch.tensor([classes.get(label, -1) for label in labels], device=device) for labels in (y, y_test))
    rows, right = [], {}
    for run in s.run:
        model, settings = load_run(run, device, dtype)
        if model.router is None:
            raise UserError(f"{run} has no trained router to probe")
        untrained = f"{Path(settings['encoder']).name}, untrained, {settings['pooling']} pooling"
        for name, m in ((untrained, None), (Path(run).name, model)):
            if name not in right:
                m = m or build(settings, device, dtype)
                context = m.router.encoder.config.max_position_embeddings
                h, h_test = (m.embed([m.encoder_chat.query(t)[:context] for t in texts]).clone() for texts in (train, test))
                right[name] = (softmax_regression(h, y, h_test) == y_test).double().cpu().numpy()
        gain = right[Path(run).name] - right[untrained]
        rows += [(n, bootstrap(lambda i: 100 * right[n][i].mean(), len(test))) for n in (untrained, Path(run).name)]
        rows.append((f"gain of {Path(run).name}", bootstrap(lambda i: 100 * gain[i].mean(), len(test))))
    if s.json:
        return print(json.dumps({"train": len(train), "test": len(test), "classes": len(classes), "accuracy": dict(rows)}))
    most = (y_test == y.bincount().argmax()).double().mean().item()
    print(f"{len(train)} training, {len(test)} test texts, {len(classes)} classes; always the commonest {100 * most:.1f}%\n")
    print_table(["", "accuracy in %, 95% interval"],
                [(n, shown(a, 1) + (smaller(a) if n.startswith("gain") else "")) for n, a in dict(rows).items()])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", action="append", required=True, metavar="DIR", help="a folder that train.py wrote; may be given again")
    add("--tasks", help=f"benchmarks, with commas between them: {', '.join([*TASKS, *JUDGED])}")
    add("--data", metavar="DIR", help="where the benchmarks' files are (default: the hub, for those that are there)")
    add("--limit", type=int, help="only the first so many questions of each task")
    add("--route", choices=ROUTES, default="learned", help="for --tasks, how the experts are mixed; none is the bare base, "
        "cot the bare base answering through the Persona-CoT prompt (default: learned)")
    add("--top-k", type=int, help="keep only the k largest of the router's weights, scaled to sum to 1")
    add("--no-chat", action="store_true", help="give the base the harness's text as it stands, without the chat format")
    add("--max-new-tokens", type=int, default=400, help="of answers in free text (default: 400)")
    add("--judge", metavar="URL", help="an OpenAI-compatible endpoint (its key: OPENAI_API_KEY)")
    add("--judge-model", metavar="NAME")
    add("--probe", metavar="FILE", help="a labelled file: CLINC150's data_full.json, or CSV with columns text and label")
    add("--json", action="store_true", help="print JSON in place of tables")
    add("--seed", type=int, default=0)
    add("--device", default="auto")
    add("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    s = parser.parse_args()
    if s.top_k is not None and not 1 <= s.top_k <= len(TRAITS) or s.limit is not None and s.limit < 1:
        parser.error(f"--top-k is 1 to {len(TRAITS)}, --limit at least 1")
    base = read_settings(s.run[0])["base"]
    for run in s.run[1:]:                                       # before anything is loaded
        read_settings(run, base)
    device = pick_device(s.device)
    (run_tasks if s.tasks else probe if s.probe else compare)(s, device, pick_dtype(s.dtype, device))


if __name__ == "__main__":
    run_program(main)
