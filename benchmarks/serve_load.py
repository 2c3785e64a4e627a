"""A server at saturation, with adapters coming and going: makes benchmarks/serve_load.md.

    python benchmarks/serve_load.py [--minutes 10]

A server of random adapters, mixed with some that come, go and change in the watched folder, is asked over loopback by
clients of this process, each with its next request as soon as it has an answer. Every answer is held against what its
adapter answers alone. Then clients many times as many ask at once: the queue must refuse them with 429, and nothing
may hang. The server's memory is read once a second.
"""

import argparse
import asyncio
import json
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from lora_sentiment import bundled
from lora_sentiment.classifier import load
from lora_sentiment.recipe.method import LoraMethod

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests.random_adapters import name_labels, save_random  # noqa: E402

NUM_TEXTS = 64
TOLERANCE = 1e-5
PATIENCE = 60.0
"""Seconds after which a request counts as hanging."""

Expected = dict[str, list[list[dict[str, float]]]]
"""Name of an adapter to its variants, each with the probabilities of every text by label."""


@dataclass
class Seen:
    """What the clients saw."""

    statuses: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    texts: int = 0
    wrong: int = 0
    largest: float = 0.0
    hung: int = 0


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="time at saturation")
    parser.add_argument("--base", default=bundled.NAME, help="folder of a base, or `bundled`")
    parser.add_argument("--adapters", type=int, default=16, help="adapters that stay")
    parser.add_argument("--moving", type=int, default=4, help="adapters that come, go and change")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks", help="folder of serve_load.md and .json"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        facts = asyncio.run(measure(Path(place), arguments))
    (arguments.out / "serve_load.json").write_text(
        json.dumps(facts, indent=2) + "\n", encoding="utf-8"
    )
    (arguments.out / "serve_load.md").write_text(render(facts), encoding="utf-8")
    print(render(facts))


async def measure(place: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Start the server, ask it, overload it, stop it."""
    staying, variants = make_adapters(place, arguments)
    texts = [
        json.loads(line)["text"]
        for line in (bundled.REVIEWS / "train.jsonl").open(encoding="utf-8")
    ][:NUM_TEXTS]
    folders = {folder.name: [folder] for folder in staying} | variants
    expected = {
        name: [answer_alone(folder, texts) for folder in found] for name, found in folders.items()
    }
    watched = place / "watched"
    watched.mkdir()
    command = [sys.executable, "-m", "lora_sentiment.cli", "serve", *map(str, staying)]
    command += ["--watch", str(watched), "--port", "0", "--dtype", "float32", "--no-access-log"]
    log = place / "server.log"
    with log.open("w", encoding="utf-8") as file:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True)
    assert server.stdout is not None
    address = ""
    while not (found := re.search(r"http://\S+:\d+", address)):
        address = server.stdout.readline()
    url = found.group()
    memory: list[int] = []
    tasks = [asyncio.create_task(watch_memory(server.pid, memory))]
    tasks.append(asyncio.create_task(move(variants, watched)))
    await ask(url, expected, texts, seconds=10, clients=arguments.clients)  # warm
    start = len(memory)
    seen = await ask(
        url, expected, texts, seconds=60 * arguments.minutes, clients=arguments.clients
    )
    saturated, loads = memory[start:], log.read_text(encoding="utf-8").count(": served from ")
    flood = await ask(url, expected, texts, seconds=20, clients=100, texts_per_request=64)
    after = await ask(url, expected, texts, seconds=5, clients=arguments.clients)
    for task in tasks:
        task.cancel()
    server.terminate()
    code = server.wait(120)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, server and clients share its cores",
        "minutes": arguments.minutes,
        "base": Path(arguments.base).name,
        "adapters": arguments.adapters,
        "moving": arguments.moving,
        "clients": arguments.clients,
        "saturation": summarise(seen, 60 * arguments.minutes),
        "overload": summarise(flood, 20),
        "after": summarise(after, 5),
        # Medians of ten parts of the time, so that one reading decides nothing.
        "rss_mb": [
            round(float(np.median(part)) / 1e6, 1) for part in np.array_split(saturated, 10)
        ],
        "loads": loads,
        "exit_code": code,
    }


def make_adapters(
    place: Path, arguments: argparse.Namespace
) -> tuple[list[Path], dict[str, list[Path]]]:
    """Return adapters that stay, and for each moving name two that take turns."""

    def make(folder: Path, seed: int) -> Path:
        method = LoraMethod(r=(4, 8, 12, 16)[seed % 4])
        save_random(
            folder,
            arguments.base,
            method,
            labels=name_labels(2 + seed % 19),
            seed=seed,
            max_length=128,
        )
        return folder

    staying = [make(place / f"stay-{i}", i) for i in range(arguments.adapters)]
    moving = {
        f"move-{i}": [make(place / f"variant-{v}" / f"move-{i}", 100 + 2 * i + v) for v in range(2)]
        for i in range(arguments.moving)
    }
    return staying, moving


def answer_alone(folder: Path, texts: list[str]) -> list[dict[str, float]]:
    """Return the probabilities of each text by label, from the adapter on its own."""
    return [found.scores for found in load(folder, dtype="float32").predict(texts)]


async def move(variants: dict[str, list[Path]], watched: Path) -> None:
    """Let one adapter after another come, change, or go."""
    chance = random.Random(0)
    while True:
        name = chance.choice(list(variants))
        place = watched / name
        if place.exists():
            shutil.rmtree(place)
        if chance.random() < 0.7:
            aside = watched / f"{name}.tmp"
            source = chance.choice(variants[name])
            # Where the server looks for finished folders a card appears last, by one rename.
            shutil.copytree(source, aside, ignore=shutil.ignore_patterns("card.json"))
            aside.rename(place)
            shutil.copy(source / "card.json", place / "card.json.tmp")
            (place / "card.json.tmp").rename(place / "card.json")
        await asyncio.sleep(2)


async def watch_memory(pid: int, found: list[int]) -> None:
    """Read the server's resident bytes once a second."""
    while True:
        status = Path(f"/proc/{pid}/status").read_text()
        found.append(1024 * int(re.search(r"VmRSS:\s+(\d+)", status).group(1)))  # type: ignore[union-attr]
        await asyncio.sleep(1)


async def ask(
    url: str,
    expected: Expected,
    texts: list[str],
    *,
    seconds: float,
    clients: int,
    texts_per_request: int | None = None,
) -> Seen:
    """Ask with many clients for some seconds."""
    seen, until = Seen(), time.monotonic() + seconds
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits) as client:
        await asyncio.gather(
            *(
                one_client(
                    client, expected, texts, seen, until=until, seed=i, num_texts=texts_per_request
                )
                for i in range(clients)
            )
        )
    return seen


