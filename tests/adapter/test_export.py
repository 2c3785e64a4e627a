"""Exports answer as the merged model does, in another runtime, and are not handed out where they
don't."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertForSequenceClassification,
)
from transformers.utils import logging as logging_of_transformers

from lora_sentiment import classifier
from lora_sentiment.adapter import export as export_module
from lora_sentiment.adapter.export import export
from lora_sentiment.adapter.folder import DataRecord, load_card
from lora_sentiment.adapter.graph import write_graph
from lora_sentiment.adapter.merge import merge
from lora_sentiment.adapter.merge_record import read_merge_record, write_merge_record
from lora_sentiment.adapter.onnx import PLAIN, QUANTISED, open_session
from lora_sentiment.data.rows import load_data
from lora_sentiment.errors import AdapterError, ModelError
from lora_sentiment.models.engine import Engine
from lora_sentiment.recipe.data import DataConfig
from lora_sentiment.recipe.method import LoraMethod
from tests.conftest import toy_rows, write_csv
from tests.random_adapters import save_random

LABELS = ("negative", "positive")
# What text-embeddings-inference cannot start without. Sources, in its repository: `ModelConfig` and
# `STConfig` in router/src/lib.rs, `Config` in backends/ort/src/lib.rs (commit 04a0215),
# `DistilBertConfig` in backends/candle/src/models/distilbert.rs.
TEI_KEYS = {
    "router": ("architectures", "model_type", "max_position_embeddings", "id2label", "label2id"),
    "ort": ("hidden_size", "num_hidden_layers"),
    "candle": (
        "vocab_size", "dim", "n_layers", "n_heads", "hidden_dim", "activation",
        "max_position_embeddings", "pad_token_id", "id2label",
    ),
}  # fmt: skip
IDS = [[2, 5, 6, 3], [2, 9, 14, 8, 3], [2, 7, 8, 9, 3]]
# By ONNX Runtime and tokenizers alone: what another program would do with the folder.
WITHOUT_TORCH = """
import json, sys
from pathlib import Path
import numpy as np, onnxruntime
from tokenizers import Tokenizer

