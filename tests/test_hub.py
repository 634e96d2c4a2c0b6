"""The hub path against a real HTTP endpoint on this machine: download, revision, resume, 401, 404, stall, offline.

Each request is made by a process of its own, because huggingface_hub reads its environment once, on import.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from spafit.models import load_model
from tests.paths import ROOT
from tests.tiny import save_tiny, tiny, tiny_tokenizer

REPO = "lab/small-bert"
COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@dataclass
class Hub:
    """What the endpoint serves: (repository, commit) -> folder, and how it misbehaves."""

    folders: dict[tuple[str, str], Path] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    token: str | None = None
    cut_after: int | None = None
    stall: str | None = None
    status: tuple[int, dict[str, str]] | None = None
    url: str = ""
    released: threading.Event = field(default_factory=threading.Event)


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            hub.requests.append((self.command, self.path, self.headers.get("Range")))
            if hub.stall is not None and hub.stall in self.path:
                hub.released.wait(30)
                self.close_connection = True
                return
            if hub.status is not None:
                self.refuse(*hub.status)
            elif hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
                self.refuse(401, {"X-Error-Code": "RepoNotFound"})
            elif self.path.startswith("/api/models/"):
                self.describe(self.path.removeprefix("/api/models/"))
            else:
                repo, _, rest = self.path[1:].partition("/resolve/")
                revision, _, file = rest.partition("/")
                self.send_file(repo, COMMITS.get(revision, revision), file, body=body)

        def refuse(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": "0"}.items():
                self.send_header(name, value)
            self.end_headers()

        def describe(self, path: str) -> None:
            repo, _, revision = path.partition("/revision/")
            if not any(repo == name for name, _ in hub.folders):
                return self.refuse(404, {"X-Error-Code": "RepoNotFound"})
            commit = COMMITS.get(revision or "main", revision)
            if (repo, commit) not in hub.folders:
                return self.refuse(404, {"X-Error-Code": "RevisionNotFound"})
            folder = hub.folders[repo, commit]
            files = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file()]
            content = json.dumps({"id": repo, "sha": commit, "siblings": [{"rfilename": f} for f in files]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def send_file(self, repo: str, commit: str, file: str, *, body: bool) -> None:
            path = hub.folders.get((repo, commit), Path("/nowhere")) / file
            if not path.is_file():
                return self.refuse(404, {"X-Error-Code": "EntryNotFound"})
            content = path.read_bytes()
            start = int((self.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
            self.send_response(206 if start else 200)
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if not body:
                return None
            if hub.cut_after is not None and file.endswith(".safetensors"):
                self.wfile.write(content[start : hub.cut_after])
                self.wfile.flush()
                hub.cut_after = None
                self.close_connection = True
                return None
            self.wfile.write(content[start:])
            return None

    return Handler


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """Two commits with different weights, and beside them what must not be downloaded."""
    folders = {}
    for seed, (name, commit) in enumerate(COMMITS.items()):
        folder = tmp_path_factory.mktemp("repository") / name
        save_tiny("bert", folder, seed)
        (folder / "onnx").mkdir()
        for extra in ("onnx/model.safetensors", "pytorch_model.bin", "README.md", "picture.png"):
            (folder / extra).write_bytes(b"not wanted")
        folders[REPO, commit] = folder
    return folders


@pytest.fixture
def hub(repository) -> Iterator[Hub]:
    served = Hub(folders=dict(repository))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(served))
    server.daemon_threads = True
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield served
    served.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


LOCATE = """
import json, sys, time
from spafit.errors import SpafitError
from spafit.hub import locate
start = time.monotonic()
answer = {}
try:
    found = locate(sys.argv[1], **json.loads(sys.argv[2]))
    answer = {"folder": str(found.folder), "label": found.label, "revision": found.revision, "weights": found.weights}
except SpafitError as error:
    answer = {"error": type(error).__name__, "message": str(error)}
print(json.dumps({**answer, "seconds": time.monotonic() - start, "heavy": "transformers" in sys.modules}))
"""
LOAD = """
import json, sys
from spafit.models import load_model
found = {}
for revision in json.loads(sys.argv[2]):
    loaded = load_model(sys.argv[1], revision=revision)
    found[str(revision)] = [loaded.weights_digest, loaded.revision, loaded.name, loaded.reference, loaded.max_length]
