"""Streaming a data set from the Hub: the real client code against a local endpoint, gated sets included."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from datasets import Dataset

COMMIT = "c" * 40
TEXTS = [[f"python file {i} program {j}" for j in range(8)] for i in range(3)]


class Endpoint(BaseHTTPRequestHandler):
    """The part of the Hub's protocol that streaming a data set needs.

    ``someone/code`` is open; ``someone/gated`` shows its card and file names to everybody, the rest only to the token
    hf_granted.
    """

    root: Path

    def do_HEAD(self):
        self._answer()

    do_GET = do_POST = do_HEAD

    def _answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        kind, *parts = [unquote(part) for part in url.path.strip("/").removeprefix("api/").split("/")]
        name, parts = "/".join(parts[:2]), parts[2:]
        if kind != "datasets" or name not in ("someone/code", "someone/gated"):
            return self._send(404, code="RepoNotFound")
        what, revision, inside = (parts + [None, None])[0], (parts + [None, None])[1], "/".join(parts[2:])
        if revision not in (None, "main", COMMIT):
            return self._send(404, code="RevisionNotFound")
        if what == "auth-check":
            return self._refuse(name) or self._send(200, b"{}")
        if what in (None, "revision"):
            return self._send(200, {"id": name, "sha": COMMIT})
        path = self.root / inside
        if what == "tree" and path.is_dir():
            found = path.rglob("*") if parse_qs(url.query).get("recursive") == ["true"] else path.iterdir()
            return self._send(200, [self._entry(p) for p in sorted(found)])
        if what == "paths-info":
            paths = parse_qs(body.decode()).get("paths", [])
            return self._send(200, [self._entry(self.root / p) for p in paths if (self.root / p).exists()])
        if what == "resolve" and path.is_file():
            return (path.name != "README.md" and self._refuse(name)) or self._send_file(path)
        return self._send(404, code="EntryNotFound")

    def _refuse(self, name: str) -> bool:
        """Answer as the Hub does where a gated repository is closed to the one who asks."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if name == "someone/gated" and token != "hf_granted":
            self._send(403 if token else 401, code="GatedRepo")
            return True
        return False

    def _entry(self, path: Path) -> dict:
        entry = {"path": str(path.relative_to(self.root)), "oid": "0" * 40, "size": 0, "type": "directory"}
        return entry | {"size": path.stat().st_size, "type": "file"} if path.is_file() else entry

    def _send_file(self, path: Path):
        data = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        if "Range" not in self.headers:
            return self._send(200, data, **headers)
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        first, last = int(first), min(int(last or len(data)), len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return self._send(206, data[first : last + 1], **headers)

    def _send(self, status: int, content: object = b"", code: str | None = None, **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data)))
        for key, value in (headers | ({"X-Error-Code": code, "X-Error-Message": code} if code else {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = Endpoint.root = tmp_path_factory.mktemp("hub")
    (root / "README.md").write_text("A data set.\n")
    for folder, texts in (("python", TEXTS), ("java", [["java"] * 8])):
        (root / folder).mkdir()
        for i, column in enumerate(texts):
            Dataset.from_dict({"content": column}).to_parquet(str(root / folder / f"train-0000{i}.parquet"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


READ = """
import json, os, sys
from asarm import TextTokenizer, UserError
from asarm.config import DataConfig
from asarm.data.rows import open_rows

tokenizer = TextTokenizer.from_pretrained("tiny-english")
for settings in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = settings.pop("token", "")
    try:
        config = DataConfig(**{"max_length": 8, "streams": 3, "shuffle_buffer": 1} | settings)
        rows = open_rows(config, tokenizer, seed=0).batches(0, 60)
        print(json.dumps([tokenizer.decode(row.tolist()) for row in next(rows)[0]]))
        rows.close()
    except UserError as error:
        print(json.dumps(str(error)))
"""


CODE = {"dataset": "someone/code", "data_dir": "python", "text_column": "content"}
GATED = CODE | {"dataset": "someone/gated"}
SETTINGS = {
    "rows": CODE | {"num_workers": 2},
    "in process": CODE | {"num_workers": 0},
    "at commit": CODE | {"num_workers": 0, "revision": COMMIT},
    "column": CODE | {"text_column": "text"},
    "name": CODE | {"dataset": "someone/else"},
    "revision": CODE | {"revision": "v2"},
    "split": CODE | {"split": "test"},
    "no token": GATED,
    "no access": GATED | {"token": "hf_of_somebody"},
    "granted": GATED | {"token": "hf_granted"},
}


@pytest.fixture(scope="module")
def found(hub, tmp_path_factory) -> dict[str, list[str] | str]:
    """What each of the settings reads, in one process: the texts of sixty rows, or an error's message."""
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    environment |= {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path_factory.mktemp("cache")), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", READ, json.dumps([*SETTINGS.values()])],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(SETTINGS, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.slow
def test_a_data_set_is_streamed_by_workers_and_errors_are_named(found):
    rows = found["rows"]
    assert rows == found["in process"] == found["at commit"]
    for s in range(3):  # each stream has one file in its first epoch
        texts = [text.strip() for text in "".join(rows[s::3]).split("<eod>")][:8]
        assert texts in TEXTS
    assert "no column 'text'; it has ['content']" in found["column"]
    assert "'someone/else'" in found["name"] and "'v2'" in found["revision"] and "'test'" in found["split"]


@pytest.mark.slow
def test_a_gated_data_set_names_what_is_missing(found, hub):
    for name, who in (
        ("no token", "no valid token was found"),
        ("no access", "account of your token has no access"),
    ):
        assert who in found[name] and "'someone/gated' is gated" in found[name]
        assert all(part in found[name] for part in (f"{hub}/datasets/someone/gated", "HF_TOKEN", "hf auth login"))
    assert len(found["granted"]) == 60 and "python file" in "".join(found["granted"])
