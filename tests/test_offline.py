"""Where no Hub answers: the cache, else the bundled parts if the recipe says so; an answer changes nothing."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import datasets
import pytest
from accelerate import PartialState
from huggingface_hub import close_session, constants

from lora_sentiment import offline
from lora_sentiment.errors import DataError
from lora_sentiment.offline import settle
from lora_sentiment.recipe import Recipe

ROOT = Path(__file__).parents[1]
NOWHERE = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def state() -> PartialState:
    return PartialState(cpu=True)


@pytest.fixture
def endpoint(monkeypatch):
    """Point the Hub's client at an address, online; what it is told is forgotten afterwards."""

    def point(address: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
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
        ROOT / "recipes/imdb_lora.yaml", ["model.name=nobody/base", "data.source=nobody/rows", *overrides]
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


def test_where_nothing_answers_the_bundled_parts_stand_in_and_write_elsewhere(state, endpoint, caplog):
    endpoint(NOWHERE)
    found, stand_in = settle(recipe("data.labels=[neg, pos]", "data.max_train_rows=9", "train.seed=7"), state)
    assert (found.data.source, found.model.name) == ("bundled", "bundled")
    assert (found.name, found.folder) == ("imdb_lora-offline", Path("adapters/imdb_lora-offline"))
    assert (found.data.labels, found.data.max_train_rows) == (None, None), "of other rows"
    assert found.train == recipe("train.seed=7").train
    assert stand_in is not None
    assert (stand_in["data.source"], stand_in["model.name"]) == ("nobody/rows", "nobody/base")
    assert "ConnectError" in stand_in["reason"]
    assert "NOT what the recipe asks for (data.source nobody/rows, model.name nobody/base)" in caplog.text


def test_offline_mode_counts_as_no_answer(state):
    assert constants.HF_HUB_OFFLINE, "the tests run offline"
    _, stand_in = settle(recipe(), state)
    assert stand_in is not None
    assert "HF_HUB_OFFLINE" in stand_in["reason"]


def test_a_recipe_that_does_not_say_bundled_stops_and_names_what_is_missing(state, endpoint):
    endpoint(NOWHERE)
    with pytest.raises(DataError, match=r"no Hub answers .*data.source 'nobody/rows', model.name 'nobody/base'; .*"):
        settle(recipe("offline=error"), state)


def test_what_is_in_the_cache_is_used_and_said(state, endpoint, monkeypatch, caplog):
    endpoint(NOWHERE)
    monkeypatch.setattr(offline, "find_source", lambda config: None)
    monkeypatch.setattr(offline, "cached_file", lambda name, file, revision: file)
    asked = recipe()
    assert settle(asked, state) == (asked, None)
    assert "what is in the cache is used" in caplog.text
    assert constants.HF_HUB_OFFLINE, "no client asks again"


def test_a_mistaken_address_is_told_and_not_taken_for_a_dead_network(state, endpoint):
    endpoint("huggingface.co")
    with pytest.raises(DataError, match=r"cannot be asked: UnsupportedProtocol.*mend HF_ENDPOINT"):
        settle(recipe(), state)


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
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "adapters/imdb_lora-offline"
    assert done.stderr.count("NOT what the recipe asks for") == 2, "at the start and at the end"
    card, report = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("card.json", "report.json"))
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