folder, texts = Path(sys.argv[1]), json.loads(sys.argv[2])
config = json.loads((folder / "config.json").read_text())
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
tokenizer.enable_truncation(config["lora_sentiment"]["max_length"])
tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
found = tokenizer.encode_batch(texts)
session = onnxruntime.InferenceSession(str(folder / "onnx/model.onnx"), providers=["CPUExecutionProvider"])
ids, mask = np.array([f.ids for f in found]), np.array([f.attention_mask for f in found])
logits = session.run(["logits"], {"input_ids": ids, "attention_mask": mask})[0]
scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
labels = [config["id2label"][str(i)] for i in logits.argmax(axis=1)]
assert "torch" not in sys.modules and "transformers" not in sys.modules
print(json.dumps([labels, scores.tolist()]))
"""


@pytest.fixture(scope="module")
def adapter(tiny_base, tmp_path_factory) -> Path:
    """A random LoRA adapter whose card names rows that are there."""
    folder = tmp_path_factory.mktemp("adapter")
    train = write_csv(folder / "train.csv", toy_rows(120))
    data = load_data(DataConfig(source=str(train), validation_fraction=0.5))
    record = DataRecord(
        config=DataConfig(source=str(train), validation_fraction=0.5, labels=LABELS),
        train_sha256=data.train.fingerprint,
        validation_sha256=data.validation.fingerprint,
    )
    method = LoraMethod(r=4, lora_alpha=8)
    save_random(
        folder / "a", tiny_base, method, labels=LABELS, probe=IDS, record=record, spread=0.1
    )
    return folder / "a"


@pytest.fixture(scope="module")
def merged(adapter, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "m"
    merge(adapter, out)
    return out


@pytest.fixture(scope="module")
def exported(adapter, tmp_path_factory):
    """The folder of an int8 export, which holds both graphs, and what export returned."""
    out = tmp_path_factory.mktemp("exported") / "e"
    return out, export(adapter, out, format="onnx-int8", max_drop=5)


@pytest.fixture
def traced(exported, monkeypatch) -> None:
    """Take the graph that was traced before: tracing takes seconds, and most tests are not about
    it."""
    monkeypatch.setattr(
        export_module,
        "write_graph",
        lambda model, path, **_: shutil.copyfile(exported[0] / PLAIN, path),
    )


def stock_logits(merged: Path, ids, mask):
    model = DistilBertForSequenceClassification.from_pretrained(merged).eval()
    with torch.inference_mode():
        return model(
            input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)
        ).logits.numpy()


@pytest.fixture(scope="module")
def compressed(exported, merged, tmp_path_factory):
    """The folder of an export with weights in 8 bits, and what export returned."""
    out = tmp_path_factory.mktemp("compressed") / "w"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            export_module,
            "write_graph",
            lambda model, path, **_: shutil.copyfile(exported[0] / PLAIN, path),
        )
        return out, export(merged, out, format="onnx-int8-weights", max_drop=5)


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 3), (2, 16), (5, 7), (3, 64)])
@pytest.mark.parametrize("padded", [False, True])
def test_a_graph_answers_any_batch_and_length_as_the_merged_model(
    rows, length, padded, exported, compressed, merged
):
    generator = np.random.default_rng(0)
    ids = generator.integers(5, 50, size=(rows, length))
    kept = generator.integers(1, length + 1, size=rows) if padded else np.full(rows, length)
    mask = (np.arange(length) < kept[:, None]).astype(np.int64)
    expected = stock_logits(merged, ids, mask)
    session = open_session(exported[0] / PLAIN).compute
    np.testing.assert_allclose(session(ids, mask), expected, atol=1e-5, rtol=0)
    if not padded:
        np.testing.assert_array_equal(session(ids, None), session(ids, mask))
    for folder in (exported[0], compressed[0]):
        found = open_session(folder / QUANTISED).compute(ids, mask)
        np.testing.assert_allclose(found, expected, atol=0.5, rtol=0)


def test_answers_of_8_bit_weights_do_not_depend_on_the_batch(compressed):
    ids = np.random.default_rng(0).integers(5, 50, size=(8, 16))
    mask = (np.arange(16) < np.arange(9, 17)[:, None]).astype(np.int64)
    compute = open_session(compressed[0] / QUANTISED).compute
    alone = [compute(ids[i : i + 1, : 9 + i], None)[0] for i in range(8)]
    np.testing.assert_allclose(compute(ids, mask), alone, atol=1e-5, rtol=0)


def test_8_bit_weights_are_stored_in_8_bits_and_said_to_be(compressed):
    out, found = compressed
    small, large = (onnx.load(out / name).graph for name in (QUANTISED, PLAIN))
    kept = {tensor.name for tensor in small.initializer}
    matrices = [tensor for tensor in large.initializer if len(tensor.dims) == 2]
    assert not kept & {tensor.name for tensor in matrices if tensor.dims[1] == 32}
    assert found.bytes[QUANTISED] < 0.6 * found.bytes[PLAIN]
    assert 0 < found.compared["onnx-int8-weights"]["reviews"]["max_difference"] < 0.5
    readme = (out / "README.md").read_text(encoding="utf-8")
    assert "onnx-int8-weights | reviews, 600 rows" in readme
    assert "does not depend on the other texts of its batch" in readme


def test_the_axes_are_dynamic_and_everything_stands_in_one_file(exported):
    graph = onnx.load(exported[0] / PLAIN, load_external_data=False).graph
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes == {
        "input_ids": ["batch", "length"],
        "attention_mask": ["batch", "length"],
        "logits": ["batch", len(LABELS)],
    }
    assert not any(tensor.external_data for tensor in graph.initializer)
    assert sorted(str(p.relative_to(exported[0])) for p in exported[0].rglob("*") if p.is_file()) == [
        "README.md", "config.json", PLAIN, QUANTISED, "sentence_bert_config.json",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


@pytest.mark.parametrize("part", TEI_KEYS)
@pytest.mark.parametrize("form", ["merged", "exported"])
def test_text_embeddings_inference_finds_what_it_needs(form, part, merged, exported):
    folder = merged if form == "merged" else exported[0]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert [key for key in TEI_KEYS[part] if config.get(key) is None] == []
    assert (config["hidden_size"], config["num_hidden_layers"]) == (32, 2)
    assert config["architectures"] == ["DistilBertForSequenceClassification"]
    assert config["label2id"] == {label: number for number, label in enumerate(LABELS)}
    lengths = json.loads((folder / "sentence_bert_config.json").read_text(encoding="utf-8"))
    assert lengths == {"max_seq_length": 16}


def test_stock_transformers_reads_the_added_keys_in_silence(merged, recwarn, caplog, capfd):
    logging_of_transformers.set_verbosity_warning()
    logging_of_transformers.enable_propagation()
    model = AutoModelForSequenceClassification.from_pretrained(merged)
    logging_of_transformers.disable_propagation()
    assert (model.config.dim, model.config.n_layers) == (32, 2)
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (32, 2)
    assert caplog.messages == []
    assert list(recwarn) == []
    assert "Warning" not in capfd.readouterr().err


@pytest.mark.parametrize("name", [PLAIN, QUANTISED])
@pytest.mark.parametrize("form", ["exported", "compressed"])
def test_the_oldest_runtime_that_is_named_reads_a_graph(form, name, exported, compressed):
    """ONNX Runtime 1.15.1 was tried: it reads IR 8 and opset 18, and refuses IR 10."""
    folder, _ = exported if form == "exported" else compressed
    model = onnx.load(folder / name)
    assert model.ir_version == 8
    versions = {opset.domain: opset.version for opset in model.opset_import}
    assert versions.pop("") == 18
    assert set(versions) <= {"ai.onnx.ml", "com.microsoft"}
    onnx.checker.check_model(model)


def test_no_path_of_this_machine_is_in_a_graph(exported):
    for name in (PLAIN, QUANTISED):
        content = (exported[0] / name).read_bytes()
        assert b"site-packages" not in content
        assert str(Path(torch.__file__).parent).encode() not in content


def test_what_was_compared_is_recorded(exported, adapter):
    out, found = exported
    assert found.as_dict()["folder"] == str(out)
    assert set(found.compared) == {"base", "onnx", "onnx-int8"}
    for name in ("onnx", "onnx-int8"):
        assert found.compared[name]["probe"]["rows"] == len(IDS)
        assert found.compared[name]["validation"]["rows"] == 60
    exact, small = found.compared["onnx"]["validation"], found.compared["onnx-int8"]["validation"]
    assert exact["max_difference"] < 1e-4 < small["max_difference"]
    assert exact["accuracy_merged"] == exact["accuracy_exported"]
    fall = 0
    for part in ("validation", "train"):
        figures = found.compared["onnx-int8"][part]
        fall += 60 * (figures["accuracy_merged"] - figures["accuracy_exported"])
    assert found.compared["onnx-int8"]["drop"] == pytest.approx(100 * fall / 120)
    assert set(found.texts_per_second) == set(found.bytes) == {PLAIN, QUANTISED}
    assert found.bytes[QUANTISED] < found.bytes[PLAIN]
    record = read_merge_record(out)
    assert record.adapter_sha256 == load_card(adapter).sha256
    assert set(record.files) == {PLAIN, QUANTISED}
    assert record.compared == found.compared
    assert record.readings == found.readings
    assert found.readings["stock"]["rows"] == 60
    readme = (out / "README.md").read_text(encoding="utf-8")
    assert "The cost of another runtime on raw texts: 0 of 60 validation texts" in readme
    assert "onnx-int8 | validation, 60 rows" in readme
    assert QUANTISED in readme
    assert "depends on the other texts of its batch" in readme
    assert 'pipeline("text-classification", "./e", { dtype: "q8" })' in readme


def test_the_python_of_a_card_reads_head_and_tail_as_printed(exported, merged, traced, tmp_path):
    copy = shutil.copytree(merged, tmp_path / "m")
    record = read_merge_record(copy).model_copy(update={"truncation": "head_tail"})
    write_merge_record(copy, record)
    (copy / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    export(copy, tmp_path / "e", format="onnx")
    readme = (tmp_path / "e/README.md").read_text(encoding="utf-8")
    assert "license: mit\n" in readme
    (code,) = re.findall(r"without this package:\n\n```python\n(.*?)```", readme, re.DOTALL)
    names = {}
    with contextlib.chdir(tmp_path):
        exec(code, names)
    texts = ["good<br />film", f"good {'so ' * 40}dull", "a " * 14, "a " * 15]
    for text, answer in zip(texts, classifier.load(tmp_path / "e").predict(texts), strict=True):
        assert names["classify_as_trained"](text) == pytest.approx(answer.scores, abs=1e-5)
    assert "classify_as_trained" not in (exported[0] / "README.md").read_text(encoding="utf-8")


def test_another_program_gets_our_labels_and_scores_without_torch(exported, adapter):
    texts = ["a good film.", "so dull and awful, really quite a poor plot", "it was fine"]
    texts += [
        "bad<br />plot &amp;lt; a",
        "caf&eacute;\u00a0 it&#39;s",
        "go\x00od\u200b film",
    ]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(exported[0]), json.dumps(texts)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    labels, scores = json.loads(done.stdout)
    ours = classifier.load(adapter, dtype="float32").predict(texts)
    assert labels == [answer.label for answer in ours]
    np.testing.assert_allclose(scores, [list(answer.scores.values()) for answer in ours], atol=1e-5)


@pytest.mark.parametrize("name", [PLAIN, QUANTISED])
def test_the_classifier_reads_what_was_exported(name, exported, adapter):
    ours, theirs = (
        classifier.load(p, dtype=d) for p, d in ((adapter, "float32"), (exported[0] / name, "auto"))
    )
    assert theirs.unverified == ()
    np.testing.assert_allclose(
        theirs.probabilities(["good film", "&amp;lt;b"]), ours.probabilities(["good film", "&amp;lt;b"]),
        atol=1e-5 if name == PLAIN else 0.1,
    )  # fmt: skip


def test_an_exported_folder_whose_config_was_saved_again_answers_the_same(exported, tmp_path):
    """infinity does so inside the folder that it serves."""
    copy = shutil.copytree(exported[0], tmp_path / "e")
    AutoConfig.from_pretrained(copy).save_pretrained(copy)
    assert (copy / "config.json").read_bytes() != (exported[0] / "config.json").read_bytes()
    before, after = classifier.load(exported[0]), classifier.load(copy)
    np.testing.assert_array_equal(after.probabilities(["a"]), before.probabilities(["a"]))


@pytest.mark.slow
def test_a_merged_folder_is_exported_with_the_same_bytes(merged, exported, tmp_path):
    export(merged, tmp_path / "e", format="onnx")
    assert (tmp_path / "e" / PLAIN).read_bytes() == (exported[0] / PLAIN).read_bytes()


def test_a_merged_folder_is_exported_and_compared_on_the_bundled_texts(merged, traced, tmp_path):
    found = export(merged, tmp_path / "e", format="onnx")
    assert "does not say on which rows" in found.compared["onnx"]["validation"]["reason"]
    # What travels with the model names no file or cell of anyone.
    recorded = read_merge_record(tmp_path / "e").compared["onnx"]
    assert recorded["validation"] == {"reason": "its rows could not be had where this was made"}
    assert recorded["probe"] == found.compared["onnx"]["probe"]
    assert found.compared["onnx"]["probe"]["rows"] == 32
    assert found.texts_per_second == {}
    assert not (tmp_path / "e" / QUANTISED).exists()
    assert (merged / "model.safetensors").is_file()
    assert AutoTokenizer.from_pretrained(tmp_path / "e").model_max_length == 16


def test_int8_past_the_allowed_drop_leaves_nothing(adapter, merged, traced, tmp_path):
    with pytest.raises(
        AdapterError, match=r"falls by .* points on 120 validation and train rows, allowed -50"
    ):
        export(adapter, tmp_path / "e", format="onnx-int8", max_drop=-50)
    # Without labelled rows every label that changes counts.
    with pytest.raises(
        AdapterError,
        match=r"% of labels change on 600 bundled review rows, allowed -1; accuracy cannot be "
        r"measured, because no validation rows could be read, .*; use --format onnx-int8-weights or "
        r"onnx, or raise",
    ):
        export(merged, tmp_path / "e", format="onnx-int8", max_drop=-1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("added", "said"), [(0.01, r"differ by 0\.01"), (np.nan, "are not finite")]
)
def test_a_graph_that_answers_otherwise_leaves_nothing(
    added, said, merged, traced, tmp_path, monkeypatch
):
    def open_broken(path):
        session = open_session(path)
        return Engine(
            lambda ids, mask: session.compute(ids, mask) + np.float32(added), session.max_tokens
        )

    monkeypatch.setattr(export_module, "open_session", open_broken)
    with pytest.raises(
        AdapterError, match=f"answers differently from the merged model: its logits {said}"
    ):
        export(merged, tmp_path / "e", format="onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_refused(
    adapter, merged, exported, tiny_base, tmp_path, monkeypatch
):
    out = tmp_path / "e"
    cases = [
        (
            adapter,
            {"format": "gguf"},
            ModelError,
            "format: found 'gguf'; allowed: safetensors, onnx, onnx-int8, onnx-int8-weights",
        ),
        (adapter, {"format": "onnx", "max_rows": 0}, ModelError, "max_rows"),
        (merged, {"format": "onnx", "base": "x"}, ModelError, "leave out --base and --into"),
        (merged, {"format": "onnx", "into": "dequantised"}, ModelError, "leave out --base"),
        (merged, {"format": "onnx", "max_drop": 1.0}, ModelError, "leave it out"),
        (tiny_base, {"format": "onnx"}, AdapterError, "neither an adapter .* nor a merged model"),
        (exported[0], {"format": "onnx"}, AdapterError, "was exported before"),
        (tmp_path / "nothing", {"format": "onnx"}, AdapterError, "nothing"),
    ]
    for source, options, kind, message in cases:
        with pytest.raises(kind, match=message):
            export(source, out, **options)
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    with pytest.raises(AdapterError, match="exists"):
        export(adapter, out, format="onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ModelError, match=r"needs onnxscript: pip install 'lora_sentiment\[onnx\]'"):
        export(adapter, tmp_path / "f", format="onnx")


def test_an_altered_merged_folder_is_refused(merged, tmp_path):
    copy = Path(shutil.copytree(merged, tmp_path / "m"))
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(AdapterError, match="was altered"):
        export(copy, tmp_path / "e", format="onnx")
    (copy / "tokenizer_config.json").unlink()
    (copy / "model.safetensors").write_bytes((merged / "model.safetensors").read_bytes())
    with pytest.raises(AdapterError, match=r"tokenizer_config\.json: is missing"):
        export(copy, tmp_path / "e", format="onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_merged_folder_whose_labels_are_no_names_is_refused(merged, tmp_path):
    copy = Path(shutil.copytree(merged, tmp_path / "m"))
    record = read_merge_record(copy)
    config = json.loads((copy / "config.json").read_text(encoding="utf-8")) | {
        "id2label": ["no", "yes"]
    }
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_merge_record(copy, record)
    with pytest.raises(AdapterError, match=r"config\.json: id2label is .*; allowed: an object"):
        export(copy, tmp_path / "e", format="onnx")


def test_a_model_that_cannot_be_traced_is_refused_and_left_as_it_was(merged, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise torch.onnx.errors.OnnxExporterError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", fail)
    model = DistilBertForSequenceClassification.from_pretrained(merged).eval()
    before = str(model), model.config._attn_implementation
    with pytest.raises(ModelError, match="cannot export this model to ONNX: no such operator"):
        write_graph(model, tmp_path / "a.onnx")
    assert (str(model), model.config._attn_implementation) == before


def test_safetensors_is_the_merge(adapter, merged, tmp_path):
    found = export(adapter, tmp_path / "e", format="safetensors")
    assert (tmp_path / "e/model.safetensors").read_bytes() == (
        merged / "model.safetensors"
    ).read_bytes()
    assert set(found.compared) == {"base"}
