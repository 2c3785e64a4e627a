"""Merge an adapter into its base, as a stock classifier that answers alike."""

import hashlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from peft import PeftModel
from peft.utils.integrations import dequantize_module_weight
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lora_sentiment.adapter.card import (
    describe_reading,
    make_merged_card,
    read_metadata,
)
from lora_sentiment.adapter.comparison import (
    JUDGED_ROWS,
    Reference,
    compare_readings,
    count_changes,
    find_fault,
    make_reference,
    without_reasons,
)
from lora_sentiment.adapter.folder import Card, Loaded, load, load_card, write_tokenizer_config
from lora_sentiment.adapter.merge_record import (
    SCHEMA,
    MergeRecord,
    read_merge_record,
    write_merge_record,
)
from lora_sentiment.adapter.weights import rebuild
from lora_sentiment.cleaning import add_cleaning
from lora_sentiment.data.batches import SECOND_TYPE, TextEncoder, take_rows
from lora_sentiment.data.texts import split_text
from lora_sentiment.errors import AdapterError, ModelError
from lora_sentiment.files import hash_file, write_aside
from lora_sentiment.models.dtype import DTYPES
from lora_sentiment.models.engine import Engine
from lora_sentiment.models.inference import make_engine
from lora_sentiment.models.load import hash_tokenizer, load_base, quiet
from lora_sentiment.recipe.model import ModelConfig

log = logging.getLogger("lora_sentiment")

Into = Literal["base", "dequantised"]
WEIGHTS = "model.safetensors"
ROWS_PER_FLIP = 100
"""On a quantised base, or in another dtype, one row in this many may get another label."""
ROWS_PER_LOSS = 200
"""On a quantised base, or in another dtype, one row in this many may be lost to accuracy."""


@dataclass(frozen=True)
class Merge:
    """A merged model that answers as its adapter.

    Attributes:
        folder: Its folder.
        into: The weights that the adapter was merged into.
        dtype: Dtype of its weights.
        compared: `base`, and for an adapter on a quantised base also `dequantised`: the differences
            from the adapter when merged into these weights, as `Reference.compare` returns them.
        readings: What a stock pipeline on raw texts costs, and head truncation if it was asked for.
            See `MergeRecord`.
        reading: How texts were read in training, and which of it stock runtimes do not do.
    """

    folder: Path
    into: Into
    dtype: str
    compared: dict[str, dict[str, Any]]
    readings: dict[str, dict[str, Any]]
    reading: str

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        return {**vars(self), "folder": str(self.folder)}


