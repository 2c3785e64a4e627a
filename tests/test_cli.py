import io
import json
import os
import re
import subprocess
import sys

import pytest

from lora_sentiment import __version__, cli, commands
from lora_sentiment.classifier import Prediction
from lora_sentiment.commands.predict import Answer, show_answer
from lora_sentiment.tasks import SINGLE_LABEL
from tests.conftest import write_csv


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(map(str, arguments)))
    captured = capsys.readouterr()
    return stopped.value.code or 0, captured.out, captured.err


def test_validate_shows_the_resolved_recipe(capsys, toy_recipe):
    code, out, _ = call(capsys, "validate", toy_recipe, "train.seed=7")
    assert code == 0
    assert "seed: 7" in out
    assert "learning_rate: 0.01" in out


def test_validate_as_json(capsys, toy_recipe):
    assert json.loads(call(capsys, "validate", toy_recipe, "--json")[1])["name"] == "toy"


def test_the_version_is_printed(capsys):
    assert call(capsys, "--version") == (0, f"{__version__}\n", "")


def test_a_users_mistake_is_a_message_without_a_traceback(capsys, toy_recipe):
    code, out, err = call(capsys, "validate", toy_recipe, "train.sed=7")
    assert code == 1
    assert out == ""
    assert err.startswith("error: ")
    assert "did you mean 'seed'?" in err
    assert "Traceback" not in err


def test_train_then_evaluate(capsys, toy_recipe):
    code, out, _ = call(capsys, "train", toy_recipe)
    assert code == 0
    assert "adapter + 1,122 head" in out
    assert out.index("validation (95 %") < out.index("test (95 %")
    assert "\n  calibrated_log_loss 0." in out
    assert "\n  accuracy            " in out
    adapter = toy_recipe.parent / "adapter"
    code, out, _ = call(capsys, "evaluate", adapter)
    assert code == 0
    assert out.startswith("test: 41 rows, 95 % intervals")
    assert (
        json.loads(call(capsys, "evaluate", adapter, "--split", "validation", "--json")[1])[
            "num_rows"
        ]
        == 12
    )


def test_train_as_json(capsys, toy_recipe):
    assert json.loads(call(capsys, "train", toy_recipe, "--json")[1])["schema"] == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["evaluate", "--help"],
        ["validate", "--help"],
        ["compare", "--help"],
        ["estimate", "--help"],
    ],
)
def test_every_verb_has_help(capsys, arguments):
    assert call(capsys, *arguments)[0] == 0


def test_validate_imports_no_torch(toy_recipe):
    code = (
        "import sys\nfrom lora_sentiment.cli import main\n"
        f"try:\n    main(['validate', {str(toy_recipe)!r}])\nexcept SystemExit:\n    pass\n"
        "sys.stderr.write(str([m for m in ('torch', 'transformers', 'peft', 'datasets', 'numpy') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]"


def test_looking_at_data_imports_no_peft():
    code = "import sys, lora_sentiment.commands.data; assert 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_texts_are_labelled(capsys, toy_adapter):
    code, out, _ = call(capsys, "predict", toy_adapter, "a good film", "a bad\nmeal")
    assert code == 0
    cells = [line.split("\t") for line in out.splitlines()]
    assert [(row[0], row[2]) for row in cells] == [
        ("positive", "a good film"),
        ("negative", "a bad meal"),
    ]
    assert all(0.5 < float(row[1]) <= 1 for row in cells)


def test_lines_of_standard_input_are_labelled_and_a_blank_one_is_an_error(
    capsys, toy_adapter, monkeypatch
):
    monkeypatch.setattr("sys.stdin", io.StringIO("a good film\n\na bad meal\n"))
    code, out, _ = call(capsys, "predict", toy_adapter, "--json", "--all-scores")
    assert code == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row.get("label") for row in rows] == ["positive", None, "negative"]
    assert rows[1] == {"text": "", "error": "text is empty"}
    assert set(rows[0]["scores"]) == {"negative", "positive"}


def test_a_table_is_labelled(capsys, toy_adapter, tmp_path):
    write_csv(tmp_path / "in.csv", [("a good film", "x"), ("", "y")], header=("text", "note"))
    code, out, _ = call(
        capsys,
        "predict",
        toy_adapter,
        "--input",
        tmp_path / "in.csv",
        "--output",
        tmp_path / "out.csv",
    )
    assert code == 0
    assert "2 rows (negative 0, positive 1; 1 with an error instead)" in out
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert lines[0] == "text,note,label,score,error"
    assert lines[2] == ",y,,,text is empty"


def test_an_explanation_names_the_words_and_writes_a_page(capsys, toy_adapter, tmp_path):
    code, out, _ = call(
        capsys, "predict", toy_adapter, "a good film", "--explain", "--html", tmp_path / "page.html"
    )
    assert code == 0
    assert out.startswith("positive")
    assert "good" in (tmp_path / "page.html").read_text()


