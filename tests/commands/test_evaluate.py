import json
import shutil
from pathlib import Path

import pytest

from lora_sentiment.commands.evaluate import evaluate
from lora_sentiment.errors import AdapterError, DataError, ModelError
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.train import train
from tests.conftest import toy_rows, write_csv


@pytest.fixture(scope="module")
def runs(tiny_base, tmp_path_factory):
    """A function that trains on the toy rows, with a source of one's own if given."""
    folder = tmp_path_factory.mktemp("evaluate")
    rows = toy_rows(161)
    write_csv(folder / "train.csv", rows[:120])
    write_csv(folder / "test.csv", rows[120:])
    write_csv(folder / "dev.csv", rows[120:141])
    (folder / "toy.yaml").write_text(
        f"data: {{source: {folder}/train.csv}}\n"
        f"model: {{name: {tiny_base}, max_length: 16, dtype: float32}}\n"
        "train: {max_steps: 8, batch_size: 16, learning_rate: 1e-2}\n",
        encoding="utf-8",
    )

    def run(name, *overrides, **files):
        source = [f"{role}: {folder}/{file}" for role, file in files.items()]
        more = [f"data.source={{{', '.join(source)}}}"] if files else []
        overrides = [f"output.dir={folder}/{name}", *more, *overrides]
        return train(Recipe.load(folder / "toy.yaml", overrides))

    return run


@pytest.fixture(scope="module")
def trained(runs):
    return runs("trained", train="train.csv", test="test.csv")


@pytest.fixture(scope="module")
def with_dev(runs):
    return runs("with_dev", train="train.csv", dev="dev.csv")


def copy_with(run, folder, change):
    """Return a copy of an adapter whose card a function changed."""
    copy = Path(shutil.copytree(run.adapter, folder / "copy"))
    card = json.loads((copy / "card.json").read_text(encoding="utf-8"))
    change(card)
    (copy / "card.json").write_text(json.dumps(card), encoding="utf-8")
    return copy


def test_the_folder_alone_gives_the_reports_figures(trained):
    for split in ("test", "validation"):
        found = evaluate(trained.adapter, split=split, dtype="float32")
        for name, interval in found.scores.items():
            assert interval.value == pytest.approx(
                trained.report[split][name]["value"], abs=1e-5
            ), name


def test_another_file_can_be_judged(trained):
    found = evaluate(trained.adapter, source=str(trained.adapter.parent / "train.csv"))
    assert found.num_rows == 120
    assert found.as_dict()["accuracy"]["value"] == found.scores["accuracy"].value


def test_integers_need_an_adapter_whose_label_names_were_stated(trained, tmp_path):
    rows = [(text, "01"[label == "positive"]) for text, label in toy_rows(40)]
    coded = write_csv(tmp_path / "coded.csv", rows)
    with pytest.raises(DataError, match="0=negative, 1=positive would be a guess; write the names"):
        evaluate(trained.adapter, source=str(coded))

    def state_names(card):
        card["data"]["config"]["labels"] = ["negative", "positive"]

    stated = copy_with(trained, tmp_path, state_names)
    worded = write_csv(tmp_path / "worded.csv", toy_rows(40))
    found = evaluate(stated, source=str(coded))
    assert found.as_dict() == evaluate(trained.adapter, source=str(worded)).as_dict()


@pytest.mark.parametrize(
    ("source", "is_ordered"), [("imdb", True), ("owner/set", True), ("rows.csv", False)]
)
def test_names_of_a_hub_data_set_are_in_order_in_cards_that_do_not_record_them(
    trained, tmp_path, source, is_ordered
):
    def name_source(card):
        card["data"]["config"]["source"] = source

    older = copy_with(trained, tmp_path, name_source)
    rows = [(text, "01"[label == "positive"]) for text, label in toy_rows(40)]
    coded = str(write_csv(tmp_path / "coded.csv", rows))
    if is_ordered:
        assert evaluate(older, source=coded).num_rows == 40
        return
    with pytest.raises(DataError, match="would be a guess"):
        evaluate(older, source=coded)


def test_an_adapter_whose_labels_and_columns_have_blanks_is_judged(trained, tmp_path):
    def add_blanks(card):
        card["labels"] = [" negative", "positive "]
        card["data"]["config"]["label_column"] = " label"

    older = copy_with(trained, tmp_path, add_blanks)
    expected = evaluate(trained.adapter).as_dict()
    assert evaluate(older).as_dict() == expected
    assert evaluate(older, split="validation").num_rows == 12
    source = str(trained.adapter.parent / "test.csv")
    assert evaluate(older, source=source).as_dict() == expected


def test_a_source_without_the_split_says_what_to_do(runs):
    run = runs("no_test")
    assert "test" not in run.report
    with pytest.raises(
        DataError, match="use --split validation; other rows can be named with --source"
    ):
        evaluate(run.adapter)


