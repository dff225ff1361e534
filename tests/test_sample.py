"""sample.py as a user runs it, on the small run."""

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from argparse import Namespace

import pytest
import torch
from conftest import GREEDY, ROOT, fails_in_one_line, make_model, program, train_arguments
from safetensors.torch import load_file, save_file
from test_llama import plain_greedy

from data import TRAITS
from personafuse import load_run
from plumbing.files import UserError
from sample import answer_turn

CPU = torch.device("cpu")
TRAITS_BY_HAND = "high agreeableness=0.7, low neuroticism=0.3"


def sample(*arguments, **options):
    return program("sample.py", *GREEDY, "--max-new-tokens", 12, *arguments, **options)


def shown(*arguments):
    """What sample.py shows -> the weights of its bars by name, in their order, and the answer."""
    result = sample(*arguments)
    assert result.returncode == 0, result.stderr
    return split_bars(result.stdout)


def split_bars(text):
    bars = {}
    lines = text.splitlines()
    while lines and (row := re.fullmatch(r"  ([a-z ]+?) +(\d\.\d{3}) (█*)", lines[0])):
        bars[row[1]] = float(row[2])
        # a bar of four is a tenth
        assert len(row[3]) == pytest.approx(40 * float(row[2]), abs=0.6)
        lines.pop(0)
    return bars, "\n".join(lines).strip()


class PlainMix:
    """The base with w fixed, for plain_greedy: mixed at every layer, not merged."""

    def __init__(self, base, w):
        self.base = base
        self.w = w
        self.logits = base.logits

    def __call__(self, ids):
        return self.base(ids, self.w[None])


def plain_answer(model, query, w, count=12, history=()):
    """The greedy answer, the whole pass again for every token."""
    prompt = model.tokenizer.encode_prompt(query, history)
    with torch.no_grad():
        ids = plain_greedy(PlainMix(model.base, w), prompt, count, model.tokenizer.stop)
    return model.tokenizer.decode(ids).strip()


@pytest.fixture(scope="module")
def model(run):
    return load_run(run, CPU, torch.float32)[0]


# ------------------------------------------------------------------------------------ an answer

def test_bars_strongest_first_then_the_plain_loops_answer(run, model):
    bars, text = shown("I feel anxious", "--run", run)
    w = model.route(model.encode_queries(["I feel anxious"]))[0]
    for name, weight in zip(TRAITS, w.tolist()):
        assert bars[name] == pytest.approx(weight, abs=6e-4)
    assert list(bars.values()) == sorted(bars.values(), reverse=True)
    assert text == plain_answer(model, "I feel anxious", w)


def test_blanks_around_a_query_are_none_of_it(run):
    assert shown("  I feel anxious\n", "--run", run) == shown("I feel anxious", "--run", run)


def test_routes(run, mini, model):
    bars, _ = shown("hi", "--run", run, "--route", "uniform")
    assert bars == dict.fromkeys(TRAITS, 0.1)
    for k in (1, 2, 5):
        bars, _ = shown("hi", "--run", run, "--route", f"random{k}")
        assert list(bars.values()) == [1 / k] * k
    two = [shown("hi", "--run", run, "--route", "random2", "--seed", seed)[0] for seed in range(4)]
    assert len({tuple(bars) for bars in two}) > 1

    bars, text = shown("hi", "--run", run, "--traits", TRAITS_BY_HAND)
    assert bars == {"high agreeableness": 0.7, "low neuroticism": 0.3}
    w = torch.zeros(10)
    w[6] = 0.7
    w[9] = 0.3
    assert text == plain_answer(model, "hi", w)

    bars, bare = shown("hi", "--route", "none", "--base", mini)
    assert not bars
    assert bare == plain_answer(model, "hi", torch.zeros(10))
    assert shown("hi", "--route", "none", "--run", run) == ({}, bare)


def test_compare_shows_other_answers_above_ours(run):
    compared = sample("hi", "--run", run, "--compare", "low agreeableness", "--compare", "none")
    _, text = split_bars(compared.stdout)
    alone = {
        "low agreeableness:": shown("hi", "--run", run, "--traits", "low agreeableness")[1],
        "bare base:": shown("hi", "--run", run, "--route", "none")[1],
        "PersonaFuse:": shown("hi", "--run", run)[1],
    }
    expected = []
    for title, answer in alone.items():
        expected += title.split() + answer.split()
    assert text.split() == expected


