"""The structure that CONTRIBUTING.md promises, read from the syntax trees."""

import ast
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


def read_order() -> list[str]:
    """The rooms in the order of CONTRIBUTING.md's tree: each imports from those above it only."""
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = text.partition("    lora_sentiment/\n")[2].partition("\nImports run one way")[0]
    found, folder = [], ""
    for line in listed.splitlines():
        if top := re.match(r" {6}(\w+)(/|\.py)", line):
            folder = f"{top[1]}." if top[2] == "/" else ""
            if top[2] == ".py" or top[1] == "bundled":
                found.append(top[1])
        if folder:
            found += [folder + name for name in re.findall(r"(\w+)\.py\b", line)]
    return found


ORDER = read_order()
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
    return found - {""}  # the package itself, for its version


def test_every_library_that_is_imported_is_declared():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    # The CUDA build of torch brings Triton; without it nothing needs Triton.
    declared = [*project["dependencies"], *extras["onnx"], *extras["serve"], "triton"]
    names = {re.match(r"[\w.-]+", line)[0].lower().replace("-", "_") for line in declared}
    found = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                found.add((node.module or "").partition(".")[0])
    found = {{"yaml": "pyyaml"}.get(name, name) for name in found - {"lora_sentiment", *sys.stdlib_module_names}}
    assert sorted(found - names) == []
    # onnxscript is what torch's exporter needs.
    assert sorted(names - found) == ["onnxscript"]


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


UNSAFE_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "jsonpickle", "marshal", "shelve", "joblib"}
UNSAFE_CALLS = {
    "eval", "exec", "compile", "__import__", "torch.load", "torch.save", "torch.jit.load", "torch.hub.load",
    "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all", "yaml.load_all",
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput",
}  # fmt: skip
SAFE_VALUES = {"trust_remote_code": "False", "allow_pickle": "False", "shell": "False", "weights_only": "True"}


def find_unsafe(tree: ast.AST) -> list[str]:
    """What in a tree could run code out of a file, or a shell."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            names = {f"{module}.{alias.name}".lstrip(".") for alias in node.names} | {module}
            found += [name for name in names if name.partition(".")[0] in UNSAFE_MODULES or name in UNSAFE_CALLS]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            # A safe loader must be named; ours are subclasses of one.
            loader = {k.arg: ast.unparse(k.value) for k in node.keywords}.get("Loader")
            found += [called] * (called in UNSAFE_CALLS or (called == "yaml.load" and loader not in SAFE_LOADERS))
            given = [(k.arg, ast.unparse(k.value)) for k in node.keywords if k.arg in SAFE_VALUES]
            found += [f"{key}={value}" for key, value in given if value != SAFE_VALUES[key]]
        if isinstance(node, ast.Dict):
            pairs = [(ast.unparse(k), ast.unparse(v)) for k, v in zip(node.keys, node.values, strict=True) if k]
            keyed = [(ast.literal_eval(key), value) for key, value in pairs if key.startswith(("'", '"'))]
            found += [f"{key}={value}" for key, value in keyed if SAFE_VALUES.get(key, value) != value]
    return found


SAFE_LOADERS = ("_Loader", "yaml.SafeLoader")
ROOT = PACKAGE.parent
WRITTEN = [path for folder in (PACKAGE, ROOT / "scripts", ROOT / "benchmarks") for path in sorted(folder.rglob("*.py"))]


@pytest.mark.parametrize("path", WRITTEN, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_unsafe_is_written(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert find_unsafe(tree) == []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and path.is_relative_to(PACKAGE):
            assert ast.unparse(node.func) != "print"
            if ast.unparse(node.func) in ("typer.echo", "Console"):
                assert path.name in ("cli.py", "terminal.py")
        if isinstance(node, ast.ExceptHandler) and path.is_relative_to(PACKAGE):
            assert node.type is not None
            assert ast.unparse(node.type) not in ("Exception", "BaseException")


def test_our_yaml_loader_is_a_safe_one():
    from lora_sentiment.recipe import _Loader

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
