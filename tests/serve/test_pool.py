import gc
import json
import shutil

import numpy as np
import pytest
import torch

from lora_sentiment.classifier import load
from lora_sentiment.data.batches import Encoded
from lora_sentiment.errors import AdapterError, ModelError
from lora_sentiment.fast.kernels import FUSED_ATTENTION_FROM
from lora_sentiment.recipe.method import FullMethod, HeadMethod, Ia3Method, LoraMethod
from lora_sentiment.serve import pool as pool_module
from lora_sentiment.serve.pool import load_pool
from tests.conftest import toy_rows
from tests.random_adapters import name_labels, save_random

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


def read(served, text):
    (ids,) = served.encoder.tokenise([text])
    return served.encoder.frame(served.encoder.truncate(ids))


def answer(pool, pairs):
    """Logits of (adapter, text) pairs, in one stream."""
    served = [pool.adapters[name] for name, _ in pairs]
    inputs = [read(own, text) for own, (_, text) in zip(served, pairs, strict=True)]
    encoded: Encoded = served[0].encoder.pack(inputs)
    return pool.compute(served, encoded)


def alone(folder, text):
    classifier = load(folder, dtype="float32")
    ids = classifier.encoder.truncate(classifier.encoder.tokenise([text])[0])
    return classifier.engine.compute(classifier.encoder.frame(ids)[None].astype(np.int64), None)[0]


def shuffled(names):
    pairs = [(name, text) for text in TEXTS for name in names]
    return [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]


def test_in_a_mixed_stream_every_adapter_answers_as_alone(folders):
    pool = make_pool(folders.values())
    pairs = shuffled(folders)
    found = answer(pool, pairs)
    engines = {name: load(folder, dtype="float32") for name, folder in folders.items()}
    for (name, text), logits in zip(pairs, found, strict=True):
        own = engines[name]
        ids = own.encoder.frame(own.encoder.truncate(own.encoder.tokenise([text])[0]))[None].astype(
            np.int64
        )
        np.testing.assert_allclose(
            logits, own.engine.compute(ids, None)[0], atol=1e-5, err_msg=name
        )


@pytest.fixture
def packed(monkeypatch):
    """Let rows lie one after another on the CPU, as they do on a GPU."""

    def pack(pool):
        monkeypatch.setattr(pool, "_packs", True)
        return pool

    return pack


@pytest.mark.parametrize("max_tokens", [2**15, 100, 1])
def test_packed_rows_of_many_adapters_answer_as_padded_ones(
    folders, packed, monkeypatch, max_tokens
):
    pairs = shuffled(MIX)
    pool = make_pool([folders[name] for name in MIX])
    padded = answer(pool, pairs)
    monkeypatch.setattr(pool_module, "inference_tokens", lambda device_type: max_tokens)
    for found, expected in zip(answer(packed(pool), pairs), padded, strict=True):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_packed_rows_hold_no_padding_between_them(folders, packed, monkeypatch):
    pool = packed(make_pool([folders[name] for name in MIX]))
    given = []
    encode = pool._forward.encode_packed

    def encode_and_note(input_ids, *rest, **options):
        given.append(len(input_ids))
        return encode(input_ids, *rest, **options)

    monkeypatch.setattr(pool._forward, "encode_packed", encode_and_note)
    monkeypatch.setattr(pool_module, "inference_tokens", lambda device_type: 2**15)
    pairs = shuffled(MIX)
    answer(pool, pairs)
    tokens = sum(len(read(pool.adapters[name], text)) for name, text in pairs)
    assert len(given) == 1
    assert tokens <= given[0] <= 1.125 * tokens + 8


def test_one_text_of_one_adapter_is_packed_too(folders, packed):
    pool = make_pool([folders["all-linear"]])
    expected = answer(pool, [("all-linear", "good")])[0]
    np.testing.assert_allclose(
        answer(packed(pool), [("all-linear", "good")])[0], expected, atol=1e-5
    )


