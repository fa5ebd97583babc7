"""Fetching the evaluations' data: a real process against a local server, wrong hashes and torn transfers included."""

import gzip
import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "fetch_eval_datasets.py"
PUBLISHED = b'{"text": "I went home to my \\u201cdog\\u201d"}\n'
CONVERTED = '{"context": "I went home to my", "continuation": "“dog”"}\n'.encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Files(BaseHTTPRequestHandler):
    """/whole answers in full, /torn promises more than it sends, anything else is not found."""

    def do_GET(self):
        if self.path not in ("/whole", "/torn"):
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(PUBLISHED) + 9 * (self.path == "/torn")))
        self.end_headers()
        return self.wfile.write(PUBLISHED)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def entry(server, name="lambada", file="whole", published=PUBLISHED, converted=CONVERTED):
    source = {"url": f"{server}/{file}", "sha256": sha256(published), "convert": "lambada"}
    return {"name": name, "path": f"eval/{name}.jsonl", "sha256": sha256(converted), "download": source}


def fetch(folder, entries, *arguments):
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({"datasets": entries}))
    command = [sys.executable, str(SCRIPT), "--manifest", str(manifest), *arguments]
    environment = os.environ | {"ASARM_DATA_DIR": str(folder)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_what_is_missing_is_fetched_and_what_is_there_is_verified(server, tmp_path):
    done = fetch(tmp_path, [entry(server)])
    assert (done.returncode, done.stderr) == (0, "") and "fetched" in done.stdout
    assert (tmp_path / "eval" / "lambada.jsonl").read_bytes() == CONVERTED
    assert os.listdir(tmp_path / "eval") == ["lambada.jsonl"]
    again = fetch(tmp_path, [entry("http://127.0.0.1:9")])  # nobody answers there: it must not ask
    assert again.returncode == 0 and "there, verified" in again.stdout


def test_one_failure_leaves_no_file_and_does_not_stop_the_others(server, tmp_path):
    bad = [
        entry(server, "other-than-published", published=b"x"),
        entry(server, "other-than-converted", converted=b"x"),
        entry(server, "torn", "torn"),
        entry(server, "absent", "absent"),
        entry("http://127.0.0.1:9", "nobody"),
        {"name": "closed", "path": "eval/closed.csv", "sha256": sha256(b"c"), "on_request": "write to the authors"},
    ]
    done = fetch(tmp_path, [*bad, entry(server, "good")])
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert [line.split(":")[0] for line in lines] == [e["name"] for e in bad]
    assert "another sha256" in lines[0] and "another sha256" in lines[1] and "IncompleteRead" in lines[2]
    assert "404" in lines[3] and "cannot download" in lines[4] and "write to the authors" in lines[5]
    assert [path.name for path in (tmp_path / "eval").rglob("*")] == ["good.jsonl"]


def test_a_file_on_request_is_verified_and_a_changed_file_is_left_alone(server, tmp_path):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "closed.csv").write_text("c")
    (tmp_path / "eval" / "lambada.jsonl").write_text("mine")
    closed = {"name": "closed", "path": "eval/closed.csv", "sha256": sha256(b"c"), "on_request": "write"}
    done = fetch(tmp_path, [closed, entry(server)])
    assert done.returncode == 1 and "closed: there, verified" in done.stdout and "left alone" in done.stderr
    assert (tmp_path / "eval" / "lambada.jsonl").read_text() == "mine"
    assert fetch(tmp_path, [closed, entry(server)], "--names", "closed").returncode == 0
    unknown = fetch(tmp_path, [closed], "--names", "closed,nonsense")
    assert unknown.returncode == 2 and "nonsense" in unknown.stderr and "closed" in unknown.stderr


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("fetch_eval_datasets", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_hellaswag_is_converted(script):
    published = {
        "activity_label": "Youth",
        "ctx": "[header] How to sit [title] Find a chair. [step] Pull  it out.",
        "endings": ["Sit down. [substeps] Lean back.", "Run."],
        "label": 1,
        "ind": 7,
    }
    expected = {
        "ctx": "Youth: How to sit. Find a chair. Pull it out.",
        "endings": ["Sit down. Lean back.", "Run."],
        "label": "1",
    }
    assert json.loads(script.convert_hellaswag(json.dumps(published).encode() + b"\n")) == expected


def test_wikitext_is_taken_out_of_its_archive(script):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for split in ("train", "valid", "test"):
            archive.writestr(f"wikitext-2-raw/wiki.{split}.raw", f" = {split} = \n")
    assert script.CONVERTERS["wikitext"](data.getvalue()) == b" = valid = \n"
    assert script.CONVERTERS["wikitext-test"](data.getvalue()) == b" = test = \n"


def test_lambada_as_published_becomes_the_file_that_is_evaluated(script, data_dir):
    """The published file's sha256 is public; ours is undone to it and made from it again."""
    entry = next(e for e in json.loads(script.MANIFEST.read_text())["datasets"] if e["name"] == "lambada")
    ours = (data_dir / entry["path"]).read_bytes()
    rows = [json.loads(line) for line in ours.splitlines()]
    published = script.json_lines([{"text": f"{row['context']} {row['continuation']}"} for row in rows])
    assert sha256(published) == entry["download"]["sha256"]
    assert script.convert_lambada(published) == ours


def test_the_manifest_is_that_of_the_real_files(script, data_dir):
    entries = json.loads(script.MANIFEST.read_text())["datasets"]
    there = [entry for entry in entries if (data_dir / entry["path"]).exists()]
    assert {entry["name"] for entry in entries if entry not in there} <= {"wikitext-2-raw-test"}
    for entry in there:
        assert "there, verified" in script.provide(entry, data_dir)
        path = data_dir / entry["path"]
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        assert len(data.splitlines()) - (path.suffix == ".csv") == entry["rows"]
        assert {"name", "source", "licence", "used_by"} <= set(entry)
