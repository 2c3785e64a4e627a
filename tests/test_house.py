"""What the package never does, read from the syntax trees. Layers are import-linter's, in pyproject.toml."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import lora_sentiment
from lora_sentiment import errors

PACKAGE = Path(lora_sentiment.__file__).parent


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def test_every_library_that_is_imported_is_declared():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))[
        "project"
    ]
    extras = project["optional-dependencies"]
    # The CUDA build of torch brings Triton; without it nothing needs Triton.
    used = [*extras["onnx"], *extras["search"], *extras["serve"]]
    declared = [*project["dependencies"], *used, "triton"]
    names = {re.match(r"[\w.-]+", line)[0].lower().replace("-", "_") for line in declared}
    found = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                found.add((node.module or "").partition(".")[0])
    found = {
        {"yaml": "pyyaml"}.get(name, name)
        for name in found - {"lora_sentiment", *sys.stdlib_module_names}
    }
    assert sorted(found - names) == []
    # onnxscript is what torch's exporter needs.
    assert sorted(names - found) == ["onnxscript"]


UNSAFE_MODULES = {
    "pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "jsonpickle",
    "marshal",
    "shelve",
    "joblib",
}
UNSAFE_CALLS = {
    "eval", "exec", "compile", "__import__", "torch.load", "torch.save", "torch.jit.load", "torch.hub.load",
    "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all", "yaml.load_all",
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput",
}  # fmt: skip
SAFE_VALUES = {
    "trust_remote_code": "False",
    "allow_pickle": "False",
    "shell": "False",
    "weights_only": "True",
}


def find_unsafe(tree: ast.AST) -> list[str]:
    """What in a tree could run code out of a file, or a shell."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            names = {f"{module}.{alias.name}".lstrip(".") for alias in node.names} | {module}
            found += [
                name
                for name in names
                if name.partition(".")[0] in UNSAFE_MODULES or name in UNSAFE_CALLS
            ]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            # A safe loader must be named; ours are subclasses of one.
            loader = {k.arg: ast.unparse(k.value) for k in node.keywords}.get("Loader")
            found += [called] * (
                called in UNSAFE_CALLS or (called == "yaml.load" and loader not in SAFE_LOADERS)
            )
            given = [(k.arg, ast.unparse(k.value)) for k in node.keywords if k.arg in SAFE_VALUES]
            found += [f"{key}={value}" for key, value in given if value != SAFE_VALUES[key]]
        if isinstance(node, ast.Dict):
            pairs = [
                (ast.unparse(k), ast.unparse(v))
                for k, v in zip(node.keys, node.values, strict=True)
                if k
            ]
            keyed = [
                (ast.literal_eval(key), value) for key, value in pairs if key.startswith(("'", '"'))
            ]
            found += [
                f"{key}={value}" for key, value in keyed if SAFE_VALUES.get(key, value) != value
            ]
    return found


SAFE_LOADERS = ("_Loader", "yaml.SafeLoader")
ROOT = PACKAGE.parent
WRITTEN = [
    path
    for folder in (PACKAGE, ROOT / "scripts", ROOT / "benchmarks")
    for path in sorted(folder.rglob("*.py"))
]


@pytest.mark.parametrize("path", WRITTEN, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_unsafe_is_written(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert find_unsafe(tree) == []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and path.is_relative_to(PACKAGE):
            assert ast.unparse(node.func) != "print"
            if ast.unparse(node.func) in ("typer.echo", "Console"):
                assert path.name in ("cli.py", "console.py")
        if isinstance(node, ast.ExceptHandler) and path.is_relative_to(PACKAGE):
            assert node.type is not None
            assert ast.unparse(node.type) not in ("Exception", "BaseException")


def test_our_yaml_loader_is_a_safe_one():
    from lora_sentiment.recipe.yaml_reader import _Loader

    assert issubclass(_Loader, yaml.SafeLoader)


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from pickle import loads", "import joblib", "from joblib import load", "eval('1')",
        "exec('1')", "torch.load(path)", "from torch import load", "torch.load(path, weights_only=False)",
        "yaml.load(text)", "yaml.load(text, Loader=yaml.Loader)", "yaml.full_load(text)",
        "from yaml import unsafe_load", "f(trust_remote_code=True)", "f(trust_remote_code=given)",
        "where = {'trust_remote_code': True}", "np.load(path, allow_pickle=True)", "subprocess.run(c, shell=True)",
        "os.system(c)",
    ],
)  # fmt: skip
def test_what_is_unsafe_is_found(code):
    assert find_unsafe(ast.parse(code))


def test_the_error_tree_is_the_one_its_docstring_draws():
    drawn = {word for word in (errors.__doc__ or "").split() if word.endswith("Error")}
    classes = [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, Exception)
    ]
    assert drawn == {value.__name__ for value in classes}
    assert all(issubclass(value, errors.LoraSentimentError) for value in classes)


def test_the_readmes_imports_work_in_a_fresh_process():
    """A function and a module of one name cannot both be had from the package."""
    readme = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    lines = [line for line in readme.splitlines() if line.startswith("from lora_sentiment")]
    assert len(lines) >= 2
    code = "\n".join([*lines, "assert callable(train) and callable(Recipe.load)"])
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_is_found_beside_a_folder_of_its_name(tmp_path):
    """Such as a clone: Python takes the folder for a package if it does not know where to look."""
    (tmp_path / "lora_sentiment/docs").mkdir(parents=True)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    code = "from lora_sentiment import Recipe, load"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
