"""A run that saves the gradients of its first step, added up over its processes: what test_several.py starts."""

import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from lora_sentiment import cli
from lora_sentiment.training import loop


def run(path: Path, *arguments: str) -> None:
    """Train, and let the main process save the gradients by name as the optimizer's first step finds them."""
    reduce = loop._Loop._reduce

    def saving(self: Any, loss: Any) -> Any:
        found = reduce(self, loss)
        if self.accelerator.is_main_process and not path.exists():
            save_file(
                {name: p.grad.clone() for name, p in self.parameters.items() if p.grad is not None},
                path,
            )
        return found

    loop._Loop._reduce = saving  # type: ignore[method-assign]
    cli.main(["train", *arguments])


if __name__ == "__main__":
    run(Path(sys.argv[-1]), *sys.argv[1:-1])
