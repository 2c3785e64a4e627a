"""Every method on every precision: trained two steps, saved, reloaded, counted, and opened by stock PEFT."""

import itertools

import numpy as np
import pytest
import torch
from accelerate import PartialState
from peft import PeftModel
from pydantic import TypeAdapter
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    pipeline,
)

from lora_sentiment.adapter.file_size import saved_shapes
from lora_sentiment.adapter.folder import DataRecord, compute_probe, load, save
from lora_sentiment.adapter.merge import merge
from lora_sentiment.classifier import load as load_classifier
from lora_sentiment.data.batches import TextEncoder
from lora_sentiment.data.rows import Rows
from lora_sentiment.errors import ModelError
from lora_sentiment.models.families import FAMILIES
from lora_sentiment.models.load import encoder_tensors, hash_tensors, load_base
from lora_sentiment.models.sizes import count_parameters, make_meta_model
from lora_sentiment.models.wrap import (
    frozen_tensors,
    make_head_dense,
    make_trainable,
    trainable_tensors,
)
from lora_sentiment.recipe.data import DataConfig
from lora_sentiment.recipe.method import Method, PeftMethod
from lora_sentiment.recipe.model import ModelConfig
from lora_sentiment.recipe.train import TrainConfig
from lora_sentiment.tasks import SINGLE_LABEL
from lora_sentiment.training.loop import fit
from lora_sentiment.training.processes import make_accelerator
from tests.conftest import toy_rows
from tests.tiny_families import save_family_base

LABELS = ("negative", "positive")
REGEX = r".*\.layer\.1\..*\.(q_lin|lin2)"
METHODS = {
    "lora": {"kind": "lora", "r": 4, "lora_alpha": 8},
    "lora-rs": {"kind": "lora", "use_rslora": True, "target_modules": "all-linear"},
    "lora-dora": {"kind": "lora", "use_dora": True},
    "lora-gaussian": {"kind": "lora", "init_lora_weights": "gaussian", "lora_dropout": 0.1},
    "lora-orthogonal": {"kind": "lora", "init_lora_weights": "orthogonal"},
    "lora-random": {"kind": "lora", "init_lora_weights": False},
    "lora-pissa": {"kind": "lora", "init_lora_weights": "pissa", "r": 4, "use_rslora": True},
    "lora-olora": {
        "kind": "lora",
        "init_lora_weights": "olora",
        "r": 4,
        "rank_pattern": {"v_lin": 2},
    },
    "lora-plus": {"kind": "lora", "loraplus_lr_ratio": 4.0},
    "lora-layers": {
        "kind": "lora",
        "layers_to_transform": [1],
        "target_modules": ["lin1", "k_lin"],
    },
    "lora-patterns": {
        "kind": "lora",
        # Keys that overlap: the first that matches counts, and it comes last in the alphabet.
        "rank_pattern": {"v_lin": 2, ".*layer.1.*v_lin": 6},
        "alpha_pattern": {"q_lin": 3, ".*layer.0.*": 16},
    },
    "lora-regex": {"kind": "lora", "target_modules": REGEX},
    "adalora": {
        "kind": "adalora",
        "init_r": 6,
        "target_r": 3,
        "target_modules": ["q_lin", "k_lin", "out_lin"],
    },
    "ia3": {"kind": "ia3"},
    "ia3-regex": {"kind": "ia3", "target_modules": REGEX},
    "vera": {"kind": "vera", "r": 16, "target_modules": "all-linear"},
    "unfreeze-layers": {"kind": "unfreeze", "last_layers": 1},
    "unfreeze-patterns": {
        "kind": "unfreeze",
        "patterns": ["*.bias", "transformer.layer.0.attention.*"],
    },
    "head": {"kind": "head"},
    "full": {"kind": "full"},
}
FAMILY_METHODS = {
    "lora": {"kind": "lora"},
    "dora-all": {"kind": "lora", "use_dora": True, "target_modules": "all-linear"},
    "pissa": {"kind": "lora", "init_lora_weights": "pissa", "r": 4},
    "last-layer": {"kind": "unfreeze", "last_layers": 1},
    "all-weights": {"kind": "unfreeze", "patterns": ["*.weight"]},
    "head": {"kind": "head"},
    "full": {"kind": "full"},
    "adalora": {"kind": "adalora", "init_r": 6, "target_r": 3},
    "ia3": {"kind": "ia3"},
    "vera": {"kind": "vera", "r": 16},
}
"""Methods with the targets of each family."""
PRECISIONS = ("none", "int8", "nf4")
REFUSED = {
    "full": "trains the base's own tensors",
    "unfreeze-layers": "trains the base's own tensors",
    "unfreeze-patterns": "trains the base's own tensors",
    "vera": "no VeRA for quantised",
    "lora-pissa": "changes the base's weights",
    "lora-olora": "changes the base's weights",
    "lora-orthogonal": "have the dtype of the weights",
}
PAIRS = [
    pair
    for pair in itertools.product(METHODS, PRECISIONS)
    if pair[1] == "none" or (pair[0] not in REFUSED and pair != ("lora-dora", "int8"))
]
OTHERS = [family for family in FAMILIES.values() if family.model_type != "distilbert"]
FAMILY_CASES = []
for _family in OTHERS:
    for _name, _quantize in itertools.product(FAMILY_METHODS, PRECISIONS):
        _method = FAMILY_METHODS[_name]
        if (
            _method["kind"] in ("adalora", "ia3", "vera")
            and _method["kind"] not in _family.adapters
        ):
            continue
        if _quantize != "none" and _name not in ("lora", "dora-all", "head", "adalora", "ia3"):
            continue
        if (_name, _quantize) == ("dora-all", "int8"):
            continue
        # A merge of a quantised adapter is judged on 600 reviews, which takes seconds.
        _is_quick = _quantize == "none" and (_name == "lora" or _family.model_type == "bert")
        FAMILY_CASES.append(
            pytest.param(
                _family.model_type,
                _name,
                _quantize,
                id=f"{_family.model_type}-{_name}-{_quantize}",
                marks=[] if _is_quick else pytest.mark.slow,
            )
        )
