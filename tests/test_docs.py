"""README and docs/: size, language, links, and commands that exist and run."""

import ast
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
import yaml

import lora_sentiment
from lora_sentiment import cli
from lora_sentiment.recipe.other_names import OTHER_NAMES
from lora_sentiment.recipe.recipe import Recipe, make_schema

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
WRITTEN = [*PAGES, *(ROOT / name for name in OTHERS)]
FIGURES = [
    *sorted((ROOT / "benchmarks").glob("*.md")),
    *sorted((ROOT / "lora_sentiment/bundled").glob("*/*.md")),
    ROOT / "adapters/README.md",
    ROOT / "adapters/imdb_small/README.md",
]
"""Pages that say what was measured."""
LANGUAGES = {"sh", "text", "python", "yaml", "js", "bibtex", "{toctree}", "{eval-rst}"}
TOOLS = {".", "cp", "curl", "echo", "head", "npm", "pip", "pipx", "printf", "uv", "uvx"}
"""Programs of others, whose options are not checked."""
USERS = ("recipes/mine.yaml",)
"""Files that a reader makes."""
MOST_WORDS = 30


def by_path(path):
    return str(path.relative_to(ROOT))


@dataclass(frozen=True)
class Fence:
    """A fenced block. `reason` says why it is not run."""

    language: str
    text: str
    line: int
    reason: str | None


def find_fences(text: str) -> list[Fence]:
    found = []
    lines = text.splitlines()
    start = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = number
            continue
        before = re.fullmatch(r"<!-- not run: (.+) -->", lines[start - 1]) if start else None
        block = "\n".join(lines[start + 1 : number])
        found.append(Fence(lines[start][3:], block, start + 1, before and before[1]))
        start = None
    assert start is None, f"line {start} opens a block that does not end"
    return found