print(json.dumps(found))
"""


def run(hub: Hub, home: Path, code: str = LOCATE, reference: str = REPO, given: Any = None, **env: str) -> Any:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE", "TRANSFORMERS"))}
    done = subprocess.run(
        [sys.executable, "-c", code, reference, json.dumps(given or {})],
        env={**clean, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        cwd=home,
    )
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_download_takes_only_what_loading_needs_and_the_next_run_only_asks(hub, tmp_path, repository):
    found = run(hub, tmp_path)
    folder = Path(found["folder"])
    assert (found["label"], found["revision"], found["weights"]) == (
        "small-bert",
        COMMITS["main"],
        ["model.safetensors"],
    )
    source = repository[REPO, COMMITS["main"]]
    assert {p.name for p in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert all((folder / p.name).read_bytes() == (source / p.name).read_bytes() for p in folder.iterdir())
    assert not found["heavy"]
    hub.requests.clear()
    assert run(hub, tmp_path)["folder"] == found["folder"]
    assert {(method, path.startswith("/api/")) for method, path, _ in hub.requests} <= {("GET", True), ("HEAD", False)}


def test_two_revisions_load_as_two_models(hub, tmp_path, repository):
    loaded = run(hub, tmp_path, LOAD, given=[None, "v2"])
    assert [loaded[r][1] for r in ("None", "v2")] == [COMMITS["main"], COMMITS["v2"]]
    digests = [load_model(repository[REPO, commit]).weights_digest for commit in COMMITS.values()]
    assert [loaded[r][0] for r in ("None", "v2")] == digests
    assert digests[0] != digests[1]
    assert loaded["v2"][2:] == ["small-bert", REPO, 64]


def test_offline_uses_the_cache_without_a_request_and_says_when_it_is_not_there(hub, tmp_path):
    online = run(hub, tmp_path, given={"revision": "v2"})
    hub.requests.clear()
    assert run(hub, tmp_path, given={"revision": "v2", "offline": True})["folder"] == online["folder"]
    assert run(hub, tmp_path, given={"revision": "v2"}, HF_HUB_OFFLINE="1")["folder"] == online["folder"]
    absent = run(hub, tmp_path, given={"offline": True})
    assert absent["error"] == "HubError"
    assert "is not in the cache" in absent["message"]
    assert "without --offline" in absent["message"]
    assert hub.requests == []


def test_broken_connection_goes_on_where_it_stopped(hub, tmp_path):
    """The second request for the weights asks for the rest only; a file of 16 MB, since 10 MB are one piece."""
    folder = tmp_path / "big"
    tiny("bert", vocab_size=250_000).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    hub.folders[REPO, COMMITS["main"]] = folder
    hub.cut_after = 12_000_000
    home = tmp_path / "home"
    home.mkdir()
    found = run(hub, home)
    weights = [r for method, path, r in hub.requests if method == "GET" and path.endswith("model.safetensors")]
    assert weights == [None, "bytes=10485760-"]
    assert (Path(found["folder"]) / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (
            (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
            "the token is not valid.*Set HF_TOKEN",
        ),
        ((403, {"X-Error-Code": "GatedRepo"}), "is gated on http.*accept its licence.*HF_TOKEN"),
        ((500, {}), "with status 500.*local folder.*--offline.*spafit\\[demo\\]"),
    ],
)
def test_refusals_are_one_sentence_with_a_remedy(hub, tmp_path, status, words):
    hub.status = status
    answer = run(hub, tmp_path)
    assert answer["error"] == "HubError"
    assert re.search(words, answer["message"])
    assert "\n" not in answer["message"]
    assert answer["seconds"] < 5


def test_private_model_opens_with_the_right_token_only(hub, tmp_path):
    hub.token = "good"
    shut = run(hub, tmp_path)
    assert "is private and HF_TOKEN does not open it" in shut["message"]
    assert run(hub, tmp_path, HF_TOKEN="good")["revision"] == COMMITS["main"]


def test_unknown_model_and_revision_say_so_and_a_similar_folder_is_suggested(hub, tmp_path):
    (tmp_path / "lab" / "smal-bert").mkdir(parents=True)
    answer = run(hub, tmp_path, reference="lab/smal-berd")
    assert "has no model 'lab/smal-berd'" in answer["message"]
    assert "Did you mean 'lab/smal-bert'?" in answer["message"]
    answer = run(hub, tmp_path, given={"revision": "v3"})
    assert "has no revision 'v3'" in answer["message"]
    assert "Did you mean" not in answer["message"]


def test_hub_that_never_answers_is_given_up_within_ten_seconds(hub, tmp_path):
    hub.stall = "/api/"
    start = time.monotonic()
    answer = run(hub, tmp_path)
    assert time.monotonic() - start < 15  # with the interpreter's own start on a busy machine
    assert answer["seconds"] < 10
    assert "did not answer for 'lab/small-bert' within 7 s" in answer["message"]
    assert all(words in answer["message"] for words in ("local folder", "--offline", "spafit[demo]"))


def test_stall_after_the_first_answer_is_given_up_too_and_a_cached_copy_is_mentioned(hub, tmp_path):
    hub.stall = "/resolve/"
    answer = run(hub, tmp_path, given={"timeout_s": 2})
    assert "did not answer" in answer["message"]
    assert answer["seconds"] < 6
    hub.stall = None
    run(hub, tmp_path)
    hub.stall = "/api/"
    answer = run(hub, tmp_path, given={"timeout_s": 2})
    assert "A copy is in the cache: --offline uses it." in answer["message"]


def test_unreachable_hub_is_said_at_once(hub, tmp_path):
    hub.url = "http://127.0.0.1:9"
    answer = run(hub, tmp_path)
    assert answer["error"] == "HubError"
    assert "did not answer" in answer["message"]
    assert answer["seconds"] < 5


def test_pickle_only_and_remote_code_are_refused_before_any_weight_is_downloaded(hub, tmp_path):
    folder = tmp_path / "pickled"
    save_tiny("bert", folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    hub.folders[REPO, COMMITS["main"]] = folder
    answer = run(hub, tmp_path)
    assert "pickle weights only (pytorch_model.bin)" in answer["message"]
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "mine.Model"}}))
    assert "Python code of its own" in run(hub, tmp_path)["message"]
    assert not any(path.endswith((".bin", ".safetensors")) for _, path, _ in hub.requests)
