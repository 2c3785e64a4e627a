"""Make the small base that ships: distil a DistilBERT into fewer layers and a smaller vocabulary.

The student is the teacher with its most used word pieces and some of its layers, trained until each of these gives what
the teacher gives at the same depth (Sanh et al. 2019, "DistilBERT": start from the teacher's layers, match its states).
Texts only, no labels. Stopped at any time, it goes on from its last checkpoint.

    python scripts/distil_base.py TEACHER DATA OUT

TEACHER is a DistilBERT folder; DATA holds `imdb/{train,unsupervised}.parquet` and `sst2/train.parquet`. No test row is
read.
"""

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.nn import functional
from tqdm import tqdm
from transformers import DistilBertConfig, DistilBertModel

from lora_sentiment.cleaning import clean_text
from lora_sentiment.data.tables import read_table
from lora_sentiment.files import write_json

SOURCES = {
    "imdb/unsupervised.parquet": "text",
    "imdb/train.parquet": "text",
    "sst2/train.parquet": "sentence",
}
LAYERS = (0, 2, 4, 5)
"""Layers of the teacher that the student starts from; each learns to give what the teacher gives after it."""
VOCABULARY = 12_288
SHORT, LONG = 128, 256
"""Tokens of a window: three texts in four are cut short, which costs less; the rest teach the later positions."""
TOKENS_PER_BATCH = 2_048
HELD_OUT = 16
"""Batches that are never trained on: the error on them is what the record states."""
LAST_WEIGHT = 3.0
"""The last layer's states are what a head reads; they count more than those on the way."""


@dataclass(frozen=True)
class Corpus:
    """Windows of word pieces, one after another.

    Attributes:
        input_ids: (num_tokens,), special tokens included.
        offsets: (num_windows + 1,), window i is `input_ids[offsets[i]:offsets[i + 1]]`.
    """

    input_ids: np.ndarray
    offsets: np.ndarray


def read_texts(data: Path) -> Iterator[str]:
    """Yield the cleaned texts of every source in order."""
    for name, column in SOURCES.items():
        for batch in read_table(data / name):
            for text in batch[column]:
                yield clean_text(text, Counter())


def choose_pieces(tokenizer: Tokenizer, data: Path) -> list[int]:
    """Return the teacher's ids of the word pieces that stay: specials, single characters, then the most used."""
    names = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    counts = np.zeros(len(names), dtype=np.int64)
    for ids in _ids_of(tokenizer, data, "counting pieces"):
        np.add.at(counts, ids, 1)
    special = set(tokenizer.get_added_tokens_decoder())
    # A word whose pieces went is spelt with smaller ones, so every single character that was ever seen has to stay.
    letters = {
        i
        for i, name in enumerate(names)
        if len(name.removeprefix("##")) == 1 and (counts[i] or name.isascii())
    }
    rest = [int(i) for i in np.argsort(-counts, kind="stable") if i not in special | letters]
    kept = sorted([*special, *letters, *rest[: VOCABULARY - len(special | letters)]])
    share = 1 - counts[kept].sum() / counts.sum()
    print(
        f"{len(kept)} of {len(names)} word pieces stay; {share:.2%} of the texts' pieces are spelt with smaller ones"
    )
    return kept


def _ids_of(tokenizer: Tokenizer, data: Path, what: str) -> Iterator[np.ndarray]:
    texts: list[str] = []
    for text in tqdm(read_texts(data), desc=what, unit=" texts"):
        texts.append(text)
        if len(texts) == 1000:
            yield from (
                np.array(found.ids)
                for found in tokenizer.encode_batch(texts, add_special_tokens=False)
            )
            texts = []
    yield from (
        np.array(found.ids) for found in tokenizer.encode_batch(texts, add_special_tokens=False)
    )


def cut_tokenizer(teacher: Path, names: list[str], kept: list[int]) -> Tokenizer:
    """Return the teacher's tokenizer with only the pieces `kept` of its `names`, numbered in order."""
    found = json.loads((teacher / "tokenizer.json").read_text(encoding="utf-8"))
    numbers = {names[old]: new for new, old in enumerate(kept)}
    found["model"]["vocab"] = numbers
    for token in found["added_tokens"]:
        token["id"] = numbers[token["content"]]
    for name, token in found["post_processor"]["special_tokens"].items():
        token["ids"] = [numbers[name]]
    found["truncation"] = found["padding"] = None
    return Tokenizer.from_str(json.dumps(found))