def test_compare_alone_is_the_bare_base(run):
    once = sample("hi", "--run", run, "--compare").stdout
    assert once == sample("hi", "--run", run, "--compare", "none").stdout
    assert "bare base:" in once


def test_sampling_repeats_with_its_seed(run):
    def ask(seed):
        hot = ["--temperature", 1.5, "--top-p", 0.9, "--seed", seed]
        return sample("hi", "--run", run, *hot).stdout

    assert ask(1) == ask(1) != ask(2)


def test_very_cold_is_greedy(run):
    assert shown("hi", "--run", run, "--temperature", "1e-40") == shown("hi", "--run", run)


def test_the_newest_run_is_used(run, tmp_path):
    for name in ("old", "new"):
        shutil.copytree(run, tmp_path / "out" / name)
    settings = tmp_path / "out" / "old" / "personafuse.json"
    settings.write_text("{}")
    os.utime(settings, (1, 1))
    asked = program(ROOT / "sample.py", "hi", "--max-new-tokens", 2, cwd=tmp_path)
    assert asked.returncode == 0, asked.stderr


def test_a_base_that_has_moved_is_found_by_its_contents(mini, small_data, tmp_path):
    base = shutil.copytree(mini, tmp_path / "base")
    out = tmp_path / "run"
    stage_1 = ["--stage", 1, "--steps1", 1]
    assert program(*train_arguments(base, small_data, out, *stage_1)).returncode == 0
    ask = ["hi", "--run", out, "--traits", TRAITS_BY_HAND]
    before = shown(*ask)
    base.rename(tmp_path / "moved")
    assert fails_in_one_line(sample(*ask), base, "--base")
    assert shown(*ask, "--base", tmp_path / "moved") == before


# ------------------------------------------------------------------------------ what goes wrong

def test_bad_input_ends_in_one_line(run, mini, tmp_path):
    def refused(*arguments, words):
        return fails_in_one_line(sample(*arguments), *words)

    none = program(ROOT / "sample.py", "hi", cwd=tmp_path)
    assert fails_in_one_line(none, "no run", "train.py")
    assert refused("hi", "--run", tmp_path, words=["personafuse.json", "train"])
    assert refused("  ", "--run", run, words=["empty"])
    assert refused("\ud83d", "--run", run, words=["cannot be read"])
    assert refused("hi", "--run", run, "--traits", "high ego=1", words=["unknown trait 'high ego'"])
    assert refused("hi", "--run", run, "--traits", "high openness=2", words=["out of the range"])
    assert refused("hi", "--run", run, "--compare", "high ego", words=["high ego"])
    other = make_model(tmp_path / "other", seed=1)
    assert refused("hi", "--run", run, "--base", other, words=["other weights", mini, other])
    assert refused("hi", "--base", "owner/model", "--route", "none", words=["owner/model"])
    assert refused("hi", "--base", "nothing", "--route", "none", words=["nothing"])
    assert refused("hi", "--base", mini, "--route", "none", "--traits", TRAITS_BY_HAND,
                   words=["bare base", "--run"])
    assert refused("hi", "--run", run, "--device", "gpu9", words=["gpu9"])


def test_a_query_beyond_the_context_is_cut_and_that_is_said(run):
    result = sample("word " * 600, "--run", run, "--max-new-tokens", 4)
    assert result.returncode == 0
    assert "1 of 1 queries are cut to 508 tokens: the base's context" in result.stderr
    assert "1 of 1 queries are cut to 512 tokens: what the router's encoder" in result.stderr
    short = sample("word " * 20, "--run", run, "--max-new-tokens", 4)
    assert "cut" not in short.stderr


@pytest.mark.parametrize("said", ['{"temperature": "hot"}', '{"temperature": -1}', '{"top_p": NaN}'])
def test_sampling_that_a_base_cannot_mean_is_named(mini, tmp_path, said):
    base = shutil.copytree(mini, tmp_path / "base")
    (base / "generation_config.json").write_text(said)
    result = program("sample.py", "hi", "--base", base, "--route", "none")
    assert fails_in_one_line(result, "generation_config.json", "no positive number")


def test_broken_files_of_a_run_are_named(run, tmp_path):
    broken = shutil.copytree(run, tmp_path / "expert")
    path = broken / "low_openness" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert fails_in_one_line(sample("hi", "--run", broken), path)

    broken = shutil.copytree(run, tmp_path / "router")
    path = broken / "router.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert fails_in_one_line(sample("hi", "--run", broken), path)
    whole = load_file(run / "router.safetensors")
    save_file({name: t for name, t in whole.items() if name != "e"}, path)
    assert fails_in_one_line(sample("hi", "--run", broken), path)


