"""Loading from the Hub by id and revision: the real client code against a local endpoint."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import make_model

from asarm.embedded import ASSETS

COMMITS = {"main": "a" * 40, "nlp": "b" * 40}


class Endpoint(BaseHTTPRequestHandler):
    """The part of the Hub's protocol that downloading files needs."""

    root: Path
    served: list[str]

    def _answer(self, body: bool):
        parts = self.path.split("?")[0].strip("/").split("/")
        if len(parts) < 5 or parts[2] != "resolve" or parts[:2] != ["someone", "asarm-test"]:
            return self._missing("RepoNotFound")
        revision, name = parts[3], "/".join(parts[4:])
        revision = next((r for r, commit in COMMITS.items() if revision in (r, commit)), None)
        if revision is None:
            return self._missing("RevisionNotFound")
        file = self.root / revision / name
        if not file.is_file():
            return self._missing("EntryNotFound")
        data = file.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMITS[revision])
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.served.append(f"{revision}/{name}")
            self.wfile.write(data)
        return None

    def _missing(self, code: str):
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", f"{code}: {self.path}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """An endpoint that holds one repository with a different model at each of two revisions."""
    root = tmp_path_factory.mktemp("hub")
    tokenizer = (ASSETS / "tiny-english" / "tokenizer.json").read_bytes()
    for seed, revision in enumerate(COMMITS):
        make_model(vocab_size=8192, mask_token_id=6, seed=seed).save_pretrained(root / revision)
        (root / revision / "tokenizer.json").write_bytes(tokenizer)
    stored = {"whitespace_map": "code", "document_end": "<sep><cls></s>"}
    (root / "nlp" / "tokenizer_config.json").write_text(json.dumps(stored))
    Endpoint.root, Endpoint.served = root, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


RUN = """
import json, sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from asarm.cli import main

for words in json.loads(sys.argv[1]):
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        status = main(words)
    print(json.dumps([status, out.getvalue(), err.getvalue()]))
"""
UNKNOWN = [
    (("--model", model, "--revision", revision, *tokenizer), message)
    for model, revision, message in (
        ("someone/asarm-test", "nlp_210k", "'nlp_210k'"),
        ("someone/other", "main", "'someone/other'"),
    )
    for tokenizer in ((), ("--tokenizer", "tiny-english"))
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """Where the models of the Hub are exported to, a folder a revision."""
    return tmp_path_factory.mktemp("exported")


def export_words(revision: str, exported: Path) -> list[str]:
    return ["--model", "someone/asarm-test", "--revision", revision, "--output_dir", str(exported / revision)]


@pytest.fixture(scope="module")
def answers(hub, exported, tmp_path_factory) -> dict[tuple[str, ...], tuple[int, str, str]]:
    """Status, output and errors of each command by its words, all run by one process that asks the endpoint."""
    commands = [("infill", "--text", "a <mask>", *words) for words, _ in UNKNOWN]
    for revision in COMMITS:
        for model in (("someone/asarm-test", "--revision", revision), (str(Endpoint.root / revision),)):
            commands.append(("score", "--text", "A small dog", "--json", "--model", *model))
        commands.append(("export", *export_words(revision, exported)))
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    environment |= {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path_factory.mktemp("cache")), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(commands)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(commands, map(json.loads, done.stdout.splitlines()), strict=True))


def test_a_hub_id_at_two_revisions(answers):
    scores = {}
    for revision in COMMITS:
        command = ("score", "--text", "A small dog", "--json", "--model")
        (status, out, err), (_, of_folder, _) = (
            answers[*command, *model]
            for model in (("someone/asarm-test", "--revision", revision), (str(Endpoint.root / revision),))
        )
        assert status == 0, err
        scores[revision] = json.loads(out)["log_prob"]
        assert json.loads(of_folder)["log_prob"] == scores[revision]
    assert scores["main"] != scores["nlp"]
    assert {"main/model.safetensors", "nlp/model.safetensors", "main/tokenizer.json"} <= set(Endpoint.served)


def test_a_hub_id_is_exported_with_what_is_stored_beside_its_tokenizer(answers, exported):
    found = {}
    for revision in COMMITS:
        status, _, err = answers["export", *export_words(revision, exported)]
        assert status == 0, err
        settings = json.loads((exported / revision / "tokenizer_config.json").read_text())
        found[revision] = (settings.get("whitespace_map"), settings["document_end"])
        weights = (exported / revision / "model.safetensors").read_bytes()
        assert weights == (Endpoint.root / revision / "model.safetensors").read_bytes()
    assert found == {"main": (None, "<eod>"), "nlp": ("code", "<sep><cls></s>")}


@pytest.mark.parametrize(("words", "message"), UNKNOWN)
def test_an_unknown_id_or_revision_is_named(answers, words, message):
    status, _, err = answers["infill", "--text", "a <mask>", *words]
    assert status == 2, err
    assert "Traceback" not in err and message in err.strip().splitlines()[-1]
