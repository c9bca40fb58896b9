"""The process of one engine rank:
``python -m lightllmd.engine CHANNEL_FD PARENT_PID FLIGHT_FD [[--context DEVICE] MODULE…]``.

The modules are imported and a context on the device is made before the configuration is waited for: a spare engine has
that behind it when it is needed.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys

from lightllmd import errors
from lightllmd.config.plan import decode_plan
from lightllmd.config.stamps import require_unchanged
from lightllmd.engine import openmp
from lightllmd.ipc import child_setup as child
from lightllmd.ipc import messages
from lightllmd.ipc.flight_record import FlightRecorder
from lightllmd.observe import log
from lightllmd.weights.read_ahead import ReadAhead

_KINDS: tuple[tuple[type[Exception], str, int], ...] = (
    (errors.ConfigInvalid, "config", errors.EXIT_CONFIG),
    (errors.WeightsInvalid, "weights", errors.EXIT_CONFIG),
    (errors.ModelChanged, "changed", errors.EXIT_TRY_AGAIN),
    (errors.NoUsableDevice, "device", errors.EXIT_NO_DEVICE),
    (errors.OutOfMemory, "memory", errors.EXIT_OUT_OF_MEMORY),
    (errors.RankGone, "rank", errors.EXIT_RANK_GONE),
    (MemoryError, "memory", errors.EXIT_OUT_OF_MEMORY),
    (errors.SystemFailure, "error", errors.EXIT_SYSTEM),
)


def main(arguments: list[str]) -> None:
    try:
        _run(arguments)
    except SystemExit as ending:
        if (distributed := sys.modules.get("torch.distributed")) is not None and distributed.is_initialized():
            # The interpreter's orderly end takes the process group apart, which may wait for ranks that are gone.
            logging.shutdown()
            sys.stderr.flush()
            os._exit(ending.code if isinstance(ending.code, int) else errors.EXIT_OK)
        raise


def _run(arguments: list[str]) -> None:
    # Between layers and in every wait, so SIGTERM ends a long prefill too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(errors.EXIT_OK))
    link = child.adopt(arguments)
    recorder = FlightRecorder(int(arguments[2]))
    try:
        if arguments[3:]:
            _begin(arguments[3:])
            link.send(messages.Heartbeat("boot", 0))
        configure = child.first_message(link)
        if isinstance(configure, messages.Stop):
            sys.exit(errors.EXIT_OK)
        if not isinstance(configure, messages.EngineConfigure):
            raise TypeError(f"the first message to an engine was {type(configure).__name__}")
        plan = decode_plan(configure.plan)
        log.set_up_child(plan.config.log.level)
        if plan.model is not None:
            require_unchanged(plan.model.weight_stamps)  # before seconds are spent; who reads them asks again
            if configure.rank == 0:
                ReadAhead(plan.model.files)  # while torch is imported, and for as long as loading takes
        if configure.rank:
            from lightllmd.engine.ranks.following import Follower

            Follower(link, configure, plan).run()
        # Before prometheus_client is imported, which the worker does.
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = configure.metrics_dir
        from lightllmd.engine.worker import EngineWorker
        from lightllmd.observe import metrics

        metrics.use_files(configure.metrics_id, configure.metrics_dir)
        EngineWorker(link, recorder, configure, plan).run()
    except Exception as error:
        kind, code = next(
            ((kind, code) for type_, kind, code in _KINDS if isinstance(error, type_)), ("error", errors.EXIT_FAILED)
        )
        link.send(messages.Failed(kind, str(error) or type(error).__name__))
        logging.getLogger(__name__).exception("the engine ends")
        sys.exit(code)


def _begin(told: list[str]) -> None:
    """What a spare engine does beforehand. Raises ImportError, SystemFailure."""
    device = None
    if told[0] == "--context":
        device, *told = told[1:]
    openmp.settle()
    for module in told:
        importlib.import_module(module)
    if device is not None:
        from lightllmd.engine.device_context import make_context

        make_context(device)


if __name__ == "__main__":
    main(sys.argv[1:])