IDS = [[2, 5, 6, 3], [2, 9, 14, 8, 3], [2, 7, 8, 9, 3]]
TEXTS = ["a lovely film", "the dull plot was so so awful really", "quite"]


def make(name, quantize, tiny_base, *, head="full", methods=METHODS):
    """Return a toy base wrapped with a method, and what it was made of."""
    method = TypeAdapter(Method).validate_python(methods[name])
    config = ModelConfig(
        name=str(tiny_base), max_length=16, dtype="float32", quantize=quantize, dropout=0.0, attention_dropout=0.0,
        double_quant=quantize == "nf4", seq_classif_dropout=0.0, head=head,
    )  # fmt: skip
    torch.manual_seed(0)
    base = load_base(config, labels=LABELS)
    return (
        base,
        method,
        config,
        make_trainable(base, method, config, dtype=torch.float32, num_steps=3),
    )


def train(model, base, method, *, steps=3, eval_steps=None, rate=1e-2):
    """Take a few steps over the same rows, so that their losses can be compared."""
    rows = toy_rows(48)
    labels = np.array([LABELS.index(label) for _, label in rows])
    encoded = TextEncoder.of(base.tokenizer, max_length=16, truncation="head").encode(
        Rows([text for text, _ in rows], labels, np.arange(48))
    )
    return fit(
        model,
        train=encoded,
        validation=encoded,
        task=SINGLE_LABEL,
        numbers=np.arange(48),
        config=TrainConfig(
            batch_size=48,
            learning_rate=rate,
            lr_scheduler_type="constant",
            max_steps=steps,
            eval_steps=eval_steps or steps,
        ),
        method=method,
        accelerator=make_accelerator(PartialState(), "float32"),
        max_tokens=4096,
    )


def write(folder, model, base, method, config):
    folder.mkdir()
    record = DataRecord(config=DataConfig(source="x/y"), train_sha256="0", validation_sha256="1")
    return save(
        folder, model, base=base, labels=LABELS, model_config=config, method=method, data=record, machine={},
        trained=compute_probe(model, IDS), tolerance=1e-5,
    )  # fmt: skip


