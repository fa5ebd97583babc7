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


def asarm(hub, cache, *arguments):
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    environment |= {"HF_ENDPOINT": hub, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-m", "asarm", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=120,
    )


def test_a_hub_id_at_two_revisions(hub, tmp_path):
    command = ["score", "--text", "A small dog", "--json", "--model", "someone/asarm-test"]
    scores = {}
    for revision in COMMITS:
        done = asarm(hub, tmp_path, *command, "--revision", revision)
        assert done.returncode == 0, done.stderr
        scores[revision] = json.loads(done.stdout)["log_prob"]
        local = asarm(hub, tmp_path, *command[:-1], str(Endpoint.root / revision))
        assert json.loads(local.stdout)["log_prob"] == scores[revision]
    assert scores["main"] != scores["nlp"]
    assert {"main/model.safetensors", "nlp/model.safetensors", "main/tokenizer.json"} <= set(Endpoint.served)


def test_a_hub_id_is_exported_with_what_is_stored_beside_its_tokenizer(hub, tmp_path):
    found = {}
    for revision in COMMITS:
        out = tmp_path / revision
        words = ("--model", "someone/asarm-test", "--revision", revision, "--output_dir", str(out))
        done = asarm(hub, tmp_path / "cache", "export", *words)
        assert done.returncode == 0, done.stderr
        settings = json.loads((out / "tokenizer_config.json").read_text())
        found[revision] = (settings.get("whitespace_map"), settings["document_end"])
        weights = (out / "model.safetensors").read_bytes()
        assert weights == (Endpoint.root / revision / "model.safetensors").read_bytes()
    assert found == {"main": (None, "<eod>"), "nlp": ("code", "<sep><cls></s>")}


@pytest.mark.parametrize(
    ("model", "revision", "message"),
    [("someone/asarm-test", "nlp_210k", "'nlp_210k'"), ("someone/other", "main", "'someone/other'")],
)
@pytest.mark.parametrize("tokenizer", [[], ["--tokenizer", "tiny-english"]])
def test_an_unknown_id_or_revision_is_named(hub, tmp_path, model, revision, message, tokenizer):
    done = asarm(hub, tmp_path, "infill", "--text", "a <mask>", "--model", model, "--revision", revision, *tokenizer)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert message in done.stderr.strip().splitlines()[-1]
