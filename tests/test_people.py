"""Blind pairs: their files and their page, driven in a browser; the tally, by hand; a judge."""

import http.server
import itertools
import json
import re
import secrets
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.request

import pytest
import torch
from conftest import fails_in_one_line, program

from data import by_hash
from experiments import people
from experiments.answers import write_answers
from experiments.common import run_records
from personafuse import load_run

# what a model may write, and a page must not take for its own
HOSTILE = [
    "</script><script>document.title = 'run'</script>",
    "<img src=x onerror=\"document.title = 'run'\"> <!-- <b>bold</b> &amp; &lt;",
    "two\u2028lines\u2029of one",
    "\"double\" 'single' `back` \\ \\u003c ${1}",
    "SHEET \U0001f642 שלום",
    "   \n",
]


def make_sheet(folder, n=4, answers=None):
    """The files of n pairs -> their name. Without `answers`: "good k" of Alpha, "bad k" of Beta."""
    # a sheet of its own for every test: one browser keeps them all
    queries = [f"query {k} of {folder.name}" for k in range(n)]
    if answers is None:
        answers = [[f"good {k}" for k in range(n)], [f"bad {k}" for k in range(n)]]
    pairs, who_is_a = people.make_pairs(queries, *answers)
    name = folder / "sheet"
    name.with_suffix(".html").write_text(people.render_page("sheet", pairs), encoding="utf-8")
    name.with_suffix(".jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    contestants = [{"run": "Alpha", "route": "learned"}, {"run": "Beta", "route": "learned"}]
    key = {"contestants": contestants, "a": who_is_a}
    name.with_suffix(".key.json").write_text(json.dumps(key))
    return name


def pairs_of(name):
    text = name.with_suffix(".jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def write_ratings(name, rater, wanted):
    """A rater's file: `wanted` holds for each pair "g" for the good answer, "b" for the other, or
    "=". The sides are read off the answers, and not off the key.
    """
    choices = {}
    for letter, pair in zip(wanted, pairs_of(name), strict=True):
        good, bad = ("a", "b") if pair["a"].startswith("good") else ("b", "a")
        choices[pair["id"]] = {"g": good, "b": bad, "=": "tie"}[letter]
    path = name.parent / f"sheet-{rater}.json"
    path.write_text(json.dumps(choices))
    return path


def tally(name, *ratings):
    return program("experiments.people", "tally", name, *ratings)


def row_of(text, rater):
    """The cells of a rater's row: win rate, low, high, and in the row of the mean the same of how
    often two choose the same.
    """
    line, = [line for line in text.splitlines() if line.startswith(rater + " ")]
    return [float(x) for x in line.replace("[", "").replace("]", "").replace(",", "").split()[1:]]


# --------------------------------------------------------------------------------------- the sheet

def test_sides_are_drawn_anew_and_each_comes_first_in_half():
    queries = [str(k) for k in range(20)]
    seen = set()
    for _ in range(5):
        pairs, who_is_a = people.make_pairs(queries, ["first"] * 20, ["second"] * 20)
        assert [pair["query"] for pair in pairs] == queries
        assert sorted(who_is_a.values()) == [0] * 10 + [1] * 10
        for pair in pairs:
            writers = ["first", "second"]
            assert pair["a"] == writers[who_is_a[pair["id"]]]
            assert {pair["a"], pair["b"]} == set(writers)
        seen.add(tuple(who_is_a.values()))
    assert len(seen) > 1


def test_the_page_holds_what_a_rater_may_see_and_nothing_else(monkeypatch):
    """Who is who could only show in the page if changing places behind the sides changed it."""
    # the ids are drawn; here they are counted
    ids = itertools.cycle("xy")
    monkeypatch.setattr(secrets, "token_hex", lambda _: next(ids))
    pairs, who_is_a = people.make_pairs(["q", "r"], ["1", "2"], ["3", "4"])
    for pair in pairs:
        assert pair.keys() == {"id", "query", "a", "b"}
    while True:
        # drawn until each side has the other's answer
        others, who = people.make_pairs(["q", "r"], ["3", "4"], ["1", "2"])
        if list(who.values()) == [1 - side for side in who_is_a.values()]:
            break
    assert others == pairs
    assert people.render_page("sheet", pairs) == people.render_page("sheet", others)


SHEET = ["--n", 5, "--max-new-tokens", 12, "--temperature", 0.5, "--seed", 3]


def test_a_run_against_its_opposite_poles(run, tmp_path):
    name = tmp_path / "opposite"
    result = program("experiments.people", "sheet", name, "--run", run, "--route", "opposite",
                     *SHEET)
    assert result.returncode == 0, result.stderr
    pairs = pairs_of(name)
    key = json.loads(name.with_suffix(".key.json").read_text())

    # the first five held-out queries, in the order that --limit takes
    model, settings = load_run(run, torch.device("cpu"), torch.float32)
    _, held = run_records(settings)
    queries = [record["query"] for record in sorted(held, key=by_hash)[:5]]
    assert [pair["query"] for pair in pairs] == queries
    # the poles of a trait stand side by side: high, low, high, low, ...
    w = model.mixing_weights(queries)
    opposite = w.reshape(5, 5, 2).flip(2).reshape(5, 10)
    drawn = {"temperature": 0.5, "top_p": settings["top_p"], "seed": 3,
             "repetition_penalty": settings["repetition_penalty"]}
    wanted = [write_answers(model, queries, mix, 12, **drawn) for mix in (w, opposite)]
    assert wanted[0] != wanted[1]
    for k, pair in enumerate(pairs):
        side = key["a"][pair["id"]]
        assert pair["a"] == wanted[side][k]
        assert pair["b"] == wanted[1 - side][k]

    learned, swapped = key["contestants"]
    assert (learned["route"], swapped["route"]) == ("learned", "opposite")
    assert learned["run"] == swapped["run"] == str(run)
    for option in map(str, SHEET):
        assert option in key["arguments"]
    for secret in ("learned", run.name):
        assert secret not in name.with_suffix(".html").read_text()
        assert secret not in name.with_suffix(".jsonl").read_text()


def test_the_bare_base_against_a_run(run, tmp_path):
    name = tmp_path / "bare"
    arguments = ["experiments.people", "sheet", name, "--run", run, "--route", "none", *SHEET]
    result = program(*arguments)
    assert result.returncode == 0, result.stderr
    key = json.loads(name.with_suffix(".key.json").read_text())
    assert [one["route"] for one in key["contestants"]] == ["learned", "none"]
    page = name.with_suffix(".html").read_text()
    # a key is never lost, and with it what the ratings of its pairs say
    assert fails_in_one_line(program(*arguments), "bare.key.json is there already")
    assert name.with_suffix(".html").read_text() == page
    # nor is a file of somebody's own
    arguments[2] = tmp_path / "mine"
    (tmp_path / "mine.jsonl").write_text("mine")
    assert fails_in_one_line(program(*arguments), "mine.jsonl is there already")
    assert (tmp_path / "mine.jsonl").read_text() == "mine"
    arguments[2] = tmp_path / "gone" / "bare"
    assert fails_in_one_line(program(*arguments), "there is no such folder", "gone")


def test_two_are_compared(run, tmp_path):
    sheet = ["experiments.people", "sheet", tmp_path / "new", "--run", run]
    assert fails_in_one_line(program(*sheet), "--run twice")
    three = program(*sheet, "--run", run, "--route", "none")
    assert fails_in_one_line(three, "--run twice")
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------- the tally

def test_tally_by_hand(tmp_path):
    name = make_sheet(tmp_path, n=8)
    ratings = [write_ratings(name, "Ada", "gggggg=b"), write_ratings(name, "Bo", "ggggbb=="),
               write_ratings(name, "Cy", "ggbbbb==")]
    result = tally(name, *ratings)
    assert result.returncode == 0, result.stderr
    assert "Alpha, learned against Beta, learned, 8 pairs" in result.stdout
    # six won and half of one tie of eight: 0.8125; four and half of two: 0.625; two and one: 0.375
    for rater, rate in [("Ada", 0.8125), ("Bo", 0.625), ("Cy", 0.375)]:
        found, low, high = row_of(result.stdout, f"sheet-{rater}")
        assert found == pytest.approx(rate, abs=0.001)
        assert low < rate < high
    mean, _, _, same, low, high = row_of(result.stdout, "mean")
    assert mean == pytest.approx((0.8125 + 0.625 + 0.375) / 3, abs=1e-3)
    # of the pairs of raters 3, 3, 1, 1, 1, 1, 3 and 1 of 3 agree: 14 of 24
    assert same == pytest.approx(14 / 24, abs=0.001) and low < same < high


def test_one_rater_has_neither_mean_nor_agreement(tmp_path):
    name = make_sheet(tmp_path)
    result = tally(name, write_ratings(name, "Ada", "gggg"))
    assert row_of(result.stdout, "sheet-Ada") == [1, 1, 1]
    assert "mean" not in result.stdout and "two choose" not in result.stdout


def test_the_key_stays_shut_until_all_pairs_are_rated(tmp_path):
    name = make_sheet(tmp_path)
    path = write_ratings(name, "Ada", "gggg")
    whole = json.loads(path.read_text())
    part = dict(list(whole.items())[:3])
    for choices in (part, whole | {"another": "a"}, whole | dict.fromkeys(part, "c"),
                    whole | dict.fromkeys(part, ["a"]), {}):
        path.write_text(json.dumps(choices))
        result = tally(name, path)
        assert fails_in_one_line(result, "sheet-Ada.json does not rate the pairs of this sheet")
        assert result.stdout == "" and "Alpha" not in result.stderr


def test_ratings_never_meet_another_sheet(tmp_path):
    name = make_sheet(tmp_path)
    # of the same queries and answers, the sides drawn again
    path = write_ratings(name, "Ada", "gggg")
    sides = json.loads(name.with_suffix(".key.json").read_text())["a"]
    while json.loads(make_sheet(tmp_path).with_suffix(".key.json").read_text())["a"] == sides:
        pass
    assert fails_in_one_line(tally(name, path), "does not rate the pairs")
    assert fails_in_one_line(tally(name, tmp_path / "none.json"), "there is no", "none.json")
    assert fails_in_one_line(tally(tmp_path / "gone", path), "there is no", "gone.key.json")


# --------------------------------------------------------------------------------------- the judge

@pytest.fixture
def judge():
    """A server that answers as an OpenAI-compatible one; server.verdict(prompt) says what."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = server.verdict(body["messages"][0]["content"])
            choice = {"message": {"content": text}, "finish_reason": "stop"}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [choice]}).encode())

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def judged(name, url):
    return program("experiments.people", "judge", name, "--server", url, "--model", "m")


def test_a_judge_is_one_more_rater(tmp_path, judge):
    name = make_sheet(tmp_path, n=8)

    def verdict(prompt):
        if "query 0" in prompt:
            return "both [[a]] and [[b]]"
        if "query 1" in prompt:
            return "I cannot say"
        # what the answers say, and not where they stand
        return "Good. [[a]]" if prompt.index("good") < prompt.index("bad") else "Better. [[b]]"

    judge.verdict = verdict
    result = judged(name, judge.url)
    assert result.returncode == 0, result.stderr
    table = tally(name, tmp_path / "sheet-judge.json").stdout
    # two ties, the rest won
    assert row_of(table, "sheet-judge")[0] == pytest.approx(7 / 8)

    # whoever always takes the first prefers nobody
    judge.verdict = lambda prompt: "[[a]]"
    judged(name, judge.url)
    assert row_of(tally(name, tmp_path / "sheet-judge.json").stdout, "sheet-judge")[0] == 0.5


def test_a_judge_who_is_not_there_is_said(tmp_path):
    name = make_sheet(tmp_path)
    assert fails_in_one_line(judged(name, "127.0.0.1:9"), "the judge gives no answer")


# ----------------------------------------------------------------------------------------- the page

class Browser:
    """Headless Chromium, told what to do over the WebDriver protocol: real keys, a real page."""

    KEYS = {"Right": "\ue014", "Tab": "\ue004"}

    def __init__(self, chromium, driver, downloads):
        self.downloads = downloads
        self.process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True)
        # it takes a free port, and says which
        port = None
        while port is None:
            line = self.process.stdout.readline()
            assert line, "chromedriver did not start"
            port = re.search(r"successfully on port (\d+)", line)
        self.url = f"http://127.0.0.1:{port[1]}/session"
        options = {
            "binary": chromium,
            "args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                     f"--user-data-dir={downloads / 'profile'}"],
            "prefs": {"download.default_directory": str(downloads)},
        }
        wanted = {"browserName": "chrome", "goog:chromeOptions": options}
        session = self.post("", capabilities={"alwaysMatch": wanted})
        self.url += "/" + session["sessionId"]

    def post(self, command, **body):
        request = urllib.request.Request(self.url + command, json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode())

    def open(self, path):
        self.post("/url", url=path.as_uri())

    def run(self, script):
        return self.post("/execute/sync", script=script, args=[])

    def text(self, selector):
        return self.run(f"return document.querySelector('{selector}').textContent")

    def press(self, *keys):
        """Keys by name, anything else letter by letter."""
        actions = []
        for key in keys:
            for letter in [self.KEYS[key]] if key in self.KEYS else key:
                actions.append({"type": "keyDown", "value": letter})
                actions.append({"type": "keyUp", "value": letter})
        self.post("/actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def find(self, selector):
        return self.post("/element", using="css selector", value=selector)

    def click(self, selector):
        identifier, = self.find(selector).values()
        self.post(f"/element/{identifier}/click")

    def close(self):
        end = urllib.request.Request(self.url, method="DELETE")
        urllib.request.urlopen(end, timeout=60).close()
        self.process.terminate()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver (apt-get install chromium chromium-driver)")
    browser = Browser(chromium, driver, tmp_path_factory.mktemp("downloads"))
    yield browser
    browser.close()


@pytest.fixture
def sheet(browser, tmp_path):
    """A sheet of four pairs, open in the browser for the first time -> its name."""
    name = make_sheet(tmp_path)
    browser.open(name.with_suffix(".html"))
    return name


def choose(browser, pair, choice):
    selector = f"input[name='{pair['id']}'][value='{choice}']"

    def click():
        browser.click(selector)
        return browser.run(f"return [...document.querySelectorAll(\"{selector}:checked\")]")

    # a browser that is busy may miss a click on a page that it has not painted yet
    assert wait_for(browser, click, 1)


def wait_for(browser, look, count):
    """What `look` finds, once it finds `count` things; after ten seconds whatever is there."""
    deadline = time.monotonic() + 10
    found = look()
    while len(found) < count and time.monotonic() < deadline:
        # a round trip to the browser, which so gets on with it
        browser.run("return 0")
        found = look()
    return found


def test_a_sheet_is_rated_and_tallied(browser, sheet):
    """Who takes "good" wherever it stands has chosen Alpha in each pair."""
    disabled = "return document.getElementById('download').disabled"
    for pair in pairs_of(sheet):
        assert browser.run(disabled)
        choose(browser, pair, "a" if pair["a"].startswith("good") else "b")
    assert not browser.run(disabled)
    browser.click("#rater")
    browser.press("Ada B.")
    browser.click("#download")
    # the browser gives a download its name when it is whole
    path, = wait_for(browser, lambda: list(browser.downloads.glob("sheet-Ada*.json")), 1)
    assert path.name == "sheet-Ada-B-.json"
    result = tally(sheet, path)
    assert result.returncode == 0, result.stderr
    assert row_of(result.stdout, "sheet-Ada-B-") == [1, 1, 1]


def test_keys_choose_as_in_any_form(browser, sheet):
    first, second, *_ = pairs_of(sheet)
    # Tab goes from pair to pair, arrows go through the three choices
    browser.press("Tab", " ", "Right", "Tab", " ", "Right", "Right")
    assert json.loads(browser.run("return localStorage.getItem(storageKey)")) == {
        first["id"]: "b", second["id"]: "tie"}


def test_whoever_comes_back_goes_on_where_they_were(browser, sheet, tmp_path):
    first, *_, last = pairs_of(sheet)
    choose(browser, first, "b")
    choose(browser, last, "tie")

    def come_back():
        browser.open(sheet.with_suffix(".html"))
        return browser.run("return [...document.querySelectorAll(':checked')]"
                           ".map((button) => button.name + button.value)")

    # a browser that is busy has not stored it at once
    assert wait_for(browser, come_back, 2) == [first["id"] + "b", last["id"] + "tie"]
    assert browser.text("#left") == "2 pairs are left to rate."
    # another sheet of the same name knows nothing of it
    (tmp_path / "other").mkdir()
    browser.open(make_sheet(tmp_path / "other", n=3).with_suffix(".html"))
    assert browser.text("#left") == "3 pairs are left to rate."


def test_answers_are_text_whatever_they_hold(browser, tmp_path):
    n = len(HOSTILE)
    name = make_sheet(tmp_path, answers=[HOSTILE, HOSTILE[1:] + ["plain"]], n=n)
    browser.open(name.with_suffix(".html"))
    for k, pair in enumerate(pairs_of(name)):
        for side in "ab":
            place = f"document.querySelectorAll('span.{side}')[{k}]"
            assert browser.run(f"return {place}.textContent") == (pair[side].strip() or "(no words)")
            assert browser.run(f"return {place}.children.length") == 0
    assert browser.run("return document.title") == "Which answer is better?"


def test_without_storage_the_page_works_and_says_so(browser, tmp_path):
    pair, *_ = pairs_of(make_sheet(tmp_path))
    # a page in a sandboxed frame has no storage
    frame = tmp_path / "frame.html"
    frame.write_text("<iframe sandbox='allow-scripts' src='sheet.html' height=600></iframe>")
    browser.open(frame)
    browser.post("/frame", id=browser.find("iframe"))
    assert browser.run("return document.getElementById('unsaved').hidden") is False
    choose(browser, pair, "a")
    assert browser.text("#left") == "3 pairs are left to rate."
    browser.post("/frame", id=None)


WAYS_OUT = {"image", "script", "frame", "form", "beacon", "fetch", "socket"}
TRY_THEM_ALL = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => {
  // of a frame only the server is told
  const isFrame = event.effectiveDirective === "frame-src";
  const way = isFrame ? "frame" : event.blockedURI.split("/").pop();
  // some are reported twice
  if (!violations.includes(way)) {
    violations.push(way);
  }
});
const url = "http://127.0.0.1:PORT/";
function add(tag, properties) {
  const element = Object.assign(document.createElement(tag), properties);
  document.body.append(element);
  return element;
}
add("img", { src: url + "image" });
add("script", { src: url + "script" });
add("iframe", { src: url + "frame" });
add("iframe", { name: "target" });
add("form", { action: url + "form", method: "post", target: "target" }).submit();
navigator.sendBeacon(url + "beacon");
fetch(url + "fetch").catch(() => null);
try { new WebSocket(url.replace("http", "ws") + "socket"); } catch (error) { }
"""


@pytest.fixture
def listener():
    """A web server on this machine -> (its port, the paths that were asked for)."""
    asked = set()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.add(self.path.strip("/"))
            self.send_response(200)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1], asked
    server.shutdown()
    server.server_close()


def test_nothing_can_be_sent(browser, sheet, listener):
    """Each way out is closed by the page's policy, and open in the same page without it."""
    port, asked = listener
    script = TRY_THEM_ALL.replace("PORT", str(port))
    browser.run(script)
    blocked = wait_for(browser, lambda: browser.run("return violations"), len(WAYS_OUT))
    assert set(blocked) == WAYS_OUT
    assert asked == set()

    html = sheet.with_suffix(".html").read_text()
    start = html.index("<meta http-equiv")
    bare = sheet.with_name("bare.html")
    bare.write_text(html[:start] + html[html.index(">", start) + 1:])
    browser.open(bare)
    browser.run(script)
    assert wait_for(browser, lambda: asked, len(WAYS_OUT)) == WAYS_OUT
