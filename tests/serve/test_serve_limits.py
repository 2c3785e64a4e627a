"""Hostile and unlucky requests over a real socket, each answered as the table in SECURITY.md says."""

import json
import re
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from lora_sentiment.serve import messages
from tests.serve.fake_pool import FakePool, make_adapter, running

ROOT = Path(__file__).parents[2]
MIB = 2**20
CLOSED = (BrokenPipeError, ConnectionResetError)
HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def server():
    with running(
        FakePool(make_adapter("one"), make_adapter("two", "abc")),
        header_seconds=2.0,
        body_seconds=2.0,
    ) as found:
        yield found


def connect(server):
    host, port = server.address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=15)


def read(connection):
    """Read one answer: its status, its header, its body; (None, ..) where the server closed without one."""
    # A buffer would take bytes of the next answer along, if that is there already.
    with connection.makefile("rb", buffering=0) as file:
        try:
            line = file.readline()
        except ConnectionResetError:
            line = b""
        if not line:
            return None, {}, b""
        header = {}
        while (row := file.readline().decode().strip()) != "":
            name, _, value = row.partition(": ")
            header[name.lower()] = value
        body, length = b"", int(header.get("content-length", "0"))
        while len(body) < length and (more := file.read(length - len(body))):
            body += more
        return int(line.split()[1]), header, body


def send(connection, data):
    # Refused and closed already, perhaps; what was answered can still be read.
    with suppress(*CLOSED):
        connection.sendall(data)


def post(body, *, kind="application/json", path="/predict"):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        + data
    )


def get(path):
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


def chunked(body, *, head=HEAD):
    head += b"Transfer-Encoding: chunked\r\n\r\n"
    parts = [body[i : i + 65536] for i in range(0, len(body), 65536)]
    return head + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


