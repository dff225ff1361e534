"""The page for raters, driven in a browser, and the tally of what they said, by hand."""

import argparse
import http.server
import json
import random
import re
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from conftest import fails_in_one_line, program

from experiments import people

# what a model may write, and a page must not take for its own
HOSTILE = [
    "</script><script>document.title = 'run'</script>",
    "<img src=x onerror=\"document.title = 'run'\"> <!-- <b>bold</b> &amp; &lt;",
    "two\u2028lines\u2029of one",
    "\"double\" 'single' `back` \\ \\u003c ${1}",
    "SHEET_DATA CONTENT_POLICY \U0001f642 שלום",
    "   \n",
]


def make_sheet(folder, n=4, seed=0, answers=None):
    """A sheet of n pairs -> (page, key file). Without `answers`: "good k" against "bad k"."""
    # a sheet of its own for every test: one browser keeps them all
    queries = [f"query {k} of {folder.name}" for k in range(n)]
    if answers is None:
        answers = [[f"good {k}" for k in range(n)], [f"bad {k}" for k in range(n)]]
    pairs = people.make_pairs(queries, answers, random.Random(seed))
    visible = people.blind(pairs)
    page = folder / "sheet.html"
    page.write_text(people.render_page("sheet", visible), encoding="utf-8")
    key = {"sheet": people.sheet_id(visible), "contestants": ["Alpha", "Beta"], "pairs": pairs}
    key_file = folder / "sheet.key.json"
    key_file.write_text(json.dumps(key))
    return page, key_file


def write_ratings(key_file, rater, wanted, why=""):
    """A rater's file, as the page would write it: `wanted` holds "a", "b" or "=" for each pair."""
    key = json.loads(key_file.read_text())
    ratings = []
    for letter, pair in zip(wanted, key["pairs"]):
        choice = 0
        if letter != "=":
            shown_second = (letter == "b") != pair["swapped"]
            choice = 2 if shown_second else 1
        ratings.append({"choice": choice, "why": why})
    path = key_file.parent / f"sheet-{rater}.json"
    content = {"sheet": key["sheet"], "name": "sheet", "rater": rater, "ratings": ratings}
    path.write_text(json.dumps(content))
    return path


def tally(*arguments):
    return program("experiments.people", "tally", *arguments)


def row_of(text, rater):
    """The cells of a rater's row: win rate, low, high, won, tied, lost and the rest."""
    line, = [line for line in text.splitlines() if line.startswith(rater + " ")]
    return line.replace("[", "").replace("]", "").replace(",", "").split()[1:]


# --------------------------------------------------------------------------------------- the sheet

def test_pairs_are_shuffled_by_seed_and_each_side_comes_first_in_half():
    queries = [str(k) for k in range(20)]
    answers = [["a"] * 20, ["b"] * 20]
    sides = {}
    for seed in (0, 0, 1):
        pairs = people.make_pairs(queries, answers, random.Random(seed))
        swapped = [pair["swapped"] for pair in pairs]
        assert sum(swapped) == 10
        assert sides.setdefault(seed, swapped) == swapped
        for pair, shown in zip(pairs, people.blind(pairs)):
            assert shown["answers"] == (["b", "a"] if pair["swapped"] else ["a", "b"])
    assert sides[0] != sides[1]


def test_equal_answers_are_not_asked_about():
    pairs = people.make_pairs(["q", "r"], [["same", "one"], ["same", "other"]], random.Random(0))
    assert [pair["query"] for pair in pairs] == ["r"]


def test_the_page_depends_on_what_a_rater_sees_and_on_nothing_else():
    """Who is who could only show in the page if changing places behind the sides changed it."""
    queries = ["q", "r"]
    pairs = people.make_pairs(queries, [["1", "2"], ["3", "4"]], random.Random(0))
    other = []
    for pair in pairs:
        other.append({**pair, "answers": pair["answers"][::-1], "swapped": not pair["swapped"]})
    page = people.render_page("sheet", people.blind(pairs))
    assert page == people.render_page("sheet", people.blind(other))