def remove_fences(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def find_commands(block: str) -> list[list[str]]:
    """The commands of a shell block as words. A pipe separates two."""
    commands = []
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while "|" in words:
            commands.append(words[: words.index("|")])
            words = words[words.index("|") + 1 :]
        if words:
            commands.append(words)
    return commands


def check_command(words: list[str]) -> None:
    """Refuse a program, an option, a recipe or a file that does not exist."""
    program, *rest = words
    if program == "lora-sentiment":
        check_verb(rest)
    elif program in ("accelerate", "torchrun"):
        module, *arguments = rest[rest.index("-m") + 1 :]
        if module == "lora_sentiment.train":
            check_verb(["train", *arguments])
        else:
            assert module == "lora_sentiment.cli"
            check_verb(arguments)
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for word in rest:
            assert "=" in word or f"\n{word}:" in makefile, word
    elif program in ("python", "node"):
        assert rest[0] == "-m" or (ROOT / rest[0]).is_file(), rest[0]
    else:
        assert program in TOOLS, program
    for extra in re.findall(r"(?:lora_sentiment|\.)\[(\w+)\]", " ".join(words)):
        assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def check_verb(words: list[str]) -> None:
    verb, *rest = words
    group = typer.main.get_group(cli.app)
    if verb.startswith("--"):
        assert verb in ("--install-completion", "--show-completion", "--help")
        return
    try:
        values = group.commands[verb].make_context(verb, rest).params
    except typer.Exit:  # of --help
        return
    recipes = [values.get("recipe"), *(values.get("paths") or ())]
    for path in filter(None, recipes):
        if str(path) in USERS or not str(path).startswith("recipes/"):
            continue
        found = sorted(ROOT.glob(str(path)))
        assert found, path
        for each in found:
            Recipe.load(each, values.get("overrides") or ())


@pytest.mark.parametrize("path", [*WRITTEN, *FIGURES], ids=by_path)
def test_no_sentence_is_long(path):
    text = remove_fences(path.read_text(encoding="utf-8"))
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = "\n".join("" if line.startswith("|") else line for line in text.splitlines())
    text = re.sub(r"``?[^`]+``?", "code", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    # An indented block is code, but for what goes on in a list.
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[-*#]|\d+\.) )", text)
    long = []
    for block in blocks:
        if block.startswith("    "):
            continue
        for sentence in re.split(r"(?<=[.!?])[*)\"]*\s", " ".join(block.split())):
            if len(re.findall(r"\w\S*", sentence)) > MOST_WORDS:
                long.append(sentence)
    assert not long, "\n".join(long)


def test_the_readme_is_a_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1200


def test_the_index_leads_to_every_page():
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    names = {path.stem for path in PAGES} - {"README", "index"}
    assert [name for name in sorted(names) if f"\n{name}\n" not in index] == []


def test_no_page_has_the_name_of_a_page_that_sphinx_makes():
    made = {"search", "genindex", "py-modindex", "modindex"}
    assert made.isdisjoint(path.stem.lower() for path in PAGES)


def find_anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    found = set()
    for title in re.findall(r"^#+ (.+)$", remove_fences(path.read_text(encoding="utf-8")), re.M):
        found.add(re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-"))
    return found


@pytest.mark.parametrize("path", WRITTEN, ids=by_path)
def test_no_link_inside_is_dead(path):
    text = remove_fences(path.read_text(encoding="utf-8"))
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        made_at_build = by_path(target).startswith("docs/generated/")
        if made_at_build:
            continue
        if not target.exists() or (anchor and anchor not in find_anchors(target)):
            dead.append(link)
    assert not dead, dead


@pytest.mark.parametrize("path", PAGES, ids=by_path)
def test_each_block_and_command_is_sound(path):
    text = path.read_text(encoding="utf-8")
    for fence in find_fences(text):
        assert fence.language in LANGUAGES, f"line {fence.line}"
        if fence.language == "sh":
            for words in find_commands(fence.text):
                check_command(words)
        if fence.language == "python":
            compile(fence.text, f"{path}:{fence.line}", "exec")
        if fence.language == "yaml":
            check_recipe(yaml.safe_load(fence.text))
    for code in re.findall(r"`([^`]+)`", remove_fences(text)):
        # A word in capitals stands for a file of the reader's. A command with a verb alone is a name.
        if re.match(r"(lora-sentiment [a-z]+|make) \S|.* -m lora_sentiment", code):
            check_command(shlex.split(code))


def check_recipe(values: dict) -> None:
    """Refuse keys that no recipe has. A part of a recipe is enough."""
    schema = make_schema()
    for section, part in values.items():
        assert section in schema["properties"]
        if isinstance(part, dict):
            known = str(schema["$defs"])
            assert all(f"'{key}':" in known for key in part), part


def test_the_messages_of_the_troubleshooting_page_are_in_the_code():
    said = []
    for path in Path(lora_sentiment.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [
                    part.value if isinstance(part, ast.Constant) else "…" for part in node.values
                ]
                said.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(re.sub(r"%[-.\w]*[sdf]", "…", node.value).replace("%%", "%"))
    everything = "\n".join(said)
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    assert page.count("\n### ") >= 30
    missing = []
    # `…` stands for what is filled in. Short parts, such as the name of a key, are not looked for.
    for line in re.findall(r"\*\*You see\*\* (.*)", page):
        for message in re.findall(r"`([^`]+)`", line):
            for part in message.split("…"):
                if len(part) > 15 and part.strip(" ;,:()'[]") not in everything:
                    missing.append(part)
    assert not missing, "\n".join(missing)


def test_the_table_for_users_of_the_trainer_has_every_name_that_the_messages_know():
    page = (ROOT / "docs/questions.md").read_text(encoding="utf-8")
    section = page.partition("\n## Coming from the Trainer\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.M) == list(OTHER_NAMES)


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_keys_has_every_key(generate):
    schema = make_schema()
    page = generate.make_key_page(schema)
    for part in (schema, *schema["$defs"].values()):
        for key, value in part["properties"].items():
            assert f"\n| `{key}` |" in page
            # Only the first words: a cell has no line breaks.
            assert value["description"].split("\n")[0][:40] in page


def test_the_page_of_verbs_has_every_verb(generate):
    page = generate.make_command_page()
    for verb in typer.main.get_group(cli.app).commands:
        assert f"\n## `lora-sentiment {verb}`" in page


# The slow tier: every command of a page runs, in order, in a folder like a clone.

SERVE_SECONDS = 120


@pytest.fixture
def clone(tmp_path):
    for name in ("recipes", "examples", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "adapters/imdb_small", tmp_path / "adapters/imdb_small")
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def run_block(fence: Fence, folder: Path, servers: list[subprocess.Popen]) -> str:
    """Run a block and return what it printed. A server goes on until the page ends."""
    scripts = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "PATH": f"{scripts}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }
    if fence.language == "python":
        return call([sys.executable, "-c", fence.text], folder, environment)
    if fence.language == "js":
        if not shutil.which("node"):
            return ""
        return call(["node", "--input-type=module", "--eval", fence.text], folder, environment)
    printed = ""
    for line in fence.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words or words[0] == ".":
            continue
        if words[:2] == ["lora-sentiment", "serve"] and "--help" not in words:
            servers.append(start_server(words, folder, environment))
            continue
        if words[0] == "make":
            # The environment that runs the tests stands for the one that make would install.
            venv = str(Path(sys.executable).parents[1])
            ready = [f"{venv}/.ready-to-run", f"{venv}/bin/python"]
            line = f"{line.partition('#')[0]} VENV={venv} -o {ready[0]} -o {ready[1]}"
        printed += call(["bash", "-c", line], folder, environment)
    return printed


def call(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def start_server(
    words: list[str], folder: Path, environment: dict[str, str]
) -> subprocess.Popen[str]:
    server = subprocess.Popen(
        words, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    started = time.monotonic()
    while "http://" not in server.stdout.readline():
        assert server.poll() is None
        assert time.monotonic() - started < SERVE_SECONDS
    return server


def to_pattern(line: str) -> str:
    """A line of output in which any number stands for any other."""
    parts = re.split(r"\d[\d.,]*(?:e-?\d+)?", line.removesuffix(" ..."))
    return r"\d[\d.,]*(?:e-?\d+)?".join(re.escape(part) for part in parts)


@pytest.mark.slow
@pytest.mark.parametrize("path", PAGES, ids=by_path)
def test_the_commands_of_a_page_run_and_print_what_it_shows(path, clone):
    servers: list[subprocess.Popen] = []
    printed: str | None = ""
    try:
        for fence in find_fences(path.read_text(encoding="utf-8")):
            if fence.reason:
                printed = None  # a block of output that follows is of this one
                continue
            if fence.language in ("sh", "python", "js"):
                printed = run_block(fence, clone, servers)
            if fence.language == "text" and printed is not None:
                for line in fence.text.splitlines():
                    if line != "...":
                        assert re.search(to_pattern(line), printed), f"{line!r} not in {printed}"
    finally:
        for server in servers:
            with suppress(ProcessLookupError):
                server.send_signal(signal.SIGTERM)
            server.wait(60)


@pytest.mark.slow
def test_the_wheel_is_below_30_mb_as_the_quickstart_says(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "lora_sentiment", source / "lora_sentiment", ignore=ignored)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path]
    subprocess.run([*command, source], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 30_000_000
    size = re.search(r"The wheel has ([\d.]+) MB", (ROOT / "docs/quickstart.md").read_text())
    assert wheel.stat().st_size / 1e6 == pytest.approx(float(size[1]), abs=0.5)