WITHOUT_MEANING = [
    ("--temperature", "nan"), ("--temperature", "inf"), ("--temperature", -1), ("--top-p", 0),
    ("--top-p", 1.1), ("--top-p", "nan"), ("--repetition-penalty", 0), ("--max-new-tokens", 0),
    ("--repetition-penalty", "inf"), ("--seed", -1), ("--seed", 10**30),
]


@pytest.mark.parametrize("option, value", WITHOUT_MEANING, ids=str)
def test_a_setting_without_a_meaning_is_refused_when_the_options_are_read(option, value):
    result = program("sample.py", "hi", "--run", "none", f"{option}={value}")
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1 and f"argument {option}: {value}" in lines[0], result.stderr


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_numbers_that_overflow_in_fp16_are_named(tmp_path, temperature):
    """Weights that are too large for fp16 alone; in fp32 the same question is answered."""
    folder = make_model(tmp_path / "loud")
    tensors = load_file(folder / "model.safetensors")
    for name, t in tensors.items():
        if name.endswith("down_proj.weight"):
            t *= 1e6
    save_file(tensors, folder / "model.safetensors")
    ask = ["sample.py", "hi", "--route", "none", "--base", folder, "--temperature", temperature,
           "--max-new-tokens", 3]
    assert fails_in_one_line(program(*ask, "--dtype", "fp16"), "fp16", "overflow", "--dtype bf16")
    assert program(*ask, "--dtype", "fp32").returncode == 0


def test_without_a_terminal_a_query_is_asked_for(run):
    assert sample("--run", run).returncode == 2


# -------------------------------------------------------------------------------- conversation

