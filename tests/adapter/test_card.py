import pytest
import yaml

from lora_sentiment.adapter.card import make_model_card
from lora_sentiment.adapter.folder import BaseRecord, Card, DataRecord, Probe
from lora_sentiment.recipe.data import DataConfig
from lora_sentiment.recipe.method import LoraMethod

REPORT = {
    "test": {
        "accuracy": {"value": 0.91, "low": 0.9, "high": 0.92},
        "auroc": {"value": None, "low": None, "high": None},
    },
    "validation": {
        "accuracy": {"value": 0.9, "low": 0.8, "high": 1.0},
        "auroc": {"value": 0.5, "low": 0.4, "high": 0.6},
    },
    "parameters": {"adapter": 10, "encoder": 0, "head": 20, "trainable": 30, "base": 100, "share": 0.3},
    "train": {"steps": 5, "best_step": 4, "tokens": 1000, "seconds": 2.0, "tokens_per_second": 500.0, "engine": "fast"},
}  # fmt: skip


def card(
    source="stanfordnlp/imdb",
    base="distilbert/distilbert-base-uncased",
    revision="0" * 40,
    labels=("neg", "pos"),
):
    return Card(
        schema=1,
        labels=list(labels),
        max_length=256,
        truncation="head",
        method=LoraMethod(),
        base=BaseRecord(name=base, revision=revision, base_sha256="0" * 64),
        tokenizer_sha256="1" * 64,
        files={},
        data=DataRecord(
            config=DataConfig(source=source),
            train_sha256="2",
            validation_sha256="3",
            carved_test_sha256=None,
        ),
        calibration=None,
        versions={},
        machine={},
        probe=Probe(input_ids=[[1, 2]], logits=[[0.0, 1.0]]),
    )


def metadata(text):
    return yaml.safe_load(text.split("---")[1])


def test_hub_names_become_metadata():
    found = metadata(make_model_card("imdb", card(), REPORT, is_peft=True))
    assert found["base_model"] == "distilbert/distilbert-base-uncased"
    assert found["datasets"] == ["stanfordnlp/imdb"]
    assert found["library_name"] == "peft"
    (result,) = found["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == 0.91
    assert result["dataset"]["split"] == "test"


@pytest.mark.parametrize(
    "source", ["reviews/train.csv", "reviews/train.json", "/data/x/*.csv", {"train": "a.csv"}]
)
def test_files_and_folders_do_not(source):
    found = metadata(
        make_model_card("x", card(source, base="models/mine", revision=None), REPORT, is_peft=False)
    )
    assert "datasets" not in found
    assert "base_model" not in found


@pytest.mark.parametrize(
    ("source", "name"),
    [("bundled", "the reviews that ship with the package"), ("reviews/train.csv", "local files")],
)
def test_rows_that_have_no_name_on_the_hub_are_said_to_be_what_they_are(source, name):
    (result,) = metadata(make_model_card("x", card(source), REPORT, is_peft=True))["model-index"][
        0
    ]["results"]
    assert result["dataset"]["name"] == name


def test_the_text_states_results_use_and_limits():
    text = make_model_card("imdb", card(), REPORT, is_peft=True)
    assert "| accuracy | 0.9000 [0.8000, 1.0000] | 0.9100 [0.9000, 0.9200] |" in text
    assert "| auroc | 0.5000 [0.4000, 0.6000] | n/a |" in text
    assert "AutoPeftModelForSequenceClassification" in text
    assert "num_labels=2" in text
    assert "## Limits" in text


@pytest.mark.parametrize("base", ["bundled", "distilbert/distilbert-base-uncased"])
def test_a_card_says_how_stock_peft_gets_the_labels(base):
    text = make_model_card("x", card(base=base), REPORT, is_peft=True)
    assert "`model.config.id2label = dict(enumerate(labels))`" in text
    assert ("`AutoPeftModelForSequenceClassification` and `pipeline` look" in text) == (
        base == "bundled"
    )


def test_every_judged_role_is_a_result_under_its_own_split():
    report = {**REPORT, "dev": REPORT["validation"]}
    splits = {"train": "train", "dev": "validation", "test": "test"}
    own = card("stanfordnlp/sst2")
    own = own.model_copy(
        update={
            "data": own.data.model_copy(update={"config": DataConfig(source="a/b", splits=splits)})
        }
    )
    text = make_model_card("sst2", own, report, is_peft=True)
    results = metadata(text)["model-index"][0]["results"]
    assert {r["dataset"]["split"]: r["metrics"][0]["value"] for r in results} == {
        "test": 0.91,
        "validation": 0.9,
    }
    assert "| metric | validation | test | dev |" in text


def test_validation_is_a_result_where_nothing_else_was_judged():
    report = {name: block for name, block in REPORT.items() if name != "test"}
    (result,) = metadata(make_model_card("x", card(), report, is_peft=True))["model-index"][0][
        "results"
    ]
    assert result["dataset"]["split"] == "validation"


def test_the_limits_say_what_is_calibrated():
    plain = make_model_card("x", card(), REPORT, is_peft=True)
    assert (
        "Probabilities are as the model gives them; `ece` above says how far to trust them.\n"
        in plain
    )
    own = card().model_copy(update={"calibration": {"temperature": 1.2345}})
    text = make_model_card("x", own, REPORT, is_peft=True)
    assert "The temperature 1.234 was fitted on validation" in text
    assert "`calibrated_log_loss`" in text


@pytest.mark.parametrize(
    ("label", "shown"),
    [
        ("two\nlines", "`two lines`"),
        ("a\t| b", "`a | b`"),
        ("<script>x</script>", "`<script>x</script>`"),
        ("`code`", "`` `code` ``"),
        ("a ``` b", "````a ``` b````"),
        ("**bold** [x](y)", "`**bold** [x](y)`"),
        ("\x1b[31m\u202ex", "`\ufffd[31m\ufffdx`"),
    ],
)
@pytest.mark.parametrize("base", ["bundled", "distilbert/distilbert-base-uncased"])
def test_a_label_is_code_in_a_card_whatever_it_holds(label, shown, base):
    text = make_model_card("x", card(base=base, labels=[label, "ok"]), REPORT, is_peft=True)
    assert text.count(f"{shown}, `ok`") == 3
    assert label not in text.replace(shown, "")


def test_a_card_does_not_name_a_thousand_labels():
    labels = [f"topic {i}" for i in range(1000)]
    text = make_model_card("x", card(labels=labels), REPORT, is_peft=True)
    assert "`topic 19`, and 980 more" in text
    assert len(text) < 6000
