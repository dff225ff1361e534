"""sample.py as a user runs it, on the small run."""

import json
import os
import pty
import shutil
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from conftest import GREEDY, ROOT, fails_in_one_line, program

from data import TRAITS
from personafuse import load_run
from sample import answer_turn
from test_llama import plain_greedy


def sample(*arguments, **options):
    return program("sample.py", *GREEDY, *arguments, "--max-new-tokens", 12, **options)


class PlainMix:
    """The base with w fixed, for plain_greedy."""

    def __init__(self, base, w):
        self.base, self.w, self.logits = base, w, base.logits

    def __call__(self, ids):
        return self.base(ids, self.w[None])


def test_bars_strongest_first_then_the_plain_loops_answer(run):
    result = sample("I feel anxious", "--run", run)
    assert result.returncode == 0, result.stderr
    bars, text = result.stdout.split("\n\n", 1)
    rows = [line.rstrip(" █").strip().rsplit(maxsplit=1) for line in bars.splitlines()]
    model, _ = load_run(run, torch.device("cpu"), torch.float32)
    w = model.route([model.encoder_tokenizer.encode_query("I feel anxious")])[0]
    shown = {row[0].strip(): float(row[1]) for row in rows}
    assert shown == {name: pytest.approx(x, abs=6e-4) for name, x in zip(TRAITS, w.tolist())}
    assert list(shown.values()) == sorted(shown.values(), reverse=True)
    with torch.no_grad():                                       # mixed at every layer, not merged, the whole pass every time
        ids = plain_greedy(PlainMix(model.base, w), model.tokenizer.encode_prompt("I feel anxious"), 12, model.tokenizer.stop)
    assert text.strip() == model.tokenizer.decode(ids).strip()


def test_json_of_one_and_of_a_file(run, tmp_path):
    queries = ["I feel anxious", "argue with me", "ok", "Tell me a long story about a family and their dog."]
    (tmp_path / "q.txt").write_text("\n".join(queries) + "\n")
    many = [json.loads(line) for line in sample("--file", tmp_path / "q.txt", "--json", "--run", run).stdout.splitlines()]
    assert [m["query"] for m in many] == queries
    for one in (many[0], many[3]):
        alone = json.loads(sample(one["query"], "--json", "--run", run).stdout)
        assert alone["response"] == one["response"]
        assert alone["weights"] == {k: pytest.approx(v, abs=1e-5) for k, v in one["weights"].items()}
        assert list(alone["weights"]) == TRAITS and sum(alone["weights"].values()) == pytest.approx(1, abs=1e-4)


def test_routes(run, mini):
    def weights(*how):
        return json.loads(sample("hi", "--json", "--run", run, *how).stdout)["weights"]

    assert set(weights("--route", "uniform").values()) == {0.1}
    for k, each in ((1, 1), (2, 0.5), (5, 0.2)):
        assert sorted(weights("--route", f"random{k}").values(), reverse=True)[:k + 1] == [each] * k + [0]
    assert weights("--route", "random2", "--seed", 1) != weights("--route", "random2", "--seed", 2)
    by_hand = weights("--traits", "high agreeableness=0.7, low neuroticism=0.3")
    assert {k: v for k, v in by_hand.items() if v} == {"high agreeableness": pytest.approx(0.7), "low neuroticism": pytest.approx(0.3)}
    bare = json.loads(sample("hi", "--json", "--route", "none", "--base", mini).stdout)
    assert bare == json.loads(sample("hi", "--json", "--route", "none", "--run", run).stdout) and bare["weights"] is None


def test_compare_shows_the_bare_base_and_personafuse(run):
    text = sample("hi", "--run", run, "--compare").stdout
    bare = json.loads(sample("hi", "--json", "--route", "none", "--run", run).stdout)["response"]
    mixed = json.loads(sample("hi", "--json", "--run", run).stdout)["response"]
    assert text.split("bare base:\n")[1].split() == [*bare.split(), "PersonaFuse:", *mixed.split()]


def test_sampling_repeats_with_its_seed(run):
    def ask(seed):
        return sample("hi", "--run", run, "--temperature", 1.5, "--top-p", 0.9, "--seed", seed).stdout

    assert ask(1) == ask(1) != ask(2)


def test_the_newest_run_is_used(run, tmp_path):
    for name, age in (("old", 100), ("new", 0)):
        shutil.copytree(run, tmp_path / "out" / name)
        path = tmp_path / "out" / name / "personafuse.json"
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    settings = json.loads((tmp_path / "out/old/personafuse.json").read_text())
    (tmp_path / "out/old/personafuse.json").write_text(json.dumps(settings | {"base": "/nowhere/at-all"}))
    os.utime(tmp_path / "out/old/personafuse.json", (1, 1))
    assert program(ROOT / "sample.py", "hi", "--max-new-tokens", 2, cwd=tmp_path).returncode == 0


