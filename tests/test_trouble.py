"""What goes wrong for real, and the one message that each must give: recipes, files, bases, and a Hub's answers."""

import gzip
import io
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from accelerate import PartialState
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_sentiment import cli
from lora_sentiment.data.rows import load_data
from lora_sentiment.errors import LoraSentimentError
from lora_sentiment.hub import explain_refusal
from lora_sentiment.models.load import load_base
from lora_sentiment.recipe.data import DataConfig
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.training.offline import resolve_offline
from tests.toy_hub import point_clients, serve

RECIPE = "data: {source: rows.csv}\nmodel: {name: BASE, max_length: 16}\n"
ROWS = "text,label\n" + "".join(f"some words {i},{('good', 'bad')[i % 2]}\n" for i in range(40))


def parquet(table: dict) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(table), sink)
    return sink.getvalue()


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


BOMB = "l0: &l0 [x]\n" + "".join(
    f"l{i}: &l{i} [{','.join([f'*l{i - 1}'] * 10)}]\n" for i in range(1, 9)
)
LONG = "9" * 5000


class Trouble(NamedTuple):
    """One mistake and a telling part of its message; `rows.csv` and `recipe.yaml` are sound unless `files` has them."""

    message: str
    files: Mapping[str, str | bytes] = MappingProxyType({})
    overrides: tuple[str, ...] = ()
    recipe: str = "recipe.yaml"


def recipe(text: str | bytes, message: str) -> Trouble:
    return Trouble(message, {"recipe.yaml": text})


def override(text: str, message: str) -> Trouble:
    return Trouble(message, overrides=(text,))


def rows(content: str | bytes, message: str, *overrides: str, name: str = "rows.csv") -> Trouble:
    return Trouble(message, {name: content}, (f"data.source={name}", *overrides))


