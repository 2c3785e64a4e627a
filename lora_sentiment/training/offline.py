"""`offline: bundled`: the package's own base and reviews, where the Hub cannot be reached."""

import json
import logging

from huggingface_hub import try_to_load_from_cache

from lora_sentiment import bundled
from lora_sentiment.data.sources import find_source, is_on_hub
from lora_sentiment.errors import DataError
from lora_sentiment.hub import Answer, ask_hub, is_hub_name, use_cache_only
from lora_sentiment.recipe.data import DataConfig
from lora_sentiment.recipe.model import ModelConfig
from lora_sentiment.recipe.recipe import Recipe
from lora_sentiment.training.processes import run_on_main

log = logging.getLogger("lora_sentiment")
_KEPT = {"source", "clean", "split_seed", "task"}
"""Keys of `data` that mean the same for any rows. The source is replaced."""


def resolve_offline(recipe: Recipe) -> tuple[Recipe, str | None]:
    """Return the recipe that can run here, and a sentence if it is not the recipe that was given.

    Only a recipe that names something on the Hub is affected. The main process asks the Hub once,
    and all processes act on its answer. Any answer keeps the recipe as it is, because a refusal or
    a misspelt name is not the network's fault. Without an answer this process uses the cache alone.
    If something is not in the cache, if data and base both come from the Hub, and if the recipe
    says `offline: bundled`, the parts that ship with the package replace both, and the run writes
    to `<output.dir>-offline`.

    Raises:
        DataError: If the Hub does not answer, something is not in the cache, and nothing may be
            replaced.
    """
    names = _list_hub_names(recipe)
    if not names:
        return recipe, None
    answer, missing = run_on_main(lambda: _look(recipe, names))
    if answer.status is not None:
        return recipe, None
    use_cache_only(answer)
    if not missing:
        log.warning("no Hub answers (%s): the cache is used", answer.text)
        return recipe, None
    asked = ", ".join(f"{key} {names[key]!r}" for key in missing)
    if answer.mistaken:
        raise DataError(
            f"the Hub cannot be asked: {answer.text}; correct HF_ENDPOINT, the proxy (HTTPS_PROXY: "
            f"its address or login) or SSL_CERT_FILE; not in the cache: {asked}"
        )
    # An adapter that the training goes on from belongs to its own base.
    may_replace = len(names) == 2 and recipe.model.adapter is None
    if recipe.offline == "error" or not may_replace:
        hint = ""
        if may_replace:
            hint = ", or set offline=bundled to run with the base and reviews of the package"
        raise DataError(
            f"no Hub answers ({answer.text}) and not in the cache: {asked}; connect or set "
            f"HF_ENDPOINT to a mirror, or name files and a folder instead{hint}; "
            "model.name=bundled is the base of the package"
        )
    sentence = _describe_replacement(recipe, names, answer.text)
    log.warning("%s", sentence)
    return _replace(recipe), sentence


def _list_hub_names(recipe: Recipe) -> dict[str, str]:
    """Return the names on the Hub that a recipe holds, by key."""
    names = {}
    if is_on_hub(recipe.data.source):
        names["data.source"] = str(recipe.data.source)
    if is_hub_name(recipe.model.place):
        names["model.name"] = recipe.model.place
    return names


def _look(recipe: Recipe, names: dict[str, str]) -> tuple[Answer, list[str]]:
    """Return the Hub's answer; without one, also the keys of the names that are not cached."""
    answer = ask_hub()
    if answer.status is not None:
        return answer, []
    use_cache_only(answer)
    missing = []
    if "data.source" in names and not _is_data_cached(recipe.data):
        missing.append("data.source")
    if "model.name" in names and not _is_base_cached(recipe.model):
        missing.append("model.name")
    return answer, missing


def _is_data_cached(config: DataConfig) -> bool:
    try:
        find_source(config)
    except DataError as error:
        # The client's own error is the cause. A mistake in the recipe has no cause, and is reported
        # later.
        return error.__cause__ is None
    return True


def _is_base_cached(config: ModelConfig) -> bool:
    def is_cached(file: str) -> bool:
        path = try_to_load_from_cache(config.name, file, revision=config.revision)
        return isinstance(path, str)

    if not is_cached("config.json") or not is_cached("model.safetensors"):
        return False
    return any(map(is_cached, ("tokenizer.json", "vocab.txt", "vocab.json")))


def _describe_replacement(recipe: Recipe, names: dict[str, str], reason: str) -> str:
    """Say what was asked for and what replaced it, in one sentence."""
    asked = [f"{key} {name}" for key, name in names.items()]
    dropped = recipe.data.model_dump(mode="json", exclude=_KEPT, exclude_defaults=True)
    for key, value in dropped.items():
        text = value if isinstance(value, str) else json.dumps(value)
        asked.append(f"data.{key} {text}")
    return (
        f"NOT what the recipe asks for ({', '.join(asked)}): no Hub answered ({reason}), so the "
        "small base and the short reviews of the package replaced them; no figure here is of the "
        "data that the recipe names, and a few hundred reviews teach little: adapters/imdb_small "
        "is an adapter that works"
    )


def _replace(recipe: Recipe) -> Recipe:
    """Return the recipe with the bundled base and reviews, and an output folder of its own."""
    kept = recipe.data.model_dump(include=_KEPT)
    data = DataConfig(**{**kept, **bundled.STAND_INS[recipe.data.task]})
    model = recipe.model.model_copy(update={"name": bundled.NAME, "revision": None})
    output = recipe.output.model_copy(update={"dir": f"{recipe.folder}-offline"})
    update = {"name": f"{recipe.name}-offline", "data": data, "model": model, "output": output}
    return recipe.model_copy(update=update)