def test_a_sheet_from_a_run(run, tmp_path):
    queries = tmp_path / "queries.txt"
    days = [f"What about the {k}th day?\n\n" for k in range(9)]
    queries.write_text("".join(days) + "again\nagain\n")
    out = tmp_path / "page.html"
    arguments = ["experiments.people", "sheet", "--run", run, "--queries", queries, "--n", 5,
                 "--seed", 3, "--max-new-tokens", 40]
    result = program(*arguments, "--route", "none", "--out", out)
    assert result.returncode == 0, result.stderr
    key = json.loads((tmp_path / "page.key.json").read_text())
    assert key["contestants"] == [str(run), f"{run} --route none"]
    assert len(key["pairs"]) + key["equal"] == 5
    asked = [pair["query"] for pair in key["pairs"]]
    assert len(set(asked)) == len(asked)
    assert set(asked) <= {line.strip() for line in queries.read_text().splitlines()}
    page = out.read_text()
    for secret in (str(run), run.name, "swapped", "learned", "contestants"):
        assert secret not in page

    # the same seed draws the same again, and an earlier key is never lost
    again = tmp_path / "again.html"
    assert program(*arguments, "--route", "none", "--out", again).returncode == 0
    assert json.loads((tmp_path / "again.key.json").read_text()) == key
    assert fails_in_one_line(program(*arguments, "--route", "none", "--out", out), "page.key.json")
    assert out.read_text() == page

    new = ["--out", tmp_path / "new.html"]
    assert fails_in_one_line(program(*arguments, *new), "--run twice")
    assert fails_in_one_line(program(*arguments, *new, "--run", run), "the same answer")
    too_many = program(*arguments, *new, "--route", "none", "--n", 11)
    assert fails_in_one_line(too_many, "--n 11", "10 different queries")
    nowhere = ["--route", "none", "--out", tmp_path / "nowhere" / "new.html"]
    assert fails_in_one_line(program(*arguments, *nowhere), "there is no folder")
    assert not (tmp_path / "new.html").exists()


def test_without_a_file_the_queries_are_held_out(run):
    from data import held_out
    args = argparse.Namespace(queries=None, run=[run], n=3)
    queries = people.draw_queries(args, random.Random(0))
    assert len(queries) == 3
    assert all(held_out(query) for query in queries)


# --------------------------------------------------------------------------------------- the tally

def test_fleiss_kappa_of_the_textbook_example():
    """Ten subjects, fourteen raters, five classes: the example of the statistics textbooks.

    By hand: the squares of the first row add up to 14² = 196, (196 - 14) / (14 · 13) = 1; of the
    second to 4 + 36 + 16 + 4 = 60, (60 - 14) / 182 = 0.253, ...; their mean is 0.378. The classes
    hold 20, 28, 39, 21 and 32 of 140, whose squared shares add up to 0.213.
    (0.378 - 0.213) / (1 - 0.213) = 0.210.
    """
    votes = np.array([[0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0],
                      [2, 2, 8, 1, 1], [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2],
                      [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]])
    assert votes.sum(axis=0).tolist() == [20, 28, 39, 21, 32]
    assert people.fleiss_kappa(votes) == pytest.approx(0.210, abs=5e-4)


def test_fleiss_kappa_at_its_ends():
    # full agreement, and two raters who always differ: P = 0, chance 1/2, so -1
    assert people.fleiss_kappa(np.array([[3, 0, 0], [0, 3, 0]])) == 1
    assert people.fleiss_kappa(np.array([[1, 1, 0], [1, 1, 0]])) == -1
    assert np.isnan(people.fleiss_kappa(np.array([[3, 0, 0], [3, 0, 0]])))


def test_majority_by_hand():
    votes = np.array([[2, 1, 0], [1, 2, 0], [1, 0, 2], [1, 1, 1], [2, 2, 1], [0, 0, 3]])
    first, second, tie = people.FIRST, people.SECOND, people.TIE
    assert people.majority(votes).tolist() == [first, second, tie, tie, tie, tie]


