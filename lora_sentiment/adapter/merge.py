"""Merge an adapter into its base: a stock DistilBERT classifier, handed out only if it answers as the adapter does."""

import logging
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from peft import PeftModel
from peft.utils.integrations import dequantize_module_weight
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lora_sentiment.adapter.comparison import ask, find_fault, without_reasons
from lora_sentiment.adapter.folder import Card, Loaded, load, load_card
from lora_sentiment.adapter.merge_record import SCHEMA, Stamp, read_stamp, write_stamp
from lora_sentiment.adapter.merged_card import make_merged_card, say_reading
from lora_sentiment.adapter.weights import rebuild
from lora_sentiment.data.batches import TextEncoder
from lora_sentiment.errors import AdapterError, ModelError
from lora_sentiment.files import hash_file, take_place
from lora_sentiment.models.dtype import DTYPES
from lora_sentiment.models.inference import make_engine
from lora_sentiment.models.load import hash_tokenizer, load_base, quiet
from lora_sentiment.recipe.model import ModelConfig

log = logging.getLogger("lora_sentiment")

Into = Literal["base", "dequantised"]
WEIGHTS, TOKENIZER = "model.safetensors", ("tokenizer.json", "tokenizer_config.json")
ROWS_PER_FLIP = 100
"""Of a quantised base, or in another dtype: one row in this many may change its label."""
ROWS_PER_LOSS = 200
"""And one in this many may be lost to accuracy."""


@dataclass(frozen=True)
class Merge:
    """A merged model that was found to answer as its adapter.

    Attributes:
        folder: Where it stands.
        into: What the adapter was merged into.
        dtype: Dtype of its weights.
        compared: `base`, and for an adapter on a quantised base `dequantised`, to what was compared: `probe` and
            `validation`, each with its `rows`, the largest difference of a logit, the largest one `allowed` (null where
            flips decide), `flips` of the likeliest label, and on validation both accuracies; or the `reason` why rows
            could not be had.
        reading: How texts were read in training, and what of it stock runtimes do not do.
    """

    folder: Path
    into: Into
    dtype: str
    compared: dict[str, dict[str, Any]]
    reading: str

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        return {**vars(self), "folder": str(self.folder)}


def merge(
    adapter: Path,
    out: Path,
    *,
    dtype: str = "float32",
    into: Into = "base",
    base: str | None = None,
    max_rows: int = 500,
    progress: bool = False,
) -> Merge:
    """Write an adapter and its base as one stock model, reload it with plain transformers and compare.

    The tolerance: in fp32 on an unquantised base every logit is within MAX_DIFFERENCE. Else at most 1 % of the rows get
    another label, and accuracy is at most 0.5 points lower; judged on validation rows, or the probe without them.

    Args:
        adapter: An adapter folder.
        out: The new folder; it appears finished or not at all.
        dtype: Dtype of the weights, cast at the end: `float32`, `bfloat16` or `float16`.
        into: The base as it was published, or, for an adapter on a quantised one, what quantising left of it. Both are
            compared.
        base: Where to find the base, if not where the adapter says.
        max_rows: Most validation rows to compare on.
        progress: Show bars.

    Raises:
        AdapterError: If the place is taken, the adapter or base is not the one that was saved, or was merged before,
            or the merged model answers otherwise than the adapter.
        ModelError: If an option is none of those allowed, or the base cannot be loaded.
    """
    _check_options(dtype, into, max_rows)
    with write_aside(out) as aside:
        card = _check_source(adapter, into, base)
        quantised = card.base.quantize != "none"
        loaded = load(adapter, base=base)
        encoder = TextEncoder.of(
            loaded.tokenizer, max_length=card.max_length, truncation=card.truncation
        )
        engine = make_engine(loaded.model)
        unmerged = ask(
            engine, "adapter", card=card, encoder=encoder, max_rows=max_rows, progress=progress
        )
        compared: dict[str, dict[str, Any]] = {}
        if quantised:
            other: Into = "dequantised" if into == "base" else "base"
            model = _make_merged(adapter, loaded, into=other, base=base).to(DTYPES[dtype])
            compared[other] = unmerged.compare(make_engine(model), "merged", exact=False)
        model = _make_merged(adapter, loaded, into=into, base=base)
        if dtype != "float32":
            # What rounding did to a merge says nothing of one that was wrong before.
            found = unmerged.compare(make_engine(model), "merged", exact=not quantised)
            _refuse_otherwise(out, found, _advice(compared, into, "float32"))
        _save_model(aside, model.to(DTYPES[dtype]), loaded)
        exact = not quantised and dtype == "float32"
        compared[into] = unmerged.compare(make_engine(_reload(aside, card)), "merged", exact=exact)
        _refuse_otherwise(out, compared[into], _advice(compared, into, dtype))
        compared = {choice: compared[choice] for choice in get_args(Into) if choice in compared}
        stamp = _make_stamp(aside, card, into=into, dtype=dtype, compared=compared)
        text = make_merged_card(out.name, tuple(card.labels), stamp)
        (aside / "README.md").write_text(text, encoding="utf-8")
        write_stamp(aside, stamp)
    return Merge(out, into, dtype, compared, say_reading(stamp, other="a stock pipeline"))