RECIPES = {
    "no such recipe": Trouble(
        "recpie.yaml: no such recipe file; did you mean 'recipe.yaml'?", recipe="recpie.yaml"
    ),
    "empty recipe": recipe(
        "", "found NoneType; a recipe is a mapping with data, model, method, train"
    ),
    "recipe is a list": recipe("- data\n", "found list; a recipe is a mapping"),
    "recipe is a csv": recipe(ROWS, "found str; a recipe is a mapping"),
    "tab in yaml": recipe(
        "data:\n\tsource: x\n", "line 2, column 1 is no valid YAML: found character '\\t'"
    ),
    "unclosed bracket": recipe("data: {source: x\n", "is no valid YAML: expected ',' or '}'"),
    "key twice": recipe(
        RECIPE + "model: {}\n", "line 3, column 1 is no valid YAML: key 'model' stands twice"
    ),
    "key is a number": recipe(RECIPE + "1: 2\n", "key 1 is no string"),
    "recipe in latin-1": recipe(
        RECIPE.encode() + b"# \xe9\n", "is no UTF-8; save the recipe as UTF-8"
    ),
    "python in yaml": recipe(
        "data: !!python/name:os.system\n", "could not determine a constructor for the tag"
    ),
    "yaml tag of another kind": recipe("data: !!bool maybe\n", "is no valid YAML"),
    "yaml time that is none": recipe("data: !!timestamp noon\n", "is no valid YAML"),
    "yaml in itself": recipe(
        "data: &d {source: *d}\nmodel: {name: x}\n", "line 1, column 19 is no valid YAML: *d is"
    ),
    "yaml bomb": recipe(BOMB, "*l0 is an alias; write the value out"),
    "glob taken for an alias": override("data.source=*a", "*a is an alias; write the value out"),
    "long wrong value": override(f"train.seed={'x' * 5000}", "train.seed: found 'xxxxx"),
    "folder with a NUL": override(
        'output.dir="a\\0b"', "output.dir: found 'a\\x00b'; allowed: a name without NUL"
    ),
    "folder with a long name": override(
        f"output.dir={'a' * 300}", "allowed: a name without NUL, of at most 200 bytes"
    ),
    "list of files": override(
        "data.source=[a.csv, b.csv]", "found ['a.csv', 'b.csv']; name several files by a glob"
    ),
    "unknown section": recipe(RECIPE + "trian: {}\n", "trian: unknown key; did you mean 'train'?"),
    "unknown key": override("train.lr=1e-4", "train.lr: unknown key"),
    "no data": recipe("model: {name: x}\n", "data: is missing; it has no default"),
    "no base": recipe("data: {source: rows.csv}\nmodel: {}\n", "model.name: is missing"),
    "number in quotes": override(
        "train.batch_size='8'", "train.batch_size: found '8'; allowed: a valid integer"
    ),
    "rate that is none": override("train.learning_rate=fast", "train.learning_rate: found 'fast'"),
    "rate below zero": override("train.learning_rate=-1e-4", "train.learning_rate: found -0.0001"),
    "rate not finite": override(
        "train.learning_rate=.inf", "train.learning_rate: found inf; allowed: a finite number"
    ),
    "no such method": override("method.kind=lroa", "found kind 'lroa'; allowed: lora, adalora"),
    "rank zero": override("method.r=0", "method.r: found 0"),
    "no such layer": override("method.target_modules=[q_proj]", "q_proj"),
    "head rank without use": override(
        "model.head_r=4", "head_r does nothing with head full; set model.head=low_rank"
    ),
    "double quant without use": override(
        "model.double_quant=true", "double_quant does nothing with quantize none"
    ),
    "method not on 4 bits": Trouble(
        "model.quantize: nf4 cannot be", {}, ("model.quantize=nf4", "method.kind=full")
    ),
    "engine that cannot": Trouble(
        "set train.engine=auto", {}, ("train.engine=fast", "method.use_dora=true")
    ),
    "no such encoding": override(
        "data.encoding=utf9", "data.encoding: found 'utf9'; allowed: a text encoding"
    ),
    "one label name": override(
        "data.labels=[good]", "data.labels: found ['good']; allowed: two or more names"
    ),
    "label name twice": override("data.labels=[good, good]", "two or more names, each once"),
    "no train": override(
        "data.source={test: rows.csv}", "has no 'train'; splits by role name at least train"
    ),
    "misspelt role": override(
        "data.source={train: rows.csv, tets: rows.csv}", "did you mean 'test'?"
    ),
    "no source": override(
        "data.source=''", "data.source: is empty; name a Hub data set, a file, a glob"
    ),
    "one column for both": override(
        "data.text_column=label", "text_column and label_column are both 'label'"
    ),
    "carve everything": override("data.validation_fraction=1", "data.validation_fraction: found 1"),
    "name with a slash": override("name=a/b", "name: found 'a/b'"),
    "override without a value": override("train.seed", "override 'train.seed': expected key=value"),
    "override that is no yaml": override("train.seed=[1", "override 'train.seed=[1': line 1"),
    "no such way offline": override(
        "offline=bundle", "offline: found 'bundle'; allowed: error, bundled"
    ),
    "hub options of files": override(
        "data.revision=main", "data.revision: found 'main', but 'rows.csv' are files"
    ),
}

