"""CUDA graphs: the kernels of a function, recorded once and then launched together."""

from collections.abc import Callable, Hashable

import torch

Body = Callable[[], None]


class GraphRunner:
    """Runs functions, and replays each one as a graph from its second call on.

    The first call of a key runs eagerly: libraries set themselves up in it. The second call is
    captured and replayed. The tensors that a function reads and writes must stay at their
    addresses, and the function must not wait on the host.

    Attributes:
        capture: Records a function without running it, and returns a function that replays it.
    """

    def __init__(self, capture: Callable[[Body], Body] | None = None) -> None:
        self.capture = capture or CudaCapture()
        self._seen: set[Hashable] = set()
        self._replays: dict[Hashable, Body] = {}

    @property
    def num_graphs(self) -> int:
        """Number of captured functions."""
        return len(self._replays)

    def run(self, key: Hashable, body: Body) -> None:
        """Run a function, or its graph.

        Args:
            key: Identifies the function, such as the size of its input.
            body: The function. That of the second call of a key is kept.
        """
        if key not in self._seen:
            self._seen.add(key)
            body()
            return
        if key not in self._replays:
            self._replays[key] = self.capture(body)
        self._replays[key]()

    def clear(self) -> None:
        """Drop every graph, and free the memory of the graphs."""
        self._seen.clear()
        self._replays.clear()


class CudaCapture:
    """Captures CUDA graphs that share their memory.

    Each graph overwrites the results of the one before it in the shared memory. Results must be
    copied to tensors that were made outside of a capture. The current stream must not be the
    default one.
    """

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, body: Body) -> Body:
        """Record the kernels of a function, and return a function that launches them again."""
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        # Meanwhile other threads, such as NCCL's, may make calls that a capture forbids.
        with torch.cuda.graph(
            graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"
        ):
            body()
        replay: Body = graph.replay
        return replay
