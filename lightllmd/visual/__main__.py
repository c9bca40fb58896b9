"""``python -m lightllmd.visual CHANNEL_FD PARENT_PID``: the process that sees images."""

from __future__ import annotations

import asyncio
import logging
import os
import sys

from lightllmd import errors
from lightllmd.config.plan import Plan, decode_plan
from lightllmd.config.stamps import require_unchanged
from lightllmd.ipc import child_setup as child
from lightllmd.ipc import messages
from lightllmd.ipc.channel import Channel
from lightllmd.observe import log

_KINDS: tuple[tuple[type[Exception], str, int], ...] = (
    (errors.ConfigInvalid, "config", errors.EXIT_CONFIG),
    (errors.WeightsInvalid, "weights", errors.EXIT_CONFIG),
    (errors.ModelChanged, "changed", errors.EXIT_TRY_AGAIN),
    (errors.NoUsableDevice, "device", errors.EXIT_NO_DEVICE),
    (errors.OutOfMemory, "memory", errors.EXIT_OUT_OF_MEMORY),
    (MemoryError, "memory", errors.EXIT_OUT_OF_MEMORY),
    (errors.SystemFailure, "error", errors.EXIT_SYSTEM),
)


def main() -> int:
    channel = child.adopt(sys.argv[1:])
    configure = child.first_message(channel)
    if isinstance(configure, messages.Stop):
        return errors.EXIT_OK
    if not isinstance(configure, messages.VisualConfigure):
        channel.send(messages.Failed("error", f"the first message is {type(configure).__name__}, not VisualConfigure"))
        return errors.EXIT_FAILED
    channel.send(messages.Heartbeat("boot", progress=0, busy=True))
    try:
        plan = decode_plan(configure.plan)
        log.set_up_child(plan.config.log.level)
        # Before torch: it sees this GPU alone, or none.
        os.environ["CUDA_VISIBLE_DEVICES"] = "" if configure.device is None else str(configure.device)
        if plan.model is not None:
            require_unchanged(plan.model.weight_stamps)
        asyncio.run(_serve(channel, configure, plan))
    except Exception as error:
        kind, code = next(
            ((kind, code) for type_, kind, code in _KINDS if isinstance(error, type_)), ("error", errors.EXIT_FAILED)
        )
        channel.send(messages.Failed(kind, str(error) or type(error).__name__))
        logging.getLogger(__name__).exception("the visual worker ends")
        return code
    return errors.EXIT_OK


async def _serve(channel: Channel[messages.Down], configure: messages.VisualConfigure, plan: Plan) -> None:
    from lightllmd.visual.worker import VisualWorker

    await VisualWorker(channel, configure, plan).run()


if __name__ == "__main__":
    sys.exit(main())