def make_corpus(tokenizer: Tokenizer, data: Path) -> Corpus:
    """Cut every text into windows of its length class, each framed by [CLS] and [SEP]."""
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    parts: list[np.ndarray] = []
    for number, ids in enumerate(_ids_of(tokenizer, data, "cutting windows")):
        room = (LONG if number % 4 == 0 else SHORT) - 2
        parts += [
            np.array([cls, *ids[i : i + room], sep], dtype=np.uint16)
            for i in range(0, len(ids), room)
        ]
    return Corpus(np.concatenate(parts), np.cumsum([0, *map(len, parts)]))


def prepare(options: argparse.Namespace) -> tuple[Tokenizer, list[int], Corpus]:
    """Return the cut tokenizer, its pieces' ids in the teacher, and the corpus; made once and kept in OUT."""
    path, names = options.out / "corpus.safetensors", ("input_ids", "offsets")
    whole = Tokenizer.from_file(str(options.teacher / "tokenizer.json"))
    whole.no_truncation()
    if path.exists():
        found = load_numpy(path)
        kept, corpus = found["kept"].tolist(), Corpus(*(found[name] for name in names))
    else:
        kept, corpus = choose_pieces(whole, options.data), None
    numbers = whole.get_vocab()
    tokenizer = cut_tokenizer(options.teacher, sorted(numbers, key=numbers.__getitem__), kept)
    if corpus is None:
        corpus = make_corpus(tokenizer, options.data)
        save_numpy(
            {"kept": np.array(kept), **{name: getattr(corpus, name) for name in names}}, path
        )
    return tokenizer, kept, corpus


def plan_batches(corpus: Corpus, *, seed: int) -> list[np.ndarray]:
    """Return window numbers batch by batch, in random order: like lengths together, `TOKENS_PER_BATCH` in each."""
    generator = np.random.default_rng(seed)
    lengths = np.diff(corpus.offsets)
    order = generator.permutation(len(lengths))
    order = order[np.argsort(lengths[order], kind="stable")]
    batches, start = [], 0
    while start < len(order):
        rows = max(1, TOKENS_PER_BATCH // int(lengths[order[start]]))
        batches.append(order[start : start + rows])
        start += rows
    return [batches[i] for i in generator.permutation(len(batches))]


def make_models(teacher: Path, kept: list[int]) -> tuple[DistilBertModel, DistilBertModel]:
    """Return (teacher, student), both in fp32 on the cut vocabulary, dropout off."""
    whole = (
        DistilBertModel.from_pretrained(teacher, dtype=torch.float32).eval().requires_grad_(False)
    )
    rows = whole.embeddings.word_embeddings.weight[kept].clone()
    whole.embeddings.word_embeddings = torch.nn.Embedding.from_pretrained(rows, freeze=True)
    values = {
        **whole.config.to_dict(),
        "n_layers": len(LAYERS),
        "vocab_size": len(kept),
        "pad_token_id": 0,
    }
    student = DistilBertModel(DistilBertConfig(**values)).eval()
    student.embeddings.load_state_dict(whole.embeddings.state_dict())
    for place, layer in enumerate(LAYERS):
        student.transformer.layer[place].load_state_dict(
            whole.transformer.layer[layer].state_dict()
        )
    return whole, student


def match(
    teacher: DistilBertModel, student: DistilBertModel, corpus: Corpus, batch: np.ndarray
) -> torch.Tensor:
    """Return (num_layers,): ||student - teacher||^2 / ||teacher||^2 over the batch's tokens, layer by layer."""
    parts = [
        torch.from_numpy(
            corpus.input_ids[corpus.offsets[i] : corpus.offsets[i + 1]].astype(np.int64)
        )
        for i in batch
    ]
    ids = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence(
        [torch.ones_like(part) for part in parts], batch_first=True
    )
    # Without padding no mask is given: attention then takes its quicker path.
    given = {
        "input_ids": ids,
        "attention_mask": None if mask.all() else mask,
        "output_hidden_states": True,
    }
    with torch.no_grad():
        wanted = teacher(**given).hidden_states
    found = student(**given).hidden_states
    real = mask.bool()
    pairs = [
        (found[place + 1][real], wanted[layer + 1][real]) for place, layer in enumerate(LAYERS)
    ]
    return torch.stack(
        [functional.mse_loss(ours, theirs) / theirs.square().mean() for ours, theirs in pairs]
    )


def distil(
    teacher: DistilBertModel, student: DistilBertModel, corpus: Corpus, options: argparse.Namespace
) -> None:
    """Train the student in place, from the last checkpoint where there is one."""
    batches = plan_batches(corpus, seed=options.seed)
    held_out, batches = batches[:HELD_OUT], batches[HELD_OUT:][: options.steps]
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=options.learning_rate, weight_decay=0.01, fused=True
    )
    warmup = 0.05 * options.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, (options.steps - step) / (options.steps - warmup)),
    )
    weights = torch.tensor([1.0] * (len(LAYERS) - 1) + [LAST_WEIGHT])
    start = _resume(options.out, student, optimizer, schedule)
    log = options.out / "log.jsonl"
    bar = tqdm(range(start, options.steps), initial=start, total=options.steps, desc="distilling")
    for step in bar:
        if step % options.save_steps == 0:
            _judge(teacher, student, corpus, held_out, step, log)
            _save(options.out, student, optimizer, step)
        errors = match(teacher, student, corpus, batches[step])
        (errors * weights).sum().backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(last=f"{errors[-1].item():.4f}")
    _judge(teacher, student, corpus, held_out, options.steps, log)


