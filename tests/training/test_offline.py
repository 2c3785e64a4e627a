"""Where no Hub answers: the cache, else the bundled parts if the recipe says so; an answer changes nothing."""

import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import datasets
import pytest
from accelerate import PartialState
from httpx2 import ConnectError, RemoteProtocolError
from huggingface_hub import close_session, constants

from lora_sentiment import hub
from lora_sentiment.adapter.merge import merge
from lora_sentiment.classifier import load
from lora_sentiment.commands.evaluate import evaluate
from lora_sentiment.commands.sweep import make_trials
from lora_sentiment.data.sources import find_source
from lora_sentiment.errors import DataError, LoraSentimentError, ModelError
from lora_sentiment.hub import Answer, ask_hub
from lora_sentiment.models import load as base
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.training import offline
from lora_sentiment.training.offline import settle

ROOT = Path(__file__).parents[2]
NOWHERE = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def state() -> PartialState:
    return PartialState(cpu=True)


@pytest.fixture
def endpoint(monkeypatch):
    """Point the Hub's client at an address, online; what it is told is forgotten afterwards."""

    def point(address: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        files = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "_unanswered", None)
        close_session()

    yield point
    close_session()


@pytest.fixture
def answering():
    """A server that answers every request with one status."""
    servers = []

    def serve(status: int) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):  # the name is the base class's
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_CONNECT = do_GET = do_POST = do_HEAD

            def log_message(self, *args):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def recipe(*overrides: str) -> Recipe:
    return Recipe.load(
        ROOT / "recipes/imdb_lora.yaml",
        ["model.name=nobody/base", "data.source=nobody/rows", *overrides],
    )


@pytest.mark.parametrize("status", [200, 401, 403, 404, 500, 503])
def test_any_answer_leaves_the_recipe_as_it_is(state, endpoint, answering, status):
    endpoint(answering(status))
    asked = recipe()
    assert settle(asked, state) == (asked, None)
    assert not constants.HF_HUB_OFFLINE


def test_a_recipe_that_names_nothing_on_the_hub_asks_nothing(state, toy_recipe, monkeypatch):
    monkeypatch.setattr(offline, "ask_hub", lambda: pytest.fail("the Hub was asked"))
    for asked in (Recipe.load(toy_recipe), Recipe.load(ROOT / "recipes/quickstart.yaml")):
        assert settle(asked, state) == (asked, None)


def test_where_nothing_answers_the_bundled_parts_stand_in_and_write_elsewhere(
    state, endpoint, caplog
):
    endpoint(NOWHERE)
    own = ("data.labels=[neg, pos]", "data.max_train_rows=9", "data.revision=v2")
    found, stand_in = settle(
        recipe(*own, "data.clean=false", "data.split_seed=3", "train.seed=7"), state
    )
    assert (found.data.source, found.model.name) == ("bundled", "bundled")
    assert (found.name, found.folder) == ("imdb_lora-offline", Path("adapters/imdb_lora-offline"))
    assert (found.data.labels, found.data.max_train_rows) == (None, None), "of other rows"
    assert (found.data.clean, found.data.split_seed) == (False, 3), "of any rows"
    assert found.train == recipe("train.seed=7").train
    assert stand_in is not None
    assert (stand_in["data.source"], stand_in["model.name"]) == ("nobody/rows", "nobody/base")
    assert "ConnectError" in stand_in["reason"]
    asked = 'data.source nobody/rows, model.name nobody/base, data.revision v2, data.labels ["neg", "pos"]'
    assert f"NOT what the recipe asks for ({asked}, data.max_train_rows 9)" in caplog.text


def test_offline_mode_counts_as_no_answer(state):
    assert constants.HF_HUB_OFFLINE, "the tests run offline"
    _, stand_in = settle(recipe(), state)
    assert stand_in is not None
    assert "HF_HUB_OFFLINE" in stand_in["reason"]


def test_a_recipe_that_does_not_say_bundled_stops_and_names_what_is_missing(state, endpoint):
    endpoint(NOWHERE)
    with pytest.raises(
        DataError, match=r"no Hub answers .*data.source 'nobody/rows', model.name 'nobody/base'; .*"
    ):
        settle(recipe("offline=error"), state)


