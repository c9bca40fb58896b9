"""Steps of one shape as CUDA graphs, all in one memory pool."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor


class StepGraphs:
    """Captured in the thread that replays them, largest first, so that the smaller ones fit into its memory."""

    def __init__(self) -> None:
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __contains__(self, shape: Hashable) -> bool:
        return shape in self._graphs

    def capture(self, shape: Hashable, compute: Callable[[], Tensor]) -> None:
        """`compute` has run once for this shape, so that everything it needs is compiled and loaded."""
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # What other threads do with the device (copies of weights, NCCL's watchdog) is none of the graph's.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                out = compute()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        self._graphs[shape] = graph, out

    def replay(self, shape: Hashable) -> Tensor:
        """What `compute` returned, computed anew; valid until the next replay of any shape."""
        graph, out = self._graphs[shape]
        graph.replay()
        return out
