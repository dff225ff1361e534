"""The Persona-CoT parser, and experiments.generate: generate (server, interrupted), show, check."""

import json
import resource
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import ROOT, make_model
from data import TRAITS, load_records
from plumbing.chat import ChatTokenizer
from experiments import asking, persona_cot
from experiments.generate import main, read_queries
from personafuse import load_llama
from plumbing.files import UserError

PROGRAM = [sys.executable, "-m", "experiments.generate"]

PLAIN = """Step 1: Read the social cue
Social cue: The user sounds worried and a little ashamed.
Step 2: Read the task cue
Task cue: They want a short, usable plan.
Step 3: Choose the personality traits
Social traits: High Agreeableness, Low Neuroticism
Task traits: High Conscientiousness
Step 4: Plan the answer
Plan: Warm first, then three steps.
Step 5: Write the answer
##Response: That sounds hard. Let's take it one step at a time.
##Persona Behavior Rationale: The opening is warm and the steps are orderly."""

PLAIN_TRAITS = ["High Agreeableness", "Low Neuroticism"], ["High Conscientiousness"]
PLAIN_RESPONSE = "That sounds hard. Let's take it one step at a time."
PLAIN_RATIONALE = "The opening is warm and the steps are orderly."

# what models write: (answer, social traits, task traits, response, rationale), as far as the parser should get each right
GOOD = {
    "as asked": (PLAIN, *PLAIN_TRAITS, PLAIN_RESPONSE, PLAIN_RATIONALE),
    "other capitals": ("SOCIAL CUE: stress\nSOCIAL TRAITS: HIGH AGREEABLENESS\nTask Cue: x\ntask traits: low openness\n"
                       "## RESPONSE:\nHello.\n## persona behavior rationale:\nKind.",
                       ["High Agreeableness"], ["Low Openness"], "Hello.", "Kind."),
    "bold marks": ("**Social Cue:** tense\n**Social Traits:** **High Agreeableness**, **Low Extraversion**\n"
                   "**Task Cue:** y\n**Task Traits:** *High Openness*\n\n**Response:**\n**Breathe.** Then write it down.\n\n"
                   "**Persona Behavior Rationale:**\nCalm.",
                   ["High Agreeableness", "Low Extraversion"], ["High Openness"],
                   "**Breathe.** Then write it down.", "Calm."),
    "numbered headings": ("1. Social cue: a\n2. Task cue: b\n3. Social traits: High Extraversion\n4) Task traits: none\n"
                          "5. ##Response: Party time!\n6. ##Persona Behavior Rationale: Lively.",
                          ["High Extraversion"], [], "Party time!", "Lively."),
    "step in the heading": ("### Step 1: Social Cue\nThe user jokes.\n### Step 2: Task Cue\nA story.\n"
                            "### Step 3: Social Traits: High Extraversion\nTask Traits: High Openness\n"
                            "### Step 5: Final Response:\nOnce upon a time.\n### Persona Rationale:\nPlayful.",
                            ["High Extraversion"], ["High Openness"], "Once upon a time.", "Playful."),
    "trait, then pole": ("Social traits: Agreeableness: High, Neuroticism: Low\nTask traits: Openness to Experience: High\n"
                         "##Response: Yes.\n##Persona Behavior Rationale: ok",
                         ["High Agreeableness", "Low Neuroticism"], ["High Openness"], "Yes.", "ok"),
    "pole in brackets": ("Social traits: Agreeableness (high), Extraversion (low)\nTask traits: Conscientiousness = high\n"
                         "##Response: Yes.",
                         ["High Agreeableness", "Low Extraversion"], ["High Conscientiousness"], "Yes.", ""),
    "a list of traits": ("Social traits:\n- High Agreeableness: the user is hurt, low agreeableness would sting\n"
                         "- Low Neuroticism (calm)\nReasoning: high neuroticism would feed the worry.\n"
                         "Task traits:\n* Low Openness\n##Response: I hear you.",
                         ["High Agreeableness", "Low Neuroticism"], ["Low Openness"], "I hear you.", ""),
    "full names": ("Social traits: High Openness to Experience and Low Extroversion\nTask traits: None\n##Response: Well.",
                   ["High Openness", "Low Extraversion"], [], "Well.", ""),
    "one pole for two": ("Social traits: High Openness and Agreeableness\nTask traits: high in conscientiousness\n"
                         "##Response: Go.", ["High Openness", "High Agreeableness"], ["High Conscientiousness"], "Go.", ""),
    "quoted list": ('Social traits: ["High Agreeableness", "Low Neuroticism"]\nTask traits: []\n##Response: Fine.',
                    ["High Agreeableness", "Low Neuroticism"], [], "Fine.", ""),
    "no space, British": ("Social traits: High Agreeableness\nTask traits: none\n##Response:Hello there.\n"
                          "##Persona Behaviour Rationale:Friendly.",
                          ["High Agreeableness"], [], "Hello there.", "Friendly."),
    "no colon": ("Social traits: Low Agreeableness\nTask traits: none\n## Response\n\nNo. Do it again.\n\n"
                 "## Persona Behavior Rationale\n\nBlunt.", ["Low Agreeableness"], [], "No. Do it again.", "Blunt."),
    "all on one line": ("Social traits: High Openness\nTask traits: none\nStep 5: ##Response: Dream on! "
                        "##Persona Behavior Rationale: Bold.", ["High Openness"], [], "Dream on!", "Bold."),
    "trailing talk": (PLAIN + "\n\n---\nLet me know if you would like another version!",
                      *PLAIN_TRAITS, PLAIN_RESPONSE, PLAIN_RATIONALE),
    "goes on by itself": (PLAIN + "\n\nThe user wrote:\nHi\nSocial traits: High Neuroticism\n##Response: Oh no!",
                          *PLAIN_TRAITS, PLAIN_RESPONSE, None),
    "title before heading": ("Social traits: High Agreeableness\nTask traits: none\n**Final Response**\nHere it comes:\n\n"
                             "##Response:\nDear Sam,\n\nthank you.\n\n---\n##Persona Behavior Rationale: Warm.",
                             ["High Agreeableness"], [], "Dear Sam,\n\nthank you.", "Warm."),
    "the form, then the answer": (persona_cot.PERSONA_COT + "\n" + PLAIN, *PLAIN_TRAITS, PLAIN_RESPONSE, PLAIN_RATIONALE),
    "lines and lists in the response": ("Social traits: High Conscientiousness\nTask traits: none\n##Response:\n"
                                        "1. Plan: list it\n2. Do it\n\n**Task:** done\n"
                                        "##Persona Behavior Rationale: Orderly.",
                                        ["High Conscientiousness"], [],
                                        "1. Plan: list it\n2. Do it\n\n**Task:** done", "Orderly."),
    "thinks first": ("<think>Social traits: Low Agreeableness\n##Response: draft</think>\n" + PLAIN,
                     *PLAIN_TRAITS, PLAIN_RESPONSE, PLAIN_RATIONALE),
    "Windows line ends": ("Social traits: High Openness\r\nTask traits: none\r\n## Response\r\nHello.\r\n"
                          "## Rationale\r\nCurious.",
                          ["High Openness"], [], "Hello.", "Curious."),
}
BAD = {
    "nothing": ("", "no response"),
    "chatter": ("Sure! I'd be happy to help you with that. What would you like to know?", "no response"),
    "repeats itself": ("Step 1: Step 1: Step 1: Step 1:", "no response"),
    "stops before the answer": (PLAIN.partition("##Response")[0], "no response"),
    "empty response": ("Social traits: High Openness\n##Response:\n##Persona Behavior Rationale: ok", "no response"),
    "copies the form": ("Social traits: High Openness\n##Response:...\n##Persona Behavior Rationale:...", "no response"),
    "gives the prompt back": (persona_cot.PERSONA_COT, "no response"),
    "placeholder": ("Social traits: High Openness\n##Response: [Your response here]\n##Rationale: [why]", "no response"),
    "all zeros": ("Social traits: none\nTask traits: none\n##Response: Hello.", "no trait"),
    "only an answer": ("##Response: Paris.\n##Persona Behavior Rationale: It is short.", "no trait"),
    "other words": ("Social traits: Empathetic, patient\nTask traits: Organised\n##Response: Hi.", "no trait"),
    "fills in nothing": ("Social traits: [High/Low] Openness\nTask traits: High/Low Extraversion\n##Response: Hi.",
                         "no trait"),
    "middling": ("Social traits: Openness: Moderate\nTask traits: Extraversion: Medium\n##Response: Hi.", "no trait"),
    "both poles": ("Social traits: High Neuroticism\nTask traits: Low Neuroticism\n##Response: Hi.",
                   "both poles of one trait"),
    "all ten": ("Social traits: " + ", ".join(TRAITS) + "\n##Response: Hi.", "both poles of one trait"),
}