BIG = b'{"texts": ["' + b"a" * 10 * MIB + b'"]}'
NUMBERS = b'{"texts": [' + b"1," * 500_000 + b"1]}"
INPUT_NUMBERS = b'{"inputs": [' + b"[1]," * 250_000 + b"[1]]}"
UNKNOWN_KEYS = {f"key{i}": 1 for i in range(60_000)}
# What was sent -> status, error_type; None where it is answered, or where there is no answer.
HOSTILE = {
    "a body of 10 MB": (post(BIG), 413, "TooLarge"),
    "a body of 10 MB without its length": (chunked(BIG), 413, "TooLarge"),
    "100,000 texts": (post({"texts": ["a"] * 100_000, "adapter": "one"}), 413, "TooLarge"),
    "500,000 numbers as texts": (post(NUMBERS), 422, "Validation"),
    "250,000 numbers as inputs": (post(INPUT_NUMBERS), 422, "Validation"),
    "100,000 inputs": (post({"inputs": [["a"]] * 100_000, "adapter": "one"}), 413, "TooLarge"),
    "300 words to explain": (post({"texts": ["a " * 300], "explain": True, "adapter": "one"}), 413, "TooLarge"),
    "256 words of 38 letters to explain, four times": (
        post({"texts": [f"{'a' * 38} " * 256] * 4, "explain": True, "adapter": "one"}), 413, "TooLarge",
    ),
    "JSON in UTF-16": (post('{"texts": ["a"], "adapter": "one"}'.encode("utf-16")), 200, None),
    "JSON in UTF-32": (post('{"texts": ["a"], "adapter": "one"}'.encode("utf-32-le")), 200, None),
    "bytes that are no UTF-8": (post(b'{"texts": ["\xff\xfe"]}'), 400, "Malformed"),
    "half of a surrogate pair": (post(b'{"texts": ["\\ud800"], "adapter": "one"}'), 422, "Validation"),
    "half of a surrogate pair as a key": (post(b'{"texts": ["a"], "\\ud800": 1}'), 422, "Validation"),
    "a null byte in the JSON": (post(b'{"texts": ["a\x00"]}'), 400, "Malformed"),
    "a null byte in a text": (post({"texts": ["a\x00b"], "adapter": "one"}), 200, None),
    "no JSON": (post(b"texts=a"), 400, "Malformed"),
    "an empty body": (post(b""), 400, "Malformed"),
    "100,000 brackets": (post(b"[" * 100_000), 400, "Malformed"),
    "a number of 100,000 digits": (post(b'{"texts": ["a"], "top_k": ' + b"9" * 100_000 + b"}"), 400, "Malformed"),
    "NaN": (post(b'{"texts": ["a"], "top_k": NaN}'), 422, "Validation"),
    "a form": (post(b"texts=a", kind="application/x-www-form-urlencoded"), 415, "UnsupportedMediaType"),
    "an unknown key": (post({"texts": ["a"], "adaptor": "one"}), 422, "Validation"),
    "60,000 unknown keys": (post(UNKNOWN_KEYS), 422, "Validation"),
    "60,000 unknown parameters": (
        post({"inputs": "a", "parameters": UNKNOWN_KEYS}), 422, "Validation",
    ),
    "a key of 1 MB": (post({"a" * 10**6: 1}), 422, "Validation"),
    "a pair of texts": (post({"inputs": ["a", "b"], "adapter": "one"}), 422, "Validation"),
    "<script> as a text": (post({"texts": ["<script>alert(1)</script>"], "adapter": "one"}), 200, None),
    "<script> as an adapter": (post({"texts": ["a"], "adapter": "<script>alert(1)</script>"}), 404, "NotFound"),
    "an unknown adapter": (post({"texts": ["a"], "adapter": "three"}), 404, "NotFound"),
    "a path as an adapter": (post({"texts": ["a"], "adapter": "../../etc/passwd"}), 404, "NotFound"),
    "a null byte as an adapter": (post({"texts": ["a"], "adapter": "one\x00"}), 404, "NotFound"),
    "a name of 500,000 letters": (post({"texts": ["a"], "adapter": "a" * 500_000}), 404, "NotFound"),
    "a path out of the page": (get("/../../../../etc/passwd"), 404, "NotFound"),
    "an escaped path out of the page": (get("/%2e%2e/%2e%2e/page.css/..%2f..%2fapp.py"), 404, "NotFound"),
    "a line break after a path": (post({"texts": ["a"], "adapter": "one"}, path="/predict%0a"), 404, "NotFound"),
    "another method": (b"DELETE /predict HTTP/1.1\r\nHost: x\r\n\r\n", 405, "MethodNotAllowed"),
    "a question whether other sites may ask": (
        b"OPTIONS /predict HTTP/1.1\r\nHost: x\r\nOrigin: http://y\r\nAccess-Control-Request-Method: POST\r\n\r\n",
        405, "MethodNotAllowed",
    ),
    "no HTTP": (b"\x16\x03\x01 hello\r\n\r\n", 400, "Malformed"),
    "a header of 100,000 bytes": (b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000, 400, "Malformed"),
    "a chunk without its length": (
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        400, "Malformed",
    ),
    "a length of 5,000 digits": (
        HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", 400, "Malformed",
    ),
    "a header that does not end": (b"GET / HTTP/1.1\r\nX-Slow: ", 408, "Timeout"),
    "a body that does not come": (
        HEAD + b"Content-Length: 100\r\n\r\n{", 408, "Timeout",
    ),
    "no request at all": (b"", None, None),
}  # fmt: skip


HF_HEAD = HEAD.replace(b"/predict", b"/?adapter=one")
BIG_INPUT = BIG.replace(b"texts", b"inputs")


def post_hf(body, *, path="/?adapter=one", **options):
    return post(body, path=path, **options)


