"""The Hugging Face hub in tests: its cache on disk, and a server that serves some files."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest
from huggingface_hub import constants

COMMIT = "1" * 40


def repo_folder(cache, repo):
    return cache / f"models--{repo.replace('/', '--')}"


def write_cache(cache, repo, files, commit=COMMIT, ref="main"):
    """Write files (bytes by name) as huggingface_hub does: blobs, snapshots, refs, symlinks."""
    folder = repo_folder(cache, repo)
    for name, content in files.items():
        blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link = folder / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        up = "../" * (len(link.relative_to(folder).parts) - 1)
        link.symlink_to(f"{up}blobs/{blob.name}")
    if ref:
        (folder / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    return folder / "snapshots" / commit


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Return the folder of an empty cache, offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


class Hub(BaseHTTPRequestHandler):
    """The requests of huggingface_hub that list and read the files of one model."""

    repo = "org/model"

    def do_HEAD(self):  # noqa: N802
        self.do_GET()

    def do_GET(self):  # noqa: N802
        path = unquote(self.path.split("?")[0]).removeprefix("/")
        files, commit = self.server.files, self.server.commit
        self.server.requests.append((self.command, path))
        if path.startswith(f"api/models/{self.repo}/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": _oid(content)}
                for name, content in files.items()
            ]
            self._send(json.dumps(entries).encode())
        elif path in (
            f"api/models/{self.repo}",
            f"api/models/{self.repo}/revision/main",
            f"api/models/{self.repo}/revision/{commit}",
        ):
            siblings = [{"rfilename": name} for name in files]
            body = {"id": self.repo, "sha": commit, "siblings": siblings}
            self._send(json.dumps(body).encode())
        elif path.startswith(f"api/models/{self.repo}/revision/"):
            self._send(b"{}", 404, {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith(f"{self.repo}/resolve/"):
            name = path.split("/", 4)[4]
            found = {"X-Repo-Commit": commit}
            if name in files:
                self._send(files[name], 200, found | {"ETag": f'"{_oid(files[name])}"'})
            else:
                self._send(b"", 404, found | {"X-Error-Code": "EntryNotFound"})
        else:
            self._send(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

    def _send(self, body, status=200, headers=()):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def _oid(content):
    return hashlib.sha1(content).hexdigest()


@contextmanager
def serve_hub(monkeypatch, files, commit=COMMIT):
    """Serve a model org/model to huggingface_hub; yield its server, which notes the requests."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.commit, server.requests = files, commit, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def downloads(server):
    """Return the names of the files that were sent, in order."""
    return [
        path.split("/", 4)[4]
        for method, path in server.requests
        if method == "GET" and "/resolve/" in path and path.split("/", 4)[4] in server.files
    ]
