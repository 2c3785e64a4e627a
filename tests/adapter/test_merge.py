"""A merged model answers as its adapter in stock transformers, or is refused."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertForSequenceClassification,
    pipeline,
)

from lora_sentiment import classifier
from lora_sentiment.adapter import merge as merge_module
from lora_sentiment.adapter.card import make_merged_card
from lora_sentiment.adapter.comparison import make_reference
from lora_sentiment.adapter.export import export
from lora_sentiment.adapter.folder import DataRecord, compute_probe, load, load_card
from lora_sentiment.adapter.merge import merge
from lora_sentiment.adapter.merge_record import read_merge_record, write_merge_record
from lora_sentiment.adapter.safe_files import check_files
from lora_sentiment.classifier import tokenise
from lora_sentiment.cli import show_compared
from lora_sentiment.data.rows import load_data
from lora_sentiment.errors import AdapterError, ModelError
from lora_sentiment.files import write_json
from lora_sentiment.models.load import load_base
from lora_sentiment.recipe.data import DataConfig
from lora_sentiment.recipe.method import HeadMethod, LoraMethod, Method
from lora_sentiment.tasks import SINGLE_LABEL
from tests.conftest import toy_rows, write_csv
from tests.random_adapters import alter_json, save_random
from tests.test_every_method import LABELS, METHODS, PAIRS

TEXT = "a really good film and a warm plot"
# These see what quantising changes. The others are slow.
QUICK = (("lora-patterns", "nf4"), ("lora-patterns", "int8"), ("ia3-regex", "nf4"))


@pytest.fixture(scope="module")
def original(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "a"
    # With this seed more than half of the toy rows are right.
    save_random(folder, tiny_base, LoraMethod(r=4, lora_alpha=8), labels=LABELS, seed=2)
    return folder


@pytest.fixture(scope="module")
def merged(original, tmp_path_factory):
    out = tmp_path_factory.mktemp("merged") / "out"
    merge(original, out)
    return out


@pytest.fixture
def adapter(original, tmp_path):
    return shutil.copytree(original, tmp_path / "a")


@pytest.fixture(scope="module")
def adapter_4bit(tiny_base, tmp_path_factory):
    """An adapter on a toy base that 4 bits change much, with a probe long enough to show it."""
    folder = tmp_path_factory.mktemp("original") / "a"
    probe = torch.randint(5, 80, (100, 8), generator=torch.Generator().manual_seed(0)).tolist()
    method = LoraMethod(r=4, lora_alpha=8)
    save_random(folder, tiny_base, method, labels=LABELS, probe=probe, seed=2, quantize="nf4")
    return folder


def name_rows(adapter, path, rows, **options):
    """Let an adapter's card name rows: a number of toy rows, or the rows themselves."""
    config = DataConfig(
        source={"train": str(write_csv(path, toy_rows(rows) if isinstance(rows, int) else rows))},
        **options,
    )
    data = load_data(config)
    record = DataRecord(
        config=config,
        train_sha256=data.train.fingerprint,
        validation_sha256=data.validation.fingerprint,
    )
    alter_json(adapter, "card.json", data=record.model_dump(mode="json"))


@pytest.fixture
def with_rows(adapter, tmp_path):
    """The adapter with validation rows that can be read."""
    name_rows(adapter, tmp_path / "train.csv", 200)
    return adapter


def alter_what_is_written(monkeypatch, change):
    """Let every merged model be altered on its way to the disk."""
    save_pretrained = DistilBertForSequenceClassification.save_pretrained

    def save_wrongly(model, folder, **values):
        save_pretrained(model, folder, **values)
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    monkeypatch.setattr(DistilBertForSequenceClassification, "save_pretrained", save_wrongly)


