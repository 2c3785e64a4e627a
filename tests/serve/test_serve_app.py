"""The HTTP face: what each route answers."""

import json
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from pydantic import SecretStr
from starlette.testclient import TestClient

from lora_sentiment import __version__
from lora_sentiment.commands.explain import explain
from lora_sentiment.serve.app import EXAMPLES, EXAMPLES_HF, make_app
from lora_sentiment.serve.config import Limits, ServeConfig
from lora_sentiment.tasks import find_task
from tests.serve.fake_pool import FakePool, answer, make_adapter, make_classifier

KEY = "0123456789abcdef"
LONG = " ".join(f"w{i}" for i in range(30))


def make_client(*served, key=None, **limits):
    """A client of an app in this process; use it as a context manager, which starts and stops the app."""
    config = ServeConfig(
        adapters=(Path("x"),), api_key=SecretStr(key) if key else None, limits=Limits(**limits)
    )
    app = make_app(FakePool(*(served or [make_adapter("one")])), config)
    return TestClient(app)


def ask(client, **body):
    response = client.post("/predict", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_every_answer_equals_that_of_its_adapter_alone_however_many_ask_at_once():
    served = [make_adapter(f"a{i}", [f"label{j}" for j in range(2 + i)], factor=0.1 + i, clean=i % 2 == 0,
                          truncation=("head", "head_tail")[i % 2]) for i in range(6)]  # fmt: skip
    thresholds = {"thresholds": [0.2, 0.5, 0.8]}
    served += [
        make_adapter("many", "xyz", task=find_task("multi_label"), calibration=thresholds),
        make_adapter("value", ["stars"], task=find_task("regression")),
    ]
    texts = ["a good film", "bad<br />film", LONG, "good  good"]
    with make_client(*served) as client, ThreadPoolExecutor(6) as threads:
        found = list(
            threads.map(lambda own: ask(client, texts=texts, adapter=own.name, top_k=9), served * 2)
        )
    for own, got in zip(served * 2, found, strict=True):
        assert got["adapter"] == own.name
        for expected, answered in zip(
            make_classifier(own).predict(texts), got["predictions"], strict=True
        ):
            for key in ("label", "score", "labels", "value"):
                assert answered[key] == getattr(expected, key)
            assert {row["label"]: row["score"] for row in answered["top_k"]} == pytest.approx(
                expected.scores
            )
            assert [row["score"] for row in answered["top_k"]] == sorted(
                expected.scores.values(), reverse=True
            )
        assert [row["truncated"] for row in got["predictions"]] == [
            False,
            False,
            True,
            False,
        ]
        assert got["predictions"][0]["words"] is None


PAIR = ("a good film", "the bad film")
LONG_PAIR = (LONG, "the bad film")


def test_pairs_are_answered_in_every_shape_as_by_their_adapter_alone():
    served = make_adapter("one", "abc", reads_pairs=True)
    expected = [row.scores for row in make_classifier(served).predict([PAIR, LONG_PAIR])]
    named = [{"text": first, "text_pair": second} for first, second in (PAIR, LONG_PAIR)]
    with make_client(served, make_adapter("single")) as client:
        own = ask(client, texts=named, adapter="one", top_k=3)["predictions"]
        hf = client.post("/?adapter=one", json={"inputs": named}).json()
        hf_single = client.post("/?adapter=one", json={"inputs": named[0]}).json()
        tei = ask(client, inputs=[list(PAIR), list(LONG_PAIR)], adapter="one")
        tei_single = ask(client, inputs=list(PAIR), adapter="one")
        facts = {
            row["name"]: row["reads_pairs"] for row in client.get("/adapters").json()["adapters"]
        }
    assert [row["truncated"] for row in own] == [False, True]
    assert (hf_single, tei_single) == (hf[:1], tei[0])
    for shape in ([row["top_k"] for row in own], hf, tei):
        for rows, scores in zip(shape, expected, strict=True):
            assert {row["label"]: row["score"] for row in rows} == pytest.approx(scores)
    assert facts == {"one": True, "single": False}


def test_a_pair_is_explained_word_by_word_and_an_empty_side_has_no_label():
    served = make_adapter("one", "abc", reads_pairs=True)
    texts = [{"text": "a good", "text_pair": "bad film"}, {"text": "good", "text_pair": " "}]
    with make_client(served) as client:
        found, empty = ask(client, texts=texts, explain=True)["predictions"]
    expected = explain(make_classifier(served), ("a good", "bad film"))
    assert found["words"] == expected.words == ["a", "good", "bad", "film"]
    assert found["effects"] == pytest.approx(expected.effects)
    assert empty == {"label": None, "score": None, "error": "text is empty"}


def test_of_a_pair_the_ends_stay_where_the_first_tokens_are_cut():
    served = make_adapter("one", reads_pairs=True)
    words = LONG.split()
    with make_client(served) as client:
        found = ask(client, inputs=list(LONG_PAIR), truncation_direction="Left")
        assert found == ask(client, inputs=[" ".join(words[-10:]), LONG_PAIR[1]])


PAIRS_REFUSED = {
    'texts[0]: found a single text; the adapter \'one\' reads pairs {"text": "..", "text_pair": ".."}':
        {"texts": ["a"]},
    'inputs[1]: found a single text; the adapter \'one\' reads pairs {"text": "..", "text_pair": ".."}':
        {"inputs": [["a", "b"], ["a"]]},
    'texts[0]: allowed: a text, or a pair {"text": "..", "text_pair": ".."}': {"texts": [3]},
    "texts[0][text_pair]: Field required": {"texts": [{"text": "a"}]},
    "texts[0]: unknown key 'pair'; did you mean 'text_pair'? (allowed: text, text_pair)":
        {"texts": [{"text": "a", "pair": "b"}]},
    'inputs: allowed: one text, or a pair ["..", ".."], or a batch of lists of one or two texts':
        {"inputs": ["a", "b", "c"]},
}  # fmt: skip


@pytest.mark.parametrize("error", PAIRS_REFUSED)
def test_what_is_no_pair_is_refused_in_one_sentence(error):
    with make_client(make_adapter("one", reads_pairs=True)) as client:
        refused = client.post("/predict", json=PAIRS_REFUSED[error])
    assert (refused.status_code, refused.json()["error"]) == (422, error)


def test_a_coverage_gives_label_sets_and_calibrated_scores_or_is_refused():
    sets = {"temperature": 2.0, "label_scores": [[0.4], [0.4]]}
    served = [make_adapter("with", calibration=sets), make_adapter("without")]
    texts = ["a good film", "bad film", "w1 w2", " "]
    with make_client(*served) as client:
        told = {
            row["name"]: row["has_label_sets"] for row in client.get("/adapters").json()["adapters"]
        }
        found = ask(client, texts=texts, adapter="with", coverage=0.5)["predictions"]
        plain = ask(client, texts=texts, adapter="with")["predictions"]
        errors = [
            client.post("/predict", json={"texts": texts, "adapter": name, "coverage": coverage})
            for name, coverage in (("without", 0.5), ("with", 1))
        ]
    assert told == {"with": True, "without": False}
    expected = make_classifier(served[0]).predict(texts, coverage=0.5)
    for row, own in zip(found[:-1], expected, strict=False):
        assert (row["label_set"], row["is_certain"]) == (own.label_set, own.is_certain)
        assert row["score"] == own.score
    assert found[-1]["error"] == "text is empty"
    assert [row["label_set"] for row in plain[:-1]] == [None] * 3
    assert [error.status_code for error in errors] == [422] * 2
    assert "without calibration rows" in errors[0].json()["error"]
    assert errors[1].json()["error"].startswith("coverage: ")


def test_top_k_names_as_many_labels_as_asked_for():
    with make_client(make_adapter("one", "abcde")) as client:
        assert [
            len(ask(client, texts=["a"], top_k=k)["predictions"][0]["top_k"])
            for k in (1, 3, 10**30)
        ] == [1, 3, 5]


def test_an_explanation_is_that_of_the_command_line():
    served = make_adapter("one", "abc", truncation="head_tail")
    texts = ["a good&amp;bad film", "the", LONG]
    with make_client(served) as client:
        found = ask(client, texts=[*texts, " "], explain=True)["predictions"]
    for text, row in zip(texts, found, strict=False):
        expected = explain(make_classifier(served), text)
        assert (row["label"], row["words"]) == (expected.label, expected.words)
        assert row["effects"] == pytest.approx(expected.effects)
    assert found[-1] == {"label": None, "score": None, "error": "text is empty"}


@pytest.mark.parametrize(
    ("inputs", "batch"),
    [("a good film", False), (["a good film"], False), ([["a good film"], ["bad"]], True)],
)
def test_the_words_of_text_embeddings_inference_are_understood(inputs, batch):
    served = make_adapter("one", "abc")
    with make_client(served) as client:
        found, raw = ask(client, inputs=inputs), ask(client, inputs=inputs, raw_scores=True)
    for rows, scored in ((found, True), (raw, False)):
        first = rows[0] if batch else rows
        assert [row["score"] for row in first] == sorted(
            (row["score"] for row in first), reverse=True
        )
        logits = dict(zip("abc", answer(served, [2, 7, 4, 6, 3]).tolist(), strict=True))
        expected = make_classifier(served).predict(["a good film"])[0].scores if scored else logits
        assert {row["label"]: row["score"] for row in first} == pytest.approx(expected)


ALLOWED = 'allowed: one text, or a pair {"text": "..", "text_pair": ".."}, or a list of these'
HF_REFUSED = (
    ({"inputs": [["a"], ["b"]]}, f"inputs: {ALLOWED}"),
    ({"inputs": []}, f"inputs: {ALLOWED}"),
    ({"inputs": None}, f"inputs: {ALLOWED}"),
    ({"parameters": {}}, f"inputs: {ALLOWED}"),
    ({"inputs": {"text": "a"}}, f"inputs: {ALLOWED}"),
    (
        {"inputs": {"text": "a", "text_pair": "b"}},
        "inputs[0]: found a pair of texts; the adapter 'one' reads single texts",
    ),
    ({"texts": ["a"]}, "unknown key 'texts' (allowed: inputs, parameters)"),
    (["a"], 'the body must be a JSON object, such as {"inputs": ["A lovely film."]}'),
    ("a", 'the body must be a JSON object, such as {"inputs": ["A lovely film."]}'),
    (
        {"inputs": "a", "options": {"wait_for_model": True}},
        "unknown key 'options' (allowed: inputs, parameters)",
    ),
    (
        {"inputs": "a", "parameters": {"beam": None}},
        "parameters: unknown key 'beam' (allowed: top_k, function_to_apply)",
    ),
    (
        {"inputs": "a", "parameters": {"top_k": 0}},
        "parameters[top_k]: Input should be greater than or equal to 1",
    ),
    (
        {"inputs": "a", "parameters": {"top_k": "2"}},
        "parameters[top_k]: Input should be a valid integer",
    ),
    (
        {"inputs": "a", "parameters": {"function_to_apply": "relu"}},
        "parameters[function_to_apply]: Input should be 'softmax', 'sigmoid' or 'none'",
    ),
    ({"inputs": "a\ud800"}, "inputs: holds half of a surrogate pair; send it as UTF-8"),
    ({"inputs": ["a", "a\ud800"]}, "inputs: holds half of a surrogate pair; send it as UTF-8"),
)


@pytest.mark.parametrize(("body", "error"), HF_REFUSED)
def test_what_hugging_faces_shape_does_not_hold_is_refused_by_name(body, error):
    headers = {"Content-Type": "application/json"}
    with make_client() as client:
        refused = client.post("/", content=json.dumps(body), headers=headers)
    assert (refused.status_code, refused.json()) == (
        422,
        {"error": error, "error_type": "Validation"},
    )


FUNCTIONS = {
    None: lambda x: np.exp(x) / np.exp(x).sum(),
    "softmax": lambda x: np.exp(x) / np.exp(x).sum(),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "none": lambda x: x,
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("top_k", [None, 1, 2, 3, 99])
def test_hugging_faces_shape_is_answered_with_a_list_for_each_text(function, top_k):
    served = make_adapter("one", "abc")
    parameters = {"top_k": top_k, "function_to_apply": function}
    with make_client(served) as client:
        found = client.post("/", json={"inputs": ["a film", "bad"], "parameters": parameters})
        single = client.post("/", json={"inputs": "a film", "parameters": parameters})
    assert found.json()[:1] == single.json()
    for rows, ids in zip(found.json(), ([2, 7, 6, 3], [2, 5, 3]), strict=True):
        scores = FUNCTIONS[function](answer(served, ids).astype(np.float64))
        best = sorted(zip(scores, "abc", strict=True), reverse=True)[:top_k]
        assert [row["label"] for row in rows] == [label for _, label in best]
        assert [row["score"] for row in rows] == pytest.approx([score for score, _ in best])


def test_hugging_faces_shape_may_come_without_parameters_and_a_longer_text_is_cut_as_in_training():
    served = make_adapter("one", truncation="head_tail")
    words = LONG.split()
    with make_client(served) as client:
        plain = client.post("/", json={"inputs": LONG}).json()
        assert plain == [ask(client, inputs=" ".join(words[:3] + words[-11:]))]
        for nothing in ({}, None, {"top_k": None, "function_to_apply": None}):
            assert client.post("/", json={"inputs": LONG, "parameters": nothing}).json() == plain
        client.get("/")
        counts = client.get("/metrics").text
    assert 'lora_sentiment_requests_total{route="/",status="200"} 5.0' in counts
    # Four at `POST /` and one at `/predict`; the page is no prediction.
    assert "lora_sentiment_predict_seconds_count 5.0" in counts
    with make_client(served, on_long="refuse", max_texts=2) as client:
        refused = [client.post("/", json={"inputs": row}) for row in (LONG, ["a"] * 3)]
    assert [row.status_code for row in refused] == [413, 413]
    assert refused[1].json()["error"] == "inputs: found 3; allowed: at most 2 in a request"


def test_hugging_faces_clients_name_an_adapter_in_the_address():
    with make_client(make_adapter("one"), make_adapter("two", "xyz")) as client:
        found = client.post("/?adapter=two", json={"inputs": "a"})
        unknown = client.post("/?adapter=three", json={"inputs": "a"})
        missing = client.post("/", json={"inputs": "a"})
        info = client.get("/info?adapter=two")
        missing_info = client.get("/info")
    assert {row["label"] for row in found.json()[0]} == set("xyz")
    assert (unknown.status_code, unknown.json()["error_type"]) == (404, "NotFound")
    assert missing.json() == missing_info.json()
    assert missing.status_code == missing_info.status_code == 422
    assert "?adapter=NAME); allowed: one, two" in missing.json()["error"]
    assert info.json()["model_id"] == "two"


def test_info_has_the_keys_of_text_embeddings_inference():
    # `struct Info` in router/src/lib.rs of text-embeddings-inference 1.9.3.
    with make_client(make_adapter("one", "xyz"), max_texts=7, on_long="refuse") as client:
        assert client.get("/info").json() == {
            "model_id": "one", "model_sha": "0" * 64, "model_dtype": "float32", "served_model_name": "one",
            "model_type": {"classifier": {
                "id2label": {"0": "x", "1": "y", "2": "z"}, "label2id": {"x": 0, "y": 1, "z": 2},
            }},
            "max_concurrent_requests": 128, "max_input_length": 16, "max_batch_tokens": 8192,
            "max_batch_requests": None, "max_client_batch_size": 7, "auto_truncate": False,
            "tokenization_workers": 2, "version": __version__, "sha": None, "docker_label": None,
        }  # fmt: skip


def test_each_address_names_its_methods():
    with make_client() as client:
        assert client.get("/").headers["Content-Type"].startswith("text/html")
        assert client.delete("/").headers["Allow"] == "GET, HEAD, POST"
        assert client.delete("/predict").headers["Allow"] == "POST"


def test_a_fault_of_ours_is_a_refusal_like_any_other_and_the_log_says_where_without_the_text(
    caplog,
):
    class Panic(BaseException):
        """As a tokenizer in Rust raises it: no `Exception`."""

    class Broken:
        def encode_batch(self, texts, **_):
            raise fault(texts[0])

    served = make_adapter("one")
    object.__setattr__(served.encoder, "tokenizer", Broken())
    with make_client(served) as client:
        for fault in (ValueError, Panic):
            response = client.post("/predict", json={"texts": ["w99"]})
            assert (response.status_code, response.json()["error_type"]) == (503, "Backend")
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert f"/predict: {fault.__name__} was raised, at\n" in caplog.text
        counts = client.get("/metrics").text
    assert "raise fault(texts[0])" in caplog.text
    assert "w99" not in caplog.text
    assert 'lora_sentiment_requests_total{route="/predict",status="503"} 2.0' in counts
    assert "lora_sentiment_faults_total 2.0" in counts


def test_a_longer_text_is_read_as_text_embeddings_inference_was_told():
    served = make_adapter("one", truncation="head_tail")
    words = LONG.split()
    with make_client(served) as client:
        for direction, kept in (
            ("Right", words[:14]),
            ("right", words[:14]),
            ("Left", words[-14:]),
        ):
            found = ask(client, inputs=LONG, truncation_direction=direction, truncate=True)
            assert found == ask(client, inputs=" ".join(kept), truncate=False)
        assert ask(client, inputs=LONG) == ask(client, inputs=" ".join(words[:3] + words[-11:]))
        refused = client.post("/predict", json={"inputs": LONG, "truncate": False})
    assert (refused.status_code, refused.json()["error"]) == (
        413,
        "texts[0]: has 32 tokens; the adapter reads 16",
    )


def test_a_server_may_refuse_longer_texts():
    with make_client(on_long="refuse") as client:
        assert client.post("/predict", json={"texts": ["a", LONG]}).status_code == 413
        assert client.post("/predict", json={"inputs": LONG}).status_code == 413
        assert client.post("/predict", json={"inputs": LONG, "truncate": True}).status_code == 200


def test_an_adapter_must_be_named_where_several_are_loaded_and_an_unknown_one_is_told_what_there_is():
    many = [make_adapter(f"adapter{i:02}") for i in range(25)]
    with make_client(*many) as client:
        missing = client.post("/predict", json={"texts": ["a"]})
        unknown = client.post("/predict", json={"inputs": "a", "adapter": "nobody"})
    assert (missing.status_code, missing.json()["error_type"]) == (422, "Validation")
    assert (unknown.status_code, unknown.json()["error_type"]) == (404, "NotFound")
    assert "adapter19 and 5 more; see GET /adapters" in unknown.json()["error"]


def test_what_is_loaded_is_told():
    with make_client(make_adapter("b"), make_adapter("a", "xyz")) as client:
        found = client.get("/adapters").json()
    assert found["base"] == {"name": "fake", "sha256": "1" * 64}
    assert [row["name"] for row in found["adapters"]] == ["a", "b"]
    assert found["adapters"][0] == {
        "name": "a", "task": "single_label", "answer_columns": ["label", "score"], "labels": ["x", "y", "z"],
        "method": "lora", "form": "low-rank",
        "num_parameters": 10, "max_length": 16, "truncation": "head", "reads_pairs": False, "has_label_sets": False,
        "sha256": "0" * 64,
    }  # fmt: skip


def test_a_server_is_ready_while_something_is_loaded_and_it_is_not_stopping():
    with make_client() as client:
        assert client.get("/readyz").status_code == 200
        health = client.get("/health")
        assert (health.status_code, health.content) == (200, b"")
        client.app.state.queue.close()
        stopping = [
            client.get("/readyz"),
            client.get("/health"),
            client.post("/predict", json={"texts": ["a"]}),
            client.post("/", json={"inputs": "a"}),
        ]
        assert client.get("/healthz").status_code == 200
    assert [row.status_code for row in stopping] == [503] * 4
    app = make_app(FakePool(), ServeConfig(watch=Path("x")))
    with TestClient(app) as client:
        nothing = [
            client.get("/readyz"),
            client.get("/health"),
            client.get("/info"),
            client.post("/predict", json={"texts": ["a"]}),
            client.post("/", json={"inputs": "a"}),
        ]
    assert [row.json()["error"] for row in nothing] == ["no adapter is loaded"] * 5


def test_a_fault_of_the_queue_itself_is_logged_and_the_server_is_unhealthy(monkeypatch, caplog):
    def fail(*_):
        raise ZeroDivisionError

    with make_client() as client:
        assert client.get("/healthz").status_code == 200
        monkeypatch.setattr("lora_sentiment.serve.batching._answer_requests", fail)
        assert client.post("/predict", json={"texts": ["a"]}).status_code == 503
        assert client.get("/healthz").status_code == 503
    (record,) = (record for record in caplog.records if record.levelname == "ERROR")
    assert record.exc_info[0] is ZeroDivisionError


def test_adapters_come_and_go_and_their_counts_with_them(monkeypatch):
    monkeypatch.setattr("lora_sentiment.serve.app.WATCH_SECONDS", 0.05)
    pool, asked = FakePool(make_adapter("one")), threading.Event()

    def swap(_):
        if asked.is_set():
            pool.adapters = {"two": make_adapter("two")}

    pool.refresh = swap
    app = make_app(pool, ServeConfig(watch=Path("x")))
    with TestClient(app) as client:
        ask(client, texts=["a"], adapter="one")
        asked.set()
        for _ in range(1000):
            shown = client.get("/metrics").text
            if (
                client.get("/adapters").json()["adapters"][0]["name"] == "two"
                and 'adapter="one"' not in shown
            ):
                break
            time.sleep(0.01)
        assert client.post("/predict", json={"texts": ["a"], "adapter": "one"}).status_code == 404
        ask(client, texts=["a", "good"])
        assert 'lora_sentiment_texts_total{adapter="two"} 2.0' in client.get("/metrics").text
        assert 'adapter="one"' not in client.get("/metrics").text


def test_a_look_at_the_watched_folder_that_fails_leaves_what_is_served(caplog, monkeypatch):
    monkeypatch.setattr("lora_sentiment.serve.app.WATCH_SECONDS", 0.01)
    pool = FakePool(make_adapter("one"))

    def fail(_):
        raise OSError("no such device")

    pool.refresh = fail
    app = make_app(pool, ServeConfig(watch=Path("x")))
    with TestClient(app) as client:
        for _ in range(200):
            if "no such device" in caplog.text:
                break
            ask(client, texts=["a"])
        ask(client, texts=["a"])
    assert "'x': the watched folder cannot be read" in caplog.text


def test_a_key_is_needed_for_all_that_tells_of_adapters_or_texts():
    with make_client(key=KEY) as client:
        for method, path, body in (
            ("POST", "/predict", {"texts": ["a"]}),
            ("POST", "/", {"inputs": "a"}),
            ("GET", "/adapters", None),
            ("GET", "/info", None),
            ("GET", "/metrics", None),
        ):
            for given in (
                None,
                f"Bearer {KEY}x",
                "Bearer",
                f"Basic {KEY}",
                f"Bearer {KEY[:-1]}é".encode(),
            ):
                headers = {} if given is None else {"Authorization": given}
                response = client.request(method, path, json=body, headers=headers)
                assert (response.status_code, response.headers["WWW-Authenticate"]) == (
                    401,
                    "Bearer",
                ), (path, given)
            for given in (f"Bearer {KEY}", f"bearer  {KEY}"):
                response = client.request(method, path, json=body, headers={"Authorization": given})
                assert response.status_code == 200
        for path in (
            "/", "/page.js", "/page.css", "/health", "/healthz", "/readyz", "/openapi.json",
        ):  # fmt: skip
            assert client.get(path).status_code == 200


def test_the_page_may_use_nothing_from_elsewhere_and_no_site_may_use_the_server():
    with make_client() as client:
        page = client.get("/")
        assert page.headers["Content-Type"] == "text/html; charset=utf-8"
        for response in (page, client.get("/adapters"), client.get("/nowhere")):
            assert response.headers["Content-Security-Policy"].startswith(
                "default-src 'none'; script-src 'self';"
            )
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert "Access-Control-Allow-Origin" not in response.headers
        asked = {"Origin": "http://elsewhere", "Access-Control-Request-Method": "POST"}
        for path in ("/predict", "/"):
            assert client.options(path, headers=asked).status_code == 405
        assert client.get("/docs").status_code == 404


def test_no_text_stands_in_the_log_or_the_counts(caplog):
    secret = "w99"
    with caplog.at_level(logging.DEBUG), make_client() as client:
        ask(client, texts=[secret], explain=True)
        client.get(f"/adapters?text={secret}")
        client.get(f"/{secret}")
        client.post(f"/?adapter={secret}", json={"inputs": secret})
        client.post("/", json={"inputs": [secret], secret: 1})
        client.request(secret.upper(), "/predict")
        client.post("/predict", json={"texts": [secret], "top_k": 0, secret: 1})
        client.app.state.queue._compute = lambda *_: [][1]
        assert client.post("/predict", json={"texts": [secret]}).status_code == 503
        counts = client.get("/metrics").text
    ours = "\n".join(
        row.getMessage() + (row.exc_text or "")
        for row in caplog.records
        if not row.name.startswith("httpx")
    )
    assert "POST /predict 200" in ours
    assert "GET other 404" in ours
    assert "IndexError" in ours
    assert secret not in ours.lower()
    assert secret not in counts.lower()


def test_the_document_names_every_error_and_its_examples_are_answered():
    with make_client(make_adapter("imdb_small"), max_texts=7, key=KEY) as client:
        document = client.get("/openapi.json").json()
        for path, examples in (("/predict", EXAMPLES), ("/", EXAMPLES_HF)):
            for example in examples.values():
                response = client.post(
                    path, json=example["value"], headers={"Authorization": f"Bearer {KEY}"}
                )
                assert response.status_code == 200
    statuses = {"200", "400", "401", "404", "408", "413", "415", "422", "429", "503", "504"}
    for path in ("/predict", "/"):
        predict = document["paths"][path]["post"]
        assert set(predict["responses"]) == statuses
        assert predict["security"]
    assert "HTTPValidationError" not in json.dumps(document)
    assert (
        document["components"]["schemas"]["PredictRequest"]["properties"]["texts"]["maxItems"] == 7
    )


@pytest.mark.parametrize("text", ["", "   ", "\u200b \x07", "[SEP]"])
def test_a_text_without_tokens_gets_no_label_and_the_reason(text):
    nothing = [{"label": None, "score": None, "error": "text is empty"}]
    with make_client() as client:
        for explained in (False, True):
            (empty, good) = ask(client, texts=[text, "good"], explain=explained)["predictions"]
            assert [empty] == nothing
            assert good["label"]
        assert ask(client, inputs=text) == nothing
        assert client.post("/", json={"inputs": text}).json() == [nothing]
        batch = ask(client, inputs=[[text], ["good"]])
        assert batch[0] == nothing
        assert batch[1][0].keys() == {"label", "score"}
