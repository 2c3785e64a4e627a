"""Load a model in any saved form, and answer texts: `load(path).predict(["A lovely film."])`.

An adapter folder, a merged folder, an ONNX file and a stock PEFT folder all give a `Classifier`.
This module and the loading of an ONNX file import no torch. So the functions for the other forms
import late.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from lora_sentiment.adapter.merge_record import MergeRecord, check_merge_record, read_merge_record
from lora_sentiment.adapter.onnx import PLAIN, open_session
from lora_sentiment.adapter.safe_files import (
    MAX_TOKENIZER_BYTES,
    ExplainLibraryError,
    find_file,
    read_bytes,
    read_labels,
    read_object,
    read_task,
)
from lora_sentiment.cleaning import clean_text, remove_cleaning
from lora_sentiment.data.batches import TOKENISE_ROWS, TextEncoder, TokenIds, read_template
from lora_sentiment.data.texts import Text, split_text
from lora_sentiment.errors import AdapterError, DataError, ModelError, show_names
from lora_sentiment.files import hash_file
from lora_sentiment.models.engine import Engine, compute_logits
from lora_sentiment.models.families import FAMILIES, num_positions
from lora_sentiment.tasks import SINGLE_LABEL, Task, find_task_of
from lora_sentiment.tasks.label_sets import find_set_thresholds, make_label_set
from lora_sentiment.tasks.task import Calibration, get_temperature

WEIGHTS = "model.safetensors"
EMPTY_TEXT = "text is empty"
"""Why a text without tokens has no label, or a pair with such a text, in all answers."""
TOKENISE_CHARACTERS = 2**16
"""Most characters that the tokenizer gets in one call, but for a longer text alone."""


@dataclass(frozen=True)
class Prediction:
    """The answer to one text.

    Attributes:
        label: The likeliest of single labels, or None for a text without tokens.
        score: Its probability, or None.
        labels: The labels of a multi-label model, or None.
        value: The value of a regression, or None.
        scores: The probability of every label, or the value, by name; empty without an answer.
        error: Why there is no label, or None.
        label_set: The labels that cannot be ruled out at the coverage that was asked for, in the
            classifier's order. None if none was asked for.
    """

    label: str | None = None
    score: float | None = None
    labels: list[str] | None = None
    value: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    label_set: list[str] | None = None

    @property
    def is_certain(self) -> bool | None:
        """Whether the label set holds exactly one label. None without a label set."""
        return None if self.label_set is None else len(self.label_set) == 1


@dataclass(frozen=True)
class Classifier:
    """A model with its labels and its way from texts to inputs.

    Attributes:
        labels: Label names. The index of a name is its label.
        encoder: From a text to token ids.
        engine: From token ids to logits.
        clean: Whether texts are cleaned first, as in training.
        calibration: What was fitted on validation in training, or None.
        sha256: Hash of everything that decides an answer.
        unverified: Facts that no hash confirms, one sentence each. Empty if every hash was checked.
        task: What its labels are.
    """

    labels: tuple[str, ...]
    encoder: TextEncoder
    engine: Engine
    clean: bool
    calibration: Calibration | None
    sha256: str
    unverified: tuple[str, ...] = ()
    task: Task = SINGLE_LABEL

    @property
    def temperature(self) -> float | None:
        """Fitted on validation in training, or None if none is known."""
        return get_temperature(self.calibration)

    def __post_init__(self) -> None:
        """Refuse labels and thresholds that do not fit the task."""
        fault = self.task.check_answers(self.labels, self.calibration)
        if fault:
            raise AdapterError(fault)

    def predict(
        self,
        texts: Sequence[Text],
        *,
        stride: int | None = None,
        calibrated: bool = False,
        coverage: float | None = None,
    ) -> list[Prediction]:
        """Answer texts, in their order.

        A text of which the tokenizer leaves no token, such as blanks, gets no label. Neither does a
        pair with such a text.

        Args:
            texts: A list of strings of any length. For a model of pairs, a list of tuples
                (text, text_pair).
            stride: Read a longer text whole, in windows that share this many tokens, and average
                their probabilities. None cuts a longer text as in training.
            calibrated: Divide logits by the temperature that was fitted in training.
            coverage: Give each text the set of labels that holds the right one with at least this
                probability, for new rows drawn as the calibration rows of the
                training were. It implies `calibrated`.

        Raises:
            DataError: If the texts are not a list of strings, or of pairs for a model of pairs.
            ModelError: If the stride is too large or the model reads pairs, there is no
                temperature, or the model has no label sets at this coverage.
            AdapterError: If the model's number of logits is not its number of labels.
        """
        predictions = []
        thresholds = None
        if coverage is not None:
            if stride is not None:
                raise ModelError(
                    "coverage: label sets were calibrated on texts that are cut as in training; "
                    "leave out stride or coverage"
                )
            thresholds = find_set_thresholds(self.calibration, coverage)
            calibrated = True
        pooled, are_empty = self._compute(texts, stride=stride, calibrated=calibrated)
        for scores, is_empty in zip(pooled, are_empty, strict=True):
            if is_empty:
                predictions.append(Prediction(error=EMPTY_TEXT))
                continue
            answer = self.task.make_answer(scores, self.labels, self.calibration)
            named = dict(zip(self.labels, scores.tolist(), strict=True))
            label_set = None
            if thresholds is not None:
                label_set = make_label_set(scores, thresholds, self.labels)
            predictions.append(Prediction(**answer, scores=named, label_set=label_set))
        return predictions

    def is_empty(self, text: Text) -> bool:
        """Return whether the tokenizer leaves no token of a text, which then gets no label."""
        texts = check_texts([text], reads_pairs=self.encoder.reads_pairs)
        ids = next(tokenise(self.encoder, texts, clean=self.clean))
        return self.encoder.is_empty(ids)

    def probabilities(
        self, texts: Sequence[Text], *, stride: int | None = None, calibrated: bool = False
    ) -> NDArray[np.float64]:
        """Compute the probability of each label.

        Texts are computed in order of length, so that there is little padding. A text without
        tokens is read as [CLS] [SEP].

        Args:
            texts: As in `predict`.
            stride: As in `predict`.
            calibrated: As in `predict`.

        Returns:
            Probabilities of shape (num_texts, num_labels), in the order of the texts.

        Raises:
            DataError: As `predict`.
            ModelError: As `predict`.
            AdapterError: As `predict`.
        """
        return self._compute(texts, stride=stride, calibrated=calibrated)[0]

    def _compute(
        self, texts: Sequence[Text], *, stride: int | None, calibrated: bool
    ) -> tuple[NDArray[np.float64], list[bool]]:
        """Compute as `probabilities`, and also return of each text whether it has no token."""
        if calibrated and self.temperature is None:
            raise ModelError("calibrated: this model was saved without a temperature; leave it out")
        if stride is not None and self.encoder.reads_pairs:
            raise ModelError(
                "stride: is for single texts, and this model reads pairs; leave it out"
            )
        room = self.encoder.room
        if stride is not None and (not isinstance(stride, int) or not 0 <= stride < room):
            raise ModelError(f"stride: found {stride}; allowed: 0 to {room - 1} tokens")
        temperature = self.temperature if calibrated and self.temperature else 1.0
        texts = check_texts(texts, reads_pairs=self.encoder.reads_pairs)
        pooled = np.zeros((len(texts), len(self.labels)))
        are_empty: list[bool] = []
        for start in range(0, len(texts), TOKENISE_ROWS):
            inputs: list[NDArray[np.int32]] = []
            owners: list[int] = []
            some = texts[start : start + TOKENISE_ROWS]
            for owner, ids in enumerate(tokenise(self.encoder, some, clean=self.clean)):
                are_empty.append(self.encoder.is_empty(ids))
                windows = [self.encoder.truncate(ids)]
                if stride is not None and isinstance(ids, list):
                    windows = [*self.encoder.windows(ids, stride=stride)]
                inputs += [self.encoder.frame(window) for window in windows]
                owners += [owner] * len(windows)
            logits = compute_logits(self.engine, self.encoder.pack(inputs))
            if logits.shape[1:] != (len(self.labels),):
                raise AdapterError(
                    f"the model answers {logits.shape[1:]} values a text for {len(self.labels)} "
                    f"labels: {show_names(self.labels)}"
                )
            scores = self.task.compute_scores(logits, temperature=temperature)
            num_windows = np.bincount(owners)[owners, None]
            np.add.at(pooled, start + np.array(owners), scores / num_windows)
        return pooled, are_empty


def tokenise(encoder: TextEncoder, texts: Iterable[Text], *, clean: bool) -> Iterator[TokenIds]:
    """Clean texts and yield the token ids of each, before they are cut.

    The texts are taken some at a time.

    Args:
        encoder: From a text to token ids.
        texts: The texts, or pairs of texts if the encoder reads pairs.
        clean: Whether to clean them, as in training.

    Raises:
        DataError: If a text holds half of a surrogate pair.
    """
    some: list[Text] = []
    size = 0
    for text in texts:
        if clean:
            text = clean_parts(text)
        for part in split_text(text):
            if re.search("[\ud800-\udfff]", part):
                raise DataError(
                    "texts: one holds half of a surrogate pair, which no tokenizer takes; decode "
                    "it as UTF-8"
                )
            size += len(part)
        some.append(text)
        if size >= TOKENISE_CHARACTERS:
            yield from encoder.tokenise(some)
            some, size = [], 0
    yield from encoder.tokenise(some)


def clean_parts(text: Text) -> Text:
    """Return a text cleaned, or a pair with both texts cleaned."""
    if isinstance(text, str):
        return clean_text(text, Counter())
    return clean_text(text[0], Counter()), clean_text(text[1], Counter())


def check_texts(texts: Sequence[Any], *, reads_pairs: bool) -> list[Text]:
    """Return texts as a list, pairs as tuples.

    Raises:
        DataError: If one is no string, or no pair of strings where pairs are read.
    """
    example = "('Is it good?', 'Yes.')" if reads_pairs else "'A lovely film.'"
    if isinstance(texts, str):
        raise DataError(f"texts: found one string; give a list, as in predict([{example}])")
    listed: list[Text] = []
    for place, text in enumerate(texts):
        if reads_pairs and _is_pair(text):
            listed.append((text[0], text[1]))
        elif isinstance(text, str) and not reads_pairs:
            listed.append(text)
        else:
            found = "pair of texts" if _is_pair(text) else type(text).__name__
            wanted = "pairs of texts: give tuples" if reads_pairs else "single texts: give strings"
            raise DataError(
                f"texts[{place}]: found a {found}; this model reads {wanted}, as in "
                f"predict([{example}])"
            )
    return listed


def _is_pair(text: Any) -> bool:
    if not isinstance(text, list | tuple) or len(text) != 2:
        return False
    return isinstance(text[0], str) and isinstance(text[1], str)


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
        path: An adapter folder, a merged or exported folder, an `.onnx` file in one, a stock
            transformers folder, or a stock PEFT folder.
        labels: Label names in order. A stock PEFT folder does not hold them, and those of a stock
            model may mean nothing.
        base: Place of an adapter's base, if it is not where the adapter says.
        max_length: Most tokens of a text. Only for stock folders, which do not hold it.
        dtype: Compute dtype: `auto`, `float32`, `bfloat16` or `float16`. An ONNX file has its own.

    Raises:
        AdapterError: If the folder has none of these forms, is incomplete or altered, or has
            another base.
        ModelError: If the base cannot be loaded, or an option does not fit the form.
    """
    if isinstance(labels, str):
        raise ModelError(f"labels: found the string {labels!r}; give a list of names, in order")
    if max_length is not None and (type(max_length) is not int or max_length < 8):
        raise ModelError(f"max_length: found {max_length!r}; allowed: 8 or more tokens")
    path = Path(path).resolve()
    if path.is_dir() and (path / "card.json").is_file():
        form = "an adapter of this package, which knows them"
        _refuse_options(path, form, labels=labels, max_length=max_length)
        return _load_adapter(path, base, dtype)
    if path.is_dir() and (path / "adapter_config.json").is_file():
        return _load_stock_peft(path, labels, base, max_length, dtype)
    if path.is_dir() and (path / WEIGHTS).is_file():
        _refuse_options(path, "a whole model, which has no base", base=base)
        return _load_whole(path, labels, max_length, dtype)
    graph = path if path.suffix == ".onnx" and path.is_file() else path / PLAIN
    if graph.is_file():
        asked = None if dtype == "auto" else dtype
        form = "an ONNX file, which holds them"
        _refuse_options(graph, form, labels=labels, base=base, dtype=asked)
        return _load_onnx(graph, max_length)
    if not path.is_dir():
        raise AdapterError(f"{path}: no such folder or .onnx file")
    raise AdapterError(
        f"{path}: holds no model; expected card.json (an adapter), adapter_config.json (a PEFT "
        f"folder), {WEIGHTS} (a merged model) or {PLAIN}"
    )