def merge(
    adapter: Path,
    out: Path,
    *,
    dtype: str = "float32",
    into: Into | None = None,
    base: str | None = None,
    truncation: Literal["head"] | None = None,
    max_rows: int = 500,
    progress: bool = False,
) -> Merge:
    """Write an adapter and its base as one stock model.

    The model is reloaded with plain transformers and compared with the adapter. In fp32 on an
    unquantised base, every logit must be within MAX_DIFFERENCE. Otherwise at most 1 % of the rows
    may get another label, and accuracy may be at most 0.5 points lower, on JUDGED_ROWS rows of
    validation and train, or on the bundled reviews without them.

    Args:
        adapter: An adapter folder.
        out: The new folder. It appears when it is finished.
        dtype: Dtype of the weights, cast at the end: `float32`, `bfloat16` or `float16`.
        into: For an adapter on a quantised base, the weights to merge into: the published `base`,
            or the `dequantised` one, which has the rounding of quantising. Both are compared. By
            default the first of the two that stays within the limits.
        base: Place of the base, if it is not where the adapter says.
        truncation: `head` lets the merged model read the first tokens of a longer text, as stock
            runtimes do, and measures what that costs. By default it reads as in training.
        max_rows: Most validation rows to compare on, or JUDGED_ROWS if labels may change.
        progress: Whether to show bars.

    Raises:
        AdapterError: If `out` exists, the adapter or base is not the one that was saved or is
            merged already, or the merged model answers differently.
        ModelError: If an option has a value that is not allowed, or the base cannot be loaded.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype: found {dtype!r}; allowed: {', '.join(DTYPES)}")
    if into not in (None, *get_args(Into)):
        raise ModelError(f"into: found {into!r}; allowed: {', '.join(get_args(Into))}")
    if truncation not in (None, "head"):
        raise ModelError(f"truncation: found {truncation!r}; allowed: head")
    check_max_rows(max_rows)
    with write_aside(out) as aside:
        return merge_aside(
            adapter,
            aside,
            out,
            dtype=dtype,
            into=into,
            base=base,
            truncation=truncation,
            max_rows=max_rows,
            progress=progress,
        )


def check_max_rows(max_rows: int) -> None:
    """Refuse a number of rows to compare on that is less than 1.

    Raises:
        ModelError: If it is.
    """
    if max_rows < 1:
        raise ModelError(f"max_rows: found {max_rows}; allowed: 1 or more")


def merge_aside(
    adapter: Path,
    aside: Path,
    out: Path,
    *,
    dtype: str,
    into: Into | None,
    base: str | None,
    truncation: Literal["head"] | None = None,
    max_rows: int,
    progress: bool,
) -> Merge:
    """Merge into an existing empty folder.

    Args:
        adapter: As in `merge`.
        aside: The folder to write to.
        out: The final place of the folder, for messages and the README.
        dtype: As in `merge`.
        into: As in `merge`.
        base: As in `merge`.
        truncation: As in `merge`.
        max_rows: As in `merge`.
        progress: As in `merge`.

    Raises:
        AdapterError: As `merge`.
        ModelError: If the base cannot be loaded.
    """
    card = _check_source(adapter, into, base)
    source = read_metadata(adapter)
    quantised = card.base.quantize != "none"
    loaded = load(adapter, base=base)
    encoder = loaded.make_encoder()
    exact = not quantised and dtype == "float32"
    engine = make_engine(loaded.model)
    if card.base.quantize == "int8":
        # One text at a time: which values bitsandbytes computes in full depends on the batch, and
        # in another batch 1 % of the labels of one adapter were others.
        engine = replace(engine, max_tokens=1)
    reference = make_reference(
        engine,
        "adapter",
        card=card,
        task=card.task,
        calibration=card.calibration,
        encoder=encoder,
        max_rows=max_rows,
        min_rows=0 if exact else JUDGED_ROWS,
        progress=progress,
    )
    measured: dict[str, dict[str, Any]] = {}
    if quantised:
        for choice in get_args(Into):
            if choice != into:
                model = _make_merged(adapter, loaded, into=choice, base=base).to(DTYPES[dtype])
                measured[choice] = reference.compare(make_engine(model), "merged", exact=False)
    if into is None:
        into = _choose_weights(measured)
    others = {choice: found for choice, found in measured.items() if choice != into}
    model = _make_merged(adapter, loaded, into=into, base=base)
    if dtype != "float32":
        # First in fp32: rounding to another dtype must not hide a wrong merge.
        unrounded = reference.compare(make_engine(model), "merged", exact=not quantised)
        _check_compared(out, unrounded, others, dtype="float32")
    tokenizer_sha256, cleaning_steps = _save_model(aside, model.to(DTYPES[dtype]), loaded)
    reloaded, tokenizer = _reload(aside, card, tokenizer_sha256)
    engine = make_engine(reloaded)
    found = reference.compare(engine, "merged", exact=exact)
    _check_compared(out, found, others, dtype=dtype)
    measured[into] = found
    compared = {choice: measured[choice] for choice in get_args(Into) if choice in measured}
    own_encoder = replace(encoder, truncation=truncation or card.truncation)
    readings = _measure_readings(reference, engine, encoder, own_encoder, tokenizer)
    record = MergeRecord(
        schema=SCHEMA,
        adapter_sha256=card.sha256,
        base_sha256=card.base.base_sha256,
        base=card.base.name,
        model_type=card.base.model_type,
        method=card.method.kind,
        into=into,
        dtype=dtype,
        max_length=card.max_length,
        truncation=own_encoder.truncation,
        reads_pairs=card.reads_pairs,
        clean=card.data.config.clean,
        cleaning_steps=cleaning_steps,
        calibration=card.calibration,
        compared=without_reasons(compared),
        readings=readings,
        files={WEIGHTS: hash_file(aside / WEIGHTS)},
    )
    readme = make_merged_card(out.name, tuple(card.labels), record, source, task=card.task)
    (aside / "README.md").write_text(readme, encoding="utf-8")
    write_merge_record(aside, record)
    reading = describe_reading(record, other="a stock pipeline")
    return Merge(out, into, dtype, compared, readings, reading)


def _check_source(adapter: Path, into: Into | None, base: str | None) -> Card:
    """Return the adapter's card, and refuse a folder or base that holds a merged adapter."""
    if not (adapter / "card.json").is_file() and (adapter / "config.json").is_file():
        record = read_merge_record(adapter)
        if record:
            raise AdapterError(
                f"{adapter}: already holds the adapter {record.adapter_sha256[:12]}, merged into "
                f"{record.base!r}; give the adapter's own folder"
            )
    card = load_card(adapter)
    if into == "dequantised" and card.base.quantize == "none":
        raise AdapterError(
            f"{adapter}: was trained on an unquantised base, so nothing is dequantised; use --into "
            "base"
        )
    name = base or card.base.name
    record = read_merge_record(Path(name)) if Path(name, "config.json").is_file() else None
    if record:
        # A merged model may be the base that the adapter was trained on. A merged model named now
        # is a mistake.
        holds_this = record.adapter_sha256 == card.sha256
        if holds_this or (base and record.base_sha256 == card.base.base_sha256):
            raise AdapterError(
                f"{name}: is not a base: it already holds the adapter "
                f"{record.adapter_sha256[:12]}, merged into {record.base!r}; name that base with "
                "--base"
            )
    return card


