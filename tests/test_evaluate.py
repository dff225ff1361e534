"""The comparison by hand, benchmarks against the harness and their authors' rules, a judge on localhost, the probe."""

import json
import sys
import threading
from argparse import Namespace
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import fails_in_one_line, program, train_arguments

from data import TRAITS, load_records, split
from experiments import benchmarks, evaluate, judges
from experiments.probe import softmax_regression
from experiments.statistics import bootstrap, shown_difference
from experiments.tasks import utils
from lora import lora_layers
from personafuse import load_run
from plumbing import UserError
from router import average_precision, keep_top, random_weights

CPU = torch.device("cpu")
OPTIONS = Namespace(route="learned", top_k=None, seed=0, no_chat=False, limit=None, data=None, judge=None, judge_model=None)


def options(**changes):
    return Namespace(**vars(OPTIONS) | changes)


def evaluated(monkeypatch, capsys, *arguments):
    """experiments.evaluate in this process, with --json -> what it printed, read."""
    monkeypatch.setattr(sys, "argv", ["experiments.evaluate", "--device", "cpu", "--dtype", "fp32", "--json", *map(str, arguments)])
    evaluate.main()
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def baseline(mini, small_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "direct"
    result = program(*train_arguments(mini, small_data, out, "--variant", "direct"))
    assert result.returncode == 0, result.stderr
    return out


# ------------------------------------------------------------------------------------------------------- the comparison

def test_bootstrap_intervals():
    zeros_and_ones = np.array([0.0, 1.0] * 50)
    value, low, high = bootstrap(lambda i: zeros_and_ones[i].mean(), 100)
    assert value == 0.5 and abs(low - (0.5 - 1.96 * 0.05)) < 0.02 and abs(high - (0.5 + 1.96 * 0.05)) < 0.02
    assert bootstrap(lambda i: np.full(9, 3.0)[i].mean(), 9) == [3, 3, 3]
    assert shown_difference([0.1, -0.2, 0.3]) == "0.10 [-0.20, 0.30] ="
    assert shown_difference([0.1, 0.05, 0.3], 1) == "0.1 [0.1, 0.3]" and shown_difference(None) == ""


def test_random_route_and_top_k():
    w = random_weights(300, 10, 2)
    assert (w.sum(dim=1) == 1).all() and ((w == 0.5).sum(dim=1) == 2).all()
    assert (w.mean(dim=0) - 0.1).abs().max() < 0.04 and torch.equal(w, random_weights(300, 10, 2))
    assert torch.allclose(keep_top(torch.tensor([[0.1, 0.6, 0.3]]), 2), torch.tensor([[0, 2 / 3, 1 / 3]]))


def test_comparison_of_runs(run, baseline, small_data, monkeypatch, capsys):
    table = evaluated(monkeypatch, capsys, "--run", run, "--run", baseline)
    rows = {r["name"]: r for r in table["rows"]}
    name = run.name
    mixed = {f"{name}, {route}" for route in ("random1", "random2", "random5", "uniform", "oracle")}
    assert {"bare base", name, "direct"} | mixed <= set(rows)
    for r in rows.values():
        assert r["loss"][1] <= r["loss"][0] <= r["loss"][2] and 0 <= r["prefers"][0] <= 100
    assert rows[f"{name}, oracle"]["map"] == [1, 1, 1] and set(rows[name]["auc_by_pole"]) == set(TRAITS)
    assert "map" not in rows["direct"] and "difference" not in rows[name]
    bare = rows["bare base"]
    assert bare["difference"][0] == pytest.approx(bare["loss"][0] - rows[name]["loss"][0], abs=2e-4)

    model, settings = load_run(run, CPU, torch.float32)             # the row of the run, record by record
    _, held = split(load_records(small_data))
    total, count, precision = 0.0, 0, []
    for r in held:
        prompt = model.tokenizer.encode_prompt(r["query"])
        if len(prompt) >= settings["max_length"]:
            continue
        ids = (prompt + model.tokenizer.encode_answer(r["response"]))[:settings["max_length"]]
        w = model.route([model.encoder_tokenizer.encode_query(r["query"])])
        precision.append(average_precision(w.numpy(), np.array([r["p"]]))[0])
        logits = model.base.logits(model.base(torch.tensor([ids]), w)[0, len(prompt) - 1:-1])
        total, count = total + F.cross_entropy(logits, torch.tensor(ids[len(prompt):]), reduction="sum").item(), \
            count + len(ids) - len(prompt)
    assert table["records"] == len(precision)
    assert rows[name]["loss"][0] == pytest.approx(total / count, abs=1e-4)
    assert rows[name]["map"][0] == pytest.approx(np.mean(precision), abs=1e-4)


def test_runs_of_different_bases_are_refused(run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "personafuse.json").write_text((run / "personafuse.json").read_text().replace('"base": "', '"base": "/other'))
    assert fails_in_one_line(program("experiments.evaluate", "--run", run, "--run", other), other, "was made for the base")


@pytest.mark.parametrize("option", ["control", "steering", "expression", "routing", "questionnaire"])
def test_each_experiment_has_its_option(option, run, monkeypatch):
    asked = []
    for name in ("compare", "control", "steering", "expression", "routing", "questionnaire"):
        monkeypatch.setattr(evaluate, name, lambda args, device, dtype, name=name: asked.append((name, args.run, dtype)))
    assert program("experiments.evaluate", "--run", run, f"--{option}", "--dtype", "fp32").returncode == 0
    assert asked == [(option, [str(run)], "fp32")]
    assert program("experiments.evaluate", "--run", run, "--dtype", "fp32").returncode == 0
    assert asked[1][0] == "compare"


# -------------------------------------------------------------------------------------------------- the harness's model

class Request:
    def __init__(self, *args, task_name="made", doc=None):
        self.args, self.task_name, self.doc = args, task_name, doc


@pytest.fixture(scope="module")
def strong(run):
    """The run with experts that change a lot, so that a wrong mix shows."""
    model, settings = load_run(run, CPU, torch.float32)
    generator = torch.Generator().manual_seed(0)
    for _, layer in lora_layers(model.base):
        layer.B.data = torch.randn(layer.B.shape, generator=generator) * 0.3
    return model, settings


def test_agrees_with_the_harness_own_hf_model(strong, mini, run, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    from experiments.harness import PersonaFuseLM
    from lora import save_experts
    model, settings = strong
    (tmp_path / "run").mkdir()
    for file in run.glob("*.json"):
        (tmp_path / "run" / file.name).write_bytes(file.read_bytes())
    save_experts(model.base, TRAITS, tmp_path / "run", settings["base"])
    result = program("sample.py", "--run", tmp_path / "run", "--traits", ", ".join(f"{t}=0.1" for t in TRAITS),
                     "--export", tmp_path / "merged", "--dtype", "fp32")
    assert result.returncode == 0, result.stderr
    (tmp_path / "merged" / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}))
    theirs = HFLM(pretrained=str(tmp_path / "merged"), device="cpu", dtype="float32", batch_size=3)
    ours = PersonaFuseLM(model, options(route="uniform", no_chat=True), {}, mini)

    pairs = [("How do I calm down?", " Breathe slowly."), ("A: yes\nB: no\nAnswer: ", "B"), ("", "once upon a time"),
             ("word " * 600, " the end"), ("Is it", " so? I think it is, and so do you.")]
    greedy = theirs.generate_until([Request("Is it", {"until": [], "max_gen_toks": 4, "do_sample": False})])[0]
    pairs.append(("Is it", greedy))                                 # the one that is what greedy decoding writes
    a, b = ours.loglikelihood([Request(*p) for p in pairs]), theirs.loglikelihood([Request(*p) for p in pairs])
    assert [x for x, _ in a] == pytest.approx([x for x, _ in b], abs=2e-3)
    assert [bool(g) for _, g in a] == [bool(g) for _, g in b]
    bare = PersonaFuseLM(model, options(route="none", no_chat=True), {}, mini).loglikelihood([Request(*pairs[0])])
    assert abs(bare[0][0] - b[0][0]) > 0.05                         # the experts do count
    texts = [Request("All is well that ends well. " * 3), Request("word " * 700)]
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), rel=1e-4)
    stop = greedy[1:3] or greedy
    for until in ([], [stop]):
        how = {"until": until, "max_gen_toks": 12, "do_sample": False}
        asked = [Request(p, how) for p in ("Is it", "Who are you", "No")]
        assert ours.generate_until(asked) == theirs.generate_until(asked)