# Those that another model checks in Hugging Face's shape, at `POST /`.
HOSTILE_HF = {
    "a body of 10 MB without its length": chunked(BIG_INPUT, head=HF_HEAD),
    "100,000 inputs": post_hf({"inputs": ["a"] * 100_000}),
    "250,000 numbers as inputs": post_hf(INPUT_NUMBERS),
    "half of a surrogate pair": post_hf(b'{"inputs": ["\\ud800"]}'),
    "NaN": post_hf(b'{"inputs": "a", "parameters": {"top_k": NaN}}'),
    "an unknown key": post_hf({"inputs": "a", "adapter": "one"}),
    "60,000 unknown parameters": post_hf({"inputs": "a", "parameters": UNKNOWN_KEYS}),
    "<script> as an adapter": post_hf({"inputs": "a"}, path="/?adapter=<script>"),
    "a null byte as an adapter": post_hf({"inputs": "a"}, path="/?adapter=one%00"),
    "a body that does not come": HF_HEAD + b"Content-Length: 100\r\n\r\n{",
}
REQUESTS = [(name, data) for name, (data, _, _) in HOSTILE.items()]
REQUESTS += HOSTILE_HF.items()


@pytest.mark.parametrize(("name", "data"), REQUESTS, ids=[name for name, _ in REQUESTS])
def test_a_hostile_request_is_answered_as_the_table_says(server, name, data):
    _, status, kind = HOSTILE[name]
    with connect(server) as connection:
        send(connection, data)
        found, header, body = read(connection)
    assert found == status, body
    if status is not None:
        assert header["content-type"] == "application/json"
        assert header["x-content-type-options"] == "nosniff"
        assert len(body) < 2000
        answer = json.loads(body)
        assert (answer["error_type"] if status != 200 else None) == kind
    with connect(server) as connection:
        connection.sendall(post({"texts": ["a"], "adapter": "one"}))
        assert read(connection)[0] == 200


@pytest.mark.parametrize("kind", [messages.AnyRequest, messages.HfRequest])
@pytest.mark.parametrize(
    "body",
    [
        json.loads(NUMBERS),
        json.loads(INPUT_NUMBERS),
        {"inputs": json.loads(NUMBERS)["texts"]},
        UNKNOWN_KEYS,
        {"inputs": "a", "parameters": UNKNOWN_KEYS},
    ],
    ids=["texts", "lists", "inputs", "keys", "parameters"],
)
def test_checking_a_body_stops_at_its_first_faults(kind, body):
    with pytest.raises(ValidationError) as refused:
        TypeAdapter(kind).validate_python(body)
    assert refused.value.error_count() <= 3


def test_the_security_page_has_the_same_table():
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    written = dict(re.findall(r"^\| (.+?) \| (\d{3}|closed)\b", page, flags=re.MULTILINE))
    assert {name: str(status or "closed") for name, (_, status, _) in HOSTILE.items()} == {
        name: written.get(name.replace("<script>", "`<script>`")) for name in HOSTILE
    }


def send_for_ever(connection, data, *, seconds):
    """Send again and again, for a minute at most."""
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        connection.sendall(data)
        time.sleep(seconds)


def test_a_sender_that_goes_on_after_it_was_refused_is_cut_off(server):
    with connect(server) as connection:
        connection.sendall(HEAD + b"Content-Length: 99999999\r\n\r\n")
        assert read(connection)[0] == 413
        with pytest.raises(CLOSED):
            send_for_ever(connection, b"a", seconds=0.05)


@pytest.mark.parametrize("path", ["/page.js", "/healthz"])
def test_a_client_that_reads_no_answers_is_cut_off(path):
    with running(FakePool(make_adapter("one")), header_seconds=1.0) as server:
        # The less the kernel takes, the sooner the server has answers that it cannot send.
        server._bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with connect(server) as connection:
            connection.settimeout(60)
            with pytest.raises(CLOSED):
                send_for_ever(connection, get(path) * 100, seconds=0)