def _make_merged(adapter: Path, loaded: Loaded, *, into: Into, base: str | None) -> nn.Module:
    """Return the merged model in fp32, built from a freshly loaded unquantised base."""
    card = loaded.card
    revision = None if base else card.base.revision
    config = ModelConfig(
        name=base or card.base.name, revision=revision, max_length=card.max_length, dtype="float32"
    )
    plain = load_base(config, labels=tuple(card.labels), problem_type=card.task.head_type)
    if plain.sha256 != card.base.base_sha256:
        raise AdapterError(
            f"the base {config.name!r} changed on disk while {adapter} was being merged; try again"
        )
    if into == "dequantised":
        _dequantise(loaded.model, plain.model)
    model = rebuild(adapter, plain, card.method, config)
    if not isinstance(model, PeftModel):
        return model
    try:
        merged: Any = model.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError) as error:
        raise AdapterError(
            f"{adapter}: method {card.method.kind} cannot be merged: {error}"
        ) from error
    return cast(nn.Module, merged.eval())


def _dequantise(quantised: nn.Module, plain: nn.Module) -> None:
    """Copy the dequantised weights of an encoder's linears into a plain encoder, in fp32."""
    # Late: bitsandbytes is not on every platform.
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    with torch.no_grad():
        for name, module in quantised.named_modules():
            if isinstance(module, Linear4bit | Linear8bitLt):
                own = name.removeprefix("base_model.model.").removesuffix(".base_layer")
                plain.get_parameter(f"{own}.weight").copy_(dequantize_module_weight(module))


def _choose_weights(measured: dict[str, dict[str, Any]]) -> Into:
    """Return the weights to merge into: the first ones that stay within the limits."""
    for into in get_args(Into):
        if into in measured and _find_merge_fault(measured[into]) is None:
            if into == "dequantised":
                log.info(
                    "merged into the dequantised base, which stays within the limits: into the "
                    "published base %s",
                    _find_merge_fault(measured["base"]),
                )
            return cast(Into, into)
    return "base"


def _measure_readings(
    reference: Reference,
    engine: Engine,
    trained: TextEncoder,
    own: TextEncoder,
    tokenizer: Any,
) -> dict[str, dict[str, Any]]:
    """Measure what other ways of reading the validation rows cost.

    Args:
        reference: The rows.
        engine: The merged model.
        trained: From texts to inputs, as in training.
        own: From texts to inputs, as this package will for the merged model.
        tokenizer: The merged model's tokenizer, as a stock pipeline loads it.

    Returns:
        As `MergeRecord.readings`.
    """
    rows = reference.validation
    measures_head = own.truncation != trained.truncation
    if rows is None:
        unknown = {"reason": "not measured, because the validation rows could not be read"}
        return {"stock": unknown, "head": unknown} if measures_head else {"stock": unknown}
    # Files of JSON can hold half of a surrogate pair, which a stock tokenizer refuses.
    texts = []
    for text in reference.raw_texts:
        parts = [part.encode("utf-8", "replace").decode() for part in split_text(text)]
        texts.append(tuple(parts) if own.reads_pairs else parts[0])
    read = tokenizer(texts, truncation=True)
    raw = [np.array(ids, dtype=np.int32) for ids in read["input_ids"]]
    if "token_type_ids" in read:
        types = [np.array(kinds, dtype=np.int32) for kinds in read["token_type_ids"]]
        raw = [ids + SECOND_TYPE * kinds for ids, kinds in zip(raw, types, strict=True)]
    every = np.arange(len(rows))
    cleaned = take_rows(own.encode(rows), every)
    readings = {"stock": compare_readings(reference, engine, own, cleaned, raw)}
    if measures_head:
        before = take_rows(reference.rows["validation"], every)
        readings["head"] = compare_readings(reference, engine, own, before, cleaned)
    return readings


