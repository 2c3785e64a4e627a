import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lora_sentiment.errors import RecipeError
from lora_sentiment.recipe.recipe import Recipe, make_schema

RECIPES = Path(__file__).parents[2] / "recipes"
MINIMAL = "data: {source: stanfordnlp/imdb}\nmodel: {name: a/b}\n"
BASE = "data: {source: stanfordnlp/imdb}\nmodel: "


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_defaults_and_name_from_the_file(write):
    recipe = Recipe.load(write(MINIMAL))
    assert recipe.name == "mine"
    assert str(recipe.folder) == "adapters/mine"
    assert recipe.method.kind == "lora"
    assert recipe.method.target_modules is None  # those of the base's family
    assert recipe.train.learning_rate == 5e-4


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("my recipe", "my-recipe"),
        ("отзывы", "отзывы"),
        ("recipe (2) – final", "recipe-2-final"),
        ("_draft", "draft"),
        ("a+b=c", "a-b-c"),
        ("imdb_lora.v2-", "imdb_lora.v2-"),
        ("cafe\u0301", "café"),
        ("हिन्दी 評価", "हिन्दी-評価"),
        ("2024.01", "2024.01"),
    ],
)
def test_a_file_of_any_name_names_its_run(tmp_path, stem, name):
    path = tmp_path / f"{stem}.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    recipe = Recipe.load(path)
    assert recipe.name == name
    assert recipe.folder == Path("adapters") / name
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.load(path) == recipe


@pytest.mark.parametrize(
    ("found", "hint"),
    [("my run", "my-run"), ("a/b", "a-b"), ("..", "my-recipe"), ("-x", "x"), ("😀", "my-recipe")],
)
def test_a_name_that_is_no_file_name_is_told_in_words(write, found, hint):
    with pytest.raises(RecipeError) as caught:
        Recipe.load(write(MINIMAL), [f"name='{found}'"])
    assert f"name: found '{found}'; a name has letters, digits," in str(caught.value)
    assert str(caught.value).endswith(f"; write name: {hint}")


def test_a_file_name_without_a_letter_asks_for_a_name(tmp_path):
    (tmp_path / "😀.yaml").write_text(MINIMAL)
    with pytest.raises(
        RecipeError, match=r"name: found '😀'; a name has .*; write name: my-recipe$"
    ):
        Recipe.load(tmp_path / "😀.yaml")


def test_overrides_take_dotted_keys_and_yaml_values(write):
    recipe = Recipe.load(
        write(MINIMAL),
        [
            "train.learning_rate=2e-4",
            "data.source={train: a.csv, test: b.csv}",
            "method.target_modules=[v_lin, lin1]",
        ],
    )
    assert recipe.train.learning_rate == 2e-4
    assert recipe.data.source == {"train": "a.csv", "test": "b.csv"}
    assert recipe.method.target_modules == ("v_lin", "lin1")


def test_a_whole_section_can_be_replaced(write):
    recipe = Recipe.load(write(MINIMAL + "method: {r: 4}\n"), ["method={kind: full}"])
    assert recipe.method.kind == "full"


