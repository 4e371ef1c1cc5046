"""An object store for tests: moto's S3 server behind a proxy that logs requests and injects faults.

Its objects are also there for plain HTTP and, as far as downloads go, for Google's client.
"""

import http.client
import logging
import socket
import threading
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from moto.server import ThreadedMotoServer

BUCKET = "shards"
_CHUNK = 1 << 16
_HOP_BY_HOP = ("connection", "transfer-encoding", "keep-alive", "content-length", "server", "date")
_S3_CODES = {403: "AccessDenied", 404: "NoSuchKey", 500: "InternalError", 503: "SlowDown"}
# moto serves private objects to whoever signs, and checks no signature
_SIGNED = {"Authorization": "AWS4-HMAC-SHA256 Credential=test/20250101/us-east-1/s3/aws4_request"}
_GCS_DOWNLOAD = "/download/storage/v1/b/"


@dataclass
class Fault:
    """What happens to one download of an object."""

    status: int = 0
    """Answer this instead of the object."""
    cut_at: int | None = None
    """Close the connection after so many bytes of the body."""
    stall_at: int | None = None
    """Send nothing more after so many bytes of the body, before the first header with -1, until `go` is set."""
    reached: threading.Event = field(default_factory=threading.Event)
    """Set when the fault shows."""
    go: threading.Event = field(default_factory=threading.Event)


@dataclass
class Request:
    """A request and how far it was answered."""

    method: str
    key: str
    status: int = 0
    sent: int = 0
    """Bytes of the body that were handed out."""


class ObjectStore:
    """A bucket whose downloads can be made to fail."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._moto.start()
        self._backend = "{}:{}".format(*self._moto.get_host_and_port())
        self._faults: dict[str, deque[Fault]] = defaultdict(deque)
        self._given: list[Fault] = []
        self.requests: list[Request] = []
        self._proxy = _Proxy(("127.0.0.1", 0), _handler(self))
        threading.Thread(target=self._proxy.serve_forever, daemon=True, kwargs={"poll_interval": 0.02}).start()
        self.endpoint = f"http://127.0.0.1:{self._proxy.server_address[1]}"
        # moto's objects outlive its servers
        self._send("POST", "/moto-api/reset", b"")
        self._send("PUT", f"/{BUCKET}", b"")

    def environment(self) -> dict[str, str]:
        """What s3fs and gcsfs need to find it."""
        return {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
            "STORAGE_EMULATOR_HOST": self.endpoint,
            "FSSPEC_GS_TOKEN": "anon",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def url(self, key: str, protocol: str = "s3") -> str:
        """URL of an object: `s3`, `gs` or `http`."""
        return f"{self.endpoint}/{BUCKET}/{key}" if protocol == "http" else f"{protocol}://{BUCKET}/{key}"

    def put(self, key: str, content: bytes) -> str:
        """Store an object; its `s3://` URL."""
        self._send("PUT", f"/{BUCKET}/{key}", content)
        return self.url(key)

    def fail(self, key: str, status: int, times: int = 1) -> None:
        """Answer the next downloads of an object with an error's status."""
        self._add(key, *(Fault(status=status) for _ in range(times)))

    def cut(self, key: str, after: int, times: int = 1) -> None:
        """Close the connection of the next downloads after so many bytes."""
        self._add(key, *(Fault(cut_at=after) for _ in range(times)))

    def stall(self, key: str, after: int, status: int = 0) -> Fault:
        """Stop sending the next download after so many bytes (-1: before it begins) until `go` of the result is set.

        A status makes the answer that error's.
        """
        fault = Fault(status=status, stall_at=after)
        self._add(key, fault)
        return fault

    def downloads(self, key: str) -> list[Request]:
        """Requests for an object's content."""
        return [request for request in list(self.requests) if request.method == "GET" and request.key == key]

    def clear(self) -> None:
        """Forget faults and requests; what is stalled goes on."""
        for fault in self._given:
            fault.go.set()
        self._given.clear()
        self._faults.clear()
        self.requests.clear()

    def close(self) -> None:
        """Stop the servers."""
        self.clear()
        self._proxy.shutdown()
        self._proxy.server_close()
        self._moto.stop()

    def _add(self, key: str, *faults: Fault) -> None:
        self._faults[key].extend(faults)
        self._given.extend(faults)

    def _send(self, method: str, path: str, body: bytes) -> None:
        connection = http.client.HTTPConnection(self._backend)
        connection.request(method, path, body, _SIGNED)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        connection.close()


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients go away as they like."""


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """A store that is closed at the end."""
    store = ObjectStore()
    try:
        yield store
    finally:
        store.close()


def _handler(store: ObjectStore) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            path, key = _path_and_key(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            request = Request(self.command, key)
            store.requests.append(request)
            faults = store._faults[key]
            fault = faults.popleft() if self.command == "GET" and key and faults else Fault()
            if fault.stall_at == -1:
                fault.reached.set()
                fault.go.wait()
            if fault.status:
                fault.reached.set()
                request.status, headers, content = fault.status, {}, _error(fault.status)
            else:
                request.status, headers, content = self._ask_moto(path, body)
            self._send(request, headers, content, fault)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer

        def _ask_moto(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
            connection = http.client.HTTPConnection(store._backend)
            connection.request(self.command, path, body, _SIGNED | dict(self.headers))
            answer = connection.getresponse()
            headers = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP_BY_HOP}
            if self.command == "HEAD":
                headers["Content-Length"] = answer.headers["Content-Length"] or "0"
            content = answer.read()
            connection.close()
            return answer.status, headers, content

        def _send(self, request: Request, headers: dict[str, str], content: bytes, fault: Fault) -> None:
            marks = {at for at in (fault.cut_at, fault.stall_at) if at is not None}
            try:
                self.send_response(request.status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if request.method != "HEAD":
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                while request.method != "HEAD":
                    if request.sent in marks:
                        fault.reached.set()
                    if request.sent == fault.stall_at:
                        fault.go.wait()
                    if request.sent == fault.cut_at:
                        # a forked process may hold the socket, too
                        self.connection.shutdown(socket.SHUT_RDWR)
                        self.close_connection = True
                        break
                    if request.sent == len(content):
                        break
                    begin, end = request.sent, min(len(content), request.sent + _CHUNK)
                    # counted before the client can have it
                    request.sent = min([end, *(mark for mark in marks if mark > begin)])
                    self.wfile.write(content[begin : request.sent])
            except OSError:  # the client went away
                self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    return Handler


def _path_and_key(target: str) -> tuple[str, str]:
    """Path for moto, and the object's key, of a request by path-style S3, plain HTTP or Google's download."""
    parts = urlsplit(target)
    if parts.path.startswith(_GCS_DOWNLOAD):
        bucket, _, key = parts.path.removeprefix(_GCS_DOWNLOAD).partition("/o/")
        return f"/{bucket}/{unquote(key)}", unquote(key)
    return target, unquote(parts.path.removeprefix(f"/{BUCKET}").lstrip("/"))


def _error(status: int) -> bytes:
    code = _S3_CODES.get(status, "Unknown")
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
