"""Hugging Face data sets: local directories, and the pinning of hub revisions."""

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from qrpo_core.common import hashing
from qrpo_core.common.errors import DataError
from qrpo_core.config import PromptsConfig
from qrpo_core.data.sources import load_prompts, source_identity

FIRST, SECOND = "a" * 40, "b" * 40


def config(name, **fields):
    return PromptsConfig(kind="hub", name=str(name), **fields)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    """A data set directory with two splits, message lists and ground truths."""
    ask = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ""}]
    rows = [
        {"prompt": [ask[0], ask[1] | {"content": f"{number}?"}], "answer": number} for number in range(20)
    ]
    write(tmp_path / "set" / "train.jsonl", rows)
    write(tmp_path / "set" / "test.jsonl", rows[:7])
    return tmp_path / "set"


def test_a_local_directory(folder):
    found = load_prompts(config(folder, ground_truth_field="answer")).prompts.to_pylist()
    assert [row["messages"][1]["content"] for row in found] == [f"{number}?" for number in range(20)]
    assert [row["messages"][0]["role"] for row in found] == ["system"] * 20
    assert [json.loads(row["ground_truth"]) for row in found] == list(range(20))
    assert found[3]["source"] == f"{folder}/train.jsonl:4"


def test_splits_and_slices(folder):
    assert load_prompts(config(folder, split="test", held_out=0.5)).counts["read"] == 7
    assert load_prompts(config(folder, split="train[:10]", held_out=0.5)).counts["read"] == 10
    with pytest.raises(DataError) as caught:
        load_prompts(config(folder, split="validation"))
    assert str(caught.value).endswith("has no split 'validation' [prompts.split]: it has train, test")


def test_a_changed_file_is_read_again(folder):
    before = load_prompts(config(folder)).counts["read"]
    (folder / "test.jsonl").unlink()
    write(folder / "train.jsonl", [{"prompt": f"{number}?"} for number in range(30)])
    assert (before, load_prompts(config(folder)).counts["read"]) == (20, 30)


def test_identity_of_a_directory_is_its_files(folder):
    first = source_identity(config(folder))
    assert first == {
        "files": {name: hashing.digest_file(folder / name) for name in ("test.jsonl", "train.jsonl")}
    }
    (folder / ".cache").mkdir()
    (folder / ".cache" / "junk").write_text("x")
    assert source_identity(config(folder)) == first
    write(folder / "train.jsonl", [{"prompt": "x"}])
    assert source_identity(config(folder)) != first