@pytest.mark.parametrize("name", GOOD)
def test_reads_what_models_write(name):
    text, social, task, response, rationale = GOOD[name]
    got = persona_cot.parse_answer(text)
    assert (got["social_traits"], got["task_traits"], got["response"]) == (social, task, response)
    assert rationale is None or got["rationale"] == rationale
    assert {TRAITS[i].title() for i in range(10) if got["p"][i]} == {*social, *task}


@pytest.mark.parametrize("name", BAD)
def test_drops_with_the_reason(name):
    text, reason = BAD[name]
    with pytest.raises(ValueError, match=f"^{reason}"):
        persona_cot.parse_answer(text)


@pytest.mark.parametrize("run", ["*", "#", " ", "-", "_", "1.", "## ", "**1. ", "High ", "\n", "- ", "Step 1: "])
def test_a_model_that_stutters_does_not_hold_us_up(run):
    start = time.process_time()
    with pytest.raises(ValueError):
        persona_cot.parse_answer(run * (3000 // len(run)))
    persona_cot.read_traits("High Openness: High" + run * (3000 // len(run)))
    assert time.process_time() - start < 2


def test_cues_are_read():
    assert persona_cot.parse_answer(PLAIN)["social_cue"] == "The user sounds worried and a little ashamed."
    assert persona_cot.parse_answer(GOOD["step in the heading"][0])["task_cue"] == "A story."


def test_the_prompt_asks_in_the_form_that_is_read():
    assert all(trait.title() in persona_cot.PERSONA_COT for trait in TRAITS)
    assert [f"Step {i}" in persona_cot.PERSONA_COT for i in range(1, 6)] == [True] * 5
    assert persona_cot.PROMPTS["naive_response"].replace("{query}", "Hi {x}") == "Hi {x}"


# ------------------------------------------------------------------------------------------------------------ a server

@pytest.fixture
def server():
    """A chat endpoint. server.reply(query, times it was asked before) -> (status, content or bytes); it logs what it got."""
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body["messages"][0]["content"]
            query = prompt.partition("<<<\n")[2].partition("\n>>>")[0] or prompt
            s.log.append((self.path, self.headers.get("Authorization"), query, body))
            status, content = s.reply(query, [entry[2] for entry in s.log].count(query) - 1)
            finish = "length" if status == "cut" else "stop"
            if isinstance(content, str):
                content = json.dumps({"choices": [{"message": {"content": content}, "finish_reason": finish}]}).encode()
            try:
                self.send_response(200 if status == "cut" else status)
                self.end_headers()
                self.wfile.write(content)
            except BrokenPipeError:                     # the asker gave up
                pass

        def log_message(self, *args):
            pass

    s = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    s.daemon_threads, s.log, s.url = True, [], f"http://127.0.0.1:{s.server_port}"
    s.reply = lambda query, before: (200, PLAIN)
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield s
    s.shutdown()
    s.server_close()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(asking, "PAUSES", [pause / 100 for pause in asking.PAUSES])
    monkeypatch.setattr(asking, "TIMEOUT", 0.3)


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, argv)])
    main()


def generate(monkeypatch, server, tmp_path, *more, n=6):
    (tmp_path / "q.txt").write_text("".join(f"Question {i}?\n" for i in range(n)))
    run(monkeypatch, "generate", "--server", getattr(server, "url", server), "--model", "m", "--queries", tmp_path / "q.txt",
        "--out", tmp_path / "out.jsonl", *more)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_records_have_the_bundled_keys_and_pass_check(server, tmp_path, monkeypatch, capsys):
    server.reply = lambda query, before: (200, PLAIN if "Question" in query and "friend" not in query and
                                          server.log[-1][3]["messages"][0]["content"] != query else f" About {query[-12:]} ")
    generate(monkeypatch, server, tmp_path, "--naive", "--human-like", "--workers", 1)
    records = lines(tmp_path / "out.jsonl")
    assert sorted(r["query"] for r in records) == [f"Question {i}?" for i in range(6)]
    assert set(records[0]) == {"query", "social_cue", "social_traits", "task_cue", "task_traits", "response", "rationale",
                               "naive_response", "human_like_response"}
    assert records[0]["naive_response"] == "About Question 0?"
    run(monkeypatch, "check", tmp_path / "out.jsonl")
    shown = capsys.readouterr().out
    assert "out.jsonl: 6 kept\n" in shown and "6 records" in shown and "low neuroticism" in shown and "100.0%" in shown


def test_server_that_misbehaves_is_asked_again(server, tmp_path, monkeypatch, impatient):
    def reply(query, before):
        if before == 3:
            time.sleep(0.5)                                                             # longer than the asker waits
        return [(429, b"slow down"), (500, b"oops"), (200, b'{"choices": [{"mess'), (200, PLAIN), (200, b"{}"),
                (200, PLAIN)][before]
    server.reply = reply
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    generate(monkeypatch, server, tmp_path, n=3)
    assert len(lines(tmp_path / "out.jsonl")) == 3 and len(server.log) == 18
    assert server.log[0][:2] == ("/v1/chat/completions", "Bearer secret")


def test_url_with_v1_and_without_are_the_same(server):
    for url in (server.url, server.url + "/", server.url + "/v1", server.url + "/v1/", server.url.removeprefix("http://")):
        assert asking.ask(url, "m", "Hi", 9) == PLAIN
    assert {entry[0] for entry in server.log} == {"/v1/chat/completions"}


def test_counts_by_reason(server, tmp_path, monkeypatch, capsys):
    replies = {"Question 0?": ("cut", PLAIN), "Question 1?": (200, "Hello."), "Question 2?": (200, BAD["both poles"][0]),
               "Question 3?": (400, b'{"error": {"message": "This model\'s maximum context length is 2048 tokens"}}')}
    server.reply = lambda query, before: replies.get(query, (200, PLAIN))
    generate(monkeypatch, server, tmp_path)
    shown = capsys.readouterr().out
    for part in ("out.jsonl: 2 kept, ", "1 cut off by the token limit", "1 no response", "1 both poles of one trait",
                 "1 longer than the context"):
        assert part in shown
    assert {r["query"]: r["reason"] for r in lines(tmp_path / "out.jsonl.dropped.jsonl")}["Question 1?"] == "no response"
    asked = len(server.log)
    generate(monkeypatch, server, tmp_path)                                             # all done: nobody is asked again
    assert len(server.log) == asked and "out.jsonl: 2 kept, " in capsys.readouterr().out


def test_server_down_at_the_start(tmp_path):
    done = subprocess.run([*PROGRAM, "generate", "--server", "http://127.0.0.1:9", "--model", "m",
                           "--queries", ROOT / "persona_cot.jsonl", "--out", tmp_path / "out.jsonl"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and list(tmp_path.iterdir()) == []
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "127.0.0.1:9" in done.stderr


def test_model_that_is_not_there(tmp_path):
    done = subprocess.run([*PROGRAM, "show", "Hi", "--model", "nowhere"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: no such folder: nowhere") and done.stderr.count("\n") == 1


def test_server_that_dies_midway(server, tmp_path, monkeypatch, impatient):
    server.reply = lambda query, before: (200, PLAIN) if len(server.log) <= 2 else (503, b"gone")
    with pytest.raises(UserError, match="not all of 6 queries got an answer.*HTTP 503.*repeat the same command"):
        generate(monkeypatch, server, tmp_path, "--workers", 1)
    assert len(lines(tmp_path / "out.jsonl")) == 2
    server.reply = lambda query, before: (200, PLAIN)
    generate(monkeypatch, server, tmp_path)
    assert sorted(r["query"] for r in lines(tmp_path / "out.jsonl")) == [f"Question {i}?" for i in range(6)]


def test_one_query_that_breaks_the_server_does_not_stop_the_rest(server, tmp_path, monkeypatch, impatient):
    server.reply = lambda query, before: (500, b"") if query == "Question 2?" else (200, PLAIN)
    with pytest.raises(UserError, match="not all of 6 queries got an answer.*HTTP 500.*on disk: 5 kept;"):
        generate(monkeypatch, server, tmp_path)
    assert len(lines(tmp_path / "out.jsonl")) == 5


def test_refusal_is_final_and_leaves_nothing(server, tmp_path, monkeypatch):
    server.reply = lambda query, before: (404, b"no model m here")
    with pytest.raises(UserError, match="HTTP 404 no model m here"):
        generate(monkeypatch, server, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["q.txt"]


@pytest.mark.parametrize("more, what", [(["--model", "other"], "'model': 'm'.*'model': 'other'"),
                                        (["--naive"], "'naive_response'"),
                                        (["--max-new-tokens", "9"], "'max_new_tokens': 1024.*'max_new_tokens': 9")])
def test_out_made_with_something_else_is_refused(server, tmp_path, monkeypatch, more, what):
    generate(monkeypatch, server, tmp_path)
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(UserError, match=f"made with .*{what}"):
        generate(monkeypatch, server, tmp_path, *more)
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_queries_may_be_added(server, tmp_path, monkeypatch, capsys):
    generate(monkeypatch, server, tmp_path)
    server.log.clear()
    generate(monkeypatch, server, tmp_path, n=7)
    assert [entry[2] for entry in server.log] == ["Question 6?"]
    assert len(lines(tmp_path / "out.jsonl")) == 7 and "out.jsonl: 7 kept\n" in capsys.readouterr().out


def test_out_of_others_is_left_alone(server, tmp_path, monkeypatch):
    (tmp_path / "out.jsonl").write_text("my notes")
    with pytest.raises(UserError, match="made with another program"):
        generate(monkeypatch, server, tmp_path)
    assert (tmp_path / "out.jsonl").read_text() == "my notes" and server.log == []


# --------------------------------------------------------------------------------------------------------- interruptions

def command(server, tmp_path, out):
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"query": f"Line one\nof {i}?"}) + "\n" for i in range(40)))
    return [*PROGRAM, "generate", "--server", server.url, "--model", "m", "--workers", "2",
            "--queries", str(tmp_path / "q.jsonl"), "--out", str(out)]


def scripted(query, before):
    time.sleep(0.01)
    return 200, "Hello." if query.endswith("7?") else PLAIN.replace("hard", query.split()[-1])


def test_killed_and_started_again_it_ends_as_if_undisturbed(server, tmp_path):
    server.reply = scripted
    subprocess.run(command(server, tmp_path, tmp_path / "whole.jsonl"), cwd=ROOT, check=True, capture_output=True)
    out, dropped = tmp_path / "out.jsonl", tmp_path / "out.jsonl.dropped.jsonl"
    server.log.clear()
    process = subprocess.Popen(command(server, tmp_path, out), cwd=ROOT, stderr=subprocess.DEVNULL)
    while len(lines(dropped)) < 1 or len(lines(out)) < 12:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with open(out, "ab") as file:
        file.write(b'{"query": "Line one\\nof 3')                                        # a line that the kill cut in two
    done = {r["query"] for r in lines(dropped)} | {json.loads(s)["query"] for s in out.read_text().splitlines()[:-1]}
    assert 13 <= len(done) < 40
    server.log.clear()
    subprocess.run(command(server, tmp_path, out), cwd=ROOT, check=True, capture_output=True)
    assert sorted(out.read_text().splitlines()) == sorted((tmp_path / "whole.jsonl").read_text().splitlines())
    assert len(lines(out)) == 36 and len(lines(dropped)) == 4
    asked = {entry[2] for entry in server.log}                              # with what the dead one had under way
    assert len(asked) == 40 - len(done) and not done & asked


def test_full_disk_loses_no_whole_line(server, tmp_path):
    server.reply = scripted
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (2000, 2000))            # the write that passes this fails
    out = tmp_path / "out.jsonl"
    done = subprocess.run(command(server, tmp_path, out), cwd=ROOT, preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 2 and "cannot write" in done.stderr and "repeat the command" in done.stderr
    whole = out.read_text().splitlines()[:-1]                                           # the last is cut in two
    assert 1 <= len(whole) < 36
    subprocess.run(command(server, tmp_path, out), cwd=ROOT, check=True, capture_output=True)
    assert len(lines(out)) == 36 and out.read_text().splitlines()[:len(whole)] == whole


def test_ctrl_c_does_not_wait_for_the_server(server, tmp_path):
    server.reply = lambda query, before: (200, PLAIN) if query.endswith(" 0?") else time.sleep(8) or (200, PLAIN)
    process = subprocess.Popen(command(server, tmp_path, tmp_path / "out.jsonl"), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not lines(tmp_path / "out.jsonl"):
        time.sleep(0.01)
    start = time.time()
    process.send_signal(signal.SIGINT)
    assert "interrupted" in process.communicate()[1] and process.returncode == 2 and time.time() - start < 4
    assert len(lines(tmp_path / "out.jsonl")) == 1


# ------------------------------------------------------------------------------------------------------------------ show

def test_show_by_a_model_itself(tmp_path, monkeypatch, capsys):
    model = make_model(tmp_path / "model", max_position_embeddings=1400)
    run(monkeypatch, "show", "I feel anxious", "--model", model, "--max-new-tokens", 7)
    _, _, answer = capsys.readouterr().out.partition("the answer")
    chat, llama = ChatTokenizer(model), load_llama(model, torch.device("cpu"), torch.float32)
    ids = chat.encode_prompt(persona_cot.PERSONA_COT.replace("{query}", "I feel anxious"))
    for _ in range(7):                                                      # the whole sequence again for every token
        ids.append(llama.logits(llama(torch.tensor([ids])))[0, -1].argmax().item())
    assert f"\n{chat.decode(ids[-7:])}\n" in answer and "reason: no response" in answer


def test_show_tells_what_is_read(tmp_path, monkeypatch, capsys):
    model = make_model(tmp_path / "model", max_position_embeddings=1400)
    monkeypatch.setattr(ChatTokenizer, "decode", lambda self, ids: PLAIN)               # a model that keeps to the form
    run(monkeypatch, "show", "I feel anxious", "--model", model, "--max-new-tokens", 2)
    shown = capsys.readouterr().out
    for part in ("Step 4", "I feel anxious", "social_cue: The user sounds worried", "p: (0, 0, 1, 0, 0, 0, 1, 0, 0, 1)"):
        assert part in shown


# ------------------------------------------------------------------------------------------------------- check, bad input

def test_check_of_the_bundled_set(monkeypatch, capsys):
    run(monkeypatch, "check", ROOT / "persona_cot.jsonl")
    shown = capsys.readouterr().out
    assert "1520 records" in shown and "  high conscientiousness    514  33.8%\n" in shown
    assert "response: 42 to 130 words" in shown


def test_check_refuses_what_training_refuses(tmp_path, monkeypatch):
    good = {"query": "Hi?", "response": "Hello.", "social_traits": ["High Openness"], "task_traits": []}
    for bad, match in ((json.dumps(good | {"task_traits": ["Low Openness"]}), "line 2: both poles"),
                       (json.dumps(good | {"social_traits": ["Kind"]}), "line 2: unknown trait 'Kind'"),
                       ('{oops', "line 2: "),
                       (json.dumps(good | {"response": "So happy \ud83d today"}), "line 2: ")):
        path = tmp_path / "d.jsonl"
        path.write_text(json.dumps(good) + "\n" + bad + "\n")
        for refuse in (load_records, lambda path: run(monkeypatch, "check", path)):
            with pytest.raises(UserError, match=match):
                refuse(path)


def test_check_counts_queries_that_stand_twice(tmp_path, monkeypatch, capsys):
    good = {"query": "Hi?", "response": "Hello.", "social_traits": ["High Openness"], "task_traits": []}
    (tmp_path / "d.jsonl").write_text(2 * (json.dumps(good) + "\n"))
    run(monkeypatch, "check", tmp_path / "d.jsonl")
    assert "2 records with 1 queries" in capsys.readouterr().out


def test_an_answer_with_half_an_emoji_is_dropped(server, tmp_path, monkeypatch):
    reply = {"choices": [{"message": {"content": PLAIN + " \ud83d"}, "finish_reason": "stop"}]}
    half = json.dumps(reply).encode()
    server.reply = lambda query, before: (200, half if query == "Question 1?" else PLAIN)
    generate(monkeypatch, server, tmp_path, n=2)
    kept, dropped = lines(tmp_path / "out.jsonl"), lines(tmp_path / "out.jsonl.dropped.jsonl")
    assert [r["query"] for r in kept] == ["Question 0?"]
    (record,) = dropped
    assert record["query"] == "Question 1?" and "can't encode character" in record["reason"]


def test_a_byte_order_mark_is_no_part_of_a_query(tmp_path):
    (tmp_path / "q.txt").write_text("First?\nSecond?\n", encoding="utf-8-sig")
    assert read_queries(tmp_path / "q.txt") == ["First?", "Second?"]


def test_queries_that_cannot_be_read(server, tmp_path, monkeypatch):
    for name, text, match in (("a.jsonl", '{"query": 3}\n', "line 1"), ("b.jsonl", "What now?\n", "line 1.*\\.txt"),
                              ("c.jsonl", "[3]\n", "line 1"), ("d.jsonl", "3\n", "line 1")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=match):
            run(monkeypatch, "generate", "--server", server.url, "--model", "m", "--queries", tmp_path / name,
                "--out", tmp_path / "out.jsonl")
    with pytest.raises(UserError, match="cannot write .*no/out.jsonl"):
        generate(monkeypatch, server, tmp_path, "--out", tmp_path / "no/out.jsonl")
    with pytest.raises(SystemExit):
        generate(monkeypatch, server, tmp_path, "--workers", 0)


def test_half_an_emoji_is_not_asked_twice(server, tmp_path, monkeypatch):
    (tmp_path / "q.jsonl").write_text('{"query": "So happy \\ud83d today"}\n')
    for _ in range(2):
        run(monkeypatch, "generate", "--server", server.url, "--model", "m", "--queries", tmp_path / "q.jsonl",
            "--out", tmp_path / "out.jsonl")
    assert len(server.log) == 1 and len(lines(tmp_path / "out.jsonl")) == 1
