"""Where no Hub answers: what is in the cache, else, if the recipe says so, the parts that ship with the package."""

import json
import logging
from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers.utils.hub import cached_file

from lora_sentiment import bundled
from lora_sentiment.data.sources import find_source, is_on_hub
from lora_sentiment.errors import DataError, LoraSentimentError
from lora_sentiment.hub import Answer, ask_hub, is_hub_name, rely_on_cache
from lora_sentiment.models.load import has_tokenizer
from lora_sentiment.recipe.data import DataConfig
from lora_sentiment.recipe.model import ModelConfig
from lora_sentiment.recipe.recipe import Recipe

log = logging.getLogger("lora_sentiment")
_KEPT = {"source", "clean", "split_seed"}
"""Keys of `data` that mean the same of any rows; the source is replaced."""


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
    if answer.status is not None:
        return recipe, None
    rely_on_cache(answer)
    reason = answer.text
    asked = ", ".join(f"{key} {value!r}" for key, value in wanted.items() if key in missing)
    if not missing:
        log.warning("no Hub answers (%s): what is in the cache is used", reason)
        return recipe, None
    if answer.mistaken:
        raise DataError(
            f"the Hub cannot be asked: {reason}; mend HF_ENDPOINT, the proxy (HTTPS_PROXY: its address or login) or "
            f"SSL_CERT_FILE; not in the cache: {asked}"
        )
    if recipe.offline == "error" or len(wanted) < 2:
        # Beside rows or a base of one's own, other ones would not stand in for anything.
        how = (
            ""
            if len(wanted) < 2
            else ", or set offline=bundled to walk with the base and reviews that ship"
        )
        raise DataError(
            f"no Hub answers ({reason}) and not in the cache: {asked}; connect or set HF_ENDPOINT to a mirror, or name "
            f"files and a folder instead{how}; model.name=bundled is the base that ships"
        )
    stand_in = {**wanted, **_left_out(recipe.data), "reason": reason}
    log.warning("%s", bundled.describe(stand_in))
    return _replace(recipe), stand_in


def _on_hub(recipe: Recipe) -> dict[str, str]:
    """Return what a recipe names on the Hub, by key."""
    source, name = recipe.data.source, recipe.model.place
    wanted = {}
    if is_on_hub(source):
        wanted["data.source"] = str(source)
    if is_hub_name(name):
        wanted["model.name"] = name
    return wanted


def _look(recipe: Recipe, wanted: dict[str, str]) -> tuple[Answer, list[str]]:
    """Return what the Hub answers, and where that is nothing the keys of what is not in the cache."""
    answer = ask_hub()
    if answer.status is not None:
        return answer, []
    rely_on_cache(answer)
    probes: dict[str, Callable[[], Any]] = {
        "data.source": lambda: find_source(recipe.data),
        "model.name": lambda: _find_base(recipe.model),
    }
    return answer, [key for key in wanted if not _is_cached(probes[key])]


def _find_base(model: ModelConfig) -> None:
    """Raise an OSError unless a base is whole."""
    for file in ("config.json", "model.safetensors"):
        cached_file(model.name, file, revision=model.revision)
    if not has_tokenizer(model.name, revision=model.revision):
        raise FileNotFoundError(model.name)


def _is_cached(probe: Callable[[], Any]) -> bool:
    try:
        probe()
    except OSError:
        return False
    except LoraSentimentError as error:
        # What the Hub's client could not get is its cause; a fault of the recipe's own has none, and is told later.
        return error.__cause__ is None
    return True


def _left_out(data: DataConfig) -> dict[str, str]:
    """Return what else the recipe says of its own rows, by key; the bundled ones are read by the defaults."""
    said = data.model_dump(mode="json", exclude=_KEPT, exclude_defaults=True)
    return {
        f"data.{key}": value if isinstance(value, str) else json.dumps(value)
        for key, value in said.items()
    }


def _replace(recipe: Recipe) -> Recipe:
    """Return the recipe on the bundled base and reviews, writing beside where it would have written."""
    data = DataConfig(**{**recipe.data.model_dump(include=_KEPT), "source": bundled.NAME})
    model = recipe.model.model_copy(update={"name": bundled.NAME, "revision": None})
    output = recipe.output.model_copy(update={"dir": f"{recipe.folder}-offline"})
    return recipe.model_copy(
        update={"name": f"{recipe.name}-offline", "data": data, "model": model, "output": output}
    )
