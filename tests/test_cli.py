import json
import subprocess
import sys

import pytest

from lora_sentiment import cli


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
    assert json.loads(call(capsys, "evaluate", adapter, "--split", "validation", "--json")[1])["num_rows"] == 12


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