def test_refused_directories(folder, tmp_path):
    with pytest.raises(DataError, match="revision 'main' of a local directory"):
        load_prompts(config(folder, revision="main"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no files in"):
        load_prompts(config(tmp_path / "empty"))
    write(tmp_path / "odd" / "notes.xyz", [{}])
    with pytest.raises(DataError, match="cannot load data set"):
        load_prompts(config(tmp_path / "odd"))
    write(folder / "test.jsonl", [{"prompt": "x"}])
    with pytest.raises(DataError, match=r"no split .tests.:3.. .* it has train, test"):
        load_prompts(config(folder, split="tests[:3]"))
    with pytest.raises(DataError, match=r"prompts.split 'train\[:x\]' is not readable"):
        load_prompts(config(folder, split="train[:x]"))
    (folder / "test.jsonl").unlink()
    with pytest.raises(DataError, match=r"no field 'anwser' \[.*train.jsonl:1\]: did you mean 'answer'"):
        load_prompts(config(folder, ground_truth_field="anwser"))


def test_a_bad_row_is_named(folder):
    (folder / "test.jsonl").unlink()
    write(folder / "train.jsonl", [{"prompt": "x"}, {"prompt": "y"}, {"prompt": ""}])
    with pytest.raises(DataError) as caught:
        load_prompts(config(folder))
    assert str(caught.value).startswith(f"the prompt is empty [{folder}/train.jsonl:3]")


ROWS = "".join(json.dumps({"prompt": f"{number}?"}) + "\n" for number in range(20)).encode()


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as its client asks for: one data set `org/sums`, one file, branch `main`."""

    main = FIRST

    def do_GET(self):
        path = self.path.split("?")[0]
        if found := re.fullmatch("/api/datasets/org/sums(?:/revision/(.*))?", path):
            known = {None: self.main, "main": self.main, FIRST: FIRST, SECOND: SECOND}
            if found[1] not in known:
                return self.reply(404, X_Error_Code="RevisionNotFound")
            return self.reply(200, json.dumps({"id": "org/sums", "sha": known[found[1]]}).encode())
        if path.startswith("/api/datasets/org/sums/tree/"):
            file = {"type": "file", "path": "train.jsonl", "size": len(ROWS), "oid": "1" * 40}
            return self.reply(200, json.dumps([file]).encode())
        if found := re.fullmatch("/datasets/org/sums/resolve/([^/]*)/(.*)", path):
            if found[2] == "train.jsonl":
                return self.reply(200, ROWS, ETag='"1"', X_Repo_Commit=found[1])
            return self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=found[1])
        return self.reply(404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


SCRIPT = """
import sys
from qrpo_core.config import PromptsConfig
from qrpo_core.data.sources import load_prompts, source_identity
from qrpo_core.common.errors import DataError
for argument in sys.argv[1:]:
    name, _, revision = argument.removesuffix(" streamed").partition("@")
    streaming = argument.endswith(" streamed")
    config = PromptsConfig(kind="hub", name=name, revision=revision or None, streaming=streaming)
    try:
        print(source_identity(config)["commit"], load_prompts(config).counts["read"])
    except DataError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_hub_data_set_is_pinned_to_its_commit(tmp_path):
    """The real client against a small hub: online, offline from the cache, and a copy of another commit."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}

    def run(offline, *sets):
        env = {**os.environ, **settings, "HF_HUB_OFFLINE": str(offline)}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, *sets], env=env, capture_output=True, text=True, check=True
        )
        return done.stdout.splitlines()

    try:
        assert "no copy of it in the cache" in run(1, "org/sums")[0]
        assert run(0, "org/sums streamed") == [f"{FIRST} 20"]
        assert "cannot download 'train.jsonl' of data set 'org/sums'" in run(1, "org/sums")[0]
        online = run(0, "org/sums", "org/nothing", "org/sums@v9", f"org/sums@{FIRST}")
        assert online[0] == online[3] == f"{FIRST} 20"
        assert "no data set 'org/nothing'" in online[1]
        assert "has no revision 'v9' [prompts.revision]" in online[2]
        offline = run(1, "org/sums", f"org/sums@{SECOND}")
        assert offline[0] == f"{FIRST} 20"
        assert f"no copy of data set 'org/sums' at {SECOND} in the cache" in offline[1]
        Hub.main = SECOND
        assert run(0, "org/sums") == [f"{SECOND} 20"]
    finally:
        server.shutdown()
        server.server_close()
    settings["HF_ENDPOINT"] = "http://127.0.0.1:9"
    assert "the hub cannot be asked for data set 'org/sums'" in run(0, "org/sums")[0]


CHAT = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]


def turns(question, answer):
    return [CHAT[0] | {"content": question}, CHAT[1] | {"content": answer}]


def test_preference_data_in_message_lists(tmp_path):
    """UltraFeedback binarised: a prompt column, and chosen and rejected as whole conversations."""
    rows = [
        {
            "prompt": f"question {n}",
            "prompt_id": f"{n:x}",
            "chosen": turns(f"question {n}", f"good {n}"),
            "rejected": turns(f"question {n}", f"bad {n}"),
            "messages": turns(f"question {n}", f"good {n}"),
            "score_chosen": 8.5,
            "score_rejected": 4.0,
        }
        for n in [*range(20), 3]
    ]
    write(tmp_path / "ultra" / "train_prefs.jsonl", rows)
    found = load_prompts(config(tmp_path / "ultra", chosen_field="chosen", rejected_field="rejected"))
    assert found.counts["read"] == 21
    assert found.counts["merged"] == found.counts["repeated_pairs"] == 1
    assert len(found.offline) == 40
    sides = {(row["text"], row["label"]) for row in found.offline.to_pylist()}
    assert ("good 7", "chosen") in sides
    assert ("bad 7", "rejected") in sides


def test_instructions_with_conversations_alone(tmp_path):
    """Magpie with preferences: the prompt stands in the conversations only, beside columns of its making."""
    rows = [
        {
            "uuid": str(n),
            "instruction": f"do {n}",
            "chosen": turns(f"do {n}", "a"),
            "rejected": turns(f"do {n}", "b"),
        }
        for n in range(20)
    ]
    write(tmp_path / "magpie" / "train.jsonl", rows)
    found = load_prompts(config(tmp_path / "magpie", chosen_field="chosen", rejected_field="rejected"))
    assert [row["messages"] for row in found.prompts.to_pylist()][4] == [{"role": "user", "content": "do 4"}]
    assert len(found.offline) == 40


def test_a_ground_truth_of_several_columns(tmp_path):
    rows = [{"text": f"add {n}", "test_list": [f"assert f({n})"], "test_setup_code": ""} for n in range(20)]
    write(tmp_path / "code" / "train.jsonl", rows)
    fields = {"prompt_field": "text", "ground_truth_fields": ("test_list", "test_setup_code")}
    found = load_prompts(config(tmp_path / "code", **fields)).prompts.to_pylist()
    assert json.loads(found[2]["ground_truth"]) == {"test_list": ["assert f(2)"], "test_setup_code": ""}
    with pytest.raises(DataError, match="no field 'test'"):
        load_prompts(config(tmp_path / "code", prompt_field="text", ground_truth_fields=("test",)))
    with pytest.raises(ValueError, match="exclude each other"):
        config(tmp_path / "code", ground_truth_field="test_list", **fields)


def test_a_stream_gives_the_same_prompts_and_names(folder):
    whole = load_prompts(config(folder, ground_truth_field="answer"))
    stream = load_prompts(config(folder, ground_truth_field="answer", streaming=True))
    assert stream.prompts.equals(whole.prompts)
    assert stream.counts == whole.counts
    with pytest.raises(DataError, match="has no split 'validation'"):
        load_prompts(config(folder, split="validation", streaming=True))
    with pytest.raises(DataError, match="no field 'question'"):
        load_prompts(config(folder, prompt_field="question", streaming=True))


def test_one_of_several_configurations(tmp_path):
    card = "---\nconfigs:\n"
    for name in ("easy", "hard"):
        card += f"- config_name: {name}\n  data_files: {name}.jsonl\n"
        write(tmp_path / "both" / f"{name}.jsonl", [{"prompt": f"{name} {n}"} for n in range(10)])
    (tmp_path / "both" / "README.md").write_text(card + "---\n")
    found = load_prompts(config(tmp_path / "both", subset="hard", held_out=0.5)).prompts.to_pylist()
    assert found[0]["messages"][0]["content"] == "hard 0"
    with pytest.raises(DataError, match="easy"):  # says which there are
        load_prompts(config(tmp_path / "both", held_out=0.5))
