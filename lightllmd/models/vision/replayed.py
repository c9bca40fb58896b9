"""What a tower does to a few tiles as CUDA graphs: launching its kernels one by one takes longer than they do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightllmd.config.bounds import GRAPH_TILES


class Replayed:
    """`run` of uint8 ``[tiles, side, side, 3]`` on a GPU: one graph for each number of tiles, made here. All of them
    share one memory pool, which the largest one fills."""

    def __init__(
        self, run: Callable[[Tensor], Tensor], side: int, device: torch.device, most: int = GRAPH_TILES
    ) -> None:
        self._run, self._device = run, device
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pixels = torch.zeros((most, side, side, 3), dtype=torch.uint8, device=device)
        pool = torch.cuda.graph_pool_handle()
        aside = torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for tiles in range(most, 0, -1):
                run(self._pixels[:tiles])  # libraries choose their kernels before the capture
        torch.cuda.current_stream(device).wait_stream(aside)
        for tiles in range(most, 0, -1):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                out = run(self._pixels[:tiles])
            self._graphs[tiles] = graph, out

    def __call__(self, pixels: Tensor) -> Tensor:
        """`pixels` in host memory."""
        tiles = len(pixels)
        if tiles not in self._graphs:
            return self._run(pixels.to(self._device))
        graph, out = self._graphs[tiles]
        self._pixels[:tiles].copy_(pixels)
        graph.replay()
        return out.clone()  # the next one writes it again