def refused(adapter, out, match, error=AdapterError, **options):
    """Hold a merge to its refusal, and to leaving the disk as it was."""
    before = sorted(path.name for path in adapter.parent.iterdir())
    with pytest.raises(error, match=match):
        merge(adapter, out, **options)
    assert sorted(path.name for path in adapter.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "quantize"),
    [
        pytest.param(
            name,
            quantize,
            marks=[] if quantize == "none" or (name, quantize) in QUICK else pytest.mark.slow,
            id=f"{name}-{quantize}",
        )
        for name, quantize in PAIRS
    ],
)
def test_every_method_answers_the_same_merged(name, quantize, tiny_base, tmp_path):
    method = TypeAdapter(Method).validate_python(METHODS[name])
    save_random(
        tmp_path / "a",
        tiny_base,
        method,
        labels=LABELS,
        quantize=quantize,
        double_quant=quantize == "nf4",
    )
    into = "base" if quantize == "none" else "dequantised"
    done = merge(tmp_path / "a", tmp_path / "out", into=into)
    found = {choice: parts["probe"] for choice, parts in done.compared.items()}
    for figures in found.values():
        assert figures["rows"] == 3
        assert np.isfinite(figures["max_difference"])
    if quantize == "none":
        assert found.keys() == {"base"}
        assert found["base"]["max_difference"] <= 2e-5
        assert found["base"]["allowed"] >= 1e-4
    else:
        assert found.keys() == {"base", "dequantised"}
        # A forward in 4 bits uses dequantised weights. A forward in 8 bits also rounds its input.
        assert found["dequantised"]["max_difference"] <= {"nf4": 2e-5, "int8": 0.5}[quantize]
    assert read_merge_record(tmp_path / "out").into == done.into


