"""Decode steps as CUDA graphs: one per number of rows, all in one memory pool."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class DecodeGraphs:
    """Captured in the thread that replays them, largest first, so that the smaller ones fit into its memory."""

    def __init__(self) -> None:
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __contains__(self, size: int) -> bool:
        return size in self._graphs

    def capture(self, size: int, compute: Callable[[int], Tensor]) -> None:
        """`compute` has run once with this size, so that everything it needs is compiled and loaded."""
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool)
            try:
                out = compute(size)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        self._graphs[size] = graph, out

    def replay(self, size: int) -> Tensor:
        """What `compute` returned, computed anew; valid until the next replay of any size."""
        graph, out = self._graphs[size]
        graph.replay()
        return out