def converse(run, *lines, options=()):
    """Type lines into `python sample.py` in a terminal of its own -> all that it showed."""
    command = [sys.executable, "sample.py", "--run", run, *GREEDY, "--max-new-tokens", 8, *options]
    ours, theirs = pty.openpty()
    process = subprocess.Popen([str(part) for part in command], cwd=ROOT, stdin=theirs,
                               stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    waiting = list(lines)
    end = time.monotonic() + 60
    try:
        while select.select([ours], [], [], max(0, end - time.monotonic()))[0]:
            try:
                chunk = os.read(ours, 4096)
            except OSError:
                # the terminal closes with the program
                chunk = b""
            if not chunk:
                break
            seen += chunk
            if seen.endswith(b"you: "):
                # after the last line Ctrl-D
                os.write(ours, waiting.pop(0).encode() + b"\n" if waiting else b"\x04")
        code = process.wait(timeout=10)
    finally:
        process.kill()
        os.close(ours)
    return code, seen.decode().replace("\r\n", "\n")


def test_a_conversation_keeps_the_turns_and_obeys_its_commands(run, model):
    code, seen = converse(run, "I feel anxious", "Why is that?", "/traits high ego",
                          "/traits low agreeableness=0.5", "/hello", "/new", "Why is that?",
                          "/route uniform", "ok")
    assert code == 0, seen
    turns = seen.split("you: ")
    assert "unknown trait 'high ego'" in turns[3]
    assert "there is no /hello" in turns[5]
    bars = [line.split() for line in turns[7].splitlines() if "█" in line]
    assert [bar[:3] for bar in bars] == [["low", "agreeableness", "0.500"]]
    assert len([line for line in turns[9].splitlines() if " 0.100 ████" in line]) == 10
    # the second turn's answer is that of a prompt with the first in it
    first = plain_answer(model, "I feel anxious", model.mixing_weights(["I feel anxious"])[0], 8)
    # and the router reads the second alone
    w = model.mixing_weights(["Why is that?"])[0]
    second = plain_answer(model, "Why is that?", w, 8, [("I feel anxious", first)])
    assert first in turns[1] and second in turns[2]


def test_other_answers_stand_above_ours_in_a_conversation_too(run, model):
    code, seen = converse(run, "I feel anxious", "/traits high openness", "hi",
                          options=["--compare"])
    assert code == 0, seen
    first = plain_answer(model, "I feel anxious", model.mixing_weights(["I feel anxious"])[0], 8)
    bare = plain_answer(model, "I feel anxious", torch.zeros(10), 8)
    turns = seen.split("you: ")
    assert f"bare base:\n{bare}" in turns[1] and f"PersonaFuse:\n{first}" in turns[1]
    assert "bare base:\n" in turns[3] and "high openness:\n" in turns[3]


def test_an_answer_that_breaks_off_leaves_no_experts_in_the_base(model, monkeypatch):
    def overflow(*arguments, **options):
        yield 5
        raise UserError("not finite")

    monkeypatch.setattr("sample.generate", overflow)
    before = {name: t.clone() for name, t in model.base.state_dict().items()}
    args = Namespace(max_new_tokens=8, seed=0, temperature=0.0, top_p=1.0, repetition_penalty=1.0,
                     remarks={}, setting="uniform", compare=[])
    with pytest.raises(UserError):
        answer_turn(model, "hi", [], args)
    for name, t in model.base.state_dict().items():
        assert t.equal(before[name]), name


# ------------------------------------------------------------------------------------- remarks

def bar_of(turn, pole):
    for line in turn.splitlines():
        if line.startswith(f"  {pole}"):
            return float(line.split()[2])


def test_remarks_move_the_bars_and_stay_in_the_profile(run, tmp_path):
    profile = tmp_path / "me.json"
    code, seen = converse(run, "I feel anxious", "/more imaginative", "/more imaginative",
                          "/less spontaneous", "/more rude", "I feel anxious",
                          "/traits high openness", "/more calm",
                          options=["--profile", profile])
    assert code == 0, seen
    turns = seen.split("you: ")
    assert "imaginative +2" in turns[3] and "imaginative +2, spontaneous -1" in turns[4]
    assert "/more: 'rude' (1) is no remark" in turns[5] and "words are imaginative" in turns[5]
    before, after = turns[1], turns[6]
    assert bar_of(after, "high openness") > bar_of(before, "high openness")
    assert bar_of(after, "low conscientiousness") < bar_of(before, "low conscientiousness")
    assert "/route learned first" in turns[8]
    assert json.loads(profile.read_text(encoding="utf-8")) == {"imaginative": 2, "spontaneous": -1}
    # the next conversation, and a single question, begin there
    bars, _ = shown("I feel anxious", "--run", run, "--profile", profile)
    assert bars["high openness"] == bar_of(after, "high openness")


@pytest.mark.parametrize("text, said", [
    ('{"rude": 1}', "'rude' (1) is no remark"), ('{"kind": "much"}', "'kind' ('much') is no remark"),
    ('{"kind": 1000}', "no remark"), ('{"kind": true}', "no remark"), ("[]", "no JSON object"),
    ("{", "cannot read")])
def test_a_profile_that_is_none_is_refused(text, said, tmp_path):
    profile = tmp_path / "me.json"
    profile.write_text(text, encoding="utf-8")
    assert fails_in_one_line(sample("hi", "--profile", profile), said, profile.name)


def test_a_profile_goes_with_the_router_only(tmp_path):
    result = sample("hi", "--profile", tmp_path / "me.json", "--route", "uniform")
    assert result.returncode == 2 and "--profile shifts the router's weights" in result.stderr


def test_a_remark_that_cannot_be_kept_counts_for_nothing(run, tmp_path):
    profile = tmp_path / "none" / "me.json"
    code, seen = converse(run, "I feel anxious", "/more blunt", "I feel anxious",
                          options=["--profile", profile])
    turns = seen.split("you: ")
    assert code == 0 and "cannot write" in turns[2]
    assert bar_of(turns[3], "low agreeableness") == bar_of(turns[1], "low agreeableness")
    # nor one that the next conversation would refuse to read
    profile = tmp_path / "me.json"
    profile.write_text('{"kind": 99}')
    code, seen = converse(run, "/more kind", options=["--profile", profile])
    assert "'kind' (100) is no remark" in seen and profile.read_text() == '{"kind": 99}'


def test_the_oldest_turns_make_room(model):
    history = [(f"question {i} " + "word " * 20, "answer " * 20) for i in range(8)]
    newest = history[-1]
    args = Namespace(max_new_tokens=8, seed=0, temperature=0.0, top_p=1.0, repetition_penalty=1.0,
                     remarks={}, setting="none", compare=[])
    answer_turn(model, "and now?", history, args)
    assert 1 <= len(history) < 8 and history[-1] == newest
    # no more than had to go, all turns being of one length
    needed = []
    for turns in range(9):
        needed.append(len(model.tokenizer.encode_prompt("and now?", [newest] * turns)) + 8)
    assert needed[len(history)] <= 512 < needed[len(history) + 1]
