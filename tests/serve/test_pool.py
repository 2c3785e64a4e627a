import gc
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from lora_sentiment.adapter.folder import DataRecord
from lora_sentiment.classifier import load
from lora_sentiment.errors import AdapterError, ModelError
from lora_sentiment.recipe.data import DataConfig
from lora_sentiment.recipe.method import FullMethod, HeadMethod, Ia3Method, LoraMethod
from lora_sentiment.serve import pool as pool_module
from lora_sentiment.serve.pool import load_pool
from tests.conftest import toy_rows
from tests.random_adapters import name_labels, save_random
from tests.tiny_families import save_family_base

TEXTS = [text for text, _ in toy_rows(24)] + ["good", "", "so " * 40]
MIX = {
    "qv": {"method": LoraMethod(r=4, lora_alpha=8)},
    "wide": {"method": LoraMethod(r=16, lora_alpha=8), "labels": name_labels(20)},
    "all-linear": {
        "method": LoraMethod(r=2, target_modules="all-linear", use_rslora=True),
        "labels": name_labels(3),
    },
    "k-lin1": {
        "method": LoraMethod(r=3, target_modules=("k_lin", "lin1")),
        "labels": name_labels(5),
    },
    "one-layer": {"method": LoraMethod(r=3, layers_to_transform=(1,)), "labels": name_labels(4)},
    "head": {"method": HeadMethod(kind="head"), "labels": name_labels(3)},
    "several": {"method": LoraMethod(r=4), "labels": name_labels(4), "task": "multi_label"},
    "value": {"method": LoraMethod(r=2), "labels": ("stars",), "task": "regression"},
}
APART = {
    "dora": {"method": LoraMethod(r=4, use_dora=True), "labels": name_labels(3)},
    "ia3": {"method": Ia3Method(kind="ia3")},
    "full": {"method": FullMethod(kind="full"), "labels": name_labels(4)},
    # Not int8: which values bitsandbytes computes in full depends on the batch, alone as well.
    "nf4": {"method": LoraMethod(r=4), "quantize": "nf4"},
}


@pytest.fixture(scope="module")
def folders(tiny_base, tmp_path_factory):
    place = tmp_path_factory.mktemp("adapters")
    every = {**MIX, **APART}
    for seed, (name, options) in enumerate(every.items()):
        # The toy's weights are ten times a real base's, and so would the logits be, and their rounding.
        save_random(
            place / name, tiny_base, seed=seed, head=0.3, **{"labels": name_labels(2), **options}
        )
    return {name: place / name for name in every}


def make_pool(folders, **options):
    return load_pool(list(folders), **{"watch": None, "base": None, "dtype": "float32", **options})


@pytest.fixture(scope="module")
def pool(folders):
    """A pool of every adapter. Tests do not change it."""
    return make_pool(folders.values())


def tokenise(encoder, text):
    (ids,) = encoder.tokenise([text])
    return encoder.frame(encoder.truncate(ids))


def compute(pool, pairs):
    """Return the logits of (adapter, text) pairs, computed together."""
    adapters = [pool.adapters[name] for name, _ in pairs]
    inputs = [tokenise(pool.adapters[name].encoder, text) for name, text in pairs]
    encoded = adapters[0].encoder.pack(inputs)
    return pool.compute(adapters, encoded)


def compute_alone(classifier, text):
    ids = tokenise(classifier.encoder, text)[None].astype(np.int64)
    return classifier.engine.compute(ids, None)[0]


def shuffled(names):
    pairs = [(name, text) for text in TEXTS for name in names]
    return [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]


def test_in_a_mixed_stream_every_adapter_answers_as_alone(folders, pool):
    pairs = shuffled(folders)
    classifiers = {name: load(folder, dtype="float32") for name, folder in folders.items()}
    for (name, text), logits in zip(pairs, compute(pool, pairs), strict=True):
        expected = compute_alone(classifiers[name], text)
        np.testing.assert_allclose(logits, expected, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("max_tokens", [2**15, 100, 1])
def test_packed_rows_of_many_adapters_answer_as_padded_ones(pool, monkeypatch, max_tokens):
    pairs = shuffled(MIX)
    padded = compute(pool, pairs)
    # As on a GPU.
    monkeypatch.setattr(pool, "_packs", True)
    monkeypatch.setattr(pool_module, "inference_tokens", lambda device_type: max_tokens)
    for logits, expected in zip(compute(pool, pairs), padded, strict=True):
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize("change", ["relu", "gelu_new"])
def test_a_base_that_the_fast_forward_pass_does_not_compute_is_not_shared(change, tmp_path):
    base = save_family_base(tmp_path / "base", "bert")
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, "hidden_act": change}))
    method = LoraMethod(r=4, target_modules=("query", "value"))
    save_random(tmp_path / "a", base, method, labels=name_labels(2), head=0.3)
    alone = load(tmp_path / "a", dtype="float32")
    pool = make_pool([tmp_path / "a"])
    for text, logits in zip(TEXTS, compute(pool, [("a", text) for text in TEXTS]), strict=True):
        np.testing.assert_allclose(logits, compute_alone(alone, text), atol=1e-5)