def test_the_folder_is_a_stock_classifier(adapter, tiny_base, tmp_path):
    merge(adapter, tmp_path / "out")
    out = tmp_path / "out"
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["DistilBertForSequenceClassification"]
    assert config["id2label"] == {"0": "negative", "1": "positive"}
    assert config["label2id"] == {"negative": 0, "positive": 1}
    base = json.loads((tiny_base / "config.json").read_text())
    assert [config[key] for key in ("dropout", "attention_dropout")] == [
        base["dropout"],
        base["attention_dropout"],
    ]
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert load_file(out / "model.safetensors").keys() == model.state_dict().keys()
    answers = compute_probe(load(adapter).model, [[2, 7, 8, 9, 3]]).logits
    np.testing.assert_allclose(
        compute_probe(model.eval(), [[2, 7, 8, 9, 3]]).logits, answers, atol=2e-5, rtol=0
    )
    names = {
        "README.md",
        "config.json",
        "model.safetensors",
        "sentence_bert_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {path.name for path in out.iterdir()} == names


def test_the_record_names_adapter_and_base_and_what_was_compared(adapter, tmp_path):
    done = merge(adapter, tmp_path / "out")
    card, record = load_card(adapter), read_merge_record(tmp_path / "out")
    assert (record.adapter_sha256, record.base_sha256) == (card.sha256, card.base.base_sha256)
    assert (record.max_length, record.method, record.dtype, record.clean) == (
        16,
        "lora",
        "float32",
        True,
    )
    assert record.compared["base"]["probe"] == done.compared["base"]["probe"]
    check_files(tmp_path / "out", record.files)
    assert record.files.keys() == {"model.safetensors"}
    readme = (tmp_path / "out/README.md").read_text()
    assert card.sha256 in readme
    assert "`negative`, `positive`" in readme
    assert "| base | probe, 3 rows | " in readme
    assert json.loads(json.dumps(done.as_dict()))["into"] == "base"


@pytest.mark.parametrize(
    ("base", "line"),
    [("a/base", "base_model: a/base\n"), ("bundled", ""), ("/home/somebody/base", "")],
)
def test_the_card_names_a_base_of_the_hub_alone(adapter, tmp_path, base, line):
    merge(adapter, tmp_path / "out")
    record = read_merge_record(tmp_path / "out").model_copy(update={"base": base})
    card = make_merged_card("out", LABELS, record, ModelCardData(), task=SINGLE_LABEL)
    metadata = card.split("---\n")[1]
    assert (
        "".join(found for found in metadata.splitlines(True) if found.startswith("base_model"))
        == line
    )


def test_a_stock_pipeline_gives_names_scores_and_the_cut_of_training(adapter, tmp_path):
    merge(adapter, tmp_path / "out")
    classify = pipeline("text-classification", str(tmp_path / "out"), top_k=None)
    loaded = load(adapter)
    ids = loaded.tokenizer(TEXT)["input_ids"]
    expected = torch.softmax(torch.tensor(compute_probe(loaded.model, [ids]).logits[0]), dim=0)
    found = {answer["label"]: answer["score"] for answer in classify([TEXT])[0]}
    assert [found[label] for label in LABELS] == pytest.approx(expected.tolist(), abs=1e-5)
    long = " ".join(["good"] * 14 + ["bad"] * 90)
    assert classify([long], truncation=True) == classify([" ".join(["good"] * 14)])


def test_merging_gives_the_same_bytes_twice(with_rows, tmp_path):
    for name in ("1", "2"):
        merge(with_rows, tmp_path / name / "out")
    for path in (tmp_path / "1/out").iterdir():
        assert path.read_bytes() == (tmp_path / "2/out" / path.name).read_bytes(), path.name


def test_validation_rows_are_compared_where_they_can_be_had(with_rows, tmp_path):
    found = merge(with_rows, tmp_path / "out").compared["base"]["validation"]
    assert (found["rows"], found["flips"]) == (20, 0)
    assert found["max_difference"] <= 2e-5
    assert found["accuracy_adapter"] == found["accuracy_merged"]
    assert (
        merge(with_rows, tmp_path / "fewer", max_rows=6).compared["base"]["validation"]["rows"] == 6
    )


def test_rows_that_cannot_be_had_are_a_reason_that_stays_at_home(with_rows, tmp_path):
    with (tmp_path / "train.csv").open("a") as file:
        file.write("another,positive\n")
    found = merge(with_rows, tmp_path / "out").compared["base"]
    assert "changed since training" in found["validation"]["reason"]
    (tmp_path / "train.csv").unlink()
    done = merge(with_rows, tmp_path / "again")
    assert "no such file" in done.compared["base"]["validation"]["reason"]
    assert "raw texts: not measured, because the validation rows could not be read" in done.reading
    assert "train.csv" not in (tmp_path / "again/config.json").read_text()
    assert "train.csv" not in (tmp_path / "again/README.md").read_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype_is_stored_and_judged_by_its_labels(dtype, adapter, tmp_path):
    done = merge(adapter, tmp_path / "out", dtype=dtype)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out/model.safetensors").values()} == {
        getattr(torch, dtype)
    }
    found = done.compared["base"]["probe"]
    assert 2e-5 < found["max_difference"] < 0.2
    assert (found["allowed"], found["flips"]) == (None, 0)


def test_another_dtype_excuses_no_wrong_merge(adapter, tmp_path, monkeypatch):
    rebuild = merge_module.rebuild

    def rebuild_wrongly(*arguments):
        model = rebuild(*arguments)
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if "lora_B" in name).mul_(1.01)
        return model

    monkeypatch.setattr(merge_module, "rebuild", rebuild_wrongly)
    refused(
        adapter,
        tmp_path / "out",
        r"logits differ by .* on the probe rows, allowed 0\.000",
        dtype="bfloat16",
    )


def test_both_ways_of_a_quantised_base_are_measured_and_the_worse_is_refused(
    adapter_4bit, tmp_path
):
    adapter = shutil.copytree(adapter_4bit, tmp_path / "a")
    refused(
        adapter,
        tmp_path / "out",
        "of 600 bundled review rows get another label, allowed 1 %; --into dequantised stays within",
        into="base",
    )
    done = merge(adapter, tmp_path / "out", into="dequantised")
    assert done.compared["base"]["probe"]["flips"] > 1
    assert done.compared["dequantised"]["probe"]["flips"] == 0
    assert (
        read_merge_record(tmp_path / "out").compared
        == json.loads((tmp_path / "out/config.json").read_text())["lora_sentiment"]["compared"]
    )
    readme = (tmp_path / "out/README.md").read_text()
    assert "| base | probe, 100 rows | " in readme
    assert "| dequantised | probe, 100 rows | " in readme