def test_rows_that_changed_since_training_are_refused(trained, tmp_path):
    text = (trained.adapter.parent / "train.csv").read_text() + "another,positive\n"
    (tmp_path / "train.csv").write_text(text)

    def change(card):
        card["data"]["config"]["source"]["train"] = str(tmp_path / "train.csv")

    with pytest.raises(AdapterError, match="changed since training"):
        evaluate(copy_with(trained, tmp_path, change), split="validation")


def test_an_unknown_split_or_dtype_is_refused(trained):
    with pytest.raises(DataError, match="found 'train'; allowed: test, validation"):
        evaluate(trained.adapter, split="train")
    with pytest.raises(ModelError, match="found 'bf16'; allowed: auto, float32"):
        evaluate(trained.adapter, dtype="bf16")


def test_a_carved_test_split_is_carved_again(runs):
    run = runs("carved", "data.test_fraction=0.2")
    found = evaluate(run.adapter, dtype="float32")
    assert found.num_rows == 24
    assert found.scores["log_loss"].value == pytest.approx(
        run.report["test"]["log_loss"]["value"], abs=1e-5
    )


def test_every_judged_role_can_be_judged_again(with_dev):
    found = evaluate(with_dev.adapter, split="dev", dtype="float32")
    assert (found.split, found.num_rows) == ("dev", 21)
    assert (
        set(found.scores)
        == set(with_dev.report["dev"])
        >= {"calibrated_log_loss", "calibrated_ece"}
    )
    for name, interval in found.scores.items():
        assert interval.value == pytest.approx(with_dev.report["dev"][name]["value"], abs=1e-5), (
            name
        )
    assert evaluate(with_dev.adapter, split="validation").num_rows == 12


def test_a_role_that_was_not_judged_is_refused_with_those_that_were(with_dev):
    with pytest.raises(DataError, match="found 'test'; allowed: dev, validation"):
        evaluate(with_dev.adapter)


def test_hidden_labels_cannot_be_judged_again(with_dev, tmp_path):
    (tmp_path / "dev.csv").write_text("text,label\nfine,-1\n")

    def change(card):
        card["data"]["config"]["source"]["dev"] = str(tmp_path / "dev.csv")

    with pytest.raises(DataError, match=r"the 1 rows of dev have no labels \(all are -1\)"):
        evaluate(copy_with(with_dev, tmp_path, change), split="dev")


def test_an_adapter_without_a_temperature_is_judged_without(trained, tmp_path):
    copy = copy_with(trained, tmp_path, lambda card: card.update(calibration=None))
    assert set(trained.report["test"]) - set(evaluate(copy).scores) == {
        "calibrated_log_loss",
        "calibrated_ece",
    }


@pytest.mark.parametrize(
    ("method", "quantize", "dtype"),
    [("lora", "nf4", "bfloat16"), ("lora", "int8", "float32"), ("head", "nf4", "bfloat16")],
)
def test_a_quantised_adapter_is_rebuilt_and_judged(runs, method, quantize, dtype):
    overrides = [
        f"method.kind={method}",
        f"model.quantize={quantize}",
        f"model.dtype={dtype}",
        "train.max_steps=2",
    ]
    run = runs(f"{method}-{quantize}", *overrides, train="train.csv", test="test.csv")
    found = evaluate(run.adapter, dtype=dtype)
    tolerance = 1e-4 if dtype == "float32" else 0.02
    assert found.scores["log_loss"].value == pytest.approx(
        run.report["test"]["log_loss"]["value"], abs=tolerance
    )


# The report page


def test_training_writes_a_page_without_a_text_and_evaluate_one_with_texts(trained, tmp_path):
    texts = [text for text, _ in toy_rows(161)[120:]]
    own = (trained.adapter / "report.html").read_text(encoding="utf-8")
    assert "twice, same label" in own
    assert not any(text in own for text in texts)
    page = tmp_path / "page.html"
    found = evaluate(trained.adapter, html=page, with_texts=True)
    shown = page.read_text(encoding="utf-8")
    assert f"{found.scores['accuracy'].value:.4f} [" in shown
    num_wrong = round(41 * (1 - found.scores["accuracy"].value))
    assert sum(text in shown for text in texts) == num_wrong
    assert 'alt="confusion matrix"' in shown
    assert 'alt="confusion matrix"' in own
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_a_picture_that_cannot_be_drawn_does_not_cost_the_page(
    trained, tmp_path, monkeypatch, caplog
):
    def fail(*_, **__):
        raise ImportError("matplotlib is broken")

    monkeypatch.setattr("lora_sentiment.evaluation.plots.plot_confusion", fail)
    evaluate(trained.adapter, html=tmp_path / "page.html")
    assert "page.html: has no confusion matrix: matplotlib is broken" in caplog.text
    assert "training curve" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("there.html", "exists already"),
        ("nowhere/new.html", "there is no folder"),
        ("folder/new.html", "stands in the adapter folder"),
    ],
)
def test_a_page_is_refused_before_there_is_work_to_lose(tmp_path, place, message):
    (tmp_path / "there.html").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=message):
        evaluate(tmp_path / "folder", html=tmp_path / place)