TWO = 'text,label\nfine,good\n"poor, really",bad\n' * 1
FILES = {
    "no such file": override("data.source=row.csv", "row.csv: no such file; did you mean 'rows.csv'?"),
    "no such folder": override("data.source=nowhere/rows.csv", "nowhere/rows.csv: no such file in "),
    "glob of nothing": override("data.source=x*.csv", "data.source 'x*.csv' matches no file"),
    "a folder": override("data.source=.", ".: is a folder; name a file in it, or a pattern"),
    "format unknown": rows(ROWS, "its name tells no known format; it must end in one of .csv", name="./rows.txt"),
    "empty file": rows("", "rows.csv: is empty; a table needs a header"),
    "only a mark": rows(b"\xef\xbb\xbf", "rows.csv: is empty"),
    "only a header": rows("text,label\n", "rows.csv: has no rows"),
    "missing text column": rows(ROWS.replace("text,", "texte,"), "no column 'text'; the columns are texte, label; did"),
    "missing label column": rows(ROWS.replace("label", "class"), "no column 'label'; the columns are text, class"),
    "tabs in a csv": rows(ROWS.replace(",", "\t").replace("text", "body"), "the columns are body, label; give"),
    "semicolons in a csv": rows(ROWS.replace(",", ";").replace("label", "x"), "no column 'label'; the columns"),
    "quotes and semicolons": rows('"text";"x"\n"a";"b"\n', "no column 'label'; the columns are text, x"),
    "zip or xlsx by another name": rows(b"PK\x03\x04\x14\x00", "rows.csv: is a zip archive or an Excel workbook"),
    "address": override("data.source=https://example.org/a.csv", "addresses are not read; download the file"),
    "page of a data set": override(
        "data.source=https://huggingface.co/datasets/stanfordnlp/imdb/tree/main",
        "addresses are not read; name the data set: data.source=stanfordnlp/imdb",
    ),
    "address of a data set": override(
        "data.source=hf://datasets/a/b@main/c.csv", "are not read; name the data set: data.source=a/b",
    ),
    "file at home": override("data.source=~/nowhere/a.csv", f"{Path.home()}/nowhere/a.csv: no such file"),
    "half a character by encoding": rows(
        ROWS + "a \\ud800,good\n", "line 42 holds half of a surrogate pair", "data.encoding=raw_unicode_escape",
        "data.clean=false",
    ),
    "label of many digits": rows(ROWS + f"a,{LONG}\n", "9' has too few distinct texts to carve"),
    "column twice": rows("text,label,text\na,b,c\n", "column 3 of 3 has the name of column 1, 'text'; rename"),
    "pandas index": rows(",text,label\n0,a,b\n", "column 1 of 3 has no name; name it or remove it (pandas"),
    "ragged csv": rows(ROWS + "so, so,good\n", "row 41 (line 42): found 3 field(s), expected 2"),
    "ragged tsv": rows("text\tlabel\na\n", "row 1 (line 2): found 1 field(s), expected 2", name="rows.tsv"),
    "quote never closed": rows(ROWS + '"fine,good\n', "row 41 (line 42): a quote opened in this row is never closed"),
    "text after a quote": rows(ROWS + '"fine" film,good\n', "row 41 (line 42): text follows a closing quote"),
    "rows end in CR": rows(ROWS.replace("\n", "\r"), "a carriage return stands alone outside quotes; end rows in LF"),
    "NUL": rows(ROWS + "fi\0ne,good\n", "line 42 holds a NUL character"),
    "cp1252 as utf-8": rows(
        ROWS.encode() + b"caf\xe9,good\n", "(line 42); line 42 reads 'café,good' as cp1252, "
    ),
    "utf-16 as utf-8": rows(ROWS.encode("utf-16"), "byte 0xff at offset 0 (line 1); all of it is utf-16"),
    "latin-1 as cp1252": rows(
        ROWS.encode() + b"\x81,good\n", "is not cp1252: byte 0x81", "data.encoding=cp1252"
    ),
    "gzip by another name": rows(gzip.compress(ROWS.encode()), "is gzip, which its name must tell; end it in .gz"),
    "cut gzip": rows(gzip.compress(ROWS.encode())[:-9], "is no gzip file, or a damaged one", name="rows.csv.gz"),
    "line without end": rows("text,label\n" + "x" * 10_000_001, "line 2 is longer than 10,000,000 characters; cut it"),
    "empty text": rows(ROWS + ",good\n", "row 41: text is empty\ncorrect them, or set data.on_bad_row=drop"),
    "text of markup only": rows(ROWS + "<br />&nbsp;,good\n", "row 41: text is empty"),
    "missing label": rows(ROWS + "fine,\nfine too,\n", "row 41: label is missing (2 such rows)"),
    "unknown label": rows(ROWS + "so,so\n", "row 41: label 'so' is none of good, bad", "data.labels=[good, bad]"),
    "long unknown label": rows(ROWS + f"so,{'o' * 999}\n", "ooo' is none of good, bad", "data.labels=[good, bad]"),
    "one class": rows("text,label\na,good\nb,good\n", "every row has the label 'good'; a classifier needs two"),
    "no row is left": rows(ROWS, "no usable row among 40", "data.labels=[x, y]", "data.on_bad_row=drop"),
    "a class of one row": rows(ROWS + "so,so\n", "label 'so' has too few distinct texts to carve 10% out"),
    "labels 1.0": rows(ROWS.replace("good", "1.0").replace("bad", "0.0"), "labels are decimal numbers, such as 0.0"),
    "scores": rows("text,label\na,0.25\nb,3\nc,4.5\n", "decimal numbers, such as 0.25; a class is an integer"),
    "ids for labels": rows(
        "text,label\n" + "".join(f"a,x{i}\n" for i in range(300)), "holds 300 different values in 300 rows"
    ),
    "float label": rows(
        jsonl({"text": "a", "label": 1}, {"text": "b", "label": 0.5}, {"text": "c", "label": 0}),
        "the labels are decimal numbers, such as 0.5; a class is", name="rows.jsonl",
    ),
    "floats only": rows(
        jsonl({"text": "a", "label": 0.5}), "the labels are decimal numbers, such as 0.5", name="rows.jsonl"
    ),
    "truth values": rows(jsonl({"text": "a", "label": True}), "every row has the label 'True'", name="rows.jsonl"),
    "text is null": rows(jsonl({"text": None, "label": 1}), "row 1: text is missing", name="rows.jsonl"),
    "text is a number": rows(jsonl({"text": 5, "label": 1}), "row 1: text is int, not a string", name="rows.jsonl"),
    "text is a list": rows(jsonl({"text": ["a"], "label": 1}), "row 1: text is list, not", name="rows.jsonl"),
    "json that is a list": rows("[1]\n", "row 1 (line 1): no JSON object: found a list", name="rows.json"),
    "broken json": rows('{"text": "a"\n', "row 1 (line 1): no JSON object: Expecting ','", name="rows.jsonl"),
    "json key twice": rows('{"text": "a", "text": "b"}\n', "a key stands twice among", name="rows.jsonl"),
    "json key that comes late": rows(
        jsonl({"text": "a", "label": 1}, {"id": 2}), "row 2: text is missing", name="rows.jsonl"
    ),
    "half a character": rows('{"text": "\\ud800", "label": 1}\n', "no JSON object: 'utf-8'", name="rows.jsonl"),
    "cut parquet": rows(parquet({"text": ["a"], "label": [1]})[:-5], "cannot be read as parquet", name="rows.parquet"),
    "csv called parquet": rows(ROWS, "cannot be read as parquet (Parquet magic bytes", name="rows.parquet"),
    "parquet of lists": rows(parquet({"text": [["a"]], "label": [1]}), "text is list, not", name="rows.parquet"),
    "parquet without a label": rows(
        parquet({"text": ["a", "b", "c"], "label": [1.0, float("nan"), 0.0]}), "the labels are decimal numbers, such",
        name="rows.parquet",
    ),
    "test lacks a column": Trouble(
        "test.csv: no column 'label'; the columns are text", {"test.csv": "text\na\n"},
        ("data.source={train: rows.csv, test: test.csv}",),
    ),
    "test has another label": Trouble(
        "test.csv: row 1: label 'so' is none of bad, good", {"test.csv": "text,label\na,so\n"},
        ("data.source={train: rows.csv, test: test.csv}",),
    ),
    "validation has another label": Trouble(
        "more.csv: row 1: label 'so' is none of bad, good", {"more.csv": "text,label\na,so\n"},
        ("data.source={train: rows.csv, validation: more.csv}",),
    ),
}  # fmt: skip