def test_the_base_may_have_a_head_for_any_number_of_labels(tmp_path):
    base = save_family_base(tmp_path / "base", "bert")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model.save_pretrained(base)
    method = LoraMethod(r=4, target_modules=("query", "value"))
    save_random(tmp_path / "a", base, method, labels=name_labels(3), head=0.3)
    pool = make_pool([tmp_path / "a"])
    expected = compute_alone(load(tmp_path / "a", dtype="float32"), TEXTS[0])
    np.testing.assert_allclose(compute(pool, [("a", TEXTS[0])])[0], expected, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_pairs_and_single_texts_of_one_base_with_token_types_share_a_batch(
    packed, tmp_path, monkeypatch
):
    base = save_family_base(tmp_path / "base", "bert")
    pairs = DataRecord(
        config=DataConfig(source="x/y", text_pair_column="b"),
        train_sha256="0",
        validation_sha256="1",
    )
    method = LoraMethod(r=4, target_modules=("query", "value"))
    for seed, (name, record) in enumerate({"single": None, "pair": pairs}.items()):
        save_random(
            tmp_path / name, base, method, labels=name_labels(2), seed=seed, head=0.3, record=record
        )
    folders = {name: tmp_path / name for name in ("single", "pair")}
    pool = make_pool(folders.values())
    monkeypatch.setattr(pool, "_packs", packed)
    texts = {"single": TEXTS[:6], "pair": list(zip(TEXTS[:6], TEXTS[6:12], strict=True))}
    asked = [
        (name, text)
        for row in range(6)
        for name, own in texts.items()
        for text in own[row : row + 1]
    ]
    found = compute(pool, asked)
    assert all(adapter.form == "low-rank" for adapter in pool.adapters.values())
    for name, folder in folders.items():
        task = pool.adapters[name].task
        logits = np.stack([row for row, (own, _) in zip(found, asked, strict=True) if own == name])
        expected = load(folder, dtype="float32").probabilities(texts[name])
        np.testing.assert_allclose(task.compute_scores(logits), expected, atol=1e-5)
    # Without their types the pairs have other scores.
    classifier = load(folders["pair"], dtype="float32")
    flat = replace(classifier.encoder.template, second_type=0, end=(3,))
    without = replace(classifier, encoder=replace(classifier.encoder, template=flat))
    assert (
        np.abs(without.probabilities(texts["pair"]) - classifier.probabilities(texts["pair"])).max()
        > 1e-3
    )


def test_a_gpu_is_warmed_up_by_every_adapter_at_a_few_sizes_and_by_a_full_batch(
    pool, monkeypatch, caplog
):
    batches = []

    def note(adapters, encoded):
        names = [adapter.name for adapter in adapters]
        batches.append((names, encoded.lengths.tolist()))

    monkeypatch.setattr(pool, "compute", note)
    pool.warm_up(batch_tokens=1000)
    assert batches == []
    monkeypatch.setattr(pool, "_device", torch.device("cuda"))
    with caplog.at_level("INFO", logger="lora_sentiment"):
        pool.warm_up(batch_tokens=1000)
    names = list(pool.adapters)
    assert batches[:3] == [(names, [length] * len(names)) for length in (8, 16, 16)]
    assert len(batches[3][0]) == 1000 // 16
    assert "warmed up in" in caplog.text


def test_memory_that_runs_out_while_warming_up_says_what_to_lower(pool, monkeypatch):
    def run_out(adapters, encoded):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(pool, "compute", run_out)
    monkeypatch.setattr(pool, "_device", torch.device("cuda"))
    with pytest.raises(ModelError, match=r"a batch of 8,192 tokens; give --limit batch_tokens=N"):
        pool.warm_up(batch_tokens=8192)


def test_where_the_fast_forward_does_not_run_every_adapter_is_a_model_of_its_own(
    folders, monkeypatch
):
    monkeypatch.setattr(pool_module, "why_not_on", lambda device: "the device is mps")
    pool = make_pool([folders["qv"], folders["head"]])
    for name, adapter in pool.adapters.items():
        assert adapter.form == "merged"
        expected = compute_alone(load(folders[name], dtype="float32"), TEXTS[0])
        np.testing.assert_allclose(compute(pool, [(name, TEXTS[0])])[0], expected, atol=1e-5)


def test_what_changes_the_base_or_has_no_low_rank_form_is_served_apart(pool):
    low_rank = [name for name, adapter in pool.adapters.items() if adapter.form == "low-rank"]
    assert low_rank == list(MIX)


def test_the_base_stays_as_it_was_whatever_is_loaded_beside_it(folders, pool):
    alone = make_pool([folders["qv"]])
    pair = ("qv", TEXTS[0])
    np.testing.assert_array_equal(compute(alone, [pair])[0], compute(pool, [pair])[0])


def test_low_rank_adapters_share_the_bases_memory(pool):
    used = pool._forward.encoder.embeddings.word_embeddings.weight
    fresh = pool._fresh.model.distilbert.embeddings.word_embeddings.weight
    assert used.data_ptr() == fresh.data_ptr()


@pytest.mark.parametrize("name", ["k-lin1", "wide", "all-linear"])
def test_a_small_adapter_takes_no_more_memory_beside_a_large_one(pool, name):
    adapter = pool.adapters[name]
    saved_bytes = 4 * adapter.num_parameters
    assert adapter.part.num_bytes == saved_bytes
    tensors = [tensor for pair in adapter.part.pairs.values() for tensor in pair]
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) <= saved_bytes