def test_yaml_1_2_not_1_1(write):
    recipe = Recipe.load(
        write(
            "data: {source: x/y, labels: [no, yes]}\nmodel: {name: a/b}\ntrain: {learning_rate: 2e-4}"
        )
    )
    assert recipe.data.labels == ("no", "yes")
    assert recipe.train.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {name: a/b}", "data: is missing"),
        (MINIMAL + "trian: {}", "trian: unknown key; did you mean 'train'?"),
        (
            MINIMAL + "train: {learning_rat: 1}",
            "train.learning_rat: unknown key; did you mean 'learning_rate'?",
        ),
        (MINIMAL + "train: {learning_rate: fast}", "train.learning_rate: found 'fast'"),
        (MINIMAL + "train: {learning_rate: -1}", "train.learning_rate: found -1"),
        (MINIMAL + "train: {learning_rate: .inf}", "train.learning_rate: found inf"),
        (MINIMAL + "train: {seed: true}", "train.seed: found True"),
        (MINIMAL + "train: {batch_size: '8'}", "train.batch_size: found '8'"),
        (MINIMAL + "train: {batch_size: 8.5}", "train.batch_size: found 8.5"),
        (MINIMAL + "train: {lr_scheduler_type: liner}", "did you mean 'linear'?"),
        (MINIMAL + "train: {report_to: [tensorbord]}", "did you mean 'tensorboard'?"),
        (MINIMAL + "output: {dir: .}", "output.dir: found '.'"),
        (MINIMAL + "output: {dir: ''}", "output.dir: found ''"),
        (MINIMAL + "train: {seed: 4294967296}", "train.seed: found 4294967296"),
        (
            MINIMAL + "train: {warmup_ratio: 0.1, lr_scheduler_type: constant}",
            "train: warmup_ratio has no effect with",
        ),
        (
            MINIMAL + "train: {engine: fast}\nmethod: {kind: ia3}",
            "train.engine: fast cannot run with method",
        ),
        (
            "data: {source: x, encoding: utf-99}\nmodel: {name: a/b}",
            "data.encoding: found 'utf-99'",
        ),
        (
            MINIMAL + "method: {kind: lor}",
            "method: found kind 'lor'; allowed: lora, adalora, ia3, vera, unfreeze",
        ),
        (
            MINIMAL + "method: {target_modules: q_lin}",
            "method.target_modules: found 'q_lin'; allowed: a list of names",
        ),
        (
            MINIMAL + "method: {target_modules: '(q_lin'}",
            "method.target_modules: '(q_lin' is no regular expression",
        ),
        (
            MINIMAL + "method: {target_modules: '.*q', layers_to_transform: [1]}",
            "layers_to_transform does nothing with a",
        ),
        (
            MINIMAL + "method: {r: 3, init_lora_weights: orthogonal}",
            "orthogonal needs even ranks; found 3",
        ),
        (
            MINIMAL + "method: {rank_pattern: {'(': 3}}",
            "method.rank_pattern: '(' is no regular expression",
        ),
        (MINIMAL + "method: {init_lora_weights: loftq}", "method.init_lora_weights: "),
        (
            MINIMAL + "method: {kind: adalora, target_r: 16}",
            "method: target_r 16 is more than init_r 12",
        ),
        (MINIMAL + "method: {kind: unfreeze}", "method: name either last_layers"),
        (
            MINIMAL + "method: {kind: unfreeze, last_layers: 1, patterns: [a]}",
            "method: name either last_layers",
        ),
        (MINIMAL + "method: {kind: unfreeze, patterns: []}", "method: name either last_layers"),
        (
            BASE + "{name: a/b, double_quant: true}",
            "model: double_quant does nothing with quantize none",
        ),
        (
            BASE + "{name: a/b, head_r: 4}",
            "model: head_r does nothing with head full; set model.head=low_rank",
        ),
        (
            BASE + "{name: a/b, quantize: nf4}\nmethod: {kind: full}",
            "model.quantize: nf4 cannot be used: method full trains the base's own tensors",
        ),
        (
            BASE + "{name: a/b, quantize: int8}\nmethod: {init_lora_weights: pissa}",
            "model.quantize: int8 cannot be used: init_lora_weights pissa changes the base's weights",
        ),
        (
            BASE + "{name: a/b, quantize: nf4}\ntrain: {engine: fast}",
            "train.engine: fast cannot run with model.quantize=nf4",
        ),
        (
            BASE + "{name: a/b, head: classifier}\nmethod: {kind: full}",
            "model.head: method full trains the whole head; set model.head=full",
        ),
        (
            MINIMAL + "method: {kind: full, r: 8}",
            "method.r: unknown key of kind full; 'method={kind: full}' leaves the other keys out",
        ),
        (MINIMAL + "method: {rank: 8}", "method.rank: unknown key; use method.r (allowed: "),
        (MINIMAL + "train: {lr: 1}", "train.lr: unknown key; use train.learning_rate (allowed: "),
        (MINIMAL + "output_dir: x", "output_dir: unknown key; use output.dir (allowed: "),
        (MINIMAL + "method: {target_modules: []}", "method.target_modules: found []"),
        (MINIMAL + "method: {target_modules: [q_lin, q_lin]}", "each once"),
        (MINIMAL + "method: 3", "method"),
        (MINIMAL + "name: ../../etc", "name: found '../../etc'"),
        ("data: {source: {trian: a.csv}}\nmodel: {name: a/b}", "data.source: found split 'trian'"),
        ("data: {source: {test: a.csv}}\nmodel: {name: a/b}", "data.source: has no 'train'"),
        ("data: {source: ''}\nmodel: {name: a/b}", "data.source: is empty"),
        ("data: {source: x, labels: [a]}\nmodel: {name: a/b}", "data.labels: found ['a']"),
        ("data: {source: x, labels: [a, a]}\nmodel: {name: a/b}", "each once"),
        ("- a\n- b", "found list; a recipe is a mapping"),
        ("", "found NoneType"),
        ("a: [", "is no valid YAML"),
        ("a: 1\na: 2", "key 'a' stands twice"),
        ("1: 2", "key 1 is no string"),
        ("a: !!python/object:os.system 1", "is no valid YAML"),
        ('a: "\\UFFFFFFFF"', "is no valid YAML"),
    ],
)
def test_each_fault_says_where_and_what_is_allowed(write, text, message):
    path = write(text)
    with pytest.raises(RecipeError) as raised:
        Recipe.load(path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)