def test_what_is_in_the_cache_is_used_and_said(state, endpoint, monkeypatch, caplog):
    endpoint(NOWHERE)
    monkeypatch.setattr(offline, "find_source", lambda config: None)
    monkeypatch.setattr(offline, "_find_base", lambda model: None)
    asked = recipe()
    assert settle(asked, state) == (asked, None)
    assert "what is in the cache is used" in caplog.text
    assert constants.HF_HUB_OFFLINE, "no client asks again"


@pytest.mark.parametrize("tokenizer", ["tokenizer.json", "vocab.txt", "README.md"])
def test_a_cached_base_needs_one_file_of_a_tokenizer(
    state, endpoint, monkeypatch, tmp_path, tokenizer
):
    endpoint(NOWHERE)
    monkeypatch.setattr(offline, "find_source", lambda config: None)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    held = tmp_path / "models--nobody--base"
    (held / "refs").mkdir(parents=True)
    (held / "refs/main").write_text("1" * 40)
    (held / f"snapshots/{'1' * 40}").mkdir(parents=True)
    for file in ("config.json", "model.safetensors", tokenizer):
        (held / f"snapshots/{'1' * 40}/{file}").write_bytes(b"{}")
    asked = recipe("offline=error")
    if tokenizer == "README.md":
        with pytest.raises(LoraSentimentError, match=r"not in the cache: model\.name"):
            settle(asked, state)
    else:
        assert settle(asked, state) == (asked, None)


def test_a_mistaken_address_is_told_and_not_taken_for_a_dead_network(state, endpoint):
    endpoint("huggingface.co")
    with pytest.raises(DataError, match=r"cannot be asked: UnsupportedProtocol.*mend HF_ENDPOINT"):
        settle(recipe(), state)


def test_what_is_in_the_cache_is_used_even_if_the_address_is_mistaken(
    state, endpoint, monkeypatch, caplog
):
    endpoint("huggingface.co")
    monkeypatch.setattr(offline, "find_source", lambda config: None)
    monkeypatch.setattr(offline, "_find_base", lambda model: None)
    asked = recipe()
    assert settle(asked, state) == (asked, None)
    assert "UnsupportedProtocol" in caplog.text


@pytest.mark.parametrize(
    ("status", "mistaken"), [(407, True), (403, True), (502, False), (504, False)]
)
def test_a_proxy_that_refuses_is_no_dead_network(
    endpoint, answering, monkeypatch, status, mistaken
):
    monkeypatch.setenv("HTTPS_PROXY", answering(status))
    endpoint("https://hub.invalid")
    found = ask_hub()
    assert (found.status, found.mistaken) == (None, mistaken)
    assert f"ProxyError: {status}" in found.text


def test_certificates_that_are_missing_are_no_dead_network(state, endpoint, monkeypatch, tmp_path):
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    endpoint("https://127.0.0.1:1")
    with pytest.raises(DataError, match=r"FileNotFoundError.*mend .*SSL_CERT_FILE"):
        settle(recipe(), state)


@pytest.mark.parametrize("cause", [ssl.SSLCertVerificationError("self-signed"), None])
def test_a_certificate_that_is_not_trusted_is_no_dead_network(endpoint, monkeypatch, cause):
    class Session:
        def head(self, *arguments, **options):
            raise ConnectError("failed") from cause

    endpoint("https://hub.invalid")
    monkeypatch.setattr("huggingface_hub.get_session", Session)
    assert ask_hub() == Answer(None, "ConnectError: failed", mistaken=cause is not None)


def test_a_misspelt_split_of_data_in_the_cache_is_told_and_nothing_stands_in(
    state, endpoint, monkeypatch
):
    endpoint(NOWHERE)
    monkeypatch.setattr(
        datasets, "get_dataset_split_names", lambda *arguments, **options: ["train", "test"]
    )
    monkeypatch.setattr(offline, "_find_base", lambda model: None)
    asked = recipe("data.splits={train: train, test: tset}")
    assert settle(asked, state) == (asked, None)
    with pytest.raises(DataError, match=r"has no split 'tset'.*did you mean 'test'"):
        find_source(asked.data)


def test_a_connection_that_ends_in_the_middle_is_told(monkeypatch):
    def hang_up(*arguments, **options):
        raise RemoteProtocolError("Server disconnected")

    monkeypatch.setattr(datasets, "get_dataset_split_names", hang_up)
    monkeypatch.setattr(base, "cached_file", hang_up)
    with pytest.raises(DataError, match=r"'nobody/rows': no Hub answers"):
        find_source(recipe().data)
    with pytest.raises(ModelError, match=r"'nobody/base': no Hub answers"):
        base.check_base(recipe().model)


