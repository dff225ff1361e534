"""The paper's benchmarks through lm-eval, EleutherAI's evaluation harness: our model as it wants it, its results as rows."""

import json
import logging
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data
from data import UserError
from personafuse import generate
from tasks.utils import SOURCES, TRIES, vote_by_question

TASKS = {           # a benchmark's name -> the harness's tasks, their metric, its factor to a scale of 100, chance
    "emobench": (["emobench_ea", "emobench_eu"], "acc", 100, None),             # None: as its records say
    "eq_bench": (["eq_bench"], "eqbench", 1, 0),            # its scale is made so that random answers score 0
    "tombench": (["tombench"], "acc", 100, None),
    "gpqa": (["gpqa_main_zeroshot", "gpqa_diamond_zeroshot", "gpqa_extended_zeroshot"], "acc", 100, 0.25),
    "gsm8k": (["gsm8k"], "exact_match", 100, 0),
    "safetybench": (["safetybench"], "acc", 100, None),
}


def load_tasks(names, folder):
    """Benchmarks' names -> {name: {task name: lm_eval task}}, their files read from the folder of --data, or the hub."""
    try:
        from lm_eval import tasks as theirs
    except ImportError:
        raise UserError("these benchmarks need EleutherAI's harness: pip install lm-eval")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folders = [Path(theirs.__file__).parent / name for name in ("eq_bench", "gpqa", "gsm8k")]      # reading all takes long
    manager, loaded = theirs.TaskManager(None, [*folders, Path(__file__).parent], False, {"data": folder}), {}
    for name in names:
        local = folder and f"{name}_local" in manager.all_groups
        try:
            loaded[name] = manager.load([f"{name}_local"] if local else TASKS[name][0])["tasks"]
        except UserError:
            raise
        except Exception as e:                      # the hub's client and `datasets` raise many types
            raise UserError(f"{name}: the hub was not reached or refused ({type(e).__name__}); get the files from "
                            f"{SOURCES[name]}, and give their folder with --data")
    return loaded


def cot_prompt(text):
    return data.PERSONA_COT.replace("{query}", text)


def respond(model, prompts, w, max_new_tokens, until=()):
    """Prompts (token ids, cut on the left to fit) -> greedy answers, each ended before the first of the strings `until`."""
    room = model.base.config.max_position_embeddings - max_new_tokens
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))           # like lengths run side by side
    ids, finished, progress = [[] for _ in prompts], set(), tqdm(total=len(prompts), desc="answers", leave=False)
    for k, token in generate(model.base, [prompts[i][-room:] for i in order], max_new_tokens, model.chat.stop,
                             None if w is None else w[order], finished=finished):
        if token is not None:
            ids[order[k]].append(token)
            if until and any(stop in model.chat.decode(ids[order[k]][-24:]) for stop in until):
                finished.add(k)
        else:
            progress.update()
    progress.close()
    answers = [model.chat.decode(one) for one in ids]
    return [re.split("|".join(map(re.escape, until)), a)[0] if until else a for a in answers]


