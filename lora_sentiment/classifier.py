"""A model that answers texts, whatever form it was saved in: `load(path).predict(["A lovely film."])`.

An adapter folder, a merged folder, an ONNX file or a stock PEFT folder give one and the same `Classifier`. Importing
this imports no torch, and neither does loading and asking an ONNX file.
"""

import hashlib
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from lora_sentiment.adapter.merge_record import Stamp, check_stamp, read_stamp
from lora_sentiment.adapter.onnx import PLAIN, open_session
from lora_sentiment.adapter.safe_files import (
    MAX_TOKENIZER_BYTES,
    check_model,
    find_file,
    read_bytes,
    read_labels,
    read_object,
)
from lora_sentiment.data.batches import TOKENISE_ROWS, Encoded, TextEncoder
from lora_sentiment.data.cleaning import clean_text
from lora_sentiment.errors import AdapterError, DataError, ModelError
from lora_sentiment.files import hash_file
from lora_sentiment.models.engine import Engine, compute_logits
from lora_sentiment.tasks.single_label import softmax

log = logging.getLogger("lora_sentiment")


@dataclass(frozen=True)
class Prediction:
    """What a classifier answers for one text.

    Attributes:
        label: The likeliest label.
        score: Its probability.
        scores: The probability of every label, by name.
    """

    label: str
    score: float
    scores: dict[str, float]


