import base64
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import pytest

from lora_sentiment.adapter.merge_record import MergeRecord, write_merge_record
from lora_sentiment.commands.push import push
from lora_sentiment.errors import AdapterError, ModelError
from lora_sentiment.files import hash_file, write_json
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.train import train
from tests.conftest import toy_rows, write_csv

NAME = "someone/reviews"


class Hub:
    """As much of the Hub as a push asks for; `status` answers everything with that error."""

    def __init__(self):
        self.asked, self.files, self.created, self.token = [], None, None, None
        self.private, self.status, self.held, self.num_commits = False, None, [], 0

    def answer(self, path, body):
        if self.status:
            return self.status, {"error": "a longer story\nof two lines"}
        if path == "/api/repos/create":
            self.created = json.loads(body)
            self.private = self.private or self.created.get("visibility") == "private"
            return 200, {"url": f"{self.endpoint}/{NAME}"}
        if path == f"/api/models/{NAME}":
            siblings = [{"rfilename": file} for file in self.held]
            return 200, {"id": NAME, "sha": "0" * 40, "private": self.private, "siblings": siblings}
        if path == "/api/validate-yaml":
            return 200, {"warnings": [], "errors": []}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return 200, {
                "files": [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in files
                ]
            }
        if "/commit/" not in path:
            return 404, {}
        lines = [json.loads(line) for line in body.splitlines()]
        found = [line["value"] for line in lines if line["key"] == "file"]
        self.num_commits += 1
        self.files = {file["path"]: base64.b64decode(file["content"]) for file in found}
        return 200, {
            "commitUrl": f"{self.endpoint}/{NAME}/commit/{'1' * 40}",
            "commitOid": "1" * 40,
            "success": True,
        }


@pytest.fixture
def hub(monkeypatch):
    """A Hub on this machine, which the real client is pointed at."""
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            state.asked.append(self.path)
            state.token = self.headers.get("Authorization")
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, values = state.answer(self.path.split("?")[0], body)
            content = json.dumps(values).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    state.endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", state.endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_base):
    folder = tmp_path_factory.mktemp("trained")
    rows = [(f"{text} Zanzibar{i}", label) for i, (text, label) in enumerate(toy_rows(60))]
    write_csv(folder / "train.csv", rows)
    recipe = folder / "toy.yaml"
    recipe.write_text(
        f"data: {{source: {folder}/train.csv}}\nmodel: {{name: {tiny_base}, max_length: 16, dtype: float32}}\n"
        f"train: {{num_train_epochs: 1, learning_rate: 1e-2}}\noutput: {{dir: {folder}/adapter}}\n"
    )
    return train(Recipe.load(recipe)).adapter


@pytest.fixture
def adapter(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "adapter")


@pytest.fixture
def exported(tmp_path):
    """A merged model's folder with ONNX files; push reads hashes, no weights."""
    folder = tmp_path / "merged.model"
    (folder / "onnx").mkdir(parents=True)
    names = ("model.safetensors", "onnx/model.onnx", "onnx/model_quantized.onnx")
    for name in names:
        (folder / name).write_bytes(name.encode())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        write_json(folder / name, {"name": name})
    (folder / "README.md").write_text(
        '---\nlibrary_name: transformers\n---\n\n# merged.model\n\nSay "merged.model" to it.\n\n```python\n'
        'classify = pipeline("text-classification", model="merged.model")\nmerged.model = "mergedxmodel"\n```\n\n'
        "```sh\nlora-sentiment predict merged.model --input reviews.csv\n```\n\n"
        '```python\nimport lora_sentiment\n\nlora_sentiment.load("merged.model/onnx/model.onnx")\n```\n'
        '```js\npipeline("text-classification", "./merged.model", { dtype: "q8" });\n```\n'
    )
    write_json(
        folder / "config.json",
        {"model_type": "distilbert", "dim": 8, "n_layers": 1, "id2label": {"0": "a", "1": "b"}},
    )
    record = MergeRecord(
        schema=2, adapter_sha256="1", base_sha256="2", base="distilbert/x", method="lora", into="base", dtype="float32",
        max_length=16, truncation="head", clean=True, calibration=None, compared={},
        files={name: hash_file(folder / name) for name in names},
    )  # fmt: skip
    write_merge_record(folder, record)
    return folder