def test_a_text_that_cannot_be_explained_leaves_the_others_and_the_page(
    capsys, toy_adapter, tmp_path
):
    page = tmp_path / "page.html"
    code, out, err = call(
        capsys,
        "predict",
        toy_adapter,
        "a good film",
        "so " * 600,
        "a bad meal",
        "--explain",
        "--html",
        page,
    )
    assert code == 1
    assert "1 of 3 texts could not be explained" in err
    assert out.index("positive") < out.index("negative")
    assert "bad" in page.read_text()
    code, _, err = call(capsys, "predict", toy_adapter, "good", "--explain", "--html", page)
    assert code == 1
    assert "exists already; give another name, or --overwrite" in err


def test_bytes_that_are_no_text_are_an_error_of_their_line(capsys, toy_adapter, monkeypatch):
    given = io.TextIOWrapper(io.BytesIO(b"good\rfilm\nb\xff\nbad\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", given)
    code, out, _ = call(capsys, "predict", toy_adapter, "--json")
    assert code == 0
    texts = [json.loads(line)["text"] for line in out.splitlines()]
    assert texts == ["good\rfilm", "b\udcff", "bad"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--input", "a.csv"], "--input and --output go together"),
        (["text", "--input", "a.csv", "--output", "b.csv"], "found both texts and --input"),
        (["--input", "a.csv", "--output", "b.csv", "--explain"], "--explain is for texts"),
        (["text", "--html", "a.html"], "add --explain"),
        (["text", "--resume"], "--resume: only with --input"),
        (
            ["text", "--prefix", "x", "--encoding", "utf-8"],
            "--encoding, --prefix: only with --input",
        ),
        (["text", "--overwrite"], "--overwrite: only with --input"),
        (["text", "--explain", "--all-scores"], "leave out --all-scores"),
        (["text", "--explain", "--coverage", "0.9"], "leave out --coverage"),
    ],
)
def test_options_of_predict_that_would_be_ignored_are_refused(
    capsys, toy_adapter, options, message
):
    code, _, err = call(capsys, "predict", toy_adapter, *options)
    assert code == 1
    assert message in err


GOOD_CSV = "text,label\na good film,positive\na bad film,negative\n"


@pytest.mark.parametrize(
    ("content", "message", "options"),
    [
        ("review,label\nx,positive\n", "set --text-column", ["--text-column=review"]),
        ("text,mood\nx,positive\n", "set --label-column", ["--label-column=mood"]),
        (GOOD_CSV + ",positive\n", "set --on-bad-row=drop", ["--on-bad-row=drop"]),
        (GOOD_CSV + "x,other\n", "set --on-bad-row=drop", ["--on-bad-row=drop"]),
        (GOOD_CSV + "caf\xe9,positive\n", "set --encoding to the", ["--encoding=cp1252"]),
    ],
)
def test_evaluate_takes_the_options_that_its_messages_name(
    capsys, toy_adapter, tmp_path, content, message, options
):
    rows = tmp_path / "rows.csv"
    rows.write_text(content, encoding="latin-1")
    code, _, err = call(capsys, "evaluate", toy_adapter, "--source", rows)
    assert code == 1
    assert message in err
    assert "data." not in err
    assert call(capsys, "evaluate", toy_adapter, "--source", rows, *options)[0] == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "--source", "gone.csv"],
        ["evaluate", "--source", "broken.csv", "--on-bad-row=drop"],
        ["evaluate", "--encoding", "utf-8"],
        ["evaluate", "--base", "./gone"],
        ["evaluate", "--dtype", "float16"],
        ["evaluate", "--split", "gone"],
        ["predict", "--base", "./gone", "a text"],
        ["predict", "--dtype", "half", "a text"],
        ["predict", "--input", "broken.csv", "--output", "out.csv"],
        ["predict", "--input", "nul.csv", "--output", "out.csv"],
        ["predict", "--input", "broken.csv", "--output", "out.csv", "--encoding", "utf9"],
        ["merge", "out", "--base", "./gone"],
        ["export", "out", "--base", "./gone"],
        ["serve", "--base", "./gone", "--port", "0"],
    ],
)
def test_messages_name_only_options_that_the_verb_takes(
    capsys, toy_adapter, tmp_path, monkeypatch, arguments
):
    (tmp_path / "broken.csv").write_bytes(b"text,label\ncaf\xe9,other\n")
    (tmp_path / "nul.csv").write_bytes("text\nx\n".encode("utf-16-le"))
    monkeypatch.chdir(tmp_path)
    verb, *options = arguments
    code, _, err = call(capsys, verb, toy_adapter, *options)
    assert code == 1
    help_text = call(capsys, verb, "--help")[1]
    message = err[err.index("error: ") :]
    assert set(re.findall(r"--[a-z][a-z-]+", message)) <= set(
        re.findall(r"--[a-z][a-z-]+", help_text)
    )
    assert not re.search(r"\b(data|model|train|method|output)\.[a-z_]+\b", message)