def test_a_refused_body_leaves_the_connection_of_use(server):
    with connect(server) as connection:
        send(connection, post(BIG[: 2 * MIB]) + get("/healthz"))
        assert read(connection)[0] == 413
        assert read(connection)[0] == 200


def test_connections_beyond_the_most_are_closed_and_those_before_them_are_answered():
    with running(FakePool(make_adapter("one")), max_connections=3) as server:
        held = [connect(server) for _ in range(3)]
        time.sleep(0.2)
        with connect(server) as further:
            send(further, get("/healthz"))
            assert read(further)[0] is None
        for connection in held:
            connection.sendall(get("/healthz"))
            assert read(connection)[0] == 200
            connection.close()


@pytest.fixture(params=["/predict", "/"])
def path(request):
    """Either path that answers predictions."""
    return request.param


def ask(server, *texts, path="/predict"):
    """Send a request and return its connection."""
    connection = connect(server)
    key = "texts" if path == "/predict" else "inputs"
    connection.sendall(post({key: texts}, path=path))
    return connection


def ask_and_hold(server, pool, path="/predict"):
    """Send a request whose answer is held back. Return its connection as soon as it is computed."""
    pool.gate.clear()
    pool.begun.clear()
    connection = ask(server, "a", path=path)
    assert pool.begun.wait(20)
    return connection


def until(true):
    for _ in range(500):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it never came true")


def wait_for_tokens(server, num_tokens):
    until(lambda: server._app.state.queue.num_tokens == num_tokens)


def wait_for_requests(server, num_requests):
    line = f"lora_sentiment_requests_under_way {num_requests}.0\n".encode()

    def is_shown():
        with connect(server) as connection:
            connection.sendall(get("/metrics"))
            return line in read(connection)[2]

    until(is_shown)


def read_error(connection):
    status, _, body = read(connection)
    return status, json.loads(body)["error"]


STOPPED = (503, "the server stopped before it answered this request")


def test_overload_is_answered_429_at_once_with_a_time(path):
    pool = FakePool(make_adapter("one", max_length=512))
    with running(pool, max_queue_tokens=512, max_requests=3) as server:
        first = ask_and_hold(server, pool, path)
        second = ask(server, "a " * 500, path=path)
        wait_for_tokens(server, 502)
        with ask(server, "a " * 300, "a " * 300, path=path) as never:
            assert read(never)[0] == 413
        with ask(server, "a " * 100, path=path) as third:
            status, header, body = read(third)
            assert (status, header["retry-after"]) == (429, "1")
            assert b"502 tokens wait already and this request has at least 102" in body
            # Two are in progress. With a third, whose body is still coming, there is no room for a fourth.
            third.sendall(post({"texts": ["a"]})[:-1])
            wait_for_requests(server, 3)
            with ask(server, "a", path=path) as fourth:
                status, header, body = read(fourth)
            assert (status, header["retry-after"]) == (429, "1")
            assert b"3 predictions are in progress" in body
            third.sendall(b"}")
            pool.gate.set()
            assert [read(connection)[0] for connection in (first, second, third)] == [200] * 3


def make_slow(pool):
    """Let the tokenizer wait. Return an event that ends this, and the texts of each call."""
    release, calls = threading.Event(), []
    encoder = pool.adapters["one"].encoder
    tokenizer = encoder.tokenizer

    class Slow:
        def encode_batch(self, texts, **options):
            calls.append(texts)
            release.wait(20)
            return tokenizer.encode_batch(texts, **options)

    object.__setattr__(encoder, "tokenizer", Slow())
    return release, calls


