"""CUDA graphs: a function's kernels recorded once and launched together from then on."""

from collections.abc import Callable, Hashable

import torch

Body = Callable[[], None]


class GraphRunner:
    """Runs functions, and replays each as a graph from its second call on.

    The first call of a key runs eagerly: libraries set themselves up in it. The second call is captured and replayed.
    A function reads and writes tensors that stay where they are, and waits for nothing on the host.

    Attributes:
        capture: Records a function without running it, and returns what replays it.
    """

    def __init__(self, capture: Callable[[Body], Body] | None = None) -> None:
        self.capture = capture or CudaCapture()
        self._seen: set[Hashable] = set()
        self._replays: dict[Hashable, Body] = {}

    @property
    def num_graphs(self) -> int:
        """How many functions were captured."""
        return len(self._replays)

    def run(self, key: Hashable, body: Body) -> None:
        """Run a function, or its graph.

        Args:
            key: What tells functions apart, such as the size of their input.
            body: The function; the one of the second call of its key is kept.
        """
        if key not in self._seen:
            self._seen.add(key)
            body()
            return
        if key not in self._replays:
            self._replays[key] = self.capture(body)
        self._replays[key]()

    def clear(self) -> None:
        """Forget every graph, and free the memory that they held."""
        self._seen.clear()
        self._replays.clear()


class CudaCapture:
    """Captures CUDA graphs that share their memory.

    What one graph leaves in the shared memory is overwritten by the next: results must be copied to tensors that were
    made outside of a capture. The current stream must not be the default one.
    """

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, body: Body) -> Body:
        """Record the kernels that a function launches, and return what launches them again."""
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        # Other threads, such as NCCL's, may meanwhile ask the driver for what a capture forbids.
        with torch.cuda.graph(
            graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"
        ):
            body()
        replay: Body = graph.replay
        return replay
