"""Without an answer of the Hub: the cache, or the bundled parts if the recipe allows them."""

import json
import shutil
import socket
import ssl
import threading
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import datasets
import pytest
from accelerate import PartialState
from httpx2 import ConnectError, RemoteProtocolError
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import OfflineModeIsEnabled

from lora_sentiment import cli, hub
from lora_sentiment.adapter.merge import merge
from lora_sentiment.classifier import load
from lora_sentiment.commands.evaluate import evaluate
from lora_sentiment.commands.sweep import sweep
from lora_sentiment.data.rows import load_data
from lora_sentiment.data.sources import find_source
from lora_sentiment.errors import DataError, LoraSentimentError, ModelError
from lora_sentiment.hub import Answer, ask_hub, prepare_hub
from lora_sentiment.models import load as base
from lora_sentiment.models.load import load_base
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.training import offline, processes
from lora_sentiment.training.offline import _is_base_cached, resolve_offline
from tests.toy_hub import point_clients, serve

ROOT = Path(__file__).parents[2]
NOWHERE = "http://127.0.0.1:1"


@pytest.fixture(scope="module", autouse=True)
def state() -> PartialState:
    return PartialState(cpu=True)


@pytest.fixture
def endpoint():
    """A function that points the Hub's clients at an address until the test ends."""
    with ExitStack() as stack:
        yield lambda address: stack.enter_context(point_clients(address))


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
def test_any_answer_leaves_the_recipe_as_it_is(endpoint, answering, status):
    endpoint(answering(status))
    asked = recipe()
    assert resolve_offline(asked) == (asked, None)
    assert not constants.HF_HUB_OFFLINE


def test_a_recipe_that_names_nothing_on_the_hub_asks_nothing(toy_recipe, monkeypatch):
    monkeypatch.setattr(offline, "ask_hub", lambda: pytest.fail("the Hub was asked"))
    for asked in (Recipe.load(toy_recipe), Recipe.load(ROOT / "recipes/quickstart.yaml")):
        assert resolve_offline(asked) == (asked, None)


def test_without_an_answer_the_bundled_parts_replace_data_and_base(endpoint, caplog):
    endpoint(NOWHERE)
    own = ("data.labels=[neg, pos]", "data.max_train_rows=9", "data.revision=v2")
    found, sentence = resolve_offline(
        recipe(*own, "data.clean=false", "data.split_seed=3", "train.seed=7")
    )
    assert (found.data.source, found.model.name) == ("bundled", "bundled")
    assert (found.name, found.folder) == ("imdb_lora-offline", Path("adapters/imdb_lora-offline"))
    assert (found.data.labels, found.data.max_train_rows) == (None, None), "of other rows"
    assert (found.data.clean, found.data.split_seed) == (False, 3), "of any rows"
    assert found.train == recipe("train.seed=7").train
    asked = (
        "NOT what the recipe asks for (data.source nobody/rows, model.name nobody/base, "
        'data.revision v2, data.labels ["neg", "pos"], data.max_train_rows 9)'
    )
    assert sentence.startswith(f"{asked}: no Hub answered (ConnectError")
    assert sentence in caplog.text


def test_offline_mode_counts_as_no_answer():
    assert constants.HF_HUB_OFFLINE, "the tests run offline"
    _, sentence = resolve_offline(recipe())
    assert "no Hub answered (offline mode is on (HF_HUB_OFFLINE))" in sentence


@pytest.mark.parametrize("missing", [[], ["data.source", "model.name"]])
def test_another_process_does_what_the_main_one_found(endpoint, monkeypatch, missing):
    endpoint(NOWHERE)
    outcome = [(Answer(None, "dead"), missing), None]
    monkeypatch.setattr(PartialState, "is_main_process", False)
    monkeypatch.setattr(processes, "broadcast_object_list", lambda own: outcome)
    monkeypatch.setattr(offline, "ask_hub", lambda: pytest.fail("the Hub was asked"))
    found, sentence = resolve_offline(recipe())
    assert (found != recipe(), sentence is not None) == (bool(missing), bool(missing))
    with pytest.raises(OfflineModeIsEnabled, match="dead"):
        HfApi().model_info("nobody/base")


def test_a_recipe_that_does_not_say_bundled_stops_and_names_what_is_missing(endpoint):
    endpoint(NOWHERE)
    with pytest.raises(
        DataError, match=r"no Hub answers .*data.source 'nobody/rows', model.name 'nobody/base'; .*"
    ):
        resolve_offline(recipe("offline=error"))