def test_the_weights_that_stay_within_the_limits_are_taken_and_that_is_said(
    adapter_4bit, tmp_path, monkeypatch, caplog
):
    adapter = shutil.copytree(adapter_4bit, tmp_path / "a")
    with caplog.at_level("INFO", "lora_sentiment"):
        done = merge(adapter, tmp_path / "out")
    assert done.into == read_merge_record(tmp_path / "out").into == "dequantised"
    assert "into the published base" in caplog.text
    assert "of 600 bundled review rows get another label, allowed 1 %" in caplog.text
    # The published base comes first where both stay within.
    with monkeypatch.context() as patch:
        patch.setattr(merge_module, "ROWS_PER_FLIP", 0)
        assert merge(adapter, tmp_path / "second").into == "base"
    monkeypatch.setattr(merge_module, "ROWS_PER_FLIP", 10**9)
    match = "rows get another label, allowed 1 %"
    alter_what_is_written(monkeypatch, lambda tensors: tensors["classifier.weight"].neg_())
    refused(adapter, tmp_path / "out2", match)


@pytest.mark.parametrize(("num_rows", "parts"), [(200, (20, 180)), (110, (12, 98)), (6000, (600,))])
def test_labels_that_may_change_are_judged_on_many_rows(num_rows, parts, adapter, tmp_path):
    name_rows(adapter, tmp_path / "many.csv", num_rows)
    compared = merge(adapter, tmp_path / "out", dtype="float16", max_rows=600).compared["base"]
    found = [compared[part]["rows"] for part in ("validation", "train") if part in compared]
    assert tuple(found) == parts
    # Exact logits need no share of labels.
    assert "train" not in merge(adapter, tmp_path / "exact").compared["base"]


def test_one_label_of_few_validation_rows_is_no_share_of_all_rows(tiny_base, tmp_path, monkeypatch):
    figures = {"rows": 60, "allowed": None, "max_difference": 0.2, "flips": 1}
    figures |= {"accuracy_adapter": 0.9, "accuracy_merged": 0.9 - 1 / 60}
    train = figures | {"rows": 440, "flips": 0, "accuracy_merged": 0.9}
    judge = merge_module._find_merge_fault
    assert judge({"probe": figures, "validation": figures}) == (
        "1 of 60 validation rows get another label, allowed 1 %"
    )
    assert judge({"probe": figures, "validation": figures, "train": train}) is None
    assert judge({"probe": figures, "validation": figures, "train": train | {"flips": 5}}) == (
        "6 of 500 validation and train rows get another label, allowed 1 %"
    )
    fallen = train | {"accuracy_merged": 0.9 - 2 / 440}
    assert judge({"probe": figures, "validation": figures, "train": fallen}) == (
        "accuracy on 500 validation and train rows falls by 0.60%, allowed 0.5 points"
    )


def test_accuracy_may_not_fall(with_rows, tmp_path, monkeypatch):
    monkeypatch.setattr(merge_module, "ROWS_PER_FLIP", 0)
    alter_what_is_written(monkeypatch, lambda tensors: tensors["classifier.weight"].neg_())
    match = r"accuracy on 200 validation and train rows falls by .*%, allowed 0\.5 points; --dtype float32 stays within"
    refused(with_rows, tmp_path / "out", match, dtype="float16")


