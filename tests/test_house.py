"""The structure that CONTRIBUTING.md promises, read from the syntax trees."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lora_sentiment
from lora_sentiment import errors

PACKAGE = Path(lora_sentiment.__file__).parent

# Imports run one way: a room imports from rooms above its own line only.
ORDER = [
    "errors",
    "section",
    "files",
    "progress",
    "hub",
    "bundled",
    "data.config",
    "data.tables",
    "data.sources",
    "data.rows",
    "data.batches",
    "model.architecture",
    "model.config",
    "model.method_config",
    "model.targets",
    "model.parameters",
    "model.file_size",
    "model.memory",
    "model.base",
    "model.methods",
    "model.kernels",
    "model.encoder",
    "model.quantisation",
    "model.engine",
    "model.inference",
    "evaluation.statistics",
    "evaluation.probabilities",
    "evaluation.metrics",
    "evaluation.calibration",
    "training.config",
    "training.losses",
    "training.trackers",
    "training.loop",
    "adapter.stamp",
    "adapter.onnx",
    "adapter.weights",
    "adapter.folder",
    "adapter.card",
    "adapter.predictions",
    "adapter.comparison",
    "adapter.merged_card",
    "adapter.merge",
    "adapter.graph",
    "adapter.exported_card",
    "adapter.export",
    "recipe",
    "report",
    "plots",
    "launch",
    "offline",
    "classifier",
    "train",
    "evaluate",
    "estimate",
    "probe",
    "compare",
    "sweep",
    "predict",
    "explain",
    "push",
    "doctor",
    "terminal",
    "cli",
]
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(tree: ast.AST) -> set[str]:
    """Names of our own modules that a tree imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix("lora_sentiment.") for a in node.names if a.name.startswith("lora_sentiment")}
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lora_sentiment"):
            name = (node.module or "").removeprefix("lora_sentiment").lstrip(".")
            for alias in node.names:
                joined = f"{name}.{alias.name}".lstrip(".")
                found.add(joined if joined in ORDER else name)
    return found


def is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)


def test_every_room_has_its_place_in_the_order():
    assert sorted(map(module_name, MODULES)) == sorted(set(ORDER) - {"bundled"})


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_run_one_way(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    # `python -m lora_sentiment.train` enters through the command line, which is below it.
    tree.body = [node for node in tree.body if not is_main_guard(node)]
    own = ORDER.index(module_name(path))
    assert [name for name in imports(tree) if ORDER.index(name) >= own] == []


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_only_the_recipe_and_what_is_below_it_know_the_recipe(path):
    if ORDER.index(module_name(path)) < ORDER.index("recipe"):
        assert "recipe" not in imports(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_unsafe_is_written(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", "") or ""}
            assert not {"pickle", "dill", "marshal", "shelve"} & names
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "torch.load", "torch.save", "yaml.unsafe_load", "yaml.full_load")
            assert not any(k.arg == "trust_remote_code" and ast.unparse(k.value) == "True" for k in node.keywords)
            if called == "print":
                assert path.name == "cli.py"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None
            assert ast.unparse(node.type) not in ("Exception", "BaseException")


def test_the_error_tree_is_the_one_its_docstring_draws():
    drawn = {word for word in (errors.__doc__ or "").split() if word.endswith("Error")}
    classes = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
    assert drawn == set(classes)
    assert all(issubclass(value, errors.LoraSentimentError) for value in classes.values())


def test_the_readmes_imports_work_in_a_fresh_process():
    """A function and a module of one name cannot both be had from the package."""
    readme = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    lines = [line for line in readme.splitlines() if line.startswith("from lora_sentiment")]
    assert len(lines) >= 2
    code = "\n".join([*lines, "assert callable(train) and callable(Recipe.load)"])
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_files_fit_a_sitting_and_functions_a_screen(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            docstring = (ast.get_docstring(node) or "").count("\n")
            assert (node.end_lineno or 0) - node.lineno - docstring <= 50, f"{node.name} is long"