def test_tally_by_hand(tmp_path):
    _, key_file = make_sheet(tmp_path, n=8)
    files = [write_ratings(key_file, "Ada", "aaaaaa=b", why="warmer,\nand shorter"),
             write_ratings(key_file, "Bo", "aaaabb=="),
             write_ratings(key_file, "Cy", "aabbbb==")]
    result = tally(*files)
    assert result.returncode == 0, result.stderr
    assert "Alpha against Beta: 8 pairs" in result.stdout
    # six won and half of one tie of eight: 0.8125; four and half of two: 0.625; two and one: 0.375
    for rater, rate, counts in [("Ada", 0.8125, "6 1 1"), ("Bo", 0.625, "4 2 2"),
                                ("Cy", 0.375, "2 2 4"), ("majority", 0.625, "4 2 2")]:
        cells = row_of(result.stdout, rater)
        assert float(cells[0]) == pytest.approx(rate, abs=0.006)
        assert " ".join(cells[3:6]) == counts
        assert float(cells[1]) < rate < float(cells[2])
    # agreement of pairs of raters: 1, 1, 1/3, 1/3, 1/3, 1/3, 1, 1/3 -> 14/24; the votes are 12, 7
    # and 5 of 24, chance 218/576; (0.5833 - 0.3785) / 0.6215 = 0.33
    assert "Fleiss' kappa of 3 raters: 0.33 [" in result.stdout
    assert result.stdout.count("Ada, for Alpha: warmer, and shorter ('query") == 6
    assert result.stdout.count("Ada, for neither: warmer") == 1
    assert result.stdout.count("Ada, for Beta: warmer") == 1
    assert "Bo, for" not in result.stdout


def test_tally_says_how_often_the_first_answer_was_chosen(tmp_path):
    _, key_file = make_sheet(tmp_path, n=8)
    path = write_ratings(key_file, "Ada", "=" * 8)
    content = json.loads(path.read_text())
    for rating in content["ratings"][:5]:
        rating["choice"] = 1
    content["ratings"][5]["choice"] = 2
    path.write_text(json.dumps(content))
    assert row_of(tally(path).stdout, "Ada")[6:] == ["5", "of", "6"]


def test_one_rater_has_neither_majority_nor_agreement(tmp_path):
    _, key_file = make_sheet(tmp_path)
    result = tally(write_ratings(key_file, "Ada", "aab="))
    assert result.returncode == 0
    assert "majority" not in result.stdout
    assert "kappa" not in result.stdout


def test_raters_who_all_say_the_same(tmp_path):
    _, key_file = make_sheet(tmp_path)
    result = tally(*[write_ratings(key_file, rater, "aaaa") for rater in ("Ada", "Bo")])
    assert result.returncode == 0, result.stderr
    assert row_of(result.stdout, "majority")[:6] == ["1.00", "1.00", "1.00", "4", "0", "0"]
    assert "kappa of 2 raters: undefined" in result.stdout


def test_the_key_stays_shut_until_all_pairs_are_rated(tmp_path):
    _, key_file = make_sheet(tmp_path)
    whole = write_ratings(key_file, "Ada", "aaaa")
    part = write_ratings(key_file, "Bo", "aaaa")
    content = json.loads(part.read_text())
    for ratings in (content["ratings"][:3], content["ratings"][:3] + [{"choice": None, "why": ""}],
                    content["ratings"][:3] + [{"choice": 3, "why": ""}]):
        part.write_text(json.dumps({**content, "ratings": ratings}))
        result = tally(whole, part)
        assert fails_in_one_line(result, "sheet-Bo.json rates 3 of 4")
        assert result.stdout == ""
        assert "Alpha" not in result.stderr and "Beta" not in result.stderr


def test_tally_names_what_is_wrong(tmp_path):
    _, key_file = make_sheet(tmp_path)
    ada = write_ratings(key_file, "Ada", "aaaa")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    _, other_key = make_sheet(elsewhere, n=3)
    assert fails_in_one_line(tally(ada, "--key", other_key), "sheet-Ada.json", "another sheet")
    assert fails_in_one_line(tally(ada, "--key", ada), "not the key")
    assert fails_in_one_line(tally(ada, key_file), "sheet.key.json holds no ratings")
    assert fails_in_one_line(tally(tmp_path / "none.json"), "there is no file", "none.json")
    twin = ada.with_name("twin.json")
    twin.write_text(ada.read_text())
    assert fails_in_one_line(tally(ada, twin), "sheet-Ada.json", "twin.json", "both by Ada")
    content = json.loads(ada.read_text())
    for broken in ({**content, "ratings": []}, {**content, "ratings": 3}, {"rater": "Ada"}):
        twin.write_text(json.dumps(broken))
        assert fails_in_one_line(tally(twin), "twin.json holds no ratings")
    twin.write_text("[1]")
    assert fails_in_one_line(tally(twin), "twin.json", "no JSON object")
    key_file.unlink()
    assert fails_in_one_line(tally(ada), "there is no key", "sheet.key.json", "--key")


