"""A stand-in for CUDA graphs: operations are recorded, then replayed on the same tensors."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class RecordedCapture:
    """Captures as CUDA does: nothing is computed, and numbers of Python are what they were.

    Tensors that a function makes lie in memory that the next graph overwrites: a replay ends by
    filling them with NaN. What reads one of them later, gradients and losses included, finds NaN.

    Attributes:
        recordings: What was captured.
    """

    def __init__(self) -> None:
        self.recordings: list[Recording] = []

    def __call__(self, body: Callable[[], None]) -> Callable[[], None]:
        generator = torch.get_rng_state()
        recording = Recording()
        with recording:
            body()
        recording.undo()
        recording.spoil()
        torch.set_rng_state(generator)
        self.recordings.append(recording)
        return recording.replay


class Recording(TorchDispatchMode):
    """The operations of a function, with the tensors that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[tuple[int, Tensor]]]] = []
        self.made: dict[int, Tensor] = {}
        self.before: dict[int, tuple[Any, Any]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        assert function is not torch.ops.aten._local_scalar_dense.default, (
            "the host waits in a graph"
        )
        self._save_written(function, args, kwargs)
        read = {_address(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        found = function(*args, **kwargs)
        fresh = []
        for position, each in enumerate(tree_leaves(found)):
            if isinstance(each, Tensor) and _address(each) not in read:
                own = each.detach()
                self.made[_address(own)] = own
                fresh.append((position, own))
        args, kwargs = tree_map(_detach, (args, kwargs))
        self.calls.append((function, args, kwargs, fresh))
        return found

    def _save_written(self, function: Any, args: Any, kwargs: Any) -> None:
        for number, argument in enumerate(function._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            for each in tree_leaves(value):
                known = _address(each) in self.made or _address(each) in self.before
                if not known:
                    storage = each.untyped_storage()
                    self.before[_address(each)] = (storage, storage.clone())

    def undo(self) -> None:
        """Give tensors from outside the values that they had before."""
        for storage, saved in self.before.values():
            storage.copy_(saved)

    def spoil(self) -> None:
        """Fill what the function made with NaN."""
        for each in self.made.values():
            if each.is_floating_point():
                each.fill_(math.nan)

    @torch.no_grad()
    def replay(self) -> None:
        """Run the operations again."""
        for function, args, kwargs, fresh in self.calls:
            found = tree_leaves(function(*args, **kwargs))
            for position, recorded in fresh:
                recorded.copy_(found[position])
        self.spoil()


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _detach(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