@pytest.fixture(scope="session")
def family_bases(tmp_path_factory):
    """Folders of a random two-layer base of each family, by `model_type`."""
    folder = tmp_path_factory.mktemp("families")
    return {name: save_family_base(folder / name, name) for name in FAMILIES}


@pytest.mark.parametrize(("name", "quantize"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_every_method_on_every_precision(name, quantize, tiny_base, tmp_path):
    check_method(name, quantize, tiny_base, tmp_path)


@pytest.mark.parametrize(("model_type", "name", "quantize"), FAMILY_CASES)
def test_every_family(model_type, name, quantize, family_bases, tmp_path):
    check_method(name, quantize, family_bases[model_type], tmp_path, methods=FAMILY_METHODS)
    if quantize == "int8":
        # int8 rounds activations too. The labels of random weights change with that, and `merge`
        # refuses.
        return
    into = "base" if quantize == "none" else "dequantised"
    merge(tmp_path / "a", tmp_path / "merged", into=into)
    answers = load_classifier(tmp_path / "merged", dtype="float32").predict(TEXTS)
    stock = pipeline("text-classification", str(tmp_path / "merged"))(TEXTS)
    assert [answer.label for answer in answers] == [answer["label"] for answer in stock]
    np.testing.assert_allclose(
        [answer.score for answer in answers], [answer["score"] for answer in stock], atol=1e-5
    )


def check_method(name, quantize, tiny_base, tmp_path, *, methods=METHODS):
    """Train a few steps; compare what is counted, saved, reloaded and opened by stock PEFT."""
    base, method, config, model = make(name, quantize, tiny_base, methods=methods)
    counts = count_parameters(make_meta_model(base.config, method, config))
    assert sum(p.numel() for p in trainable_tensors(model).values()) == counts.trainable
    frozen = hash_tensors(frozen_tensors(model).items())
    # A large step on random weights may overshoot.
    rate = 1e-3 if name == "last-layer" else 1e-2
    history = train(model, base, method, rate=rate)
    assert history.steps[-1].loss < history.steps[0].loss
    assert hash_tensors(frozen_tensors(model).items()) == frozen

    model.eval()
    write(tmp_path / "a", model, base, method, config)
    loaded = load(tmp_path / "a")
    with safe_open(next((tmp_path / "a").glob("*.safetensors")), "pt") as file:
        found = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 - no mapping
    if name != "adalora":  # which of its values are pruned is the run's
        assert found == saved_shapes(base.config, method, config)
    answers = np.array(compute_probe(model, IDS).logits)
    # What was taken out of the base and put back is rounded twice; what was pruned adds up in another order.
    tolerance = {"lora-pissa": 3e-5, "pissa": 3e-5, "lora-olora": 3e-5, "adalora": 5e-6}.get(
        name, 1e-6
    )
    np.testing.assert_allclose(
        compute_probe(loaded.model, IDS).logits, answers, atol=tolerance, rtol=0
    )
    if isinstance(method, PeftMethod):
        np.testing.assert_allclose(
            stock_logits(tmp_path / "a", tiny_base, quantize), answers, atol=3e-5, rtol=0
        )


def stock_logits(folder, tiny_base, quantize):
    """What stock PEFT makes of a folder on a base that stock transformers loaded."""
    bits = {
        "int8": {"load_in_8bit": True},
        "nf4": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
        },
    }.get(quantize)
    family = FAMILIES[AutoConfig.from_pretrained(tiny_base).model_type]
    quantised = (
        BitsAndBytesConfig(**bits, llm_int8_skip_modules=list(family.head)) if bits else None
    )
    plain = AutoModelForSequenceClassification.from_pretrained(
        tiny_base, num_labels=2, dtype=torch.float32, quantization_config=quantised
    )
    for module in plain.modules():
        # Else it would round its scales where a CPU has avx512_bf16, and fail on weights as narrow as the toy's.
        module.support_avx512bf16_for_cpu = False
    return compute_probe(PeftModel.from_pretrained(plain, folder).eval(), IDS).logits


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_a_refused_pair_says_why(name, quantize, tiny_base):
    with pytest.raises(ModelError, match=f"model.quantize={quantize}.*{REFUSED[name]}"):
        make(name, quantize, tiny_base)


def test_dora_on_int8_is_refused_on_a_cpu(tiny_base):
    with pytest.raises(ModelError, match=r"int8.*use nf4"):
        make("lora-dora", "int8", tiny_base)


@pytest.mark.parametrize("name", ["lora-pissa", "lora-olora"])
def test_an_adapter_taken_out_of_the_base_is_saved_as_plain_lora(name, tiny_base, tmp_path):
    base, method, config, model = make(name, "none", tiny_base)
    assert hash_tensors(encoder_tensors(model)) != base.sha256
    train(model, base, method)
    write(tmp_path / "a", model.eval(), base, method, config)
    loaded = load(tmp_path / "a")
    assert hash_tensors(encoder_tensors(loaded.model)) == base.sha256
    lora = loaded.model.peft_config["default"]
    assert (lora.r, lora.init_lora_weights) == (8, True)


def test_adalora_is_pruned_to_its_target(tiny_base, tmp_path):
    base, method, config, model = make("adalora", "none", tiny_base)
    train(model, base, method)
    write(tmp_path / "a", model.eval(), base, method, config)
    left = load(tmp_path / "a").model.peft_config["default"].rank_pattern
    assert sum(map(sum, left.values())) == method.target_r * len(left)


def test_adalora_keeps_nothing_that_is_not_pruned_to_the_end(tiny_base, tmp_path):
    base, method, config, _ = make("adalora", "none", tiny_base)
    # Pruned at steps 5 and 10 only; what was pruned grows back in between.
    method = method.model_copy(update={"deltaT": 5})
    torch.manual_seed(0)
    model = make_trainable(
        load_base(config, labels=LABELS), method, config, dtype=torch.float32, num_steps=12
    )
    history = train(model, base, method, steps=12, eval_steps=4)
    assert [point.best for point in history.evaluations] == [False, False, True]
    write(tmp_path / "a", model.eval(), base, method, config)
    left = load(tmp_path / "a").model.peft_config["default"].rank_pattern
    assert sum(map(sum, left.values())) == method.target_r * len(left)


def test_loraplus_trains_b_faster(tiny_base):
    base, method, _, model = make("lora-plus", "none", tiny_base)
    before = {name: p.detach().clone() for name, p in trainable_tensors(model).items()}
    train(model, base, method, steps=1)
    # Adam's first step moves every value by its rate, whatever the gradient.
    moved = {
        name: float((p.detach() - before[name]).abs().median())
        for name, p in trainable_tensors(model).items()
    }
    for name, distance in moved.items():
        if ".lora_B." in name:
            assert distance == pytest.approx(4e-2, rel=1e-2)
        elif "classifier" in name:
            assert distance == pytest.approx(1e-2, rel=1e-2)


@pytest.mark.parametrize("head", ["classifier", "low_rank"])
@pytest.mark.parametrize("name", ["lora", "head", "unfreeze-layers"])
def test_a_smaller_head_is_saved_dense(name, head, tiny_base, tmp_path):
    base, method, config, model = make(name, "none", tiny_base, head=head)
    counts = count_parameters(make_meta_model(base.config, method, config))
    assert sum(p.numel() for p in trainable_tensors(model).values()) == counts.trainable
    assert counts.head < (base.config.dim + 1) * (base.config.dim + 2)
    history = train(model, base, method)
    assert history.steps[-1].loss < history.steps[0].loss
    trained = compute_probe(model.eval(), IDS).logits
    make_head_dense(model)
    write(tmp_path / "a", model, base, method, config)
    np.testing.assert_allclose(
        compute_probe(load(tmp_path / "a").model, IDS).logits, trained, atol=1e-6
    )
    if name == "lora":
        np.testing.assert_allclose(
            stock_logits(tmp_path / "a", tiny_base, "none"), trained, atol=1e-5
        )
