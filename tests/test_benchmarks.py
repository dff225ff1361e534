"""Benchmarks by their authors' rules and against EleutherAI's harness."""

import json
import re
from argparse import Namespace

import pytest
import torch
from conftest import evaluated, fails_in_one_line, program

from experiments import benchmarks
from experiments.benchmarks import TASKS, Question, read_questions
from personafuse import load_run
from plumbing.files import UserError


# ----------------------------------------------------------------------------------------- scoring

def test_emobench_wants_every_letter_right():
    def score(text):
        return benchmarks.score_emobench({"answer_q1": "B", "answer_q2": "C"}, [text])

    assert score('{"answer_q1": "B", "answer_q2": "C"}') == 1
    assert score('So:\n```json\n{"answer_q1": "B", "answer_q2": "C"}\n```') == 1
    assert score('{"answer_q1": "B", "answer_q2": "A"}') == 0       # the emotion is not enough
    assert score('{"answer_q1": "A", "answer_q2": "C"}') == 0
    assert score('{"answer_q1": 1, "answer_q2": null}') == 0
    for unusable in ("B and C", '{"answer_q1": "B"}', "[1]", ""):
        assert score(unusable) is None


def test_tombench_votes():
    order = dict(zip("ABCD", "CADB"))

    def score(right, *texts):
        return benchmarks.score_tombench(([order] * len(texts), right), texts)

    for text, vote in (("[[C]]", "D"), ("It is B. [[A]]", "C"), ("[B]", "A"), ("A or rather D", "B")):
        assert [score(right, text) for right in "ABCD"] == [right == vote for right in "ABCD"]
    assert score("C", "no idea") is None
    # the majority, and in a tie whichever came first
    assert score("A", "[[B]]", "[[D]]", "[[B]]") == 1
    assert score("A", "[[D]]", "[[B]]", "[[D]]") == 0
    assert score("A", "[[B]]", "[[D]]") == 1
    assert score("A", "[[B]]", "no idea") == 1


@pytest.mark.parametrize("answer, said", [
    ("Angry: 0\nCalm: 6\nProud: 0\nSad: 7", 100),
    ("Angry: 10\nCalm: 2\nProud: 1\nSad: 0", None),
    ("Angry: 1\nCalm: 3\nProud: 5\nSad: 2 and so on", None),
    ("I cannot say", 0),
    ("Angry: 1\nCalm: 3\nGlad: 5\nSad: 2", 0),
])
def test_eq_bench_scores_as_the_harness_does(answer, said):
    theirs = pytest.importorskip("lm_eval.tasks.eq_bench.utils").calculate_score_fullscale
    names = ("Angry", "Calm", "Proud", "Sad")
    reference = {f"emotion{n}": name for n, name in enumerate(names, 1)}
    reference |= {f"emotion{n}_score": score for n, score in enumerate((0, "6", 0, "7"), 1)}
    expected = theirs({"reference_answer_fullscale": str(reference)}, [answer])
    right = {"Angry": 0.0, "Calm": 6.0, "Proud": 0.0, "Sad": 7.0}
    found = benchmarks.score_eq_bench(right, [answer])
    assert (found is None) is (expected["percent_parseable"] == 0)
    assert 100 * (found or 0) == pytest.approx(expected["eqbench"])
    assert said is None or expected["eqbench"] == said


def test_gsm8k_reads_the_last_number():
    for text, right in (("so it is 1.\n#### 1234", 1), ("I think 1,234.", 1), ("$1234", 1),
                        ("1234 or rather 2", 0), ("-1234", 0), ("1234\nQuestion: 5", 1),
                        ("none", None)):
        assert benchmarks.score_gsm8k("1,234", [text]) == right