async def one_client(
    client: httpx.AsyncClient,
    expected: Expected,
    texts: list[str],
    seen: Seen,
    *,
    until: float,
    seed: int,
    num_texts: int | None,
) -> None:
    """Ask for another adapter and other texts again and again, and hold the answers against what is expected."""
    chance = random.Random(seed)
    while time.monotonic() < until:
        name = chance.choice(list(expected))
        index = [chance.randrange(len(texts)) for _ in range(num_texts or chance.randint(1, 8))]
        began = time.monotonic()
        try:
            answer = await client.post(
                "/predict", json={"texts": [texts[i] for i in index], "adapter": name, "top_k": 100}
            )
        except httpx.TimeoutException:
            seen.hung += 1
            continue
        seen.statuses[answer.status_code] += 1
        if answer.status_code == 429:
            # Not as long as it says: the test is what happens to those who do not wait.
            await asyncio.sleep(0.1)
        elif answer.status_code == 200:
            seen.seconds.append(time.monotonic() - began)
            seen.texts += len(index)
            difference = hold_against(answer.json()["predictions"], expected[name], index)
            seen.largest = max(seen.largest, difference)
            seen.wrong += difference > TOLERANCE
        elif not (answer.status_code == 404 and name.startswith("move")):
            print(answer.status_code, answer.text[:300], flush=True)


def hold_against(
    predictions: list[dict[str, Any]], variants: list[list[dict[str, float]]], index: list[int]
) -> float:
    """Return the largest difference of a probability from the variant that is nearest: one request is of one."""
    differences = []
    for variant in variants:
        worst = 0.0
        for found, i in zip(predictions, index, strict=True):
            scores = {entry["label"]: entry["score"] for entry in found["top_k"]}
            if scores.keys() != variant[i].keys():
                worst = 1.0
                break
            worst = max(worst, *(abs(scores[label] - score) for label, score in variant[i].items()))
        differences.append(worst)
    return min(differences)


def summarise(seen: Seen, seconds: float) -> dict[str, Any]:
    """Return the figures."""
    p50, p99 = np.percentile(seen.seconds, [50, 99]) * 1000 if seen.seconds else (0.0, 0.0)
    return {
        "statuses": {str(status): count for status, count in sorted(seen.statuses.items())},
        "texts_per_second": round(seen.texts / seconds, 1),
        "p50_ms": round(float(p50), 1),
        "p99_ms": round(float(p99), 1),
        "wrong": seen.wrong,
        "largest_difference": seen.largest,
        "hung": seen.hung,
    }


def render(facts: dict[str, Any]) -> str:
    """Return the page."""
    memory = facts["rss_mb"]
    page = [
        "# A server at saturation",
        "",
        f"`python benchmarks/serve_load.py --minutes {facts['minutes']:g}`: base `{facts['base']}`, "
        f"{facts['adapters']} adapters that stay and {facts['moving']} that come, go and change every two seconds. "
        f"First {facts['clients']} clients ask for 1 to 8 short reviews a request, then 100 clients for 64 reviews "
        f"each, then {facts['clients']} again. {facts['machine']}, {facts['date']}. A wrong answer is one whose "
        f"probability differs from that of the adapter alone by more than {TOLERANCE:g}; hung is one without an "
        f"answer after {PATIENCE:g} s. 404: the adapter was away just then.",
        "",
        "| | answers by status | texts/s | p50 ms | p99 ms | wrong | largest difference | hung |",
        "|---|---|---|---|---|---|---|---|",
    ]
    names = {
        "saturation": f"saturation, {facts['minutes']:g} min",
        "overload": "overload, 20 s",
        "after": "afterwards, 5 s",
    }
    for key, name in names.items():
        own = facts[key]
        statuses = ", ".join(f"{count:,} x {status}" for status, count in own["statuses"].items())
        page.append(
            f"| {name} | {statuses} | {own['texts_per_second']:,} | {own['p50_ms']:,} | {own['p99_ms']:,} "
            f"| {own['wrong']} | {own['largest_difference']:.1e} | {own['hung']} |"
        )
    page += [
        "",
        "Memory of the server at saturation, MB in each tenth of the time: "
        f"{', '.join(f'{mb:,.0f}' for mb in memory)}. The last is {memory[-1] / memory[0] - 1:+.1%} above the first; "
        f"{facts['loads']} adapters were loaded meanwhile. "
        f"Exit code after SIGTERM: {facts['exit_code']}.",
    ]
    return "\n".join(page) + "\n"


if __name__ == "__main__":
    main()