def _refuse_options(path: Path, form: str, **options: object) -> None:
    """Refuse options that a form does not take."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ModelError(f"{path} is {form}; leave out {' and '.join(given)}")


def _load_adapter(path: Path, base: str | None, dtype: str) -> Classifier:
    from lora_sentiment.adapter.folder import load as load_folder
    from lora_sentiment.models.inference import prepare_engine
    from lora_sentiment.training.processes import join_launch

    device = join_launch().device
    loaded = load_folder(path, base=base, device=device)
    card = loaded.card
    return _make_classifier(
        tuple(card.labels),
        loaded.make_encoder(),
        prepare_engine(loaded.model, dtype, device),
        task=card.task,
        clean=card.data.config.clean,
        calibration=card.calibration,
        weights=[card.sha256, dtype],
    )


def _load_whole(
    path: Path, labels: Sequence[str] | None, max_length: int | None, dtype: str
) -> Classifier:
    from lora_sentiment.adapter.weights import check_finite, check_whole_model
    from lora_sentiment.models.inference import prepare_engine
    from lora_sentiment.models.load import load_base
    from lora_sentiment.recipe.model import ModelConfig
    from lora_sentiment.training.processes import join_launch

    record = read_merge_record(path)
    if record:
        form = "a merged model, which knows them"
        _refuse_options(path, form, labels=labels, max_length=max_length)
        check_merge_record(path, record, weights=WEIGHTS)
    task = read_task(path)
    check_whole_model(path)
    names = tuple(labels) if labels else read_labels(path)
    length = record.max_length if record else max_length or _find_max_length(path)
    config = ModelConfig(name=str(path), max_length=length, dtype="float32")
    with ExplainLibraryError(path):
        base = load_base(config, labels=names, problem_type=task.head_type)
    check_finite(path / WEIGHTS, dict(base.model.named_parameters()))
    if record:
        encoder = _make_recorded_encoder(path, record)
    else:
        encoder = TextEncoder.of(base.tokenizer, max_length=length, truncation="head")
    return _make_classifier(
        names,
        encoder,
        prepare_engine(base.model, dtype, join_launch().device),
        task=task,
        **_get_recorded(record),
        weights=[
            record.files[WEIGHTS] if record else hash_file(path / WEIGHTS),
            record.config_sha256 if record else hash_file(path / "config.json"),
            dtype,
        ],
    )


def _load_onnx(path: Path, max_length: int | None) -> Classifier:
    folder = path.parent.parent if path.parent.name == "onnx" else path.parent
    name = path.relative_to(folder).as_posix()
    find_file(folder, name)
    record = read_merge_record(folder)
    if record:
        _refuse_options(path, "a file that knows it", max_length=max_length)
        check_merge_record(folder, record, weights=name)
    if record:
        encoder = _make_recorded_encoder(folder, record)
    else:
        longest = _find_max_length(folder)
        if max_length and max_length > longest:
            raise ModelError(
                f"max_length: found {max_length}; {path} reads at most {longest} tokens"
            )
        tokenizer, special = _read_tokenizer(folder)
        encoder = TextEncoder(
            tokenizer, *special, max_length=max_length or longest, truncation="head"
        )
    return _make_classifier(
        read_labels(folder),
        encoder,
        open_session(path),
        task=read_task(folder),
        **_get_recorded(record),
        weights=[
            record.files[name] if record else hash_file(path),
            record.config_sha256 if record else hash_file(folder / "config.json"),
        ],
    )


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
    if not name:
        raise ModelError(f"{path}: its {PEFT_CONFIG} names no base; give it with base=, --base")
    if base and Path(base, "config.json").is_file():
        record = read_merge_record(Path(base))
        if record:
            raise AdapterError(
                f"{base}: is not a base: it already holds the adapter "
                f"{record.adapter_sha256[:12]}, merged into {record.base!r}"
            )
    revision = None if base else recorded.revision
    config = ModelConfig(name=name, revision=revision, max_length=max_length or 8, dtype="float32")
    if is_hub_name(config.place):
        prepare_hub()
    loaded = load_base(config, labels=tuple(labels))
    task = find_task_of(loaded.problem_type)
    if task is None:
        raise AdapterError(
            f"{path}: problem_type of its base {name!r} is {loaded.problem_type}, which this package "
            "does not know; run this one with PEFT"
        )
    max_length = max_length or num_positions(loaded.config)
    files = [path / PEFT_WEIGHTS, path / PEFT_CONFIG]
    model = rebuild_stock(path, loaded, recorded)
    return _make_classifier(
        tuple(labels),
        TextEncoder.of(loaded.tokenizer, max_length=max_length, truncation="head"),
        prepare_engine(model, dtype, join_launch().device),
        task=task,
        weights=[loaded.sha256, *map(hash_file, files), dtype],
        unverified=(
            f"that {name!r} is the base it was trained on: the folder records no hash of it",
            f"that {show_names(labels)} are its labels, in this order",
            "how texts were cleaned and cut for training, and in which precision the base was",
        ),
    )


def _get_recorded(record: MergeRecord | None) -> dict[str, Any]:
    """Return the arguments of `_make_classifier` that the record of a whole model holds."""
    if record is None:
        return {"unverified": ("its weights: no record of this package holds their hashes",)}
    return {"clean": record.clean, "calibration": record.calibration}


def _make_classifier(
    labels: tuple[str, ...],
    encoder: TextEncoder,
    engine: Engine,
    *,
    weights: list[str],
    task: Task,
    clean: bool = False,
    calibration: Calibration | None = None,
    unverified: tuple[str, ...] = (),
) -> Classifier:
    """Return a classifier. Its hash covers `weights` and everything else that decides an answer."""
    decisive = [
        *weights,
        encoder.tokenizer.to_str(),
        encoder.max_length,
        encoder.truncation,
        clean,
        (calibration or {}).get("temperature"),
        *labels,
        *task.get_decisive(calibration),
        *([asdict(encoder.template)] if encoder.template else []),
    ]
    sha256 = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()
    return Classifier(labels, encoder, engine, clean, calibration, sha256, unverified, task)


def _find_max_length(folder: Path) -> int:
    """Return the longest input of a whole model, from its positions and its tokenizer."""
    config = {"max_position_embeddings": 512, "pad_token_id": 0} | read_object(
        folder / "config.json"
    )
    positions = config["max_position_embeddings"]
    family = FAMILIES.get(str(config.get("model_type")))
    if family and isinstance(positions, int) and isinstance(config["pad_token_id"], int):
        positions = family.num_positions(config)
    longest = read_object(folder / "tokenizer_config.json").get("model_max_length")
    lengths = []
    for value in (positions, longest):
        # A tokenizer without a limit has a huge number there.
        if isinstance(value, int | float) and 8 <= value < math.inf:
            lengths.append(int(value))
    if not lengths:
        raise AdapterError(
            f"{folder / 'config.json'}: max_position_embeddings is {positions!r}; allowed: 8 or "
            "more"
        )
    return min(lengths)


def _make_recorded_encoder(folder: Path, record: MergeRecord) -> TextEncoder:
    """Return how a merged or exported model reads texts: as in training."""
    tokenizer, special = _read_tokenizer(folder)
    if record.cleaning_steps:
        with ExplainLibraryError(folder / "tokenizer.json"):
            remove_cleaning(tokenizer, record.cleaning_steps)
    has_types = FAMILIES[record.model_type].token_types
    template = read_template(tokenizer, has_types=has_types) if record.reads_pairs else None
    return TextEncoder(
        tokenizer,
        *special,
        max_length=record.max_length,
        truncation=record.truncation,
        template=template,
    )


def _read_tokenizer(folder: Path) -> tuple[Tokenizer, tuple[int, int, int]]:
    """Read a tokenizer and its special tokens' ids, without transformers and so without torch."""
    path = folder / "tokenizer.json"
    text = read_bytes(path, limit=MAX_TOKENIZER_BYTES)
    with ExplainLibraryError(path):
        tokenizer = Tokenizer.from_str(text.decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    path = folder / "tokenizer_config.json"
    values = read_object(path)
    special = []
    for role in ("cls_token", "sep_token", "pad_token"):
        token = values.get(role)
        text_of_token = token.get("content") if isinstance(token, dict) else token
        number = tokenizer.token_to_id(str(text_of_token))
        if number is None:
            raise AdapterError(f"{path}: {role} is {token!r}, which the tokenizer does not have")
        special.append(number)
    return tokenizer, (special[0], special[1], special[2])