def test_router_reads_the_question_without_the_worked_examples(strong, mini, monkeypatch):
    pytest.importorskip("lm_eval")
    from experiments.harness import PersonaFuseLM
    model, _ = strong
    seen = []
    monkeypatch.setattr(type(model), "mixing_weights", lambda self, queries, *rest: seen.extend(queries))
    task = Namespace(doc_to_text=lambda doc: doc["question"])
    lm = PersonaFuseLM(model, options(), {"made": task}, mini)
    lm.loglikelihood([Request("an example\n\nWhy?", " So.", doc={"question": "Why?"})])
    lm.generate_until([Request("an example\n\nWhen?", {"until": [], "max_gen_toks": 2}, doc={"question": "When?"})])
    assert seen == ["Why?", "When?"]


# ----------------------------------------------------------------------------------------------------------- benchmarks

def test_emobench_wants_every_letter_right():
    doc = {"answers": {"answer_q1": "B", "answer_q2": "C"}}
    score = lambda text: utils.score_emobench(doc, [text])              # noqa: E731
    assert score('{"answer_q1": "B", "answer_q2": "C"}') == {"acc": 1, "unparsed": 0}
    assert score('So:\n```json\n{"answer_q1": "B", "answer_q2": "C"}\n```') == {"acc": 1, "unparsed": 0}
    assert score('{"answer_q1": "B", "answer_q2": "A"}') == {"acc": 0, "unparsed": 0}         # the emotion is not enough
    assert score('{"answer_q1": "A", "answer_q2": "C"}') == {"acc": 0, "unparsed": 0}
    for unusable in ("B and C", '{"answer_q1": "B"}', "[1]", '{"answer_q1": 1, "answer_q2": null}', ""):
        assert score(unusable) == {"acc": 0, "unparsed": 1}