def test_a_cpu_is_not_warmed_up(folders, monkeypatch):
    pool = make_pool([folders["qv"]])
    monkeypatch.setattr(
        pool, "compute", lambda served, encoded: pytest.fail("a CPU was given work")
    )
    pool.warm_up(batch_tokens=512)


def test_a_gpu_is_warmed_up_by_every_adapter_at_a_few_sizes_and_by_a_full_batch(
    folders, monkeypatch, caplog
):
    pool = make_pool([folders["qv"], folders["wide"], folders["dora"]])
    given = []
    compute = pool.compute

    def compute_and_note(served, encoded):
        given.append(
            [(own.name, int(length)) for own, length in zip(served, encoded.lengths, strict=True)]
        )
        return compute(served, encoded)

    monkeypatch.setattr(pool, "compute", compute_and_note)
    monkeypatch.setattr(pool, "_device", torch.device("cuda"))
    monkeypatch.setattr(
        pool, "_compute_mixed", lambda parts, encoded, index: [np.zeros(2)] * len(index)
    )
    with caplog.at_level("INFO", logger="lora_sentiment"):
        pool.warm_up(batch_tokens=100)
    names = list(pool.adapters)
    longest = {name: own.encoder.max_length for name, own in pool.adapters.items()}
    assert given[0] == [(name, 8) for name in names]
    assert given[2] == [(name, min(512, longest[name])) for name in names]
    most = max(longest.values())
    assert len(given[-1]) == max(1, 100 // most)
    assert "warmed up in" in caplog.text


def test_memory_that_runs_out_while_warming_up_says_what_to_lower(folders, monkeypatch):
    pool = make_pool([folders["qv"]])

    def run_out(served, encoded):
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
    assert {own.form for own in pool.adapters.values()} == {"merged"}
    pairs = shuffled(["qv", "head"])[:6]
    for (name, text), found in zip(pairs, answer(pool, pairs), strict=True):
        np.testing.assert_allclose(found, alone(folders[name], text), atol=1e-5)


def test_what_changes_the_base_or_has_no_low_rank_form_is_served_apart(folders):
    forms = {name: own.form for name, own in make_pool(folders.values()).adapters.items()}
    assert {name for name, form in forms.items() if form == "low-rank"} == set(MIX)


def test_the_base_stays_as_it_was_whatever_is_loaded_beside_it(folders):
    pool = make_pool([folders["qv"]])
    before = answer(pool, [("qv", TEXTS[0])])[0]
    pool.add([folders["dora"], folders["full"], folders["wide"], folders["ia3"]])
    np.testing.assert_array_equal(answer(pool, [("qv", TEXTS[0])])[0], before)


def test_low_rank_adapters_share_the_bases_memory(folders):
    pool = make_pool([folders["qv"], folders["wide"]])
    base = pool._forward.encoder.embeddings.word_embeddings.weight
    assert (
        base.data_ptr() == pool._fresh.model.distilbert.embeddings.word_embeddings.weight.data_ptr()
    )


def test_a_small_adapter_takes_no_more_memory_beside_a_large_one(folders):
    pool = make_pool([folders["k-lin1"], folders["wide"], folders["all-linear"]])
    saved = {name: own.num_parameters for name, own in pool.adapters.items()}
    assert {name: own.part.num_bytes for name, own in pool.adapters.items()} == {
        n: 4 * size for n, size in saved.items()
    }
    held = [
        tensor.untyped_storage().nbytes()
        for own in pool.adapters.values()
        for pair in own.part.pairs.values()
        for tensor in pair
    ]
    assert sum(held) <= 4 * sum(saved.values())


def test_a_texts_answer_does_not_hang_on_its_neighbours(folders):
    pool = make_pool([folders[name] for name in MIX])
    pairs = [("qv", TEXTS[0]), ("wide", TEXTS[1])]
    together = answer(pool, [*pairs, *shuffled(MIX)])[:2]
    for pair, found in zip(pairs, together, strict=True):
        np.testing.assert_allclose(found, answer(pool, [pair])[0], atol=1e-5)


def test_a_dropped_adapter_answers_what_was_asked_before(folders, tmp_path):
    for name in ("qv", "wide"):
        shutil.copytree(folders[name], tmp_path / name)
    pool = make_pool([], watch=tmp_path)
    old = pool.adapters["qv"]
    inputs = old.encoder.pack([read(old, TEXTS[0])])
    before = pool.compute([old], inputs)[0]
    shutil.rmtree(tmp_path / "qv")
    pool.refresh()
    assert set(pool.adapters) == {"wide"}
    np.testing.assert_allclose(pool.compute([old], inputs)[0], before, atol=1e-6)


def test_watching_picks_up_finished_folders_and_reloads_changed_ones(folders, tmp_path, caplog):
    pool = make_pool([folders["qv"]], watch=tmp_path)
    assert set(pool.adapters) == {"qv"}
    (tmp_path / "half.run").mkdir()
    shutil.copytree(folders["wide"], tmp_path / "new")
    pool.refresh()
    assert set(pool.adapters) == {"qv", "new"}
    shutil.rmtree(tmp_path / "new")
    shutil.copytree(folders["k-lin1"], tmp_path / "new")
    pool.refresh()
    assert len(pool.adapters["new"].labels) == 5
    same = pool.adapters
    pool.refresh()
    assert pool.adapters is same


def test_a_card_that_was_written_again_unchanged_does_no_harm_to_the_rest_of_a_look(
    folders, tmp_path
):
    for name in ("qv", "wide"):
        shutil.copytree(folders[name], tmp_path / name)
    pool = make_pool([], watch=tmp_path)
    (tmp_path / "qv/card.json").touch()
    (tmp_path / "wide").rename(tmp_path / "other")
    pool.refresh()
    assert set(pool.adapters) == {"qv", "other"}


def test_a_half_copied_folder_is_served_once_it_is_whole(folders, tmp_path):
    pool = make_pool([folders["qv"]], watch=tmp_path)
    (tmp_path / "new").mkdir()
    shutil.copy2(folders["wide"] / "card.json", tmp_path / "new")
    pool.refresh()
    assert set(pool.adapters) == {"qv"}
    shutil.copytree(folders["wide"], tmp_path / "new", dirs_exist_ok=True)
    pool.refresh()
    assert set(pool.adapters) == {"qv", "new"}


def test_an_adapter_that_breaks_is_served_as_it_was(folders, tmp_path, caplog):
    shutil.copytree(folders["wide"], tmp_path / "one")
    pool = make_pool([], watch=tmp_path)
    before = answer(pool, [("one", TEXTS[0])])[0]
    (tmp_path / "one/card.json").write_text("{}")
    pool.refresh()
    np.testing.assert_array_equal(answer(pool, [("one", TEXTS[0])])[0], before)
    assert "served as before its change" in caplog.text


def test_a_folder_that_goes_while_it_is_loaded_is_not_served(
    folders, tmp_path, caplog, monkeypatch
):
    pool = make_pool([folders["qv"]], watch=tmp_path)
    load_whole = pool._load_part

    def load_and_go(folder, card):
        found = load_whole(folder, card)
        shutil.rmtree(folder)
        return found

    monkeypatch.setattr(pool, "_load_part", load_and_go)
    shutil.copytree(folders["wide"], tmp_path / "one")
    shutil.copytree(folders["wide"], tmp_path / "two")
    pool.refresh()
    assert set(pool.adapters) == {"qv"}
    assert all(f"{name}: was removed while it was loaded" in caplog.text for name in ("one", "two"))


def test_a_folder_that_could_not_be_loaded_for_no_fault_of_its_own_is_tried_again(
    folders, tmp_path, caplog, monkeypatch
):
    pool = make_pool([folders["qv"]], watch=tmp_path)
    for name in ("one", "two"):
        shutil.copytree(folders["wide"], tmp_path / name)
    load_whole, faults = pool._load, [torch.OutOfMemoryError("the device is full")]

    def load_or_fail(folder):
        if faults:
            raise faults.pop()
        return load_whole(folder)

    monkeypatch.setattr(pool, "_load", load_or_fail)
    pool.refresh()
    assert set(pool.adapters) == {"qv", "two"}
    assert "tried again at the next look" in caplog.text
    pool.refresh()
    assert set(pool.adapters) == {"qv", "one", "two"}


def test_an_adapter_that_is_named_and_watched_is_loaded_once_and_then_followed(
    folders, tmp_path, monkeypatch
):
    place = shutil.copytree(folders["wide"], tmp_path / "one")
    pool = make_pool([place], watch=tmp_path)
    first = pool.adapters["one"]
    pool.refresh()
    assert pool.adapters["one"] is first
    shutil.rmtree(place)
    shutil.copytree(folders["k-lin1"], place)
    pool.refresh()
    assert len(pool.adapters["one"].labels) == 5
    shutil.rmtree(place)
    pool.refresh()
    assert not pool.adapters


def test_a_file_that_goes_or_leads_nowhere_does_no_harm_to_its_adapter(folders, tmp_path, caplog):
    shutil.copytree(folders["wide"], tmp_path / "one")
    shutil.copytree(folders["qv"], tmp_path / "two")
    pool = make_pool([], watch=tmp_path)
    (tmp_path / "one/.#card.json").symlink_to("somebody@somewhere")
    (tmp_path / "two/loop").symlink_to("loop")
    pool.refresh()
    assert set(pool.adapters) == {"one", "two"}
    assert "gone" not in caplog.text


def test_labels_are_those_of_the_weights_when_a_folder_is_replaced_while_it_is_loaded(
    folders, tmp_path, monkeypatch
):
    place = shutil.copytree(folders["qv"], tmp_path / "one")
    pool = make_pool([folders["wide"]], dtype="bfloat16")
    load_whole = pool._load_part

    def replace_and_load(folder, card):
        found = json.loads((place / "card.json").read_text())
        (place / "card.json").write_text(json.dumps({**found, "labels": found["labels"][::-1]}))
        return load_whole(folder, card)

    monkeypatch.setattr(pool, "_load_part", replace_and_load)
    pool.add([place])
    assert pool.adapters["one"].labels == name_labels(2)[::-1]


def test_more_tokens_than_the_base_has_positions_are_refused_at_loading(folders, tmp_path):
    place = shutil.copytree(folders["qv"], tmp_path / "one")
    card = json.loads((place / "card.json").read_text())
    (place / "card.json").write_text(json.dumps({**card, "max_length": 4096}))
    with pytest.raises(ModelError, match="4096 is more than the 64 positions"):
        make_pool([folders["wide"], place])


def test_adapters_that_came_and_went_leave_nothing_behind(folders, tmp_path):
    pool = make_pool([folders["qv"]], watch=tmp_path)

    def come_and_go():
        for name in ("wide", "dora"):
            shutil.copytree(folders[name], tmp_path / name)
            pool.refresh()
            answer(pool, [(name, TEXTS[0]), ("qv", TEXTS[1])])
            shutil.rmtree(tmp_path / name)
        pool.refresh()
        gc.collect()
        return sum(isinstance(found, torch.Tensor) for found in gc.get_objects())

    come_and_go()
    first, second, third = (come_and_go() for _ in range(3))
    assert first == second == third


def test_a_look_ends_when_the_server_stops(folders, tmp_path):
    pool = make_pool([folders["qv"]], watch=tmp_path)
    shutil.copytree(folders["wide"], tmp_path / "one")
    pool.refresh(lambda: True)
    assert set(pool.adapters) == {"qv"}
    pool.refresh()
    assert set(pool.adapters) == {"qv", "one"}


def test_a_watched_folder_that_cannot_be_served_is_logged_once_and_tried_again_when_it_changes(
    folders, tmp_path, caplog
):
    pool = make_pool([folders["qv"]], watch=tmp_path)
    shutil.copytree(folders["wide"], tmp_path / "broken")
    weights = tmp_path / "broken/adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    for _ in range(2):
        pool.refresh()
    assert [r.levelname for r in caplog.records if "broken" in r.getMessage()] == ["WARNING"]
    assert set(pool.adapters) == {"qv"}
    weights.write_bytes(whole)
    (tmp_path / "broken/card.json").touch()
    pool.refresh()
    assert set(pool.adapters) == {"qv", "broken"}


def test_a_name_that_is_taken_is_refused(folders, tmp_path):
    twin = shutil.copytree(folders["wide"], tmp_path / "qv")
    with pytest.raises(AdapterError, match=r"name 'qv' is served already, from .*; rename one"):
        make_pool([folders["qv"], twin])


def test_a_watched_twin_of_a_named_adapter_leaves_that_one_served(folders, tmp_path):
    shutil.copytree(folders["wide"], tmp_path / "qv")
    pool = make_pool([folders["qv"]], watch=tmp_path)
    assert pool.adapters["qv"].folder == folders["qv"].resolve()


def test_an_adapter_for_another_base_is_refused(folders, tiny_base, tmp_path):
    from transformers import DistilBertModel

    torch.manual_seed(5)
    other = shutil.copytree(tiny_base, tmp_path / "other-base")
    model = DistilBertModel.from_pretrained(other)
    with torch.no_grad():
        model.embeddings.LayerNorm.bias.add_(1)
    model.save_pretrained(other)
    stranger = tmp_path / "stranger"
    save_random(stranger, other, LoraMethod(r=4), labels=name_labels(2))
    with pytest.raises(
        AdapterError,
        match=r"stranger: is for the base .*this server has .*start another server for it",
    ):
        make_pool([folders["qv"], stranger])


def test_a_server_of_nothing_needs_to_know_its_base(tmp_path, tiny_base):
    with pytest.raises(ModelError, match="name the base with --base"):
        make_pool([], watch=tmp_path)
    assert make_pool([], watch=tmp_path, base=str(tiny_base)).adapters == {}


def test_bfloat16_answers_nearly_alike(folders):
    pool = make_pool([folders[name] for name in MIX], dtype="bfloat16")
    exact = make_pool([folders[name] for name in MIX])
    pairs = shuffled(MIX)
    for short, full in zip(answer(pool, pairs), answer(exact, pairs), strict=True):
        assert short.dtype == np.float32
        np.testing.assert_allclose(short, full, atol=0.1 * max(1, np.abs(full).max()))


def test_longer_texts_take_fused_attention_and_answer_alike(tmp_path, tiny_base):
    from transformers import DistilBertConfig, DistilBertModel

    torch.manual_seed(0)
    config = DistilBertConfig.from_pretrained(
        tiny_base, max_position_embeddings=FUSED_ATTENTION_FROM + 8
    )
    base = shutil.copytree(tiny_base, tmp_path / "long-base")
    DistilBertModel(config).save_pretrained(base)
    folder = tmp_path / "long"
    save_random(
        folder, base, LoraMethod(r=4), labels=name_labels(2), max_length=FUSED_ATTENTION_FROM + 8
    )
    pool = make_pool([folder])
    text = "so " * FUSED_ATTENTION_FROM
    np.testing.assert_allclose(answer(pool, [("long", text)])[0], alone(folder, text), atol=1e-5)


def test_free_memory_is_given_back_now_and_then(folders, monkeypatch):
    pool, trims = make_pool([folders["qv"]]), []
    monkeypatch.setattr(pool_module, "_malloc_trim", trims.append)
    monkeypatch.setattr(pool, "_trimmed", float("-inf"))
    monkeypatch.setattr(pool_module, "TRIM_SECONDS", 3600.0)
    for _ in range(3):
        answer(pool, [("qv", TEXTS[0])])
    assert trims == [0]
