"""The visual worker: loads the encoder, then serves images on one event loop that stays free for heartbeats."""

from __future__ import annotations

import asyncio
import gc
import logging

from lightllmd.config.images import reserved
from lightllmd.config.plan import Plan
from lightllmd.errors import EngineError, SystemFailure
from lightllmd.ipc import messages
from lightllmd.ipc.channel import Channel
from lightllmd.visual.decode import ImageDecoder
from lightllmd.visual.encoders import PictureEncoder, encoder_for
from lightllmd.visual.fetch import Fetcher
from lightllmd.visual.limits import DecodeLimits, FetchLimits
from lightllmd.visual.service import ImageService
from lightllmd.visual.store import ImageStore
from lightllmd.visual.viewing import Viewer

log = logging.getLogger(__name__)
BEAT = 0.25  # seconds between heartbeats


class VisualWorker:
    """Serves until told to stop. `run` raises what the encoder or the host can't go on with."""

    def __init__(self, channel: Channel[messages.Down], configure: messages.VisualConfigure, plan: Plan) -> None:
        if plan.vision is None:
            raise EngineError("the plan has no images")
        self._channel, self._path = channel, configure.path
        self._encoder: PictureEncoder = encoder_for(plan)
        settings, params = plan.config.images, plan.config.params
        capacity = plan.vision.capacity
        self._decoder = ImageDecoder(DecodeLimits.of(settings))
        self._store = ImageStore(capacity, reserved(capacity, params.cache_reserved_ratio))
        viewer = Viewer(
            Fetcher(FetchLimits.of(settings)),
            self._decoder,
            self._encoder.prepare,
            configure.secret,
            self._store.__contains__,
        )
        self._service = ImageService(
            self._store,
            viewer,
            self._encoder,
            data_type=plan.vision.data_type,
            # On a CPU one at a time: the end of each is progress, and a batch may last longer than a hang may.
            batch=settings.batch if plan.vision.devices else 1,
            room_timeout=settings.room_timeout,
        )
        self._phase, self._progress, self._total = "boot", 0, 0
        self._stopped = asyncio.Event()

    async def run(self) -> None:
        """From boot until `Stop`, or until the supervisor is gone."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._channel.fileno(), self._heard)
        beating = asyncio.create_task(self._beat())
        working = asyncio.create_task(self._work())
        stopped = asyncio.create_task(self._stopped.wait())
        self._heard()
        try:
            await asyncio.wait((working, stopped), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
        finally:
            loop.remove_reader(self._channel.fileno())
            for task in (beating, working, stopped):
                task.cancel()
            await self._service.close()
            await self._decoder.close()

    async def _work(self) -> None:
        self._enter("load")
        await asyncio.to_thread(self._encoder.load, self._load_progress)
        self._enter("warmup")
        await asyncio.to_thread(self._encoder.warm_up)
        await self._decoder.start()
        gc.collect()
        gc.freeze()
        try:
            self._service.listen(self._path)
        except OSError as refused:
            raise SystemFailure(f"can't listen on {self._path}: {refused}") from refused
        self._enter("ready")
        await self._service.encode_for_ever()

    # --- the supervisor ------------------------------------------------------------------------------------------
    def _heard(self) -> None:
        for message in self._channel.receive():
            match message:
                case messages.Stop():
                    self._stopped.set()
                case messages.Tune():
                    logging.getLogger().setLevel(message.log_level.upper())
        if self._channel.closed:
            self._stopped.set()

    def _enter(self, phase: str) -> None:
        self._phase, self._progress, self._total = phase, 0, 0
        self._tell()

    def _load_progress(self, done: int, total: int) -> None:
        """From the loading thread; the next heartbeat tells it."""
        self._progress, self._total = done, total

    async def _beat(self) -> None:
        while True:
            self._tell()
            await asyncio.sleep(BEAT)

    def _tell(self) -> None:
        counts, store = self._service.counts, self._store
        stats: dict[str, float] = {
            "ok": counts.encoded,
            "images_encoded": counts.encoded,
            "images_failed": counts.failed,
            "image_batches": counts.batches,
            "encoding_seconds": counts.seconds,
            "image_hits": store.hits,
            "image_misses": store.misses,
            "images_evicted": store.evicted,
            "images_kept": len(store),
            "images_queued": store.queued,
            "image_references": store.references,
            "image_bytes": store.stored_bytes,
        }
        ready = self._phase == "ready"
        # Progress in service: batches. Busy while one is out, so that an encoder that hangs is found.
        progress = counts.batches if ready else self._progress
        busy = store.encoding if ready else True
        beat = messages.Heartbeat(self._phase, progress, busy, 0 if ready else self._total, stats)
        self._channel.send(beat, droppable=True)