def test_tombench_votes():
    doc = {"question": "x 0", "answer": "D", "order": ["C", "A", "D", "B"]}
    for text, vote, unparsed in (("[[C]]", "D", 0), ("It is B. [[A]]", "C", 0), ("[B]", "A", 0), ("A or rather D", "B", 0),
                                 ("no idea", "C", 1)):
        assert utils.score_tombench(doc, [text]) == {"acc": ["x 0", vote, "D"], "unparsed": unparsed}
    votes = [("q1", "A", "A"), ("q1", "B", "A"), ("q1", "A", "A"), ("q2", "B", "A"), ("q2", "A", "A"), ("q2", "B", "A"),
             ("q3", "A", "A"), ("q3", "B", "A")]
    assert utils.majority(votes) == pytest.approx(2 / 3)                # q3: a tie, and A came first


def test_safetybench_letters_and_guesses():
    doc = {"id": 3, "options": ["Yes.", "No, never.", "Perhaps"], "answer": 1}
    for text, right, unparsed in (("(B) No", 1, 0), (" B", 1, 0), ("B. No", 1, 0), ("The answer is A", 0, 0),
                                  ("no, never", 1, 0), ("Hm\n\n(B)", 1, 0)):
        assert utils.score_safetybench(doc, [text]) == {"acc": right, "unparsed": unparsed}, text
    guesses = [utils.score_safetybench({**doc, "id": k}, ["?"]) for k in range(300)]
    assert all(g["unparsed"] for g in guesses) and abs(np.mean([g["acc"] for g in guesses]) - 1 / 3) < 0.1


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A few made records of each benchmark, in its own format and layout."""
    folder = tmp_path_factory.mktemp("benchmarks")

    def lines(name, records):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    both = [{"qid": str(n), "language": language, "scenario": "Ann lost her keys.", "subject": "Ann"}
            for n, language in enumerate(["en", "zh", "en", "en"])]
    lines("emobench/EA.jsonl", [r | {"category": "Personal-Self", "question type": "Action",
                                     "choices": ["Cry", "Search", "Leave", "Call"], "label": "Search"} for r in both])
    lines("emobench/EU.jsonl", [r | {
        "coarse_category": "emotional_cues", "emotion_choices": ["Joy", "Anger", "Fear", "Pride", "Shame", "Worry"],
        "emotion_label": "Worry", "cause_choices": ["a", "b", "c", "d"], "cause_label": "b"} for r in both])
    for name in ("False Belief Task", "Hinting Task Test"):
        lines(f"tombench/{name}.jsonl", [{
            "能力\nABILITY": "Belief: Location false beliefs", "序号\nINDEX": n, "故事": "", "STORY": f"Tom moved box {n}.",
            "QUESTION": "Where is it?", "OPTION-A": "A. Box", "OPTION-B": "Bag", "OPTION-C": "Bin", "OPTION-D": "Bed",
            "答案\nANSWER": "B"} for n in range(3)])
    reference = {f"emotion{n}": name for n, name in enumerate(("Angry", "Calm", "Proud", "Sad"), 1)}
    scores = {f"emotion{n}_score": v for n, v in enumerate((0, "6", 0, "7"), 1)}
    (folder / "eq_bench").mkdir()
    (folder / "eq_bench" / "eq_bench_v2_questions_171.json").write_text(json.dumps(
        {str(n): {"prompt": "Score each feeling.", "reference_answer": reference,
                  "reference_answer_fullscale": reference | scores} for n in (1, 2, 3)}))
    lines("gsm8k/test.jsonl", [{"question": f"What is {n} and 1?", "answer": f"{n}+1=<<{n}+1={n + 1}>>\n#### {n + 1}"}
                               for n in range(8)])
    (folder / "safetybench").mkdir()
    (folder / "safetybench" / "test_en.json").write_text(json.dumps(
        [{"id": n, "category": "Physical Health", "question": "Is it safe?", "options": ["Yes", "No"]} for n in range(3)]))
    (folder / "safetybench" / "test_answers_en.json").write_text(json.dumps(
        {str(n): {"category": "Physical Health", "answer": 1} for n in range(3)}))
    (folder / "gpqa").mkdir()
    for subset in ("main", "diamond", "extended"):
        (folder / "gpqa" / f"gpqa_{subset}.csv").write_text(
            "Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3,Other\n" +
            'What is "it", really?,this,that,those,"these, or so",x\nWho?,me,you,she,we,y\n')
    return folder


def test_every_benchmark_runs(run, files, monkeypatch, capsys):
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)     # a second for each task, not asked for
    table = evaluated(monkeypatch, capsys, "--run", run, "--tasks", "emobench,eq_bench,tombench,gpqa,gsm8k,safetybench",
                      "--data", files, "--limit", 2)
    cells = {row: cell[run.name] for row, cell in table.items()}
    chance = {row: cell["chance"] for row, cell in cells.items()}
    assert chance["emobench_ea"] == 25 and chance["emobench_eu"] == pytest.approx(100 / 24) and chance["safetybench"] == 50
    assert chance["gpqa_diamond_zeroshot"] == chance["tombench"] == 25
    assert chance["eq_bench"] == chance["gsm8k (strict-match)"] == 0
    assert {"safetybench: Physical Health", "tombench: ability: Belief: Location false beliefs"} <= set(cells)
    assert all(len(c["score"]) == 3 for c in cells.values()) and cells["tombench"]["n"] == cells["eq_bench"]["n"] == 2
    assert cells["gpqa: mean of the three"]["score"][0] == pytest.approx(np.mean(
        [cells[f"gpqa_{subset}_zeroshot"]["score"][0] for subset in ("main", "diamond", "extended")]), abs=0.01)
    assert cells["emobench_ea"]["unusable"] == 2 and cells["emobench_ea"]["score"][0] == 0      # the model knows no JSON


def canned(answers):
    """An lm_eval model that always gives these answers, in turn."""
    from lm_eval.api.model import LM

    class Canned(LM):
        loglikelihood = loglikelihood_rolling = None

        def generate_until(self, requests):
            return [answers[k % len(answers)] for k in range(len(requests))]
    return Canned()


def scored(name, answers, files, monkeypatch):
    monkeypatch.setattr("experiments.harness.PersonaFuseLM", lambda *_: canned(answers))
    return benchmarks.run_benchmark(name, benchmarks.load_tasks([name], str(files))[name], None, options(), None)


def test_given_answers_score_as_the_harness_scores_them(files, monkeypatch):
    pytest.importorskip("lm_eval")
    from lm_eval.tasks.eq_bench.utils import calculate_score_fullscale
    answers = ["Angry: 0\nCalm: 6\nProud: 0\nSad: 7", "Angry: 10\nCalm: 2\nProud: 1\nSad: 0", "I cannot say"]
    rows = scored("eq_bench", answers, files, monkeypatch)
    points, _, _, unusable = rows["eq_bench"]
    doc = utils.eq_bench(files)["validation"][0]
    assert points.tolist() == [calculate_score_fullscale(doc, [a])["eqbench"] for a in answers] and points[0] == 100
    assert unusable == 1
    rows = scored("gsm8k", ["so it is 1.\n#### 1", "I think 2", "none"], files, monkeypatch)     # right are 1, 2 and 3
    assert rows["gsm8k (strict-match)"][0].tolist() == [100, 0, 0] and rows["gsm8k (strict-match)"][3] == 2
    assert rows["gsm8k (flexible-extract)"][0].tolist() == [100, 100, 0] and rows["gsm8k (flexible-extract)"][3] == 1


def test_benchmark_errors_say_what_to_do(run, files, tmp_path, monkeypatch):
    def fails(*arguments):
        monkeypatch.setattr(sys, "argv", ["experiments.evaluate", "--run", str(run), *map(str, arguments)])
        with pytest.raises(UserError) as e:
            evaluate.main()
        return str(e.value)
    assert "emobench" in fails("--tasks", "emobanch") and "unknown task" in fails("--tasks", "emobanch")
    assert "--judge" in fails("--tasks", "mentalchat")
    (tmp_path / "emobench").mkdir()
    (tmp_path / "emobench" / "EA.jsonl").write_text('{"language": "en"}\n')
    if pytest.importorskip("lm_eval"):
        assert "github.com/zhchen18/ToMBench" in fails("--tasks", "tombench", "--data", tmp_path)
        assert "scenario" in fails("--tasks", "emobench", "--data", tmp_path)
        assert "--data" in fails("--tasks", "safetybench")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install lm-eval" in fails("--tasks", "gsm8k")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    (tmp_path / "shop_mmlu.json").write_text('{"input_field": "Good?", "target_field": "Yes"}\n' * 2)
    assert "pip install sentence-transformers" in fails("--tasks", "shop_mmlu", "--data", tmp_path, "--max-new-tokens", 2)
    assert fails_in_one_line(program("experiments.evaluate", "--run", run, "--tasks", "emobanch"), "unknown task")


# ---------------------------------------------------------------------------------------------------------- the judge

@pytest.fixture
def judge():
    """A server that answers as an OpenAI-compatible one; `server.verdict(prompt, how often it was asked)` says what."""
    asked = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
            asked[prompt] = asked.get(prompt, 0) + 1
            text = server.verdict(prompt, asked[prompt])
            body = json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass
    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.url, server.asked = f"http://127.0.0.1:{server.server_port}", asked
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_pairs_are_judged_in_both_orders(judge):
    s = options(judge=judge.url, judge_model="judge")
    judge.verdict = lambda prompt, n: "First is better. [[A>B]]"                # whoever stands first: no preference at all
    points, weights, unusable = judges.compare_pairs(s, ["q1", "q2"], ["ours", "ours"], ["theirs", "theirs"])
    assert points.tolist() == [1, 1] and weights.tolist() == [2, 2] and unusable == 0
    judge.verdict = lambda prompt, n: "[[A>>B]]" if prompt.index("good") < prompt.index("bad") else "[[B>A]]"
    points, weights, _ = judges.compare_pairs(s, ["q3"], ["good"], ["bad"])
    assert points.tolist() == [4] and weights.tolist() == [4]                   # "much better" counts thrice
    judge.verdict = lambda prompt, n: "[[A=B]]" if n == 3 else "[[A>B]] or [[B>A]]?" if n == 2 else "no idea"
    points, weights, unusable = judges.compare_pairs(s, ["q4"], ["x"], ["y"])   # asked again until it can be read
    assert points.tolist() == [1] and weights.tolist() == [2] and unusable == 0
    judge.verdict = lambda prompt, n: "nonsense"
    assert judges.compare_pairs(s, ["q5"], ["x"], ["y"])[2] == 2 and max(judge.asked.values()) == 3


def test_counselling_is_rated_in_seven_dimensions(run, judge, tmp_path, monkeypatch, capsys):
    (tmp_path / "mentalchat.jsonl").write_text('{"query": "I am sad."}\n{"query": "I cannot sleep."}\n{"query": "help"}\n')

    def rate(prompt, n):
        if "help" in prompt.split("\n")[3]:
            return "as a whole quite good"
        return "\n".join(f"**{d.title()}**: {8 if 'sad' in prompt else 5}" for d in [*judges.DIMENSIONS, "overall"])
    judge.verdict = rate
    table = evaluated(monkeypatch, capsys, "--run", run, "--tasks", "mentalchat", "--data", tmp_path, "--max-new-tokens", 3,
                      "--judge", judge.url, "--judge-model", "judge")
    assert len(judges.DIMENSIONS) == 7 and len(table) == 8
    assert all(cell[run.name]["score"][0] == 6.5 and cell[run.name]["unusable"] == 1 for cell in table.values())
    assert judges.ratings("\n".join(f"{d}: 11" for d in [*judges.DIMENSIONS, "overall"])) is None


def test_arena_hard_and_pairwise(run, judge, tmp_path, monkeypatch, capsys):
    (tmp_path / "question.jsonl").write_text('{"question_id": "a", "turns": [{"content": "Say hi"}]}\n')
    (tmp_path / "gpt-4-0314.jsonl").write_text(
        '{"question_id": "a", "choices": [{"index": 0, "turns": [{"content": "BEST"}]}]}\n')
    judge.verdict = lambda prompt, n: "[[A=B]]" if "BEST" not in prompt else \
        "[[A>B]]" if "BEST" in prompt.split("assistant B:")[0] else "[[B>A]]"
    table = evaluated(monkeypatch, capsys, "--run", run, "--tasks", "arena_hard,pairwise", "--data", tmp_path, "--limit", 2,
                      "--max-new-tokens", 3, "--judge", judge.url, "--judge-model", "judge")
    assert table["arena_hard (% of verdicts won)"][run.name]["score"] == [0, 0, 0]
    assert table["pairwise, wins over bare base"][run.name] == {"score": [50, 50, 50], "n": 2, "chance": 50, "unusable": 0}


# ---------------------------------------------------------------------------------------------------------- the probe

def test_softmax_regression_against_its_optimum():
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[3.0, 0, 0], [0, 3, 0], [0, 0, 3]])
    y = torch.arange(300) % 3
    h = centres[y] + torch.randn(300, 3, generator=generator)
    nearest = torch.cdist(h[200:], centres).argmin(dim=1)                       # what no classifier can much improve on
    assert (softmax_regression(h[:200], y[:200], h[200:]) == nearest).float().mean() > 0.93


def test_probe_reads_clinc150_and_csv(run, tmp_path, monkeypatch, capsys):
    texts = {"greeting": ["hello there", "good morning"], "goodbye": ["see you soon", "bye bye now"]}
    (tmp_path / "texts.csv").write_text("text,label\n" + "".join(
        f'"{t}, friend {n}",{k}\n' for k, ts in texts.items() for t in ts for n in range(30)))
    found = evaluated(monkeypatch, capsys, "--run", run, "--probe", tmp_path / "texts.csv")
    assert found["classes"] == 2 and found["train"] + found["test"] == 120 and 0 < found["test"] < 30
    (untrained, before), (trained, after), (_, gain) = found["accuracy"].items()
    assert "untrained" in untrained and trained == run.name and before[0] > 60
    assert gain[0] == pytest.approx(after[0] - before[0], abs=1e-3)
    pairs = [[t, k] for k, ts in texts.items() for t in ts]
    (tmp_path / "data_full.json").write_text(json.dumps({"train": pairs, "test": pairs, "val": [], "oos_val": [],
                                                         "oos_train": [["what", "oos"]], "oos_test": [["what", "oos"]]}))
    (tmp_path / "domains.json").write_text(json.dumps({"small_talk": ["greeting", "goodbye"]}))
    found = evaluated(monkeypatch, capsys, "--run", run, "--probe", tmp_path / "data_full.json")
    assert found["classes"] == 2 and found["train"] == found["test"] == 5      # one domain, and out-of-scope
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    assert fails_in_one_line(program("experiments.evaluate", "--run", run, "--probe", tmp_path / "bad.csv"), "text and label")