@contextmanager
def write_aside(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside a place; once the block is done it takes the place by one rename.

    Whatever the block raises, nothing is left behind.

    Raises:
        AdapterError: If the place is taken, or cannot be written.
    """
    if out.exists() or out.is_symlink():
        raise AdapterError(f"{out}: exists; name another folder, or remove it first")
    created = [parent for parent in out.absolute().parents if not parent.exists()]
    aside = out.with_name(f"{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        aside.mkdir(parents=True)
        yield aside
        _publish(aside, out)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{out}: cannot be written: {error}") from error
    finally:
        if aside.exists():
            shutil.rmtree(aside)
        for parent in created:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


def _check_options(dtype: str, into: str, max_rows: int) -> None:
    for name, found, allowed in (("dtype", dtype, tuple(DTYPES)), ("into", into, get_args(Into))):
        if found not in allowed:
            raise ModelError(f"{name}: found {found!r}; allowed: {', '.join(allowed)}")
    if max_rows < 1:
        raise ModelError(f"max_rows: found {max_rows}; allowed: 1 or more")


def _check_source(adapter: Path, into: Into, base: str | None) -> Card:
    """Refuse what was merged before, and return the adapter's card; nothing is loaded yet."""
    if not (adapter / "card.json").is_file() and (adapter / "config.json").is_file():
        stamp = read_stamp(adapter)
        if stamp:
            raise AdapterError(
                f"{adapter}: already holds the adapter {stamp.adapter_sha256[:12]}, merged into {stamp.base!r}; "
                "give the adapter's own folder"
            )
    card = load_card(adapter)
    if into == "dequantised" and card.base.quantize == "none":
        raise AdapterError(
            f"{adapter}: was trained on an unquantised base, so nothing is dequantised; use --into base"
        )
    name = base or card.base.name
    stamp = read_stamp(Path(name)) if Path(name, "config.json").is_file() else None
    # An adapter may have been trained on a merged model, which is its base then; one that is named now is a mistake.
    if stamp and (
        stamp.adapter_sha256 == card.sha256 or (base and stamp.base_sha256 == card.base.base_sha256)
    ):
        raise AdapterError(
            f"{name}: is no base: it already holds the adapter {stamp.adapter_sha256[:12]}, merged into "
            f"{stamp.base!r}; name that one with --base"
        )
    return card


def _make_merged(adapter: Path, loaded: Loaded, *, into: Into, base: str | None) -> nn.Module:
    """Return the merged model in fp32, built from a freshly loaded unquantised base."""
    card = loaded.card
    revision = None if base else card.base.revision
    config = ModelConfig(
        name=base or card.base.name, revision=revision, max_length=card.max_length, dtype="float32"
    )
    plain = load_base(config, labels=tuple(card.labels))
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
    """Copy what quantising left of an encoder's linears into a plain encoder, in fp32."""
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    with torch.no_grad():
        for name, module in quantised.named_modules():
            if isinstance(module, Linear4bit | Linear8bitLt):
                own = name.removeprefix("base_model.model.").removesuffix(".base_layer")
                plain.get_parameter(f"{own}.weight").copy_(dequantize_module_weight(module))


def _save_model(folder: Path, model: nn.Module, loaded: Loaded) -> None:
    """Write what stock transformers reads."""
    with quiet():
        cast(Any, model).save_pretrained(folder)
    # safetensors writes for the owner alone, where every other file here can be read by all.
    (folder / WEIGHTS).chmod(0o644)
    # What the last call set must not travel, but the length at which a stock pipeline cuts must.
    loaded.tokenizer.backend_tokenizer.no_truncation()
    loaded.tokenizer.backend_tokenizer.no_padding()
    loaded.tokenizer.model_max_length = loaded.card.max_length
    loaded.tokenizer.save_pretrained(folder)


def _reload(folder: Path, card: Card) -> nn.Module:
    """Load what was written as anyone would."""
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
    wrong = {
        str(name)
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
        for name in report[key]
    }
    if wrong:
        raise AdapterError(
            f"the merged model that was written lacks tensors or has others: {', '.join(sorted(wrong))}"
        )
    if hash_tokenizer(tokenizer) != card.tokenizer_sha256 or model.config.id2label != dict(
        enumerate(card.labels)
    ):
        raise AdapterError(
            "the merged model that was written has another tokenizer or other labels than the adapter"
        )
    return cast(nn.Module, model.eval())


def _fault(found: dict[str, Any]) -> str | None:
    """Return what is wrong with a comparison, or None."""
    if fault := find_fault(found):
        return fault
    name, figures = next(
        reversed([(name, figures) for name, figures in found.items() if "rows" in figures])
    )
    rows, flips = figures["rows"], figures["flips"]
    if figures["allowed"] is None and flips * ROWS_PER_FLIP > rows:
        return f"{flips} of {rows} {name} rows get another label, allowed 1 %"
    lost = round(
        (figures.get("accuracy_adapter", 0.0) - figures.get("accuracy_merged", 0.0)) * rows
    )
    if figures["allowed"] is None and lost * ROWS_PER_LOSS > rows:
        return f"accuracy on {rows} {name} rows falls by {lost / rows:.2%}, allowed 0.5 points"
    return None


def _refuse_otherwise(out: Path, found: dict[str, Any], advice: str) -> None:
    if fault := _fault(found):
        raise AdapterError(
            f"{out}: not written, because the merged model answers otherwise than the adapter: {fault}{advice}"
        )


def _advice(compared: dict[str, dict[str, Any]], into: str, dtype: str) -> str:
    """Return what to try instead, among what was measured."""
    for other, found in compared.items():
        if other != into and _fault(found) is None:
            return f"; --into {other} stays within"
    return "" if dtype == "float32" else "; --dtype float32 stays within"


def _make_stamp(
    folder: Path, card: Card, *, into: Into, dtype: str, compared: dict[str, dict[str, Any]]
) -> Stamp:
    return Stamp(
        schema=SCHEMA,
        adapter_sha256=card.sha256,
        base_sha256=card.base.base_sha256,
        base=card.base.name,
        method=card.method.kind,
        into=into,
        dtype=dtype,
        max_length=card.max_length,
        truncation=card.truncation,
        clean=card.data.config.clean,
        calibration=card.calibration,
        compared=without_reasons(compared),
        files={name: hash_file(folder / name) for name in (WEIGHTS, *TOKENIZER)},
    )


def _publish(aside: Path, out: Path) -> None:
    if out.exists():
        raise AdapterError(f"{out}: was written by another process meanwhile; name another folder")
    take_place(aside, out)