def ask_model(model, texts, s, max_new_tokens, queries=None, until=(), raw=False):
    """Texts -> answers, mixed by --route for `queries` (default: the texts). With --route cot the bare base answers through
    the Persona-CoT prompt (Table 9), and its response counts; the whole answer where it does not keep to the format."""
    w = model.mixing_weights(queries or texts, s.route if s.route != "cot" else "none", s.top_k, s.seed)
    context = model.base.config.max_position_embeddings
    if s.route == "cot":
        texts = [cot_prompt(t) for t in texts]
    prompts = [model.chat.prefix + model.chat.encode(t) if raw else model.chat.prompt(t) for t in texts]
    if s.route == "cot":                                                # its steps come first: 512 tokens, or what there is
        max_new_tokens = max(max_new_tokens, min(max_new_tokens + 512, context - max(map(len, prompts))))
    answers = respond(model, prompts, w, min(max_new_tokens, context // 2), until)
    for i, answer in enumerate(answers if s.route == "cot" else ()):
        try:
            answers[i] = data.parse_answer(answer)["response"]
        except ValueError:
            pass
    return [a if raw else a.strip() for a in answers]


def harness_model(model, s, tasks, folder):
    """`model` as an lm_eval LM; `tasks` by name, `folder` of the base.

    The router reads the question alone (the task's doc_to_text), not the worked examples that may stand before it. The
    base reads the harness's text in its chat format, as in training, or with --no-chat exactly as it stands.
    """
    from lm_eval.api.model import LM
    first = json.loads((Path(folder) / "config.json").read_text()).get("bos_token_id")
    first = model.chat.end if first is None else first              # what a text without context is conditioned on
    context = model.base.config.max_position_embeddings

    def tokens(text):
        return model.chat.prefix + model.chat.encode(text)

    def encode(before, after):
        """A pair of texts -> token ids of each. Without chat format encoded together, then parted, as the harness does."""
        before = cot_prompt(before) if s.route == "cot" else before
        if not s.no_chat:
            return model.chat.prompt(before), model.chat.answer(after.strip())[:-1]
        before, after = before.rstrip(), before[len(before.rstrip()):] + after
        if not before:
            ids = model.chat.encode(after)
            return ([first], ids) if ids[0] != first else (ids[:1], ids[1:])
        return tokens(before), tokens(before + after)[len(tokens(before)):]

    def questions(requests):
        return [str(tasks[r.task_name].doc_to_text(r.doc)) if r.task_name in tasks else r.args[0] for r in requests]

    def likelihoods(pairs, queries):
        examples = [{"prompt": (before + after)[-context - 1:][:-len(after)], "answer": after} for before, after in pairs]
        w = model.mixing_weights(queries, s.route if s.route != "cot" else "none", s.top_k, s.seed)
        nll, _, greedy = model.response_nll(examples, w)
        return list(zip((-nll).tolist(), greedy.tolist()))

    class PersonaFuseLM(LM):
        def loglikelihood(self, requests):
            return likelihoods([encode(*r.args) for r in requests], questions(requests))

        def loglikelihood_rolling(self, requests):
            from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
            sums = []
            for r in requests:
                windows = get_rolling_token_windows(tokens(r.args[0]), first, context, 1)
                pairs = [make_disjoint_window(pair) for pair in windows]
                sums.append(sum(ll for ll, _ in likelihoods(pairs, [r.args[0]] * len(pairs))))
            return sums

        def generate_until(self, requests):
            answers, queries = [None] * len(requests), questions(requests)
            kinds = [json.dumps(r.args[1], sort_keys=True) for r in requests]
            for kind in sorted(set(kinds)):                         # one set of options at a time
                part, options = [i for i, k in enumerate(kinds) if k == kind], json.loads(kind)
                until = options.get("until") or []
                said = ask_model(model, [requests[i].args[0] for i in part], s, options.get("max_gen_toks", 256),
                                 [queries[i] for i in part], [until] if isinstance(until, str) else until, raw=s.no_chat)
                for i, text in zip(part, said):
                    answers[i] = text
            return answers

    return PersonaFuseLM()


def run_benchmark(name, tasks, model, s, folder):
    """{row of the table: (points and weights of its questions, chance, unusable answers)}, groups after their whole."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager
    limit = s.limit and s.limit * (TRIES if name == "tombench" else 1)
    with redirect_stdout(sys.stderr):                   # some of the harness's scoring prints what it cannot use
        samples = simple_evaluate(model=harness_model(model, s, tasks, folder), tasks=list(tasks.values()), limit=limit,
                                  task_manager=TaskManager(include_defaults=False), bootstrap_iters=0)["samples"]
    _, metric, scale, fixed = TASKS[name]
    rows = {}
    for task, entries in samples.items():
        for kind in dict.fromkeys(e["filter"] for e in entries):
            for group in [None, *sorted({g for e in entries for g in e["doc"].get("groups", [])})]:
                part = [e for e in entries if e["filter"] == kind and (group is None or group in e["doc"]["groups"])]
                scores = [e[metric] for e in part]
                if name == "tombench":
                    scores = list(vote_by_question(scores).values())
                unusable = sum(e["filtered_resps"] == ["[invalid]"] or e.get("unparsed") == 1
                               or e.get("percent_parseable") == 0 for e in part)
                chance = np.mean([e["doc"]["chance"] for e in part]) if fixed is None else fixed
                label = f"{task}: {group}" if group else task if kind == "none" else f"{task} ({kind})"
                rows[label] = (np.array(scores, dtype=float) * scale, np.ones(len(scores)), 100 * chance, unusable)
    means = {"emobench": {"EA and EU": "emobench_"}, "gpqa": {"the three": "gpqa_"},
             "tombench": {"tasks": "tombench: task:", "abilities": "tombench: ability:"}}      # as the paper averages them
    for what, beginning in means.get(name, {}).items():
        parts = [row for label, row in rows.items()
                 if label.startswith(beginning) and (label in samples or beginning.endswith(":"))]
        points, weights = (np.concatenate([row[k] / len(row[1]) for row in parts]) for k in (0, 1))
        rows[f"{name}: mean of {what}"] = (points, weights, np.mean([row[2] for row in parts]), sum(row[3] for row in parts))
    return rows