@torch.no_grad()
def _judge(
    teacher: DistilBertModel,
    student: DistilBertModel,
    corpus: Corpus,
    batches: list[np.ndarray],
    step: int,
    log: Path,
) -> None:
    errors = torch.stack([match(teacher, student, corpus, batch) for batch in batches]).mean(dim=0)
    line = {"step": step, "error": [round(value, 5) for value in errors.tolist()]}
    print(json.dumps(line))
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _save(
    out: Path,
    student: DistilBertModel,
    optimizer: torch.optim.Optimizer,
    step: int,
) -> None:
    state = optimizer.state_dict()["state"]
    tensors = {f"model.{name}": tensor for name, tensor in student.state_dict().items()}
    tensors |= {f"{key}.{i}": value for i, values in state.items() for key, value in values.items()}
    aside = out / "state.aside"
    save_file(tensors, aside, metadata={"step": str(step)})
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    aside.replace(out / "state.safetensors")


def _resume(
    out: Path,
    student: DistilBertModel,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
) -> int:
    path = out / "state.safetensors"
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
    tensors = load_file(path)
    student.load_state_dict(
        {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    )
    if step:
        names = ("step", "exp_avg", "exp_avg_sq")
        found = {
            i: {key: tensors[f"{key}.{i}"] for key in names}
            for i in range(len(list(student.parameters())))
        }
        optimizer.load_state_dict(
            {"state": found, "param_groups": optimizer.state_dict()["param_groups"]}
        )
    for _ in range(step):
        schedule.step()
    return step


def save_base(student: DistilBertModel, tokenizer: Tokenizer, out: Path) -> None:
    """Write a plain folder in fp16 that `from_pretrained` reads."""
    student.half().save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    names = {f"{role}_token": f"[{role.upper()}]" for role in ("cls", "sep", "pad", "unk", "mask")}
    settings = {
        "tokenizer_class": "DistilBertTokenizer",
        "do_lower_case": True,
        "model_max_length": 512,
    }
    write_json(out / "tokenizer_config.json", {**settings, **names})


def main() -> None:
    """Make the base, or go on making it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-steps", type=int, default=200)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    tokenizer, kept, corpus = prepare(options)
    print(f"{len(corpus.offsets) - 1:,} windows, {len(corpus.input_ids):,} tokens")
    teacher, student = make_models(options.teacher, kept)
    distil(teacher, student, corpus, options)
    save_base(student, tokenizer, options.out / "base")


if __name__ == "__main__":
    main()