@dataclass(frozen=True)
class Classifier:
    """A model with its labels and the way it reads a text.

    Attributes:
        labels: Label names; the index of a name is its label.
        encoder: From a text to token ids.
        engine: From token ids to logits.
        clean: Whether texts are cleaned first, as they were for training.
        temperature: Fitted on validation at training, or None where none is known.
        sha256: Hash of what decides an answer.
        unverified: What nobody vouches for, one sentence each; empty where every hash was checked.
    """

    labels: tuple[str, ...]
    encoder: TextEncoder
    engine: Engine
    clean: bool
    temperature: float | None
    sha256: str
    unverified: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse labels that could not be told apart."""
        if len(set(self.labels)) < max(2, len(self.labels)) or not all(self.labels):
            raise AdapterError(
                f"labels: found {list(self.labels)}; a classifier needs two or more different names"
            )

    def predict(
        self, texts: Sequence[str], *, stride: int | None = None, calibrated: bool = False
    ) -> list[Prediction]:
        """Answer texts, in their order.

        Args:
            texts: A list of strings, however long each.
            stride: Read a longer text whole, in windows that share this many tokens, and average their probabilities;
                None cuts it as in training.
            calibrated: Divide logits by the temperature that training fitted.

        Raises:
            DataError: If the texts are no list of strings.
            ModelError: If the stride leaves no room, or there is no temperature.
            AdapterError: If the model answers another number of labels than it has names.
        """
        found = self.probabilities(texts, stride=stride, calibrated=calibrated)
        return [self._prediction(row) for row in found]

    def probabilities(
        self, texts: Sequence[str], *, stride: int | None = None, calibrated: bool = False
    ) -> NDArray[np.float64]:
        """Return the probability of each label: (num_texts, num_labels); arguments as `predict`'s.

        Texts are computed in order of length, so that little is padded.
        """
        if calibrated and self.temperature is None:
            raise ModelError("calibrated: this model was saved without a temperature; leave it out")
        if stride is not None and (
            not isinstance(stride, int) or not 0 <= stride < self.encoder.room
        ):
            raise ModelError(
                f"stride: found {stride}; allowed: 0 to {self.encoder.room - 1} tokens"
            )
        texts = _checked(texts)
        pooled = np.zeros((len(texts), len(self.labels)))
        for start in range(0, len(texts), TOKENISE_ROWS):
            given = texts[start : start + TOKENISE_ROWS]
            read = [clean_text(text, Counter()) for text in given] if self.clean else given
            if any(re.search("[\ud800-\udfff]", text) for text in read):
                raise DataError(
                    "texts: one holds half of a surrogate pair, which no tokenizer takes; decode it as UTF-8"
                )
            encoded, owners = self._encode(read, stride)
            logits = compute_logits(self.engine, encoded)
            if logits.shape[1:] != (len(self.labels),):
                raise AdapterError(
                    f"the model answers {logits.shape[1:]} values a text for the labels {self.labels}"
                )
            scores = softmax(
                logits, temperature=self.temperature if calibrated and self.temperature else 1.0
            )
            np.add.at(pooled, start + owners, scores / np.bincount(owners)[owners, None])
        return pooled

    def _encode(
        self, texts: Sequence[str], stride: int | None
    ) -> tuple[Encoded, NDArray[np.int64]]:
        """Return the inputs of texts, and whose input each one is."""
        inputs, owners = [], []
        for owner, ids in enumerate(self.encoder.tokenise(texts)):
            own = (
                [self.encoder.truncate(ids)]
                if stride is None
                else self.encoder.windows(ids, stride=stride)
            )
            inputs += [self.encoder.frame(window) for window in own]
            owners += [owner] * len(own)
        return self.encoder.pack(inputs), np.array(owners, dtype=np.int64)

    def _prediction(self, scores: NDArray[np.float64]) -> Prediction:
        best = int(scores.argmax())
        named = dict(zip(self.labels, scores.tolist(), strict=True))
        return Prediction(self.labels[best], float(scores[best]), named)


def _checked(texts: Sequence[str]) -> list[str]:
    """Return texts as a list, refusing what no tokenizer takes."""
    if isinstance(texts, str):
        raise DataError("texts: found one string; give a list, as in predict(['A lovely film.'])")
    found = list(texts)
    for place, text in enumerate(found):
        if not isinstance(text, str):
            raise DataError(f"texts[{place}]: found a {type(text).__name__}; give a string")
    return found


def load(
    path: str | Path,
    *,
    labels: Sequence[str] | None = None,
    base: str | None = None,
    max_length: int | None = None,
    dtype: str = "auto",
) -> Classifier:
    """Load a model that answers texts.

    Args:
        path: An adapter folder, a merged or exported folder, an `.onnx` file in one, a stock transformers folder, or a
            stock PEFT folder.
        labels: Label names in order: a stock PEFT folder does not hold them, a stock model's may mean nothing.
        base: Where to find an adapter's base, if not where it says.
        max_length: Most tokens of a text; only for stock folders, which do not say what they were trained with.
        dtype: Compute dtype: `auto`, `float32`, `bfloat16` or `float16`; an ONNX file has its own.

    Raises:
        AdapterError: If the folder is none of these, is incomplete or was altered, or has another base.
        ModelError: If the base cannot be loaded, or an option does not fit the form that was found.
    """
    if isinstance(labels, str):
        raise ModelError(f"labels: found the string {labels!r}; give a list of names, in order")
    if max_length is not None and (type(max_length) is not int or max_length < 8):
        raise ModelError(f"max_length: found {max_length!r}; allowed: 8 or more tokens")
    path = Path(path).resolve()
    if path.is_file() and path.suffix == ".onnx":
        return _load_onnx(path, labels=labels, base=base, max_length=max_length, dtype=dtype)
    if not path.is_dir():
        raise AdapterError(f"{path}: no such folder or .onnx file")
    if (path / "card.json").is_file():
        _refuse(
            path,
            "an adapter of this package, which knows them",
            labels=labels,
            max_length=max_length,
        )
        return _load_adapter(path, base, dtype)
    if (path / "adapter_config.json").is_file():
        return _load_stock_peft(path, labels, base, max_length, dtype)
    if (path / "model.safetensors").is_file():
        _refuse(path, "a whole model, which has no base", base=base)
        return _load_whole(path, labels, max_length, dtype)
    if (path / PLAIN).is_file():
        return _load_onnx(
            path / PLAIN, labels=labels, base=base, max_length=max_length, dtype=dtype
        )
    raise AdapterError(
        f"{path}: holds no model; expected card.json (an adapter), adapter_config.json (a PEFT folder), "
        f"model.safetensors (a merged model) or {PLAIN}"
    )


def _refuse(path: Path, what: str, **options: object) -> None:
    """Refuse options that the form of a model leaves no room for."""
    if given := [name for name, value in options.items() if value is not None]:
        raise ModelError(f"{path} is {what}; leave out {' and '.join(given)}")


def _load_adapter(path: Path, base: str | None, dtype: str) -> Classifier:
    from lora_sentiment.adapter.folder import load as load_folder
    from lora_sentiment.models.inference import prepare_engine
    from lora_sentiment.training.processes import join_launch

    device = join_launch().device
    loaded = load_folder(path, base=base, device=device)
    card = loaded.card
    return _make(
        tuple(card.labels),
        TextEncoder.of(loaded.tokenizer, max_length=card.max_length, truncation=card.truncation),
        prepare_engine(loaded.model, dtype, device),
        clean=card.data.config.clean,
        calibration=card.calibration,
        weights=[card.sha256, dtype],
    )


def _load_whole(
    path: Path, labels: Sequence[str] | None, max_length: int | None, dtype: str
) -> Classifier:
    from lora_sentiment.models.inference import prepare_engine
    from lora_sentiment.models.load import load_base
    from lora_sentiment.recipe.model import ModelConfig
    from lora_sentiment.training.processes import join_launch

    stamp = read_stamp(path)
    if stamp:
        _refuse(path, "a merged model, which knows them", labels=labels, max_length=max_length)
        check_stamp(
            path, stamp, needed=("model.safetensors", "tokenizer.json", "tokenizer_config.json")
        )
    check_model(path)
    names = tuple(labels) if labels else read_labels(path)
    length = stamp.max_length if stamp else max_length or _own_length(path)
    with _Explain(path):
        base = load_base(
            ModelConfig(name=str(path), max_length=length, dtype="float32"), labels=names
        )
    for name, tensor in base.model.named_parameters():
        if not tensor.isfinite().all():
            raise AdapterError(
                f"{path / 'model.safetensors'}: {name} holds a value that is not finite"
            )
    if base.new_head:
        raise AdapterError(
            f"{path}: is an encoder without a classification head; train one on it first"
        )
    device = join_launch().device
    encoder = TextEncoder.of(
        base.tokenizer, max_length=length, truncation=stamp.truncation if stamp else "head"
    )
    hashes = [hash_file(path / name) for name in ("model.safetensors", "config.json")]
    return _make_whole(
        names, encoder, prepare_engine(base.model, dtype, device), stamp, [*hashes, dtype]
    )


def _load_onnx(
    path: Path, *, labels: object, base: object, max_length: int | None, dtype: str
) -> Classifier:
    _refuse(
        path,
        "an ONNX file, which holds them",
        labels=labels,
        base=base,
        dtype=None if dtype == "auto" else dtype,
    )
    folder = path.parent.parent if path.parent.name == "onnx" else path.parent
    find_file(folder, path.relative_to(folder).as_posix())
    stamp = read_stamp(folder)
    if stamp:
        _refuse(path, "a file that knows it", max_length=max_length)
        name = path.relative_to(folder).as_posix()
        check_stamp(folder, stamp, needed=(name, "tokenizer.json", "tokenizer_config.json"))
    tokenizer, special = _read_tokenizer(folder)
    longest = _own_length(folder)
    if max_length and max_length > longest:
        raise ModelError(f"max_length: found {max_length}; {path} reads at most {longest} tokens")
    length = stamp.max_length if stamp else max_length or longest
    encoder = TextEncoder(
        tokenizer, *special, max_length=length, truncation=stamp.truncation if stamp else "head"
    )
    hashes = [hash_file(path), hash_file(folder / "config.json")]
    return _make_whole(read_labels(folder), encoder, open_session(path), stamp, hashes)


def _load_stock_peft(
    path: Path, labels: Sequence[str] | None, base: str | None, max_length: int | None, dtype: str
) -> Classifier:
    from lora_sentiment.adapter.peft_file import PEFT_CONFIG, read_config
    from lora_sentiment.adapter.weights import PEFT_WEIGHTS, rebuild_stock
    from lora_sentiment.hub import is_hub_name, prepare_hub
    from lora_sentiment.models.inference import prepare_engine
    from lora_sentiment.models.load import load_base
    from lora_sentiment.recipe.model import ModelConfig
    from lora_sentiment.training.processes import join_launch

    if labels is None:
        raise ModelError(
            f"{path} is a stock PEFT folder, which holds no label names; give them in order: "
            "labels=['negative', 'positive'], on the command line --labels negative,positive"
        )
    recorded = read_config(path)
    name = base or recorded.base_model_name_or_path
    if not isinstance(name, str) or not name:
        raise ModelError(
            f"{path}: its adapter_config.json names no base; give it with base=, --base"
        )
    if base and Path(base, "config.json").is_file() and (stamp := read_stamp(Path(base))):
        raise AdapterError(
            f"{base}: is no base: it already holds the adapter {stamp.adapter_sha256[:12]}, merged into {stamp.base!r}"
        )
    revision = None if base else recorded.revision
    config = ModelConfig(name=name, revision=revision, max_length=max_length or 8, dtype="float32")
    if is_hub_name(config.place):
        prepare_hub()
    loaded = load_base(config, labels=tuple(labels))
    max_length = max_length or loaded.shape.max_position_embeddings
    device = join_launch().device
    hashes = [
        hash_file(path / file) for file in (PEFT_WEIGHTS, PEFT_CONFIG) if (path / file).is_file()
    ]
    return _make(
        tuple(labels),
        TextEncoder.of(loaded.tokenizer, max_length=max_length, truncation="head"),
        prepare_engine(rebuild_stock(path, loaded), dtype, device),
        weights=[loaded.sha256, *hashes, dtype],
        unverified=(
            f"that {name!r} is the base it was trained on: the folder records no hash of it",
            f"that {', '.join(labels)} are its labels, in this order",
            "how texts were cleaned and cut for training, and in which precision the base was",
        ),
    )


def _make_whole(
    labels: tuple[str, ...],
    encoder: TextEncoder,
    engine: Engine,
    stamp: Stamp | None,
    weights: list[str],
) -> Classifier:
    """Return the classifier of a whole model, with what its stamp says where it has one."""
    if stamp is None:
        unverified = ("its weights: no stamp of this package says what they should be",)
        return _make(labels, encoder, engine, weights=weights, unverified=unverified)
    return _make(
        labels, encoder, engine, clean=stamp.clean, calibration=stamp.calibration, weights=weights
    )


def _make(
    labels: tuple[str, ...],
    encoder: TextEncoder,
    engine: Engine,
    *,
    weights: list[str],
    clean: bool = False,
    calibration: dict[str, float] | None = None,
    unverified: tuple[str, ...] = (),
) -> Classifier:
    """Return a classifier whose hash holds all that decides an answer, beside what `weights` says."""
    temperature = (calibration or {}).get("temperature")
    reading = [
        encoder.tokenizer.to_str(),
        encoder.max_length,
        encoder.truncation,
        clean,
        temperature,
        *labels,
    ]
    sha256 = hashlib.sha256(json.dumps([*weights, *reading]).encode()).hexdigest()
    return Classifier(labels, encoder, engine, clean, temperature, sha256, unverified)


def _own_length(folder: Path) -> int:
    """Return the longest input of a model without stamp: its tokenizer's, and at most its positions."""
    found = (
        read_object(folder / "config.json").get("max_position_embeddings", 512),
        read_object(folder / "tokenizer_config.json").get("model_max_length"),
    )
    lengths = [
        int(value) for value in found if isinstance(value, int | float) and 8 <= value < math.inf
    ]
    if not lengths:
        raise AdapterError(
            f"{folder / 'config.json'}: max_position_embeddings is {found[0]!r}; allowed: 8 or more"
        )
    return min(lengths)


def _read_tokenizer(folder: Path) -> tuple[Tokenizer, tuple[int, int, int]]:
    """Read a tokenizer and the ids of its [CLS], [SEP] and [PAD] without transformers, which would import torch."""
    path = folder / "tokenizer.json"
    text = read_bytes(path, limit=MAX_TOKENIZER_BYTES)
    with _Explain(path):
        tokenizer = Tokenizer.from_str(text.decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    values = read_object(folder / "tokenizer_config.json")
    special: list[int] = []
    for role in ("cls_token", "sep_token", "pad_token"):
        token = values.get(role)
        found = tokenizer.token_to_id(
            str(token.get("content") if isinstance(token, dict) else token)
        )
        if found is None:
            raise AdapterError(
                f"{folder}/tokenizer_config.json: {role} is {token!r}, which the tokenizer does not know"
            )
        special.append(found)
    return tokenizer, (special[0], special[1], special[2])


class _Explain:
    """Turn what tokenizers and transformers raise for files of anyone's making into one line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # The tokenizers library raises Exception itself, and nothing below it.
        if type(error) is Exception or isinstance(
            error,
            (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError),
        ):
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise AdapterError(f"{self.path}: cannot be read: {reason}") from error