def test_all_faults_come_in_one_report(write):
    with pytest.raises(RecipeError) as raised:
        Recipe.load(write(MINIMAL + "train: {seed: -1, batch_size: 0}\nmethod: {r: 0}\nextra: 1"))
    assert len(str(raised.value).splitlines()) == 4


@pytest.mark.parametrize("override", ["train.seed", "=3", "train..seed=1", "train.seed=[", "a b=1"])
def test_a_malformed_override_is_refused(write, override):
    with pytest.raises(RecipeError, match="override"):
        Recipe.load(write(MINIMAL), [override])


def test_a_malformed_override_does_not_hide_other_faults(write):
    with pytest.raises(RecipeError) as raised:
        Recipe.load(write(MINIMAL), ["train.seed=-1", "nonsense"])
    assert len(str(raised.value).splitlines()) == 2


def test_a_missing_file_suggests_a_near_name(write):
    path = write(MINIMAL)
    with pytest.raises(RecipeError, match=r"did you mean 'mine\.yaml'"):
        Recipe.load(path.with_name("mien.yaml"))


def test_a_recipe_that_is_no_utf8_says_so(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"name: caf\xe9")
    with pytest.raises(RecipeError, match="byte 9 is no UTF-8"):
        Recipe.load(path)


def test_a_recipe_is_frozen(write):
    recipe = Recipe.load(write(MINIMAL))
    with pytest.raises(ValidationError):
        recipe.train.seed = 1


def test_the_resolved_recipe_reads_back_equal(write):
    recipe = Recipe.load(
        write(MINIMAL),
        ["data.labels=['1e5', no, 'null', '010']", "train.adam_epsilon=1e-12", "train.seed=010"],
    )
    assert recipe.train.seed == 10
    assert Recipe.load(write(recipe.to_yaml())) == recipe


@given(st.text(max_size=200))
def test_no_text_makes_a_recipe_fail_otherwise(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("fuzz") / "x.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with contextlib.suppress(RecipeError):
        Recipe.load(path)


_leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
_values = st.recursive(
    _leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
)
_keys = st.sampled_from(
    [
        "name",
        "data",
        "model",
        "method",
        "train",
        "output",
        "source",
        "kind",
        "r",
        "target_modules",
        "seed",
    ]
)
_recipes = st.dictionaries(_keys, _values | st.dictionaries(_keys, _values, max_size=4), max_size=5)


@given(_recipes)
def test_no_mapping_makes_a_recipe_fail_otherwise(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("fuzz") / "x.yaml"
    path.write_text(
        yaml.safe_dump(values, allow_unicode=True), encoding="utf-8", errors="surrogatepass"
    )
    with contextlib.suppress(RecipeError):
        Recipe.load(path)


def test_the_checked_in_schema_is_current():
    assert json.loads((RECIPES / "schema.json").read_text(encoding="utf-8")) == make_schema(), (
        "run `make schema`"
    )


def test_every_field_is_described_in_the_schema():
    def fields(schema):
        for definition in [schema, *schema["$defs"].values()]:
            yield from definition["properties"].items()

    assert [name for name, field in fields(make_schema()) if "description" not in field] == []


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_validates_against_class_and_schema(path):
    import jsonschema

    Recipe.load(path)
    assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=")
    values = yaml.safe_load(Recipe.load(path).to_yaml())
    jsonschema.validate(values, make_schema())


def test_the_recipe_of_the_docs_is_a_recipe(write):
    page = (RECIPES.parent / "docs/recipes.md").read_text(encoding="utf-8")
    recipe = Recipe.load(write(page.split("```yaml\n")[1].split("```")[0]))
    shipped = Recipe.load(RECIPES / "imdb_lora.yaml")
    assert recipe.method == shipped.method
    assert recipe.model == shipped.model
    assert recipe.train.learning_rate == shipped.train.learning_rate


def test_reading_a_recipe_imports_nothing_heavy():
    code = (
        "import sys, lora_sentiment.recipe.recipe, lora_sentiment.cli, lora_sentiment.models.parameters\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'datasets', 'accelerate', 'numpy') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


def test_label_sets_are_not_calibrated_on_rows_that_an_adapter_may_have_learned_from():
    overrides = ["model.adapter=adapters/any", "data.calibration_fraction=0.1"]
    with pytest.raises(RecipeError, match="label sets need rows that no training has seen"):
        Recipe.load(RECIPES / "quickstart.yaml", overrides)
