"""A Hub on 127.0.0.1 for tests: files by name, and the answers with which a real Hub refuses."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
import pytest
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils._http import default_client_factory

from lora_sentiment import hub

Files = dict[str, bytes]
Refusal = tuple[int, str] | tuple[int, str, str]
"""HTTP status, the Hub's error code, and a message."""
COMMIT = "a" * 40


@contextmanager
def point_clients(address: str, cache: Path | None = None) -> Iterator[None]:
    """Let the Hub's clients of this process ask an address, and use a cache of their own if given."""
    with pytest.MonkeyPatch.context() as patch:
        files = address + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "ENDPOINT", address)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        patch.setattr(datasets.config, "HF_ENDPOINT", address)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        patch.setattr(hub, "_no_answer", None)
        if cache:
            patch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
            patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache / "datasets"))
        set_client_factory(default_client_factory)
        yield
        set_client_factory(default_client_factory)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repositories: dict[str, dict[str, Files]]
    refusals: dict[str, Refusal]

    def log_message(self, *_):
        """Say nothing."""

    def reply(self, status, body=b"", headers=None):
        self.send_response(status)
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code, message="no"):
        self.reply(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def find(self, kind, name, revision="main"):
        """Return a repository's files, or None after a refusal."""
        if name in self.refusals:
            return self.refuse(*self.refusals[name])
        if name not in self.repositories[kind]:
            return self.refuse(404, "RepoNotFound")
        if revision not in ("main", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        return self.repositories[kind][name]

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if file := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.reply_with_file("datasets" if file[1] else "models", file[2], file[3], file[4])
        elif tree := re.fullmatch(
            r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path
        ):
            files = self.find(*tree.groups()[:3])
            if files is not None:
                self.reply(200, [self.entry(files, name) for name in files])
        elif info := re.fullmatch(
            r"/api/(models|datasets)/([^/]+/[^/]+?)(?:/revision/([^/]+))?", path
        ):
            files = self.find(info[1], info[2], info[3] or "main")
            if files is not None:
                facts = {"id": info[2], "sha": COMMIT, "private": False, "tags": []}
                self.reply(200, {**facts, "siblings": [{"rfilename": name} for name in files]})
        else:
            self.refuse(404 if path != "/" else 200, "EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = re.fullmatch(
            r"/api/(models|datasets)/([^/]+/[^/]+)/paths-info/([^/]+)", urlsplit(self.path).path
        )
        files = self.find(*found.groups()) if found else self.refuse(404, "EntryNotFound")
        if files is not None:
            as_json = "json" in (self.headers.get("Content-Type") or "")
            wanted = (
                json.loads(body)["paths"] if as_json else parse_qs(body.decode()).get("paths", [])
            )
            self.reply(200, [self.entry(files, name) for name in wanted if name in files])

    def reply_with_file(self, kind, name, revision, file):
        files = self.find(kind, name, revision)
        if files is None:
            return
        if file not in files:
            self.refuse(404, "EntryNotFound")
            return
        tag = hashlib.sha256(files[file]).hexdigest()
        self.reply(200, files[file], {"X-Repo-Commit": COMMIT, "ETag": f'"{tag}"'})

    @staticmethod
    def entry(files, name):
        return {
            "type": "file",
            "path": name,
            "size": len(files[name]),
            "oid": hashlib.sha1(files[name]).hexdigest(),
        }


@contextmanager
def serve(
    *, models: dict[str, Files], datasets: dict[str, Files], refusals: dict[str, Refusal]
) -> Iterator[str]:
    """Serve repositories, and refuse some names; yields the address."""
    names = {"repositories": {"models": models, "datasets": datasets}, "refusals": refusals}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), names))
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