CORRUPTIONS = {
    "altered": (
        lambda t: t["classifier.bias"][0].add_(1),
        r"answers differently from the adapter: its logits differ by 1 ",
    ),
    "missing": (
        lambda t: t.pop("classifier.bias"),
        r"lacks tensors or has others: classifier\.bias",
    ),
    "not finite": (
        lambda t: t["classifier.bias"].fill_(float("nan")),
        "not finite on the probe rows",
    ),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corrupted_merge_is_refused(name, adapter, tmp_path, monkeypatch):
    change, match = CORRUPTIONS[name]
    alter_what_is_written(monkeypatch, change)
    refused(adapter, tmp_path / "out", match)


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("model.safetensors", lambda data: data[:-10], "that was written cannot be loaded again"),
        (
            "tokenizer.json",
            lambda data: data.replace(b'"good"', b'"goods"'),
            "another tokenizer or other labels",
        ),
    ],
)
def test_a_merge_that_is_read_back_differently_is_refused(
    name, change, match, adapter, tmp_path, monkeypatch
):
    reload = merge_module._reload

    def reload_changed(folder, *arguments):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))
        return reload(folder, *arguments)

    monkeypatch.setattr(merge_module, "_reload", reload_changed)
    refused(adapter, tmp_path / "out", match)


@pytest.mark.parametrize(
    ("error", "seen"),
    [(KeyboardInterrupt, KeyboardInterrupt), (OSError(28, "disk full"), AdapterError)],
)
def test_nothing_is_left_of_a_merge_that_was_stopped(error, seen, adapter, tmp_path, monkeypatch):
    def stop(model, folder):
        (folder / "half").write_text("x")
        raise error

    monkeypatch.setattr(DistilBertForSequenceClassification, "save_pretrained", stop)
    refused(
        adapter,
        tmp_path / "new/deeper/out",
        None if seen is KeyboardInterrupt else "cannot be written",
        error=seen,
    )


