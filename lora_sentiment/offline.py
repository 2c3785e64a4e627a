"""Where no Hub answers: what is in the cache, else, if the recipe says so, the parts that ship with the package."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers.utils.hub import cached_file

from lora_sentiment import bundled
from lora_sentiment.data.config import DataConfig
from lora_sentiment.data.sources import find_source, looks_like_files
from lora_sentiment.errors import DataError, LoraSentimentError
from lora_sentiment.hub import Answer, ask_hub, rely_on_cache
from lora_sentiment.recipe import Recipe

log = logging.getLogger("lora_sentiment")


def settle(recipe: Recipe, state: PartialState) -> tuple[Recipe, bundled.StandIn | None]:
    """Return the recipe that can be run here, and what was replaced in it, if anything.

    The Hub is asked once, by the main process, and only for a recipe that names something on it. Any answer means that
    the recipe stays as it is: a refusal or a misspelt name is not the network's fault.

    Raises:
        DataError: If the Hub does not answer, something is not in the cache, and the recipe does not say
            `offline: bundled`, or names rows or a base of one's own.
    """
    wanted = _on_hub(recipe)
    if not wanted:
        return recipe, None
    found: list[Any] = [(_look(recipe, wanted) if state.is_main_process else None)]
    answer, missing = broadcast_object_list(found)[0]
    if answer.mistaken:
        raise DataError(f"the Hub cannot be asked: {answer.text}; mend HF_ENDPOINT or the proxy's address")
    if answer.status is not None:
        return recipe, None
    rely_on_cache()
    reason = answer.text
    asked = ", ".join(f"{key} {value!r}" for key, value in wanted.items() if key in missing)
    if not missing:
        log.warning("no Hub answers (%s): what is in the cache is used", reason)
        return recipe, None
    if recipe.offline == "error" or len(wanted) < 2:
        # Beside rows or a base of one's own, other ones would not stand in for anything.
        how = "" if len(wanted) < 2 else ", or set offline=bundled to walk with the base and reviews that ship"
        raise DataError(
            f"no Hub answers ({reason}) and not in the cache: {asked}; connect or set HF_ENDPOINT to a mirror, or name "
            f"files and a folder instead{how}; model.name=bundled is the base that ships"
        )
    stand_in = {**wanted, "reason": reason}
    log.warning("%s", bundled.describe(stand_in))
    return _replace(recipe), stand_in


def _on_hub(recipe: Recipe) -> dict[str, str]:
    """Return what a recipe names on the Hub, by key."""
    source, name = recipe.data.source, recipe.model.place
    wanted = {}
    if isinstance(source, str) and not looks_like_files(source):
        wanted["data.source"] = source
    if not name.startswith((".", "/", "~")) and not Path(name).is_dir():
        wanted["model.name"] = name
    return wanted


def _look(recipe: Recipe, wanted: dict[str, str]) -> tuple[Answer, list[str]]:
    """Return what the Hub answers, and where that is nothing the keys of what is not in the cache."""
    answer = ask_hub()
    if answer.mistaken or answer.status is not None:
        return answer, []
    rely_on_cache()
    probes: dict[str, Callable[[], Any]] = {
        "data.source": lambda: find_source(recipe.data),
        "model.name": lambda: [
            cached_file(recipe.model.name, file, revision=recipe.model.revision)
            for file in ("config.json", "tokenizer.json", "model.safetensors")
        ],
    }
    return answer, [key for key in wanted if not _is_cached(probes[key])]


def _is_cached(probe: Callable[[], Any]) -> bool:
    try:
        probe()
    except (OSError, LoraSentimentError):
        return False
    return True


def _replace(recipe: Recipe) -> Recipe:
    """Return the recipe on the bundled base and reviews, writing beside where it would have written."""
    data = DataConfig(source=bundled.NAME, clean=recipe.data.clean, split_seed=recipe.data.split_seed)
    model = recipe.model.model_copy(update={"name": bundled.NAME, "revision": None})
    output = recipe.output.model_copy(update={"dir": f"{recipe.folder}-offline"})
    return recipe.model_copy(update={"name": f"{recipe.name}-offline", "data": data, "model": model, "output": output})
