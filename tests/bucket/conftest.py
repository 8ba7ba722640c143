"""Google Cloud Storage's JSON API as far as gcsfs and TensorStore use it, served by this process from its memory.

https://docs.cloud.google.com/storage/docs/json_api/v1/objects
"""

import base64
import contextlib
import hashlib
import importlib.util
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

BUCKET = "bucket"


@dataclass(frozen=True)
class Object:
    """One generation of an object."""

    content: bytes
    generation: int
    metageneration: int = 1

    def resource(self, name: str) -> dict[str, Any]:
        return {
            "kind": "storage#object",
            "bucket": BUCKET,
            "name": name,
            "size": str(len(self.content)),
            "md5Hash": base64.b64encode(hashlib.md5(self.content).digest()).decode(),
            "generation": str(self.generation),
            "metageneration": str(self.metageneration),
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
        }


class Refused(Exception):
    """A request that gets this status."""


class Storage:
    """The objects of a bucket by name; a request takes effect as a whole."""

    Refused = Refused

    def __init__(self):
        self.objects: dict[str, Object] = {}
        self.requests: list[str] = []
        """"METHOD name" of every request, in order"""
        self.before: Callable[[str], None] = lambda request: None
        """called with each of them before it takes effect; it may raise Refused"""
        self.lock = threading.RLock()
        self._generations = 0
        self._uploads: dict[str, tuple[str, dict[str, str], bytearray]] = {}

    def put(self, name: str, content: bytes, match: str | None = None) -> dict[str, Any]:
        self._check(name, match)
        self._generations += 1
        self.objects[name] = Object(bytes(content), self._generations)
        return self.objects[name].resource(name)

    def names(self, prefix: str = "") -> list[str]:
        with self.lock:
            return sorted(name for name in self.objects if name.startswith(prefix))

    def _check(self, name: str, match: str | None) -> None:
        there = self.objects[name].generation if name in self.objects else 0
        if match is not None and int(match) != there:
            raise Refused(412)

    def _get(self, name: str) -> Object:
        if name not in self.objects:
            raise Refused(404)
        return self.objects[name]

    def answer(self, method: str, path: str, query: dict[str, str], headers: Any, body: bytes):
        """Status, headers and body of the answer."""
        match = query.get("ifGenerationMatch")
        if path == f"/storage/v1/b/{BUCKET}":
            return 200, {}, {"kind": "storage#bucket", "name": BUCKET}
        if path == f"/storage/v1/b/{BUCKET}/o":
            return 200, {}, self._list(query)
        if path.startswith("/upload/"):
            return self._upload(method, query, headers, body)
        found = re.fullmatch(rf"(?:/download)?/storage/v1/b/{BUCKET}/o/([^/]+)(?:/(.*))?", path)
        if not found:
            raise Refused(404)
        name, action = unquote(found[1]), found[2]
        if action and (copy := re.fullmatch(rf"rewriteTo/b/{BUCKET}/o/(.+)", action)):
            return 200, {}, {"done": True, "resource": self.put(unquote(copy[1]), self._get(name).content)}
        there = self._get(name)
        self._check(name, match)
        if query.get("ifMetagenerationMatch", str(there.metageneration)) != str(there.metageneration):
            raise Refused(412)
        if method == "DELETE":
            del self.objects[name]
            return 204, {}, b""
        if method == "PATCH":
            self.objects[name] = Object(there.content, there.generation, there.metageneration + 1)
            return 200, {}, self.objects[name].resource(name)
        if query.get("alt") != "media":
            return 200, {}, there.resource(name)
        if query.get("ifGenerationNotMatch") == str(there.generation):
            raise Refused(304)
        return self._read(there, headers.get("Range"))

    def _list(self, query: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        items, prefixes = [], {}
        for name in self.names(prefix):
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes[prefix + rest.split(delimiter)[0] + delimiter] = None
            elif query.get("startOffset", "") <= name and (name < query.get("endOffset", "\U0010ffff")):
                items.append(self.objects[name].resource(name))
        return {"kind": "storage#objects", "items": items, "prefixes": list(prefixes)}

    def _read(self, there: Object, span: str | None):
        size, told = len(there.content), {"X-Goog-Generation": str(there.generation)}
        if span is None:
            return 200, told, there.content
        first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", span).groups()
        start = int(first) if first else max(size - int(last), 0)
        stop = min(int(last) + 1, size) if first and last else size
        if start >= size:
            raise Refused(416)
        return 206, {**told, "Content-Range": f"bytes {start}-{stop - 1}/{size}"}, there.content[start:stop]

    def _upload(self, method: str, query: dict[str, str], headers: Any, body: bytes):
        match = query.get("ifGenerationMatch")
        if "upload_id" in query:  # a part of a resumable upload
            name, first, content = self._uploads[query["upload_id"]]
            content += body
            if headers["Content-Range"].endswith("/*"):
                return 308, {"Range": f"bytes=0-{len(content) - 1}"}, b""
            return 200, {}, self.put(name, content, first.get("ifGenerationMatch"))
        if query["uploadType"] == "media":
            return 200, {}, self.put(query["name"], body, match)
        if query["uploadType"] == "resumable":
            number = str(len(self._uploads))
            self._uploads[number] = query.get("name") or json.loads(body)["name"], query, bytearray()
            place = f"http://{headers['Host']}/upload/storage/v1/b/{BUCKET}/o?upload_id={number}"
            return 200, {"Location": place}, b""
        boundary = re.search('boundary="?([^"]+)"?', headers["Content-Type"])[1].encode()
        _, told, content, _ = body.split(b"--" + boundary)
        name = json.loads(told.split(b"\n\n", 1)[1])["name"]
        return 200, {}, self.put(name, content.split(b"\n\n", 1)[1].removesuffix(b"\n"), match)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    storage: ClassVar[Storage]
    disable_nagle_algorithm = True

    def answer(self):
        address = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(address.query, keep_blank_values=True).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = f"{self.command} {unquote(address.path).rpartition('/o/')[2]} {query.get('name', '')}".strip()
        with self.storage.lock:
            try:
                self.storage.requests.append(request)
                self.storage.before(request)
                status, headers, content = self.storage.answer(self.command, address.path, query, self.headers, body)
            except Refused as refused:
                (status,), headers, content = refused.args, {}, b"{}"
        content = json.dumps(content).encode() if isinstance(content, dict) else content
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        with contextlib.suppress(ConnectionError):  # gcsfs asks two things at a time, and leaves with the first answer
            self.end_headers()
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

    def log_message(self, format, *args):
        del format, args


@pytest.fixture(scope="session")
def server():
    """The address of the storage, and the class that answers."""
    if not importlib.util.find_spec("gcsfs"):  # not imported yet: it reads the environment once
        pytest.skip("needs gcsfs: pip install -e '.[gcs]'")

    class Mine(Handler):
        storage = Storage()

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request, client_address):
            """Who asked has gone, or was killed."""

    with Server(("127.0.0.1", 0), Mine) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}", Mine
        listening.shutdown()


@pytest.fixture(scope="session")
def environment(server):
    """What sends gcsfs and TensorStore to the emulator, set for all tests that follow: both read it but once."""
    variables = {
        "STORAGE_EMULATOR_HOST": server[0],
        "TENSORSTORE_GCS_HTTP_URL": server[0],
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it asks by gRPC of what kind a bucket is
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield variables


@pytest.fixture
def storage(server, environment) -> Storage:
    """An empty bucket, gs://bucket."""
    server[1].storage = Storage()
    return server[1].storage