def _save_model(folder: Path, model: nn.Module, loaded: Loaded) -> tuple[str, int]:
    """Write the files that stock transformers reads.

    Returns:
        The hash of the tokenizer, and the number of its steps that clean texts.
    """
    with quiet():
        cast(Any, model).save_pretrained(folder)
    # safetensors makes the file readable for its owner alone. All other files here are readable for
    # everyone.
    (folder / WEIGHTS).chmod(0o644)
    tokenizer = Tokenizer.from_str(loaded.tokenizer.backend_tokenizer.to_str())
    # The settings of the tokenizer's last call must not be saved.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    cleaning_steps = add_cleaning(tokenizer) if loaded.card.data.config.clean else 0
    tokenizer.save(str(folder / "tokenizer.json"))
    write_tokenizer_config(
        folder,
        loaded.tokenizer,
        max_length=loaded.card.max_length,
        has_types=loaded.make_encoder().has_types,
    )
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest(), cleaning_steps


def _reload(folder: Path, card: Card, tokenizer_sha256: str) -> tuple[nn.Module, Any]:
    """Load the written model and tokenizer with plain transformers."""
    try:
        with quiet():
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            model, report = AutoModelForSequenceClassification.from_pretrained(
                folder, trust_remote_code=False, output_loading_info=True
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterError(
            f"the merged model that was written cannot be loaded again: {error}"
        ) from error
    wrong: set[str] = set()
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        wrong.update(map(str, report[key]))
    if wrong:
        raise AdapterError(
            "the merged model that was written lacks tensors or has others: "
            f"{', '.join(sorted(wrong))}"
        )
    labels = dict(enumerate(card.labels))
    if hash_tokenizer(tokenizer) != tokenizer_sha256 or model.config.id2label != labels:
        raise AdapterError(
            "the merged model that was written has another tokenizer or other labels than the "
            "adapter"
        )
    return cast(nn.Module, model.eval()), tokenizer


def _check_compared(
    out: Path, compared: dict[str, Any], others: dict[str, dict[str, Any]], *, dtype: str
) -> None:
    """Refuse a merged model that answers differently from the adapter.

    Args:
        out: The new folder, for the message.
        compared: The differences.
        others: The differences of the other weights to merge into, for the advice.
        dtype: Dtype of the merged model.

    Raises:
        AdapterError: With an option that stays within the limits, if one is known.
    """
    fault = _find_merge_fault(compared)
    if fault is None:
        return
    advice = "" if dtype == "float32" else "; --dtype float32 stays within"
    for into, found in others.items():
        other_fault = _find_merge_fault(found)
        if other_fault is None:
            advice = f"; --into {into} stays within"
        else:
            advice += f"; with --into {into}, {other_fault}"
    raise AdapterError(
        f"{out}: not written, because the merged model answers differently from the adapter: "
        f"{fault}{advice}"
    )


def _find_merge_fault(compared: dict[str, Any]) -> str | None:
    """Return a message if a merged model is too far from the adapter, or None."""
    fault = find_fault(compared)
    if fault or compared["probe"]["allowed"] is not None:
        return fault
    name, rows, flips, lost = count_changes(compared, before="adapter", after="merged")
    if flips * ROWS_PER_FLIP > rows:
        return f"{flips} of {rows} {name} rows get another label, allowed 1 %"
    if lost is not None and lost * ROWS_PER_LOSS > rows:
        return f"accuracy on {rows} {name} rows falls by {lost / rows:.2%}, allowed 0.5 points"
    return None
