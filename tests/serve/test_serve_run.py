"""`lora-sentiment serve`: what it refuses to start with, and the real thing from start to stop."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from pydantic import SecretStr

from lora_sentiment import load
from lora_sentiment.errors import ModelError, RecipeError
from lora_sentiment.serve.config import Limits, ServeConfig, make_config
from lora_sentiment.serve.run import Server, bind, serve
from tests.serve.fake_pool import FakePool, make_adapter

HERE = (Path("x"),)


def ask(address, path, **body):
    data = json.dumps(body).encode() if body else None
    with urlopen(
        Request(address + path, data, {"Content-Type": "application/json"}), timeout=60
    ) as response:
        return response.read().decode()


def test_requests_that_wait_when_the_server_is_told_to_stop_are_answered_and_it_ends_well(
    toy_adapter, tmp_path
):
    command = [sys.executable, "-m", "lora_sentiment.cli", "serve", toy_adapter, "--port", "0"]
    # What is asked waits for half a minute, unless the server is told to stop.
    command += ["--limit", "batch_wait_ms=30000", "--no-access-log"]
    with (tmp_path / "log").open("w+") as log:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        server = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
        address = server.stdout.readline().strip()
        texts = ["a good film", "a bad meal", "the awful place was so dull and cold", "lovely"]
        with ThreadPoolExecutor(4) as threads:
            asked = [
                threads.submit(ask, address, "/predict", texts=[text], top_k=2) for text in texts
            ]
            while "lora_sentiment_requests_under_way 4.0" not in ask(address, "/metrics"):
                assert not any(row.done() for row in asked)
            server.send_signal(signal.SIGTERM)
            answers = [json.loads(row.result()) for row in asked]
        assert server.wait(60) == 0
        log.seek(0)
        said = log.read()
    for expected, answer in zip(load(toy_adapter).predict(texts), answers, strict=True):
        (found,) = answer["predictions"]
        assert found["label"] == expected.label
        assert {row["label"]: row["score"] for row in found["top_k"]} == pytest.approx(
            expected.scores, abs=1e-5
        )
    assert address.startswith("http://127.0.0.1:")
    assert "stopping: " in said
    assert "Traceback" not in said


class WarmingPool(FakePool):
    """Notes in which thread it is warmed up, and in which it computes, and who can connect meanwhile."""

    def __init__(self, port):
        super().__init__(make_adapter("one"))
        self.port = port
        self.threads = []
        self.refused = False

    def warm_up(self, *, batch_tokens):
        super().warm_up(batch_tokens=batch_tokens)
        self.threads.append(threading.current_thread().name)
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
        except ConnectionRefusedError:
            self.refused = True

    def compute(self, served, encoded):
        self.threads.append(threading.current_thread().name)
        return super().compute(served, encoded)


def test_nobody_can_connect_before_the_thread_that_computes_is_warmed_up():
    config = ServeConfig(watch=Path("x"), port=0, limits=Limits(batch_tokens=777))
    bound = bind(config)
    pool = WarmingPool(bound.getsockname()[1])
    ready = threading.Event()
    server = Server(pool, config, bound, announce=lambda address: ready.set())
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert ready.wait(20)
        assert pool.warmed == 777
        assert pool.refused
        ask(server.address, "/readyz")
        ask(server.address, "/predict", texts=["good"])
        assert len(pool.threads) == 2
        assert len(set(pool.threads)) == 1
    finally:
        server.should_exit = True
        thread.join(20)


def test_what_goes_wrong_while_warming_up_ends_the_start(monkeypatch):
    pool = FakePool(make_adapter("one"))

    def run_out(*, batch_tokens):
        raise ModelError("serve: memory ran out")

    monkeypatch.setattr(pool, "warm_up", run_out)
    monkeypatch.setattr("lora_sentiment.serve.pool.load_pool", lambda *args, **options: pool)
    with pytest.raises(ModelError, match="memory ran out"):
        serve(
            ServeConfig(watch=Path("x"), port=0),
            announce=lambda address: pytest.fail("it said ready"),
        )


def test_an_address_that_others_can_reach_needs_a_key_or_a_word():
    with pytest.raises(
        RecipeError, match="can be reached from other machines: give --api-key-file"
    ):
        bind(ServeConfig(adapters=HERE, host="0.0.0.0", port=0))
    bind(ServeConfig(adapters=HERE, host="0.0.0.0", port=0, no_api_key=True)).close()
    bind(
        ServeConfig(adapters=HERE, host="0.0.0.0", port=0, api_key=SecretStr("0123456789abcdef"))
    ).close()
    bind(ServeConfig(adapters=HERE, host="localhost", port=0)).close()


def test_a_port_that_is_taken_is_refused_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            RecipeError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"
        ):
            bind(ServeConfig(adapters=HERE, port=port))
    with pytest.raises(RecipeError, match=r"cannot listen on no\.such\.host\.invalid:0"):
        bind(ServeConfig(adapters=HERE, host="no.such.host.invalid", port=0))


def test_of_two_servers_that_start_at_once_the_slower_one_is_refused():
    pool = FakePool(make_adapter("one"))
    with bind(ServeConfig(watch=Path("x"), port=0)) as faster:
        port = faster.getsockname()[1]
        config = ServeConfig(watch=Path("x"), port=port)
        slower = bind(config)  # which the system allows until one of them listens
        faster.listen()
        server = Server(pool, config, slower, announce=lambda _: pytest.fail("it said ready"))
        with pytest.raises(
            RecipeError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"
        ):
            server.run()
        slower.close()


def test_limits_are_named_on_the_command_line_and_a_wrong_one_is_refused_by_name():
    found = make_config(
        ["max_texts=3", "batch_wait_ms=0.5", "on_long=refuse"], adapters=HERE
    ).limits
    assert found == Limits(max_texts=3, batch_wait_ms=0.5, on_long="refuse")
    for given, message in (
        ("max_text=3", "did you mean 'max_texts'"),
        ("max_texts", "expected NAME=VALUE"),
        ("max_texts=0", "max_texts: Input should be greater than or equal to 1"),
        ("max_texts=many", "max_texts: Input should be a valid integer"),
        ("deadline_seconds=inf", "deadline_seconds: Input should be"),
        ("on_long=drop", "on_long: Input should be 'truncate' or 'refuse'"),
    ):
        with pytest.raises(RecipeError, match=message):
            make_config([given], adapters=HERE)
    with pytest.raises(RecipeError, match="name adapter folders, or a folder to --watch"):
        make_config([])


def test_a_key_is_read_from_a_file_and_shown_nowhere(tmp_path):
    path = tmp_path / "key"
    path.write_text("0123456789abcdef-\n")
    config = make_config([], adapters=HERE, api_key_file=path)
    assert config.api_key.get_secret_value() == "0123456789abcdef-"
    assert "0123456789" not in repr(config)
    for content in (
        "",
        "short",
        "0123456789 abcdef",
        "0123456789abcdef\n0123456789abcdef",
        "0123456789abcdefé",
    ):
        path.write_text(content)
        with pytest.raises(RecipeError, match="--api-key-file") as refused:
            make_config([], adapters=HERE, api_key_file=path)
        assert "0123456789" not in str(refused.value)
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        make_config([], adapters=HERE, api_key_file=tmp_path / "nothing")


def test_without_the_extra_one_line_says_what_to_install(tmp_path):
    (tmp_path / "uvicorn.py").write_text("raise ModuleNotFoundError(\"No module named 'uvicorn'\")")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
    done = subprocess.run(
        [sys.executable, "-m", "lora_sentiment.cli", "serve", "x"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "error: serve needs an extra (No module named 'uvicorn'): pip install 'lora_sentiment[serve]'\n"
    )