# ----------------------------------------------------------------------------------------- reading

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A few made records of each benchmark, in its own format and layout."""
    folder = tmp_path_factory.mktemp("benchmarks")

    def lines(name, records):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))

    both = [{"qid": str(n), "language": language, "scenario": "Ann lost her keys.",
             "subject": "Ann"} for n, language in enumerate(["en", "zh", "en", "en"])]
    lines("emobench/EA.jsonl", [r | {
        "category": "Personal-Self", "question type": "Action",
        "choices": ["Cry", "Search", "Leave", "Call"], "label": "Search"} for r in both])
    lines("emobench/EU.jsonl", [r | {
        "coarse_category": "emotional_cues", "emotion_label": "Worry", "cause_label": "b",
        "emotion_choices": ["Joy", "Anger", "Fear", "Pride", "Shame", "Worry"],
        "cause_choices": ["a", "b", "c", "d"]} for r in both])
    for name in ("False Belief Task", "Hinting Task Test"):
        lines(f"tombench/{name}.jsonl", [{
            "能力\nABILITY": "Belief: Location false beliefs", "序号\nINDEX": n, "故事": "",
            "STORY": f"Tom moved box {n}.", "QUESTION": "Where is it?", "OPTION-A": "A. Box",
            "OPTION-B": "Bag", "OPTION-C": "Bin", "OPTION-D": "Bed", "答案\nANSWER": "B"}
            for n in range(3)])
    names = ("Angry", "Calm", "Proud", "Sad")
    reference = {f"emotion{n}": name for n, name in enumerate(names, 1)}
    reference |= {f"emotion{n}_score": v for n, v in enumerate((0, "6", 0, "7"), 1)}
    (folder / "eq_bench").mkdir()
    (folder / "eq_bench" / "eq_bench_v2_questions_171.json").write_text(json.dumps({
        str(n): {"prompt": "Score each feeling.", "reference_answer_fullscale": reference}
        for n in (1, 2, 3)}))
    problems = [{"question": f"What is {n} and 1?", "answer": f"{n}+1\n#### {n + 1}"}
                for n in range(3)]
    lines("gsm8k/test.jsonl", problems)
    return folder


def test_each_question_has_one_right_answer_in_its_own_words(files):
    ea = [q for q in read_questions("emobench", files) if q.row == "EmoBench EA"]
    assert [q.right for q in ea] == [{"answer": "B"}] * 3
    assert ea[0].prompts[0].startswith("Ann lost her keys.") and "B) Search" in ea[0].prompts[0]
    for question in read_questions("tombench", files):
        orders, right = question.right
        assert right == "B" and len({tuple(order.items()) for order in orders}) > 1
        for prompt, order in zip(question.prompts, orders):
            # wherever the option has gone, its letter in the file is known
            shown, = [letter for letter in order if order[letter] == "B"]
            assert f"\n{shown}) Bag\n" in prompt + "\n"
    gsm8k = read_questions("gsm8k", files)
    assert sorted(q.right for q in gsm8k) == ["1", "2", "3"]
    assert ["Question: What is 2 and 1?\nAnswer:"] in [q.prompts for q in gsm8k]


def test_an_option_that_is_not_there_is_not_offered():
    """Three of ToMBench's files have NaN for it."""
    row = {"STORY": "Tom hid.", "QUESTION": "Was it rude?", "OPTION-A": "A. Yes", "OPTION-B": "B. No",
           "OPTION-C": float("nan"), "OPTION-D": float("nan"), "答案\nANSWER": "B"}
    question = benchmarks.tombench_question("Faux-pas 0", row)
    assert question.form == "[[AB]]"
    for prompt in question.prompts:
        assert {"A) Yes", "B) No"} <= set(prompt.split("\n")) or {"A) No", "B) Yes"} <= set(prompt.split("\n"))
        assert "C)" not in prompt


def test_guided_answers_have_the_likeliest_letters(run):
    """Letter by letter, each against a forward pass over what stands before it."""
    model, _ = load_run(run, torch.device("cpu"), torch.float32)
    form = '{"answer_q1": "ABC", "answer_q2": "ABCD"}'
    w = torch.full((1, 10), 0.1)
    prompt = model.tokenizer.encode_prompt("Why?")
    answer = benchmarks.fill_form(model, prompt, form, w)
    assert re.fullmatch(r'\{"answer_q1": "[A-C]", "answer_q2": "[A-D]"\}', answer)
    for key, letters in (("q1", "ABC"), ("q2", "ABCD")):
        before, said = re.match(rf'(.*"answer_{key}": ")(.)', answer).groups()
        ids = prompt + model.tokenizer.encode_answer(before)[:-1]
        logits = model.base.logits(model.base(torch.tensor([ids]), w)[0, -1])
        scores = {letter: logits[model.tokenizer.encode(letter)[-1]].item() for letter in letters}
        assert said == max(scores, key=scores.get)
    # as in fp16, where a base's numbers may overflow
    model.base.norm.weight.data.fill_(torch.inf)
    with pytest.raises(UserError, match="not finite"):
        benchmarks.fill_form(model, prompt, form, w)