LABELS = ["two\nlines", "a\ttab", "\x1b[31mred\x1b[0m", "\u202ereversed", "a|b `c` <b>d</b>"]


@pytest.mark.parametrize("label", LABELS)
def test_an_answer_is_one_line_whatever_its_label_holds(label):
    answer = Answer("a\ntext", Prediction(label, 0.75, {label: 0.75, "other": 0.25}), None)
    line = show_answer(answer, SINGLE_LABEL, all_scores=True, as_json=False)
    assert line.split("\t")[1:] == ["0.7500", line.split("\t")[2], "a text"]
    assert len(line.splitlines()) == 1
    assert line.isprintable() or line.replace("\t", "").isprintable()
    assert (
        json.loads(show_answer(answer, SINGLE_LABEL, all_scores=False, as_json=True))["label"]
        == label
    )


@pytest.mark.parametrize("text", ["-1 star", "--bad film", "-x", "-- "])
def test_a_text_like_an_option_gets_a_hint(capsys, text):
    code, _, err = call(capsys, "predict", "adapter", text)
    assert code == 2
    assert "goes after --" in " ".join(err.replace("\u2502", " ").split())


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["train", "r.yaml", "--output.dir=x"], "written key=value, without dashes"),
        (["data", "r.yaml", "--data.source", "x.csv"], "written key=value, without dashes"),
        (["sweep", "r.yaml", "--train.seed=[1, 2]"], "written key=value, without dashes"),
        (["doctor", "--gpu"], "No such option: --gpu"),
        (["evaluate", "adapter", "--batch", "3"], "No such option: --batch"),
    ],
)
def test_an_unknown_option_gets_a_hint_that_its_verb_takes(capsys, arguments, hint):
    code, _, err = call(capsys, *arguments)
    said = " ".join(err.replace("\u2502", " ").split())
    assert code == 2
    assert hint in said
    assert "goes after --" not in said


def test_an_empty_text_among_explanations_is_answered_in_its_place(
    capsys, toy_adapter, monkeypatch
):
    lines = b"a good film\n\n\xe2\x80\x8d\nbad\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    code, out, _ = call(capsys, "predict", toy_adapter, "--explain", "--json")
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [answer.get("error") for answer in answers] == [
        None,
        "text is empty",
        "text is empty",
        None,
    ]


def test_merge_then_predict_and_push(capsys, toy_adapter, tmp_path):
    merged = tmp_path / "merged"
    code, out, _ = call(capsys, "merge", toy_adapter, merged)
    assert code == 0
    assert "(float32, into base)" in out
    assert "validation rows: logits differ by" in out
    first, second = (
        call(capsys, "predict", folder, "a good film", "--json")[1]
        for folder in (toy_adapter, merged)
    )
    assert json.loads(first)["score"] == pytest.approx(json.loads(second)["score"], abs=1e-5)
    code, _, err = call(capsys, "merge", merged, tmp_path / "again")
    assert code == 1
    assert "already holds the adapter" in err
    code, out, _ = call(capsys, "push", merged, "someone/films", "--dry-run")
    assert code == 0
    assert "model.safetensors" in out
    assert "would send to" in out
    assert call(capsys, "push", toy_adapter, "someone/films", "--dry-run", "--json")[0] == 0


def test_a_sweep_shows_its_runs_and_how_to_train_the_best(capsys, toy_recipe):
    code, out, _ = call(
        capsys, "sweep", toy_recipe, "train.learning_rate=[1e-2, 1e-4]", "train.max_steps=3"
    )
    assert code == 0
    lines = out.splitlines()
    assert "learning_rate" in lines[0]
    assert lines[-1].startswith("lora-sentiment train ")
    code, _, err = call(capsys, "sweep", toy_recipe, "train.learning_rate=1e-2")
    assert code == 1
    assert "no key has several values" in err


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_sweep_without_a_finished_trial_fails(capsys, toy_recipe, form):
    toy_recipe.with_name("train.csv").write_text("text,label\n,x\n", encoding="utf-8")
    code, _, err = call(capsys, "sweep", toy_recipe, "method.r=[2, 4]", *form)
    assert code == 1
    assert "error: no trial is finished" in err


def test_a_sweep_without_optuna_names_the_extra(capsys, toy_recipe, monkeypatch):
    monkeypatch.delitem(sys.modules, "lora_sentiment.commands.sweep", raising=False)
    monkeypatch.delattr(commands, "sweep", raising=False)
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, _, err = call(capsys, "sweep", toy_recipe, "method.r=[2, 4]")
    assert code == 1
    assert "error: sweep needs an extra (" in err
    assert "pip install 'lora_sentiment[search]'" in err


def test_the_module_is_the_command():
    command = [sys.executable, "-m", "lora_sentiment", "--show-completion", "bash"]
    # Without a terminal there is no shell to detect.
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "True"}
    shown = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment
    ).stdout
    assert "complete -o default" in shown
    assert shown.rstrip().endswith("lora-sentiment")