def _edit(**values: object) -> Callable[[Path], None]:
    def edit(base: Path) -> None:
        found = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**found, **values}))

    return edit


def _write(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda base: (base / name).write_bytes(data)


def _remove(*names: str) -> Callable[[Path], None]:
    return lambda base: [(base / name).unlink() for name in names]


def _pickle(base: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


def _adapter(base: Path) -> None:
    (base / "config.json").rename(base / "adapter_config.json")


def _cut(base: Path) -> None:
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-100])


def _head(base: Path) -> None:
    from transformers import AutoTokenizer, DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig.from_pretrained(base, num_labels=3)
    tokenizer = AutoTokenizer.from_pretrained(base)
    DistilBertForSequenceClassification(config).save_pretrained(base)
    tokenizer.save_pretrained(base)


BASES = {
    "no such base": (shutil.rmtree, "no such folder"),
    "a folder without a model": (_remove("config.json"), "is no model: it has no config.json"),
    "an adapter for a base": (_adapter, "is an adapter; name the base that it was trained on"),
    "another architecture": (_edit(model_type="gpt2"), "is a gpt2 model; this package adapts encoders"),
    "an unknown architecture": (_edit(model_type="weird"), "is a weird model; this package adapts encoders"),
    "code in a base": (_edit(auto_map={"AutoModel": "code.Model"}), "asks to run its own code (auto_map"),
    "config that is no json": (_write("config.json", b"{"), "its config.json is no JSON"),
    "config that is a list": (_write("config.json", b"[]"), "its config.json names no model_type"),
    "config that is no shape": (_edit(dim="wide"), "Field 'dim' expected int, got str"),
    "no tokenizer": (_remove("tokenizer.json"), "has no tokenizer; it needs a tokenizer.json or a vocab.txt"),
    "tokenizer that is no json": (_write("tokenizer.json", b"{"), "could not be loaded"),
    "tokenizer of another kind": (_write("tokenizer.json", b"{}"), "is not valid: 'added_tokens'; fetch it again"),
    "weights in a pickle": (_pickle, "has no model.safetensors, and pickled weights are never loaded; convert them"),
    "weights cut short": (_cut, "could not be loaded: Error while deserializing header"),
    "weights of another width": (_edit(dim=64, hidden_dim=128), "tensors unfilled, which are missing or have another"),
    "another head": (_head, "has a head for 3 labels and the data has 2; name a base without a head"),
    "more length than positions": (
        _edit(max_position_embeddings=8), "model.max_length 16 is more than the 8 positions"
    ),
}  # fmt: skip