@pytest.fixture
def calls(endpoint):
    """A Hub that hangs up on whoever calls, and a list with an item for each call."""
    found = []
    server = socket.create_server(("127.0.0.1", 0))

    def hang_up():
        with suppress(OSError):  # the server's end
            while True:
                connection, caller = server.accept()
                found.append(caller)  # before the caller can know, and the test go on
                connection.close()

    threading.Thread(target=hang_up, daemon=True).start()
    endpoint(f"http://127.0.0.1:{server.getsockname()[1]}")
    yield found
    server.shutdown(socket.SHUT_RDWR)
    server.close()


@pytest.fixture
def of_the_hub(toy_adapter, tmp_path):
    """A function that gives the toy adapter, said to be of a base or of rows on the Hub."""

    def change(**names: str) -> Path:
        folder = Path(shutil.copytree(toy_adapter, tmp_path / "adapter"))
        card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
        card["base"]["name"] = names.get("base", card["base"]["name"])
        card["data"]["config"]["source"] = names.get("rows", card["data"]["config"]["source"])
        (folder / "card.json").write_text(json.dumps(card), encoding="utf-8")
        return folder

    return change


@pytest.mark.parametrize(
    "verb", [evaluate, lambda folder: merge(folder, folder.with_name("merged")), load]
)
def test_a_dead_hub_is_asked_once_for_an_adapters_base(calls, of_the_hub, verb):
    with pytest.raises(
        ModelError, match=r"'nobody/base': no Hub answers .*Error: .* not in the cache"
    ):
        verb(of_the_hub(base="nobody/base"))
    assert len(calls) == 1


def test_a_dead_hub_is_asked_once_for_an_adapters_rows(calls, of_the_hub):
    folder = of_the_hub(rows="nobody/rows")
    with pytest.raises(
        DataError, match=r"'nobody/rows': no Hub answers .*Error: .* not in the cache"
    ):
        evaluate(folder)
    assert len(calls) == 1


def test_a_dead_hub_is_asked_once_for_the_rows_that_a_merge_is_compared_on(
    calls, of_the_hub, tmp_path
):
    done = merge(of_the_hub(rows="nobody/rows"), tmp_path / "merged")
    assert "no Hub answers" in done.compared["base"]["validation"]["reason"]
    assert len(calls) == 1


def test_a_dead_hub_is_asked_once_for_a_sweep(calls):
    with pytest.raises(
        DataError, match=r"'nobody/rows': no Hub answers .*Error: .* not in the cache"
    ):
        make_trials(ROOT / "recipes/imdb_lora.yaml", ["data.source=nobody/rows", "method.r=[4, 8]"])
    assert len(calls) == 1


def test_the_main_command_walks_with_nothing_but_the_package(tmp_path):
    """The literal command, from an empty cache and with a Hub that points nowhere; the last override keeps it short."""
    online = {
        "HF_HUB_OFFLINE": "0",
        "HF_DATASETS_OFFLINE": "0",
        "HF_ENDPOINT": NOWHERE,
        "HF_HOME": str(tmp_path / "hf"),
    }
    launch = [sys.executable, "-m", "accelerate.commands.launch", "-m", "lora_sentiment.train"]
    command = [*launch, str(ROOT / "recipes/imdb_lora.yaml"), "train.max_steps=1"]
    environment = {**os.environ, **online, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "adapters/imdb_lora-offline"
    assert done.stderr.count("NOT what the recipe asks for") == 2, "at the start and at the end"
    card, report = (
        json.loads((folder / name).read_text(encoding="utf-8"))
        for name in ("card.json", "report.json")
    )
    assert card["offline"] == report["offline"]
    assert card["offline"]["model.name"] == "distilbert/distilbert-base-uncased"
    assert card["base"]["name"] == "bundled"
    assert "> **NOT what the recipe asks for" in (folder / "README.md").read_text(encoding="utf-8")
    assert report["data"]["test"]["rows"] == 100
    assert str(ROOT) not in (folder / "adapter_config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "own", ["data.source=mine.csv", "data.source=./mine", "model.name=./mine", "model.name=bundled"]
)
def test_nothing_stands_in_beside_rows_or_a_base_of_ones_own(state, endpoint, own):
    endpoint(NOWHERE)
    with pytest.raises(DataError, match="no Hub answers") as caught:
        settle(recipe(own), state)
    assert "offline=bundled" not in str(caught.value)