def test_an_adapter_goes_whole_in_one_commit(adapter, hub):
    found = push(adapter, NAME, token="hf_secret")
    assert hub.num_commits == 1
    assert hub.created["organization"] == "someone"
    assert hub.created.get("visibility") is None
    assert hub.token == "Bearer hf_secret"
    on_disk = {path.name: path.read_bytes() for path in adapter.iterdir()}
    assert hub.files == on_disk | {"README.md": found.card.encode()}
    assert dict(found.files) == {name: len(content) for name, content in hub.files.items()}
    assert found.url == f"{hub.endpoint}/{NAME}"


def test_nothing_of_the_training_texts_is_sent(adapter, hub):
    push(adapter, NAME)
    assert not any(b"zanzibar" in content.lower() for content in hub.files.values())


def test_a_dry_run_asks_nobody_and_tells_the_same(adapter, hub):
    hub.status = 500
    dry = push(adapter, NAME, dry_run=True, private=True)
    assert hub.asked == []
    hub.status = None
    assert push(adapter, NAME, private=True) == dry
    assert json.loads(json.dumps(dry.as_dict()))["url"] == dry.url


def test_the_cards_code_loads_the_model_by_its_name_on_the_hub(adapter):
    own = (adapter / "README.md").read_text()
    (adapter / "README.md").write_text(f"{own}\n## Thanks\n\nTo toy makers.\n")
    card = push(adapter, NAME, dry_run=True).card
    assert own.count('"toy"') == 2
    assert card.count(f'from_pretrained(\n    "{NAME}", num_labels=2') == 1
    assert card.count(f'from_pretrained("{NAME}")') == 1
    assert f"hf download {NAME} --local-dir {NAME}\nlora-sentiment evaluate {NAME} " in card
    assert card.startswith(own.split("```")[0])
    assert card.endswith("\n## Thanks\n\nTo toy makers.\n")
    assert '"toy"' not in card
    assert "Thanks" in (adapter / "README.md").read_text()


def test_a_merged_or_exported_model_goes_with_its_onnx_files(exported, hub):
    found = push(exported, NAME)
    assert hub.files["onnx/model.onnx"] == b"onnx/model.onnx"
    assert set(hub.files) == {
        "README.md", "config.json", "model.safetensors", "onnx/model.onnx", "onnx/model_quantized.onnx",
        "sentence_bert_config.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert f'model="{NAME}")' in found.card
    assert f'"text-classification", "{NAME}", {{ dtype' in found.card
    assert (
        f"hf download {NAME} --local-dir {NAME}\nlora-sentiment predict {NAME} --input"
        in found.card
    )
    assert f"# hf download {NAME} --local-dir {NAME}\nimport lora_sentiment\n" in found.card
    assert f'load("{NAME}/onnx/model.onnx")' in found.card
    assert 'Say "merged.model" to it.' in found.card  # prose is nobody's code
    assert 'merged.model = "mergedxmodel"' in found.card
    assert found.notes == []


def test_what_travels_of_this_machine_is_told(adapter, exported, tiny_base):
    base, data = push(adapter, NAME, dry_run=True).notes
    assert str(tiny_base) in base
    assert "--base" in base
    assert "train.csv" in data
    card = json.loads((adapter / "card.json").read_text(encoding="utf-8"))
    card["data"]["config"]["source"] = "bundled"
    write_json(adapter / "card.json", card)
    assert [note.split()[1] for note in push(adapter, NAME, dry_run=True).notes] == ["base"]
    (exported / "README.md").write_text("# merged.model\n")
    assert push(exported, NAME, dry_run=True).notes == [
        f"README.md has no code that uses the model as {NAME}"
    ]


@pytest.mark.parametrize(
    "stray", ["reviews.csv", ".DS_Store", "checkpoints/state.json", "config.json", "onnx/a.txt"]
)
def test_a_file_that_the_package_does_not_know_is_refused_by_name(adapter, hub, stray):
    (adapter / stray).parent.mkdir(exist_ok=True)
    (adapter / stray).write_text("Somebody's words.")
    with pytest.raises(AdapterError, match=re.escape(stray)):
        push(adapter, NAME)
    assert hub.asked == []


def test_so_is_a_linked_folder(exported, tmp_path):
    (exported / "onnx").rename(tmp_path / "elsewhere")
    (exported / "onnx").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterError, match="holds onnx"):
        push(exported, NAME, dry_run=True)