# ----------------------------------------------------------------------------------------- the page

class Browser:
    """Headless Chromium, told what to do over the WebDriver protocol: real keys, a real page."""

    KEYS = {"Enter": "\ue007", "Left": "\ue012", "Right": "\ue014", "Backspace": "\ue003",
            "Escape": "\ue00c", "Tab": "\ue004"}

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

    def answer_dialog(self):
        self.post("/alert/accept")

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
def page(browser, tmp_path):
    """A sheet of four pairs, open in the browser for the first time."""
    path, _ = make_sheet(tmp_path)
    browser.open(path)
    return path


def begin(browser, name="Ada"):
    browser.click("#rater")
    browser.press(name, "Enter")


def stored(browser):
    """What the browser keeps for the page that is open."""
    return json.loads(browser.run("return localStorage.getItem(storageKey)"))


def wait_for(browser, look, count):
    """What `look` finds, once it finds `count` things; after ten seconds whatever is there."""
    deadline = time.monotonic() + 10
    found = look()
    while len(found) < count and time.monotonic() < deadline:
        # a round trip to the browser, which so gets on with it
        browser.run("return 0")
        found = look()
    return found


def test_a_sheet_by_keys_alone(browser, page):
    assert browser.run("return document.activeElement.id") == "rater"
    browser.press("Ada B.", "Enter")
    assert browser.text("#count") == "Pair 1 of 4"
    # without a choice there is no next pair
    browser.press("Enter")
    assert browser.text("#count") == "Pair 1 of 4"
    browser.press("2", "1", "Enter", "Right", "Enter")
    assert browser.text("#count") == "Pair 3 of 4"
    # back, and another choice; keys in the field are text
    browser.press("Backspace", "Left", "Enter", "0")
    browser.press("w", "both 1 and 2", "Enter", "Right", "w", "kind", "Escape", "Left")
    # Tab begins at the top of each pair, and a button reached by it is pressed by Enter
    browser.press("Tab", "Tab", "Enter")
    assert browser.run("return document.activeElement.dataset.choice") == "0"
    assert stored(browser)["ratings"][3]["choice"] == 0
    browser.press("1", "Enter")
    assert browser.run("return document.getElementById('done').hidden") is False

    browser.click("#download")
    # the browser gives a download its name when it is whole
    path, = wait_for(browser, lambda: list(browser.downloads.glob("sheet-*.json")), 1)
    assert path.name == "sheet-Ada-B-.json"
    content = json.loads(path.read_text())
    assert content["rater"] == "Ada B."
    assert content["ratings"] == [
        {"choice": 1, "why": ""},
        {"choice": 1, "why": ""},
        {"choice": 0, "why": "both 1 and 2"},
        {"choice": 1, "why": "kind"},
    ]
    # what the page wrote is what the tally reads: in every pair but one, the first answer
    result = tally(path, "--key", page.with_name("sheet.key.json"))
    assert result.returncode == 0, result.stderr
    assert row_of(result.stdout, "Ada B.")[-3:] == ["3", "of", "3"]


def test_a_sheet_by_clicks_alone(browser, page):
    assert browser.run("return document.getElementById('start').disabled")
    browser.click("#rater")
    browser.press("Bo")
    browser.click("#start")
    assert browser.run("return document.getElementById('next').disabled")
    for choice in (2, 0, 1, 2):
        browser.click(f"[data-choice='{choice}']")
        pressed = browser.run("return [...document.querySelectorAll('[aria-pressed=true]')]"
                              ".map((button) => button.dataset.choice)")
        assert pressed == [str(choice)]
        browser.click("#next")
    browser.click("#review")
    assert browser.text("#count") == "Pair 1 of 4"
    state = stored(browser)
    assert [rating["choice"] for rating in state["ratings"]] == [2, 0, 1, 2]