def test_a_place_that_is_taken_is_refused_before_anything_is_loaded(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(merge_module, "load", None)
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    for name in ("out", "link", "file"):
        refused(adapter, tmp_path / name, f"{name}: exists; name another folder")
    refused(adapter, tmp_path / "file/out", "file/out: cannot be written")


def test_a_place_that_is_taken_meanwhile_is_left_alone(adapter, tmp_path, monkeypatch):
    write = merge_module.write_merge_record

    def write_late(folder, record):
        write(folder, record)
        (tmp_path / "out").mkdir()

    monkeypatch.setattr(merge_module, "write_merge_record", write_late)
    with pytest.raises(AdapterError, match="written by another process meanwhile"):
        merge(adapter, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "out"]
    assert list((tmp_path / "out").iterdir()) == []


def test_a_merged_model_is_no_adapter_and_no_base(adapter, tiny_base, tmp_path):
    merge(adapter, tmp_path / "out")
    sha256 = load_card(adapter).sha256[:12]
    refused(
        tmp_path / "out",
        tmp_path / "twice",
        f"out: already holds the adapter {sha256}, merged into",
    )
    refused(
        adapter,
        tmp_path / "twice",
        f"out: is not a base: it already holds the adapter {sha256}",
        base=str(tmp_path / "out"),
    )
    # The hash of the encoder alone would let this one through.
    save_random(tmp_path / "head", tiny_base, HeadMethod(kind="head"), labels=LABELS)
    merge(tmp_path / "head", tmp_path / "probed")
    refused(tmp_path / "head", tmp_path / "twice", "is not a base", base=str(tmp_path / "probed"))


def test_an_adapter_trained_on_a_merged_model_is_merged_into_it(adapter, tmp_path):
    merge(adapter, tmp_path / "first")
    save_random(tmp_path / "b", tmp_path / "first", LoraMethod(), labels=LABELS)
    merge(tmp_path / "b", tmp_path / "second")
    assert read_merge_record(tmp_path / "second").adapter_sha256 == load_card(tmp_path / "b").sha256


def test_a_base_that_moved_is_found_where_one_says(adapter, tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "moved")
    base = json.loads((adapter / "card.json").read_text())["base"]
    alter_json(adapter, "card.json", base=base | {"name": "/nowhere/base"})
    refused(adapter, tmp_path / "out", "name it with --base", error=ModelError)
    merge(adapter, tmp_path / "out", base=str(tmp_path / "moved"))


def test_a_base_that_changes_while_it_is_merged_is_refused(adapter, tmp_path, monkeypatch):
    def load_changed(config, **options):
        base = load_base(config, **options)
        object.__setattr__(base, "sha256", "0")
        return base

    monkeypatch.setattr(merge_module, "load_base", load_changed)
    refused(adapter, tmp_path / "out", "changed on disk while")


def test_a_method_that_peft_cannot_merge_is_refused_with_its_reason(adapter, tmp_path, monkeypatch):
    def refuse(tuner, **values):
        raise ValueError("these layers stay apart")

    monkeypatch.setattr("peft.tuners.lora.LoraModel.merge_and_unload", refuse)
    refused(adapter, tmp_path / "out", "method lora cannot be merged: these layers stay apart")


def test_options_that_are_not_allowed_are_refused(adapter, tmp_path):
    refused(
        adapter,
        tmp_path / "out",
        "unquantised base, so nothing is dequantised; use --into base",
        into="dequantised",
    )
    for options, match in (
        ({"dtype": "auto"}, "dtype: found 'auto'; allowed: float32, bfloat16, float16"),
        ({"into": "both"}, "into: found 'both'; allowed: base, dequantised"),
        ({"truncation": "tail"}, "truncation: found 'tail'; allowed: head"),
        ({"max_rows": 0}, "max_rows: found 0; allowed: 1 or more"),
    ):
        refused(adapter, tmp_path / "out", match, error=ModelError, **options)


def test_a_text_cut_elsewhere_is_said_in_the_readme(adapter, tmp_path):
    alter_json(adapter, "card.json", truncation="head_tail")
    merge(adapter, tmp_path / "out")
    assert "this pipeline keeps the first tokens" in (tmp_path / "out/README.md").read_text()


def test_the_python_of_a_card_reads_head_and_tail_as_printed(adapter, tmp_path, monkeypatch):
    alter_json(adapter, "card.json", truncation="head_tail")
    merge(adapter, tmp_path / "out")
    (code,) = re.findall(
        r"as training did:\n\n```python\n(.*?)```",
        (tmp_path / "out/README.md").read_text(),
        re.DOTALL,
    )
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    texts = ["good<br />film", f"good {'so ' * 40}dull", f"{'a ' * 14}", f"{'a ' * 15}"]
    for text, answer in zip(
        texts, classifier.load(adapter, dtype="float32").predict(texts), strict=True
    ):
        assert names["classify_as_trained"](text) == pytest.approx(answer.scores, abs=1e-5)


def test_a_card_has_no_reader_where_training_kept_the_first_tokens(merged):
    assert "classify_as_trained" not in (merged / "README.md").read_text()


METADATA = """---
license: mit
datasets:
- a/b
metrics:
- accuracy
model-index:
- name: a
  results:
  - task:
      type: text-classification
    dataset:
      name: a/b
      type: a/b
      split: test
    metrics:
    - type: accuracy
      value: 0.9
---
# A card
"""


def test_licence_and_results_of_the_adapters_card_are_kept(adapter, tmp_path):
    (adapter / "README.md").write_text(METADATA, encoding="utf-8")
    merge(adapter, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert (card.data.license, card.data.datasets, card.data.metrics) == (
        "mit", ["a/b"], ["accuracy"],
    )  # fmt: skip
    (result,) = card.data.eval_results
    assert (result.metric_value, result.dataset_split) == (0.9, "test")
    assert card.data.model_name == "out"
    assert "results of the adapter: accuracy 0.9 (a/b, test)" in card.text


@pytest.mark.parametrize(
    "block", ["license: [", "a: &a [1]\nb: *a", "model-index: [{results: 3}]", "- 1", "1: 2"]
)
def test_malformed_metadata_of_a_card_is_refused(block, adapter, tmp_path):
    (adapter / "README.md").write_text(f"---\n{block}\n---\n", encoding="utf-8")
    refused(adapter, tmp_path / "out", "README.md: its metadata cannot be read: ")


def test_what_is_not_finite_is_printed_as_that(capsys):
    found = {"rows": 32, "flips": 3, "max_difference": None, "allowed": None}
    show_compared({"dequantised": {"probe": found}})
    assert capsys.readouterr().out == (
        "dequantised 32 probe rows: logits that are not finite, 3 other labels\n"
    )


RAW = [
    "a good film", "", "   ", "good<br />bad", "good<BR>bad", "good<Br/>bad", "good<br\t/>bad",
    "good< br>bad", "good<br / >bad", "<br /><br />good<br />", "good&nbsp;bad", "good&nbspbad",
    "caf&eacute;", "caf&Eacute;", "caf&#233;", "caf&#xE9;", "caf&#0233", "na&iuml;ve",
    "&quot;good&quot; &amp; bad", "it&#39;s", "it&apos;s", "it&#x27;s", "it&rsquo;s", "it&#146;s",
    "&amp;lt;br&amp;gt;", "&lt;br /&gt;good", "&lt;i&gt;good&lt;/i&gt;", "&ltgood", "a&notit;b",
    "so &hellip; good&mdash;bad", "a &unknown; film", "a & b; c", "AT&T", "go\x00od", "go\x85od",
    "go\u200bod\ufeff", "\u200egood", "good\u00a0\u3000\r\n bad", "cafe\u0301", "e\u0301" * 9,
]  # fmt: skip
# docs/merging.md names each kind.
LEFT = [
    "&alpha; good", "&#128512; good", "a&ltimes;b", "good&#35;", "good&semi;", "good&nvgt;",
    "good&#0;", "[S\u200bEP] good", "[SEP&#93; good", "&Omega;", "&#128512",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["folder", "resaved"])
def test_a_stock_tokenizer_reads_raw_texts_as_training_did(kind, original, merged, tmp_path):
    stock = AutoTokenizer.from_pretrained(merged)
    if kind == "resaved":
        stock.save_pretrained(tmp_path / "again")
        stock = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert len(RAW) == 40
    trained = classifier.load(original)
    ours = [read(trained, text) for text in [*RAW, *LEFT]]
    theirs = [stock(text, truncation=True)["input_ids"] for text in [*RAW, *LEFT]]
    differs = [
        text for text, one, two in zip([*RAW, *LEFT], ours, theirs, strict=True) if one != two
    ]
    assert differs == LEFT


def read(model, text):
    """Return the input of a text, as a classifier reads it."""
    (ids,) = tokenise(model.encoder, [text], clean=model.clean)
    return model.encoder.frame(model.encoder.truncate(ids)).tolist()


def test_a_merged_folder_is_not_cleaned_twice(original, merged):
    trained, loaded = classifier.load(original), classifier.load(merged)
    for text in [*RAW, *LEFT, "good &amp;lt; film", "bad &amp;amp;amp;#39; plot"]:
        assert read(loaded, text) == read(trained, text)


def test_an_adapter_trained_on_raw_texts_is_merged_without_cleaning(with_rows, tmp_path):
    name_rows(with_rows, tmp_path / "raw.csv", 200, clean=False)
    done = merge(with_rows, tmp_path / "out")
    stock = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (
        stock("good<br />bad")["input_ids"]
        == load(with_rows).tokenizer("good<br />bad")["input_ids"]
    )
    assert read_merge_record(tmp_path / "out").cleaning_steps == 0
    assert "cleans" not in done.reading
    assert done.readings["stock"]["changed"] == 0


def test_what_a_stock_reading_costs_is_counted_and_said(adapter, tmp_path, caplog):
    rows = [
        (f"{text}<br />{'so ' * (i % 40)}good &alpha;", label)
        for i, (text, label) in enumerate(toy_rows(200))
    ]
    name_rows(adapter, tmp_path / "train.csv", rows)
    alter_json(adapter, "card.json", truncation="head_tail")
    with caplog.at_level("INFO", "lora_sentiment"):
        done = merge(adapter, tmp_path / "out")
    cost = done.readings["stock"]
    classify = pipeline("text-classification", str(tmp_path / "out"))
    data = load_data(load_card(adapter).data.config)
    raw = [rows[number - 1][0] for number in data.validation.numbers]
    stock = [answer["label"] for answer in classify(raw, truncation=True)]
    ours = [answer.label for answer in classifier.load(adapter, dtype="float32").predict(raw)]
    assert cost["rows"] == cost["changed"] == 20
    assert cost["flips"] == sum(a != b for a, b in zip(stock, ours, strict=True)) > 0
    truth = [data.labels[label] for label in data.validation.labels]
    gained = sum(a == b for a, b in zip(stock, truth, strict=True))
    gained -= sum(a == b for a, b in zip(ours, truth, strict=True))
    assert cost["accuracy_change"] == pytest.approx(gained / 20)
    said = f"20 of 20 validation texts are read differently, {cost['flips']} labels change"
    assert said in done.reading
    assert said in (tmp_path / "out/README.md").read_text()
    assert done.as_dict()["readings"] == read_merge_record(tmp_path / "out").readings


def test_head_truncation_is_measured_and_then_read(adapter, tmp_path):
    rows = [(f"{'so ' * (i % 40)}{text}", label) for i, (text, label) in enumerate(toy_rows(200))]
    name_rows(adapter, tmp_path / "train.csv", rows)
    alter_json(adapter, "card.json", truncation="head_tail")
    usual = merge(adapter, tmp_path / "usual").readings
    done = merge(adapter, tmp_path / "out", truncation="head")
    assert usual.keys() == {"stock"}
    assert done.readings["head"] == usual["stock"]
    assert done.readings["head"]["changed"] > 0
    assert done.readings["stock"]["changed"] == 0
    assert "its first ones stay. Training kept the first quarter" in done.reading
    (tmp_path / "train.csv").unlink()
    unknown = merge(adapter, tmp_path / "unknown", truncation="head").reading
    assert "and the last three quarters: not measured, because" in unknown
    merged = classifier.load(tmp_path / "out")
    assert merged.encoder.truncation == "head"
    stock = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert stock(rows[39][0], truncation=True)["input_ids"] == read(merged, rows[39][0])


@pytest.mark.parametrize("normalizer", [None, {"type": "Lowercase"}])
def test_a_normalizer_that_holds_no_cleaning_is_refused(normalizer, merged, tmp_path):
    shutil.copytree(merged, tmp_path / "out")
    values = json.loads((tmp_path / "out/tokenizer.json").read_text())
    write_json(tmp_path / "out/tokenizer.json", values | {"normalizer": normalizer})
    record = read_merge_record(tmp_path / "out")
    write_merge_record(tmp_path / "out", record)
    with pytest.raises(AdapterError, match=r"cannot be used"):
        classifier.load(tmp_path / "out")
    with pytest.raises(AdapterError, match=r"tokenizer\.json: cannot be used"):
        export(tmp_path / "out", tmp_path / "e", format="onnx")


@pytest.mark.parametrize(
    ("quantize", "is_alone"), [("int8", True), ("nf4", False), ("none", False)]
)
def test_only_an_int8_adapter_is_asked_one_text_at_a_time(
    quantize, is_alone, tiny_base, tmp_path, monkeypatch
):
    save_random(tmp_path / "a", tiny_base, LoraMethod(), labels=LABELS, quantize=quantize)
    engines = []

    def make(engine, name, **options):
        engines.append(engine)
        return make_reference(engine, name, **options)

    monkeypatch.setattr(merge_module, "make_reference", make)
    merge(tmp_path / "a", tmp_path / "out")
    assert [engine.max_tokens == 1 for engine in engines] == [is_alone]