def test_what_waits_to_be_tokenised_is_bounded_and_leaves_with_its_client(monkeypatch):
    monkeypatch.setattr("lora_sentiment.serve.answers.MAX_WAITING_CHARACTERS", 1000)
    pool = FakePool(make_adapter("one"))
    release, calls = make_slow(pool)
    with running(pool) as server:
        # Two threads tokenise, so the third request waits.
        first, second, third = ask(server, "first"), ask(server, "second"), ask(server, "third")
        wait_for_requests(server, 3)
        with ask(server, "a" * 1000) as fourth:
            status, header, _ = read(fourth)
            assert (status, header["retry-after"]) == (429, "1")
        third.close()
        wait_for_requests(server, 2)
        release.set()
        assert read(first)[0] == read(second)[0] == 200
    assert sorted(calls) == [["first"], ["second"]]


def test_a_stop_does_not_wait_for_what_is_still_read_or_looked_at(monkeypatch):
    monkeypatch.setattr("lora_sentiment.serve.app.WATCH_SECONDS", 0.01)
    pool = FakePool(make_adapter("one"))
    looking, looked = threading.Event(), threading.Event()
    release, calls = make_slow(pool)

    def look(is_stopped):
        looking.set()
        until(is_stopped)
        looked.set()

    pool.refresh = look
    with running(pool, stop_seconds=0.5, body_seconds=0.5) as server:
        first = ask(server, "a")
        assert looking.wait(10)
        until(lambda: calls)
        server.should_exit = True
        until(lambda: server._app.state.queue.abandoned)
        release.set()
        assert read_error(first) == STOPPED
    assert looked.is_set()


def test_a_deadline_that_passes_is_answered_504_and_its_texts_leave_the_line(path):
    pool = FakePool(make_adapter("one"))
    with running(pool, deadline_seconds=1.0) as server:
        first = ask_and_hold(server, pool, path)
        second = ask(server, *["a"] * 5, path=path)
        assert read(first)[0] == read(second)[0] == 504
        wait_for_tokens(server, 0)
        pool.gate.set()
    assert pool.batches == [1]


def test_the_texts_of_a_client_that_went_away_leave_the_line(path):
    pool = FakePool(make_adapter("one"))
    with running(pool) as server:
        first = ask_and_hold(server, pool, path)
        with ask(server, *["a"] * 5, path=path):
            wait_for_tokens(server, 15)
        wait_for_tokens(server, 0)
        pool.gate.set()
        assert read(first)[0] == 200
        wait_for_requests(server, 0)
    assert pool.batches == [1]


def test_a_stopping_server_answers_what_waits_and_refuses_what_comes():
    pool = FakePool(make_adapter("one"))
    with running(pool) as server:
        first, second, late = ask_and_hold(server, pool), ask(server, "a"), connect(server)
        late.sendall(post({"texts": ["a"]})[:-1])
        wait_for_requests(server, 3)
        server.should_exit = True
        until(lambda: server._app.state.queue.closed)
        late.sendall(b"}")
        assert read_error(late) == (503, "the server is stopping and takes no new requests")
        pool.gate.set()
        assert read(first)[0] == read(second)[0] == 200


def test_a_second_signal_gives_up_what_waits_unless_it_is_the_first_passed_on():
    pool = FakePool(make_adapter("one"))
    with running(pool) as server:
        first, second = ask_and_hold(server, pool), ask(server, "a")
        wait_for_tokens(server, 3)
        server.handle_exit(signal.SIGINT, None)
        server.handle_exit(signal.SIGINT, None)
        until(lambda: server._app.state.queue.closed)
        wait_for_tokens(server, 3)
        server._stopped_at -= 2
        server.handle_exit(signal.SIGINT, None)
        assert read_error(first) == read_error(second) == STOPPED
        pool.gate.set()


def test_a_stop_ends_in_time_whatever_waits():
    pool = FakePool(make_adapter("one"))
    started = time.monotonic()
    with running(pool, stop_seconds=0.5, body_seconds=0.5) as server:
        first, second = ask_and_hold(server, pool), ask(server, "a")
        wait_for_tokens(server, 3)
        server.should_exit = True
        assert read_error(first) == read_error(second) == STOPPED
        pool.gate.set()
    assert time.monotonic() - started < 10