def test_bad_input_ends_in_one_line(run, mini, tmp_path):
    assert fails_in_one_line(program(ROOT / "sample.py", "hi", cwd=tmp_path), "no run", "train.py")
    assert fails_in_one_line(sample("hi", "--run", tmp_path), "personafuse.json", "train")
    assert fails_in_one_line(sample("  ", "--run", run), "empty")
    assert fails_in_one_line(sample("hi", "--run", run, "--traits", "high ego=1"), "unknown trait 'high ego'")
    assert fails_in_one_line(sample("hi", "--run", run, "--traits", "high openness=2"), "out of the range")
    assert fails_in_one_line(sample("hi", "--run", run, "--base", "tiny"), "was made for the base", mini, "tiny")
    assert fails_in_one_line(sample("word " * 600, "--run", run), "tokens", "512")
    assert fails_in_one_line(sample("--file", tmp_path / "none", "--json", "--run", run), "none")
    assert fails_in_one_line(sample("hi", "--base", "owner/model", "--route", "none"), "owner/model", "--base DIR", "tiny")
    assert fails_in_one_line(sample("hi", "--base", "nothing", "--route", "none"), "nothing", "smollm2")
    assert fails_in_one_line(sample("hi", "--run", run, "--device", "gpu9"), "gpu9")
    broken = shutil.copytree(run, tmp_path / "broken")
    path = broken / "low_openness" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert fails_in_one_line(sample("hi", "--run", broken), path)


# ------------------------------------------------------------------------------------------------------- conversation

def converse(run, *lines, arguments=()):
    """Type lines into `python sample.py` in a terminal of its own -> all that it showed."""
    command = [sys.executable, "sample.py", "--run", str(run), *map(str, GREEDY), "--max-new-tokens", "8", *map(str, arguments)]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    waiting = list(lines)
    while True:
        try:
            chunk = os.read(ours, 4096)
        except OSError:                                 # the terminal closes with the program
            break
        if not chunk:
            break
        shown += chunk
        if shown.endswith(b"you: ") and waiting:
            os.write(ours, waiting.pop(0).encode() + b"\n")
        elif shown.endswith(b"you: "):
            os.write(ours, b"\x04")                     # Ctrl-D
    return process.wait(timeout=60), shown.decode().replace("\r\n", "\n")


def test_a_conversation_keeps_the_turns_and_obeys_its_commands(run):
    code, shown = converse(run, "I feel anxious", "Why is that?", "/traits high ego", "/traits low agreeableness=0.5",
                           "/hello", "/new", "Why is that?", "/route uniform", "ok")
    assert code == 0, shown
    turns = shown.split("you: ")
    assert "unknown trait 'high ego'" in turns[3] and "there is no /hello" in turns[5]
    bars = [line.split() for line in turns[7].splitlines() if "█" in line]
    assert [bar[:3] for bar in bars] == [["low", "agreeableness", "0.500"]]
    assert len([line for line in turns[9].splitlines() if " 0.100 ████" in line]) == 10
    # the second turn's answer is that of a prompt with the first in it; the router reads the second alone
    model, _ = load_run(run, torch.device("cpu"), torch.float32)
    w = model.mixing_weights(["Why is that?"])[0]
    first = json.loads(program("sample.py", "I feel anxious", "--json", "--run", run, *GREEDY, "--max-new-tokens", 8).stdout)
    first = first["response"]
    prompt = model.tokenizer.encode_prompt("Why is that?", [("I feel anxious", first)])
    with torch.no_grad():
        ids = plain_greedy(PlainMix(model.base, w), prompt, 8, model.tokenizer.stop)
    assert model.tokenizer.decode(ids).strip() in turns[2]


def test_the_oldest_turns_make_room(run):
    model, _ = load_run(run, torch.device("cpu"), torch.float32)
    history = [(f"question {i} " + "word " * 20, "answer " * 20) for i in range(8)]
    newest = history[-1]
    args = Namespace(max_new_tokens=8, seed=0, temperature=0.0, top_p=1.0, repetition_penalty=1.0)
    answer_turn(model, "and now?", history, "none", args)
    kept = [len(model.tokenizer.encode_prompt("and now?", [newest] * n)) + 8 for n in range(9)]
    assert 1 <= len(history) < 8 and history[-1] == newest
    assert kept[len(history)] <= 512 < kept[len(history) + 1]      # no more than had to go, all turns being of one length


def test_without_a_terminal_a_query_is_asked_for(run):
    assert sample("--run", run).returncode == 2


def test_weights_by_hand_are_compared_one_under_the_other(run):
    text = sample("hi", "--run", run, "--compare", "low agreeableness", "--compare", "none").stdout
    for title, how in (("low agreeableness:", ["--traits", "low agreeableness"]), ("bare base:", ["--route", "none"]),
                       ("PersonaFuse:", [])):
        alone = json.loads(sample("hi", "--json", "--run", run, *how).stdout)["response"]
        assert " ".join([title, *alone.split()]) in " ".join(text.split())