def test_an_altered_or_incomplete_folder_is_refused(adapter, exported, hub):
    with (adapter / "adapter_model.safetensors").open("ab") as file:
        file.write(b"\0")
    (exported / "onnx/model.onnx").unlink()
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors: was altered"):
        push(adapter, NAME)
    with pytest.raises(AdapterError, match=r"model.onnx: is missing"):
        push(exported, NAME)
    assert hub.asked == []


def test_weights_put_in_later_are_refused(adapter):
    (adapter / "changed.safetensors").write_bytes(b"anything")
    with pytest.raises(AdapterError, match=r"changed.safetensors was put in after it was saved"):
        push(adapter, NAME, dry_run=True)


def test_a_folder_without_its_card_is_refused(adapter):
    (adapter / "README.md").unlink()
    with pytest.raises(AdapterError, match=r"README.md: is missing"):
        push(adapter, NAME, dry_run=True)
    (adapter / "README.md").write_bytes(b"\xff")
    with pytest.raises(AdapterError, match="no text in UTF-8"):
        push(adapter, NAME, dry_run=True)


def test_only_what_this_package_made_is_sent(tmp_path, tiny_base):
    for folder in (tmp_path / "none", tmp_path, tiny_base):
        with pytest.raises(AdapterError, match=r"nothing that this package made.*hf upload"):
            push(folder, NAME, dry_run=True)


@pytest.mark.parametrize(
    "name", ["reviews", "a/b/c", "some one/x", "someone/x--y", "", "someone/x.git"]
)
def test_a_name_that_is_none_is_refused_before_the_folder_is_looked_at(tmp_path, name):
    with pytest.raises(ModelError, match="give OWNER/NAME") as caught:
        push(tmp_path / "none", name)
    assert "\n" not in str(caught.value)


def test_private_makes_a_private_repository_and_refuses_a_public_one(exported, hub):
    push(exported, NAME, private=True)
    assert hub.created["visibility"] == "private"
    hub.files = None
    # The Hub ignores what is asked of a repository that exists.
    hub.answer, answer = (
        (
            lambda path, body: (
                (409, {"url": f"{hub.endpoint}/{NAME}"})
                if path.endswith("create")
                else answer(path, body)
            )
        ),
        hub.answer,
    )
    hub.private = False
    with pytest.raises(ModelError, match="is public, but --private was given"):
        push(exported, NAME, private=True)
    assert hub.files is None
    push(exported, NAME)
    assert hub.files


def test_a_repository_that_holds_another_kind_of_model_is_refused(exported, hub):
    hub.held = [".gitattributes", "adapter_config.json", "config.json"]
    with pytest.raises(ModelError, match=r"holds adapter_config.json of another model"):
        push(exported, NAME)
    assert hub.files is None
    hub.held = [".gitattributes", "config.json", "notes.md"]
    push(exported, NAME)
    assert hub.files


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (401, "hf auth login"),
        (403, "may not write there"),
        (404, "no such owner"),
        (422, "a longer story of two lines"),
        (500, "push again later"),
    ],
)
def test_what_the_hub_refuses_becomes_one_line_that_says_what_to_do(exported, hub, status, advice):
    hub.status = status
    with pytest.raises(ModelError, match=advice) as caught:
        push(exported, NAME, token="hf_secret")
    assert f"status {status}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "hf_secret" not in str(caught.value)


def test_no_network_and_offline_mode_are_told_apart(exported, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=r"cannot reach http://127.0.0.1:9 .*check the network"):
        push(exported, NAME)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="unset HF_HUB_OFFLINE"):
        push(exported, NAME)