@pytest.fixture
def copy(folders, tmp_path):
    """A function that copies an adapter into the watched folder, `tmp_path`."""
    return lambda name, to: shutil.copytree(folders[name], tmp_path / to)


def test_watching_picks_up_finished_folders_and_reloads_changed_ones(folders, tmp_path, copy):
    pool = make_pool([folders["qv"]], watch=tmp_path)
    (tmp_path / "half.run").mkdir()
    copy("wide", "new")
    # A look ends as soon as the server stops.
    pool.refresh(lambda: True)
    assert set(pool.adapters) == {"qv"}
    pool.refresh()
    assert set(pool.adapters) == {"qv", "new"}
    shutil.rmtree(tmp_path / "new")
    copy("k-lin1", "new")
    pool.refresh()
    assert len(pool.adapters["new"].labels) == 5
    same = pool.adapters
    pool.refresh()
    assert pool.adapters is same


def test_changes_of_other_files_do_no_harm(tmp_path, caplog, copy):
    for name in ("qv", "wide", "head"):
        copy(name, name)
    pool = make_pool([], watch=tmp_path)
    (tmp_path / "qv/card.json").touch()
    (tmp_path / "wide").rename(tmp_path / "other")
    (tmp_path / "head/.#card.json").symlink_to("somebody@somewhere")
    (tmp_path / "other/loop").symlink_to("loop")
    pool.refresh()
    assert set(pool.adapters) == {"qv", "head", "other"}
    assert caplog.text == ""


def test_a_folder_that_goes_while_it_is_loaded_is_not_served(
    folders, tmp_path, caplog, monkeypatch, copy
):
    pool = make_pool([folders["qv"]], watch=tmp_path)
    load_part = pool._load_part

    def load_and_remove(folder, card):
        loaded = load_part(folder, card)
        shutil.rmtree(folder)
        return loaded

    monkeypatch.setattr(pool, "_load_part", load_and_remove)
    copy("wide", "one")
    pool.refresh()
    assert set(pool.adapters) == {"qv"}
    assert "one: was removed while it was loaded" in caplog.text


def test_a_folder_that_could_not_be_loaded_for_no_fault_of_its_own_is_tried_again(
    folders, tmp_path, caplog, monkeypatch, copy
):
    pool = make_pool([folders["qv"]], watch=tmp_path)
    copy("wide", "one")
    copy("wide", "two")
    load, errors = pool._load, [torch.OutOfMemoryError("the device is full")]

    def load_or_fail(folder):
        if errors:
            raise errors.pop()
        return load(folder)

    monkeypatch.setattr(pool, "_load", load_or_fail)
    pool.refresh()
    assert set(pool.adapters) == {"qv", "two"}
    assert "tried again at the next look" in caplog.text
    pool.refresh()
    assert set(pool.adapters) == {"qv", "one", "two"}


def test_an_adapter_that_is_named_and_watched_is_loaded_once_and_then_followed(tmp_path, copy):
    place = copy("wide", "one")
    pool = make_pool([place], watch=tmp_path)
    first = pool.adapters["one"]
    pool.refresh()
    assert pool.adapters["one"] is first
    shutil.rmtree(place)
    copy("k-lin1", "one")
    pool.refresh()
    assert len(pool.adapters["one"].labels) == 5
    shutil.rmtree(place)
    pool.refresh()
    assert not pool.adapters
    # What was asked before is still answered.
    encoded = first.encoder.pack([tokenise(first.encoder, TEXTS[0])])
    assert pool.compute([first], encoded)[0].shape == (20,)


