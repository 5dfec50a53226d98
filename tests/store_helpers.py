"""An S3-compatible server on this machine, which counts requests and fails on demand."""

import os
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from mae_jax.utils import remote
from mae_jax.utils.remote import RemotePath

SECRET = "the-secret-of-the-tests"
BUCKET = "s3://bucket"


class Server:
    """moto's server, with the requests it got and the answers it is to give instead.

    requests: method, path and Range header; faults: HTTP status codes for the next requests of
    `methods` whose path has `where` in it.
    """

    def __init__(self):
        self.requests, self.faults, self.methods, self.where = [], [], ("GET",), ""
        self._app = DomainDispatcherApplication(create_backend_app)

    def fail(self, *faults: int, methods: tuple[str, ...] = ("GET",), where: str = "") -> None:
        self.faults, self.methods, self.where = list(faults), methods, where

    def __call__(self, environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path, environ.get("HTTP_RANGE", "")))
        if self.faults and method in self.methods and self.where in path:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response(f"{self.faults.pop(0)} Fault", [("Content-Length", "0")])
            return [b""]
        return self._app(environ, start_response)


@contextmanager
def serving():
    """Run the server with a bucket, where the environment names it."""
    server = Server()
    listener = make_server("127.0.0.1", 0, server, threaded=True)
    thread = threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.server_port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "tests")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setattr(remote, "FIRST_PAUSE_S", 0.0)
        remote._store.cache_clear()
        thread.start()
        try:
            remote._store("s3", os.getpid()).makedirs("bucket", exist_ok=True)
            yield server
        finally:
            listener.shutdown()
            thread.join()
            listener.server_close()
            remote._store.cache_clear()


def upload_folder(folder: Path, address: str) -> None:
    """Copy the files of a folder to an object store."""
    for file in folder.rglob("*"):
        if file.is_file():
            (RemotePath(address) / file.relative_to(folder)).upload(file)