HUB_ROWS = ROWS.encode()
DATASETS = {
    "toy/good": {"README.md": b"# toy\n", "train.csv": HUB_ROWS},
    "toy/sentences": {"README.md": b"", "train.csv": HUB_ROWS.replace(b"text", b"sentence")},
    "toy/script": {"README.md": b"", "script.py": b"", "train.csv": HUB_ROWS},
    "toy/empty": {"README.md": b""},
    "toy/test-only": {"README.md": b"", "test.csv": HUB_ROWS},
    "toy/damaged": {"README.md": b"", "train.parquet": b"PAR1 PAR1"},
    "toy/card": {"README.md": b"---\nconfigs: [\n---\n", "train.csv": HUB_ROWS},
}
MODELS = {
    "toy/bert": {"config.json": b'{"model_type": "gpt2"}'},
    "toy/code": {
        "config.json": b'{"model_type": "distilbert", "auto_map": {"AutoModel": "code.Model"}}'
    },
    "toy/nothing": {"README.md": b""},
    "toy/words": {"config.json": b'{"model_type": "distilbert"}'},
}
REFUSALS = {
    "toy/401": (401, ""),
    "toy/403": (403, "", "no entry"),
    "toy/404": (404, "RepoNotFound"),
    "toy/410": (410, ""),
    "toy/gated": (403, "GatedRepo"),
    "toy/busy": (503, ""),
    "toy/page": (200, "", "log in"),
}
HUB = {
    "data set 401": (
        "data.source=toy/401",
        "answered 401 Unauthorized (no): there is no data set of this name, or it is private",
    ),
    "data set 403": (
        "data.source=toy/403",
        "answered 403 Forbidden (no entry): you may not read it; ask its owner",
    ),
    "data set 404": (
        "data.source=toy/404",
        "answered 404 Not Found (no): there is no data set of this name",
    ),
    "data set 410": ("data.source=toy/410", "answered 410 Gone (no): look at http://127.0.0.1"),
    "gated data set": ("data.source=toy/gated", "it is gated; ask for access at http://127.0.0.1"),
    "page instead of a data set": (
        "data.source=toy/page",
        "answered, but not as the Hub does: a network's login page",
    ),
    "page instead of a model": (
        "model.name=toy/page",
        "answered, but not as the Hub does: a network's login page",
    ),
    "misspelt data set": (
        "data.source=toy/goood",
        "did you mean 'toy/good'? (that is in the cache)",
    ),
    "data set without its owner": (
        "data.source=good",
        "did you mean 'toy/good'? (that is in the cache)",
    ),
    "data set revision": ("data.revision=v9", "it has no revision 'v9'; correct data.revision"),
    "data set configuration": (
        "data.config=nope",
        "BuilderConfig 'nope' not found. Available: ['default']; set data.",
    ),
    "data set split": (
        "data.splits={train: trian}",
        "has no split 'trian'; it has train; did you mean 'train'?",
    ),
    "data set without the column": (
        "data.source=toy/sentences",
        "no column 'text'; the columns are sentence, label",
    ),
    "data set script": (
        "data.source=toy/script",
        "is made by a script (script.py), and code from the Hub is",
    ),
    "data set without files": ("data.source=toy/empty", "holds no data files"),
    "data set without train": (
        "data.source=toy/test-only",
        "has the splits test; training needs 'train'",
    ),
    "data set damaged": ("data.source=toy/damaged", "the Hub has it, but it cannot be read"),
    "data set card damaged": ("data.source=toy/card", "the Hub has it, but it cannot be read"),
    "model 401": (
        "model.name=toy/401",
        "answered 401 Unauthorized (no): there is no model of this name, or it is private",
    ),
    "model 403": ("model.name=toy/403", "answered 403 Forbidden (no entry): you may not read it"),
    "model 404": (
        "model.name=toy/404",
        "answered 404 Not Found (no): there is no model of this name",
    ),
    "gated model": ("model.name=toy/gated", "it is gated; ask for access at http://127.0.0.1"),
    "misspelt model": ("model.name=toy/brt", "did you mean 'toy/bert'? (that is in the cache)"),
    "model revision": ("model.revision=v9", "it has no revision 'v9'; correct model.revision"),
    "no encoder": (
        "model.name=toy/bert",
        "'toy/bert' is a gpt2 model; this package adapts encoders of distilbert, bert, roberta",
    ),
    "code in a model": ("model.name=toy/code", "'toy/code' asks to run its own code"),
    "no model": ("model.name=toy/nothing", "'toy/nothing' is no model: it has no config.json"),
    "model without words": ("model.name=toy/words", "'toy/words' has no tokenizer"),
}

few = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def hub_messages(tmp_path_factory) -> dict[str, str]:
    """The message of every case of `HUB`, by the real clients."""
    folder = tmp_path_factory.mktemp("hub")
    path = folder / "recipe.yaml"
    path.write_text("data: {source: toy/good}\nmodel: {name: toy/bert, max_length: 16}\n")
    PartialState(cpu=True)
    with (
        serve(models=MODELS, datasets=DATASETS, refusals=REFUSALS) as address,
        point_clients(address, folder),
    ):
        # Fill the cache first: misspelt names are compared with it.
        load_data(Recipe.load(path).data)
        hub_complaint(path, "model.name=toy/bert")
        messages = {name: hub_complaint(path, override) for name, (override, _) in HUB.items()}
        messages["busy"] = explain_refusal(
            key="model.name", name="toy/busy", kind="model", revision=None
        )
    return messages


def hub_complaint(path: Path, override: str) -> str:
    """Return what a recipe with one override is refused with."""
    try:
        recipe, _ = resolve_offline(Recipe.load(path, [override]))
        if override.startswith("data."):
            load_data(recipe.data)
        else:
            load_base(recipe.model, labels=("bad", "good"))
    except LoraSentimentError as error:
        return str(error)
    return "nothing"


def complaint(trouble: Trouble, base: Path, capsys) -> str:
    """Set a trouble up in the current folder, ask `lora-sentiment data`, and return what it says."""
    texts = {"recipe.yaml": RECIPE, "rows.csv": ROWS, **trouble.files}
    for name, content in texts.items():
        data = content if isinstance(content, bytes) else content.encode()
        Path(name).write_bytes(data.replace(b"BASE", str(base).encode()))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["data", trouble.recipe, *trouble.overrides])
    assert stopped.value.code == 1
    return capsys.readouterr().err