def test_labels_are_those_of_the_weights_when_a_folder_is_replaced_while_it_is_loaded(
    folders, monkeypatch, copy
):
    place = copy("qv", "one")
    pool = make_pool([folders["wide"]], dtype="bfloat16")
    load_part = pool._load_part

    def replace_and_load(folder, card):
        changed = json.loads((place / "card.json").read_text())
        changed["labels"].reverse()
        (place / "card.json").write_text(json.dumps(changed))
        return load_part(folder, card)

    monkeypatch.setattr(pool, "_load_part", replace_and_load)
    pool.add([place])
    assert pool.adapters["one"].labels == name_labels(2)[::-1]


def test_more_tokens_than_the_base_has_positions_are_refused_at_loading(folders, copy):
    place = copy("qv", "one")
    card = json.loads((place / "card.json").read_text())
    (place / "card.json").write_text(json.dumps({**card, "max_length": 4096}))
    with pytest.raises(ModelError, match="4096 is more than the 64 positions"):
        make_pool([folders["wide"], place])


def test_adapters_that_came_and_went_leave_nothing_behind(folders, tmp_path, copy):
    pool = make_pool([folders["qv"]], watch=tmp_path)

    def come_and_go():
        for name in ("wide", "dora"):
            copy(name, name)
            pool.refresh()
            compute(pool, [(name, TEXTS[0]), ("qv", TEXTS[1])])
            shutil.rmtree(tmp_path / name)
        pool.refresh()
        gc.collect()
        return sum(isinstance(found, torch.Tensor) for found in gc.get_objects())

    come_and_go()
    assert come_and_go() == come_and_go()


def test_a_watched_folder_that_cannot_be_served_is_logged_once_and_tried_again_when_it_changes(
    folders, tmp_path, caplog, copy
):
    pool = make_pool([folders["qv"]], watch=tmp_path)
    weights = copy("wide", "broken") / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    for _ in range(2):
        pool.refresh()
    assert [r.levelname for r in caplog.records if "broken" in r.getMessage()] == ["WARNING"]
    assert set(pool.adapters) == {"qv"}
    weights.write_bytes(whole)
    (tmp_path / "broken/card.json").touch()
    pool.refresh()
    served = pool.adapters
    assert set(served) == {"qv", "broken"}
    # An adapter that breaks later is served as it was.
    weights.write_bytes(whole[:-1])
    pool.refresh()
    assert pool.adapters is served
    assert "served as before its change" in caplog.text


def test_a_name_that_is_taken_is_refused(folders, tmp_path, copy):
    twin = copy("wide", "qv")
    with pytest.raises(AdapterError, match=r"name 'qv' is served already, from .*; rename one"):
        make_pool([folders["qv"], twin])
    pool = make_pool([folders["qv"]], watch=tmp_path)
    assert pool.adapters["qv"].folder == folders["qv"].resolve()


def test_an_adapter_for_another_base_is_refused(folders, tiny_base, tmp_path):
    from transformers import DistilBertModel

    other = shutil.copytree(tiny_base, tmp_path / "other-base")
    model = DistilBertModel.from_pretrained(other)
    with torch.no_grad():
        model.embeddings.LayerNorm.bias.add_(1)
    model.save_pretrained(other)
    stranger = tmp_path / "stranger"
    save_random(stranger, other, LoraMethod(r=4), labels=name_labels(2))
    with pytest.raises(
        AdapterError, match=r"stranger: is for the base .*this server has .*start another server"
    ):
        make_pool([folders["qv"], stranger])


def test_a_server_of_nothing_needs_to_know_its_base(tmp_path, tiny_base):
    with pytest.raises(ModelError, match="name the base with --base"):
        make_pool([], watch=tmp_path)
    assert make_pool([], watch=tmp_path, base=str(tiny_base)).adapters == {}


def test_bfloat16_answers_nearly_alike(folders, pool):
    short_pool = make_pool([folders[name] for name in MIX], dtype="bfloat16")
    pairs = shuffled(MIX)
    for short, full in zip(compute(short_pool, pairs), compute(pool, pairs), strict=True):
        assert short.dtype == np.float32
        np.testing.assert_allclose(short, full, atol=0.1 * max(1, np.abs(full).max()))


def test_free_memory_is_given_back_now_and_then(pool, monkeypatch):
    trims = []
    monkeypatch.setattr(pool_module, "_malloc_trim", trims.append)
    monkeypatch.setattr(pool_module, "TRIM_SECONDS", 3600.0)
    monkeypatch.setattr(pool, "_trimmed", float("-inf"))
    for _ in range(3):
        compute(pool, [("qv", TEXTS[0])])
    assert trims == [0]
