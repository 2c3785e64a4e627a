"""Hugging Face's clients against a running server."""

import json
from urllib.request import Request, urlopen

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from tests.serve.fake_pool import FakePool, answer, make_adapter, running

ONE, TWO = make_adapter("one", "abc"), make_adapter("two", "xyz")


@pytest.fixture(autouse=True)
def _allow_any_address(monkeypatch):
    # Offline, the client would not even reach this machine.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture(scope="module")
def address():
    with running(FakePool(ONE)) as server:
        yield server.address


@pytest.mark.parametrize("function", [None, "softmax", "sigmoid", "none"])
@pytest.mark.parametrize(("top_k", "num_labels"), [(None, 3), (1, 1), (2, 2), (9, 3)])
def test_inference_client_gets_the_labels_that_it_asks_for(address, function, top_k, num_labels):
    found = InferenceClient(model=address).text_classification(
        "a film", top_k=top_k, function_to_apply=function
    )
    scores = [row.score for row in found]
    assert len(found) == num_labels
    assert scores == sorted(scores, reverse=True)
    logits = dict(zip("abc", answer(ONE, [2, 7, 6, 3]).tolist(), strict=True))
    assert found[0].label == max(logits, key=logits.get)
    if function == "none":
        assert scores[0] == pytest.approx(max(logits.values()))
    elif function != "sigmoid" and num_labels == 3:
        assert sum(scores) == pytest.approx(1)


@pytest.mark.parametrize(
    ("parameters", "num_labels"),
    [({}, 3), ({"parameters": {}}, 3), ({"parameters": {"top_k": 2}}, 2)],
)
def test_the_javascript_client_finds_the_list_that_it_checks(address, parameters, num_labels):
    # `HFInferenceTextClassificationTask` of @huggingface/inference sends its arguments as they are
    # and takes the first element: a list of strings and numbers.
    body = json.dumps({"inputs": "a film", **parameters}).encode()
    with urlopen(Request(address, body, {"Content-Type": "application/json"})) as response:
        (found,) = json.load(response)
    assert len(found) == num_labels
    assert all(type(row["label"]) is str and type(row["score"]) is float for row in found)


def test_inference_client_returns_the_first_text_of_a_list(address):
    client = InferenceClient(model=address)
    found = client.text_classification(["a film", "bad"])
    assert found == client.text_classification("a film")


def test_inference_client_shows_why_it_is_refused(address):
    client = InferenceClient(model=address)
    with pytest.raises(HfHubHTTPError, match="Input should be 'softmax', 'sigmoid' or 'none'"):
        client.text_classification("a film", function_to_apply="relu")


def test_inference_client_names_an_adapter_in_its_address():
    with running(FakePool(ONE, TWO)) as server:
        client = InferenceClient(model=f"{server.address}/?adapter=two")
        assert {row.label for row in client.text_classification("a film")} == set("xyz")
        with pytest.raises(HfHubHTTPError, match="allowed: one, two"):
            InferenceClient(model=server.address).text_classification("a film")


def test_inference_client_gets_no_label_of_an_empty_text_and_the_reason(address):
    (found,) = InferenceClient(model=address).text_classification(" ")
    assert (found.label, found.score, found["error"]) == (None, None, "text is empty")


def test_inference_client_finds_the_server_healthy_and_learns_of_its_adapter(address):
    client = InferenceClient(model=address, provider="hf-inference")
    assert client.health_check()
    assert client.get_endpoint_info()["model_id"] == "one"
