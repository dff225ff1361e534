"""tiny/make.py: what it reads, and that a model it makes loads like any other."""

import gzip
import json
import sys

import pytest
from conftest import ROOT, fails_in_one_line, program

sys.path.insert(0, str(ROOT / "tiny"))
import make  # noqa: E402
from data import load_records, split  # noqa: E402
from plumbing.chat import ChatTokenizer  # noqa: E402

DIALOGUE = {"source": "sgd", "turns": ["Hi there.", "Hello.", "A table, please.", "For how many?"]}
STORY = {"text": "A fox met a crow."}


@pytest.fixture
def texts(tmp_path):
    """A folder with two sources: one packed and named in its lines, one plain and named by file."""
    folder = tmp_path / "texts"
    folder.mkdir()
    with gzip.open(folder / "all.jsonl.gz", "wt") as file:
        file.write(40 * (json.dumps(DIALOGUE) + "\n"))
    (folder / "fables.jsonl").write_text(200 * (json.dumps(STORY) + "\n"))
    return folder


def test_sources_are_read_from_packed_and_plain_files(texts):
    parts = make.read_texts(texts)
    assert {name: len(found) for name, found in parts.items()} == {"sgd": 40, "fables": 200}
    assert parts["fables"][0] == "A fox met a crow."


def test_short_and_long_answers_of_a_source_are_told_apart_at_600_characters():
    answers = ["x" * 600, "x" * 601]
    records = [{"source": "counsel_chat", "turns": ["Why?", answer]} for answer in answers]
    assert [make.part_of(record) for record in records] == ["counsel_chat, short",
                                                            "counsel_chat, long"]


def test_only_plain_answers_of_the_training_split_are_read():
    path = ROOT / "persona_cot.jsonl"
    training, held = split(load_records(path))
    texts = make.plain_answers(path)
    assert len(texts) == len(training)
    joined = "\n".join(texts)
    assert not [record for record in held if record["query"].strip() in joined]
    assert not [record for record in training if record["response"].strip() in joined]


def test_the_model_made_is_asked_in_the_format_it_was_trained_in(texts, tmp_path):
    out = tmp_path / "made"
    result = program(ROOT / "tiny" / "make.py", "--texts", texts, "--out", out, "--steps", 1)
    assert result.returncode == 0, result.stderr
    assert "loss 8.3" in result.stdout                  # ln 4096: it knows nothing yet

    # a conversation in the stream is what the chat format makes of it, token by token
    chat = ChatTokenizer(out)
    stream = chat.encode_prompt("A table, please.", [("Hi there.", "Hello.")])
    stream += chat.encode_answer("For how many?")
    chat.tokenizer.encode_special_tokens = False
    assert chat.encode(make.render(DIALOGUE) + make.END) == stream

    asked = program("sample.py", "--route", "none", "--base", out, "--max-new-tokens", 3, "Hello")
    assert asked.returncode == 0, asked.stderr


def test_a_folder_without_texts_is_named(tmp_path):
    result = program(ROOT / "tiny" / "make.py", "--texts", tmp_path, "--out", tmp_path / "made")
    assert fails_in_one_line(result, tmp_path, "jsonl")
