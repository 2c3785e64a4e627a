"""A Hub on 127.0.0.1 for tests: a few files by name, and the answers that a real one refuses with."""

import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, bytes]
COMMIT = "a" * 40


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repositories: dict[str, dict[str, Files]]
    refusals: dict[str, tuple[int, str]]

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
        """Return a repository's files, or None where it has been refused."""
        if name in self.refusals:
            return self.refuse(*self.refusals[name])
        if name not in self.repositories[kind]:
            return self.refuse(404, "RepoNotFound")
        if revision not in ("main", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        return self.repositories[kind][name]

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            files = self.find("datasets" if found[1] else "models", found[2], found[3])
            if files is not None and found[4] not in files:
                self.refuse(404, "EntryNotFound")
            elif files is not None:
                data = files[found[4]]
                tags = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
                self.reply(200, data, tags)
        elif found := re.fullmatch(
            r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path
        ):
            files = self.find(*found.groups()[:3])
            if files is not None:
                self.reply(200, [self.entry(files, name) for name in files])
        elif found := re.fullmatch(
            r"/api/(models|datasets)/([^/]+/[^/]+?)(?:/revision/([^/]+))?", path
        ):
            files = self.find(found[1], found[2], found[3] or "main")
            if files is not None:
                siblings = [{"rfilename": name} for name in files]
                self.reply(
                    200,
                    {
                        "id": found[2],
                        "sha": COMMIT,
                        "private": False,
                        "siblings": siblings,
                        "tags": [],
                    },
                )
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
    *, models: dict[str, Files], datasets: dict[str, Files], refusals: dict[str, tuple[int, str]]
):
    """Serve repositories, and refuse some names with a status and error code; yields the address."""
    names = {"repositories": {"models": models, "datasets": datasets}, "refusals": refusals}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), names))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