@pytest.mark.parametrize(
    ("address", "reason"), [(NOWHERE, "ConnectError"), ("huggingface.co", "UnsupportedProtocol")]
)
def test_what_is_in_the_cache_is_used_and_said(endpoint, monkeypatch, caplog, address, reason):
    endpoint(address)
    monkeypatch.setattr(offline, "find_source", lambda config: None)
    monkeypatch.setattr(offline, "_is_base_cached", lambda model: True)
    asked = recipe()
    assert resolve_offline(asked) == (asked, None)
    assert f"no Hub answers ({reason}" in caplog.text
    prepare_hub()
    assert caplog.text.count("no Hub answers") == 1
    with pytest.raises(OfflineModeIsEnabled, match=reason):
        HfApi().model_info("nobody/base")


def test_rows_and_base_that_were_fetched_once_need_no_hub(tmp_path, tiny_base, toy):
    model = {file.name: file.read_bytes() for file in tiny_base.iterdir()}
    rows = {"README.md": b"", "train.csv": (toy / "train.csv").read_bytes()}
    asked = recipe("model.max_length=16", "offline=error")
    with (
        serve(
            models={"nobody/base": model}, datasets={"nobody/rows": rows}, refusals={}
        ) as address,
        point_clients(address, tmp_path),
    ):
        online = load_both(asked)
    with point_clients(address, tmp_path):
        assert load_both(asked) == online
        assert not _is_base_cached(recipe("model.name=nobody/other").model)


def load_both(asked: Recipe) -> tuple[str, str, str | None]:
    assert resolve_offline(asked) == (asked, None)
    data = load_data(asked.data)
    base = load_base(asked.model, labels=data.labels)
    return data.train.fingerprint, base.sha256, base.revision


@pytest.mark.parametrize("tokenizer", ["tokenizer.json", "vocab.txt", "README.md"])
def test_a_cached_base_needs_one_file_of_a_tokenizer(endpoint, monkeypatch, tmp_path, tokenizer):
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
            resolve_offline(asked)
    else:
        assert resolve_offline(asked) == (asked, None)


def test_a_mistaken_address_is_told_and_not_taken_for_a_dead_network(endpoint):
    endpoint("huggingface.co")
    with pytest.raises(
        DataError, match=r"cannot be asked: UnsupportedProtocol.*correct HF_ENDPOINT"
    ):
        resolve_offline(recipe())


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


def test_certificates_that_are_missing_are_no_dead_network(endpoint, monkeypatch, tmp_path):
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    endpoint("https://127.0.0.1:1")
    with pytest.raises(DataError, match=r"FileNotFoundError.*correct .*SSL_CERT_FILE"):
        resolve_offline(recipe())


@pytest.mark.parametrize("cause", [ssl.SSLCertVerificationError("self-signed"), None])
def test_a_certificate_that_is_not_trusted_is_no_dead_network(endpoint, monkeypatch, cause):
    class Session:
        def head(self, *arguments, **options):
            raise ConnectError("failed") from cause

    endpoint("https://hub.invalid")
    monkeypatch.setattr(hub, "get_session", Session)
    assert ask_hub() == Answer(None, "ConnectError: failed", mistaken=cause is not None)


def test_a_misspelt_split_of_data_in_the_cache_is_told_and_nothing_is_replaced(
    endpoint, monkeypatch
):
    endpoint(NOWHERE)
    monkeypatch.setattr(
        datasets, "get_dataset_split_names", lambda *arguments, **options: ["train", "test"]
    )
    monkeypatch.setattr(offline, "_is_base_cached", lambda model: True)
    asked = recipe("data.splits={train: train, test: tset}")
    assert resolve_offline(asked) == (asked, None)
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
        sweep(ROOT / "recipes/imdb_lora.yaml", ["data.source=nobody/rows", "method.r=[4, 8]"])
    assert len(calls) == 1


def test_the_main_recipe_runs_with_nothing_but_the_package(endpoint, tmp_path, monkeypatch, capsys):
    """Without a Hub or a cache. The overrides keep the run short."""
    endpoint(NOWHERE)
    monkeypatch.chdir(tmp_path)
    short = ["train.max_steps=1", "model.max_length=32"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", str(ROOT / "recipes/imdb_lora.yaml"), *short])
    assert ended.value.code == 0
    assert capsys.readouterr().err.count("NOT what the recipe asks for") == 2, "at start and end"
    folder = tmp_path / "adapters/imdb_lora-offline"
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert card["offline"] == report["offline"]
    assert "model.name distilbert/distilbert-base-uncased" in card["offline"]
    assert card["base"]["name"] == "bundled"
    assert f"> **{card['offline']}.**" in (folder / "README.md").read_text(encoding="utf-8")
    assert report["data"]["test"]["rows"] == 100
    assert str(ROOT) not in (folder / "adapter_config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "own", ["data.source=mine.csv", "data.source=./mine", "model.name=./mine", "model.name=bundled"]
)
def test_nothing_is_replaced_if_data_or_base_is_ones_own(endpoint, own):
    endpoint(NOWHERE)
    with pytest.raises(DataError, match="no Hub answers") as caught:
        resolve_offline(recipe(own))
    assert "offline=bundled" not in str(caught.value)