def test_guided_benchmarks_have_nothing_unusable(run, files):
    tables = evaluated("--run", run, "--tasks", "emobench,tombench,gsm8k", "--data", files,
                       "--limit", 3, "--guided")
    unusable = {row["name"]: row["unusable"] for row in tables[f"{run.name}, learned"]}
    assert unusable["EmoBench EA"] == unusable["ToMBench"] == 0


def test_every_benchmark_runs(run, files):
    tables = evaluated("--run", run, "--tasks", ",".join(TASKS), "--data", files, "--limit", 2)
    assert set(tables) == {f"{run.name}, learned"}
    rows = {row["name"]: row for row in tables[f"{run.name}, learned"]}
    assert rows["ToMBench"]["chance"] == 25
    assert rows["EQ-Bench"]["chance"] == rows["GSM8K"]["chance"] == 0
    emobench = [row for name, row in rows.items() if name.startswith("EmoBench")]
    assert sum(row["n"] for row in emobench) == rows["ToMBench"]["n"] == rows["GSM8K"]["n"] == 2
    assert all(len(row["score"]) == 3 for row in rows.values())
    # the model knows no JSON
    for row in emobench:
        assert row["unusable"] == row["n"] and row["score"] == [0, 0, 0]


def test_the_parts_of_emobench_have_rows_of_their_own(files):
    questions = read_questions("emobench", files)
    answers = [['{"answer": "B", "answer_q1": "F", "answer_q2": "A"}'] for _ in questions]
    ea, eu = benchmarks.score_questions(benchmarks.score_emobench, questions, answers)
    assert (ea["name"], eu["name"]) == ("EmoBench EA", "EmoBench EU")
    assert (ea["n"], ea["score"][0], ea["chance"]) == (3, 100, 25)
    assert (eu["n"], eu["score"][0], eu["chance"]) == (3, 0, pytest.approx(100 / 24))


def test_each_question_gets_the_answers_to_its_prompts(monkeypatch):
    asked = []

    def ask_model(model, prompts, args, max_new_tokens):
        asked.extend(prompts)
        return [f"answer to {prompt}" for prompt in prompts]

    monkeypatch.setattr(benchmarks, "ask_model", ask_model)
    questions = [Question(["Why?"], "", "a row"), Question(["one order", "another"], "", "a row")]
    answers = benchmarks.ask_questions(None, questions, Namespace(guided=False), 9)
    assert asked == ["Why?", "one order", "another"]
    assert answers == [["answer to Why?"], ["answer to one order", "answer to another"]]


def test_benchmark_errors_say_what_to_do(run, tmp_path):
    def fails(tasks, *more):
        return program("experiments.evaluate", "--run", run, "--tasks", tasks, *more)

    assert fails_in_one_line(fails("emobanch"), "unknown task", "emobench")
    assert fails_in_one_line(fails("gsm8k"), "--data", "github.com/openai/grade-school-math")
    (tmp_path / "emobench").mkdir()
    for name in ("EA.jsonl", "EU.jsonl"):
        (tmp_path / "emobench" / name).write_text('{"language": "en"}\n')
    assert fails_in_one_line(fails("tombench", "--data", tmp_path), "github.com/zhchen18/ToMBench")
    assert fails_in_one_line(fails("emobench", "--data", tmp_path), "choices", "emobench")
    (tmp_path / "emobench" / "EA.jsonl").write_text('{"lang')
    assert fails_in_one_line(fails("emobench", "--data", tmp_path), "cannot read", "EA.jsonl")