def test_the_choice_on_the_page_is_the_answer_in_the_key(browser, page):
    """Who takes "good" wherever it stands has chosen Alpha in each pair."""
    begin(browser)
    for _ in range(4):
        first = browser.text("#answer1").startswith("good")
        browser.press("1" if first else "2", "Enter")
    state = stored(browser)
    key = json.loads(page.with_name("sheet.key.json").read_text())
    ratings = [(rating["choice"], rating["why"]) for rating in state["ratings"]]
    assert people.outcomes(ratings, key["pairs"]).tolist() == [people.FIRST] * 4


def test_whoever_comes_back_goes_on_where_they_were(browser, page, tmp_path):
    begin(browser)
    browser.press("1", "Enter", "2", "w", "half a thou")
    browser.open(page)
    assert browser.text("#count") == "Pair 3 of 4"
    browser.press("Backspace")
    assert browser.run("return document.getElementById('why').value") == "half a thou"
    assert browser.run("return document.querySelector('[aria-pressed=true]').dataset.choice") == "2"
    # another sheet of the same name knows nothing of it
    folder = tmp_path / "other"
    folder.mkdir()
    other, _ = make_sheet(folder, n=3)
    browser.open(other)
    assert browser.run("return document.getElementById('welcome').hidden") is False


def test_another_person_starts_afresh(browser, page):
    begin(browser)
    browser.press(*["1", "Enter"] * 4)
    browser.click("#again")
    browser.answer_dialog()
    assert browser.run("return document.getElementById('rater').value") == ""
    begin(browser, "Bo")
    assert browser.text("#count") == "Pair 1 of 4"
    state = stored(browser)
    assert state["rater"] == "Bo"
    assert {rating["choice"] for rating in state["ratings"]} == {None}


def test_answers_are_text_whatever_they_hold(browser, tmp_path):
    n = len(HOSTILE)
    path, key_file = make_sheet(tmp_path, answers=[HOSTILE, HOSTILE[1:] + ["plain"]], n=n)
    browser.open(path)
    begin(browser)
    for pair in people.blind(json.loads(key_file.read_text())["pairs"]):
        for i, answer in enumerate(pair["answers"], 1):
            wanted = answer if answer.strip() else "(no words)"
            assert browser.text(f"#answer{i}") == wanted
            assert browser.run(f"return document.getElementById('answer{i}').children.length") == 0
        browser.press("1", "Enter")
    assert browser.run("return document.title") == "Which answer is better?"
    assert browser.run("return document.getElementById('done').hidden") is False


def test_without_storage_the_page_works_and_says_so(browser, tmp_path):
    make_sheet(tmp_path)
    # a page in a sandboxed frame has no storage
    frame = tmp_path / "frame.html"
    frame.write_text("<iframe sandbox='allow-scripts' src='sheet.html' height=600></iframe>")
    browser.open(frame)
    browser.post("/frame", id=browser.find("iframe"))
    assert browser.run("return document.getElementById('unsaved').hidden") is False
    begin(browser)
    browser.press("1", "Enter")
    assert browser.text("#count") == "Pair 2 of 4"
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


def test_nothing_can_be_sent(browser, page, listener):
    """Each way out is closed by the page's policy, and open in the same page without it."""
    port, asked = listener
    script = TRY_THEM_ALL.replace("PORT", str(port))
    begin(browser)
    browser.run(script)
    blocked = wait_for(browser, lambda: browser.run("return violations"), len(WAYS_OUT))
    assert set(blocked) == WAYS_OUT
    assert asked == set()

    html = page.read_text()
    start = html.index("<meta http-equiv")
    bare = page.with_name("bare.html")
    bare.write_text(html[:start] + html[html.index(">", start) + 1:])
    browser.open(bare)
    browser.run(script)
    assert wait_for(browser, lambda: asked, len(WAYS_OUT)) == WAYS_OUT