def base_complaint(spoil: Callable[[Path], object], base: Path) -> str:
    """Spoil a copy of a base and return what loading it says."""
    shutil.copytree(base, "base")
    spoil(Path("base"))
    Path("recipe.yaml").write_text(RECIPE.replace("BASE", "./base"))
    with pytest.raises(LoraSentimentError) as caught:
        load_base(Recipe.load("recipe.yaml").model, labels=("bad", "good"))
    return str(caught.value)


TROUBLES = [*RECIPES, *FILES, *BASES, *HUB]


@pytest.mark.parametrize("name", TROUBLES)
def test_every_trouble_is_one_clear_message(
    name, request, tmp_path, tiny_base, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    if name in HUB:
        message, found = HUB[name][1], request.getfixturevalue("hub_messages")[name]
    elif name in BASES:
        message, found = BASES[name][1], base_complaint(BASES[name][0], tiny_base)
    else:
        trouble = (RECIPES | FILES)[name]
        message, found = trouble.message, complaint(trouble, tiny_base, capsys)
    assert message in found
    assert "Traceback" not in found
    assert len(found) < 600
    assert len(found.strip().splitlines()) <= 3


def test_there_are_at_least_sixty_troubles():
    assert len(TROUBLES) == len(RECIPES) + len(FILES) + len(BASES) + len(HUB) >= 60


MESSY = {
    "ag_news_noisy_labels.csv": ("text", "noisy_label", "utf-8", "2000 rows of 0, 1, 2, 3"),
    "sst2_dev_crlf.tsv": ("content", "label", "utf-8", "872 rows of 0, 1"),
    "mr_negative_cp1252.txt": (
        "text",
        "label",
        "utf-8",
        "its name tells no known format; it must end in one of .csv",
    ),
    "mr_negative_cp1252.tsv": (
        "text",
        "label",
        "utf-8",
        "naïveté and arbitrary flashbacks .' as cp1252",
    ),
    "mr_negative_cp1252.csv": (
        "text",
        "label",
        "cp1252",
        "no column 'text'; the columns are simplistic, silly and",
    ),
    "phrasebank_allagree_latin1.txt": ("text", "label", "utf-8", "its name tells no known format"),
    "phrasebank_allagree_latin1.tsv": (
        "text",
        "label",
        "utf-8",
        "is not utf-8: byte 0xf1 at offset 919 (line 7)",
    ),
    "phrasebank_allagree_latin1.jsonl": (
        "text",
        "label",
        "latin-1",
        "row 1 (line 1): no JSON object: Expecting value",
    ),
}
"""Real files, those of another suffix under a name that a hopeful user might give them: columns, encoding, the end."""


@pytest.mark.shared
@pytest.mark.parametrize("name", MESSY)
def test_real_messy_files_end_as_the_table_says(name, shared, tmp_path):
    text_column, label_column, encoding, end = MESSY[name]
    (path,) = (shared / "data/messy").glob(f"{name.partition('.')[0]}.*")
    shutil.copy(path, tmp_path / name)
    options = {"text_column": text_column, "label_column": label_column, "encoding": encoding}
    try:
        data = load_data(DataConfig(source=str(tmp_path / name), **options))
        found = f"{data.counts['train'].kept} rows of {', '.join(data.labels)}"
    except LoraSentimentError as error:
        found = str(error)
    assert end in found


def test_a_busy_hub_is_said_to_be_busy(hub_messages):
    """The clients themselves try such a Hub again for half a minute."""
    assert (
        "answered 503 Service Unavailable (no): the Hub is busy or down; try again later"
        in hub_messages["busy"]
    )


# Whatever is written, a recipe or a csv gives a result or one of our errors.

WORDS = """data model method train output name source kind lora r labels offline bundled rows.csv 1 -1 0.5 1e-4 .inf
.nan null true no ~ [] {} [a] {a: b} !!bool !!int !!float !!timestamp !!set !!binary !!omap &a *a << | > ' " # : - ,
[ ] { } % text_column label_column splits test encoding max_length target_modules q_lin rank_pattern quantize nf4"""
words = st.sampled_from(WORDS.split())
lines = st.lists(words, min_size=1, max_size=6).map(" ".join)
recipes = st.one_of(
    st.text(max_size=60),
    st.lists(st.tuples(st.sampled_from(["", "  ", "- "]), lines), max_size=6).map(
        lambda parts: "\n".join(indent + line for indent, line in parts)
    ),
    st.lists(st.tuples(words, lines), max_size=5).map(
        lambda pairs: RECIPE + "".join(f"{key}: {value}\n" for key, value in pairs)
    ),
)


@few
@given(text=recipes)
def test_any_recipe_is_read_or_refused(text, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        found = Recipe.load(path)
    except LoraSentimentError:
        return
    assert Recipe.load(path).to_yaml() == found.to_yaml()


@few
@given(key=words, value=lines | st.text(max_size=20))
def test_any_override_is_read_or_refused(key, value, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "sound.yaml"
    path.write_text(RECIPE)
    for override in (
        f"{key}={value}",
        f"data.{key}={value}",
        f"method.{key}={value}",
        f"train.{key}={value}",
    ):
        with suppress(LoraSentimentError):
            Recipe.load(path, [override])


digits = st.builds(
    "{}{}".format,
    st.sampled_from("-019"),
    st.sampled_from([1, 19, 640, 4300, 5000]).map("7".__mul__),
)
cells = (
    digits
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    | st.sampled_from(
        ["good", "bad", "0", "1", "1.0", "", '"', "<br />", "&#0;", "\x85", "\ufeff", "NaN", "-1"]
    )
)
tables = st.lists(st.lists(cells, min_size=2, max_size=3).map(",".join), max_size=20).map("\n".join)
contents = st.one_of(
    st.binary(max_size=80),
    tables.map(str.encode),
    tables.map(lambda text: b"text,label\n" + text.encode()),
    tables.map(lambda text: ROWS.encode() + text.encode()),
    tables.map(lambda text: (ROWS + text).encode("utf-16")),
    # Every row is sound, so that all that these labels can stop is reached.
    st.lists(digits, max_size=3).map(
        lambda found: (ROWS + "".join(f"some,{each}\n" * 2 for each in found)).encode()
    ),
)


@few
@given(
    content=contents, drop=st.booleans(), encoding=st.sampled_from(["utf-8", "cp1252", "utf-16"])
)
def test_any_csv_is_read_or_refused(content, drop, encoding, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(content)
    config = DataConfig(source=str(path), on_bad_row="drop" if drop else "error", encoding=encoding)
    try:
        data = load_data(config)
    except LoraSentimentError:
        return
    dropped = sum(map(len, data.counts["train"].dropped.values()))
    assert len(data.train) + len(data.validation) + dropped == data.counts["train"].read
