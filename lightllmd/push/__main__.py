"""``python -m lightllmd.push CHANNEL_FD PARENT_PID``: the process that pushes metrics. It yields to all others."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys

from lightllmd.errors import EXIT_FAILED, EXIT_OK
from lightllmd.ipc import child_setup as child
from lightllmd.ipc import messages
from lightllmd.observe import log

NICENESS = 10  # its share of a busy core is a tenth of another process's


def main() -> int:
    channel = child.adopt(sys.argv[1:])
    with contextlib.suppress(OSError):  # a sandbox may refuse it
        os.nice(NICENESS)
    configure = child.first_message(channel)
    if not isinstance(configure, messages.PushConfigure):
        channel.send(messages.Failed("error", f"the first message is {type(configure).__name__}, not PushConfigure"))
        return EXIT_FAILED
    log.set_up_child(configure.log_level)
    channel.send(messages.Heartbeat("boot", progress=0, busy=False))
    # prometheus_client reads it once, when it is imported.
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = configure.metrics_dir
    from lightllmd.observe import metrics
    from lightllmd.push.worker import PushWorker

    metrics.use_files(configure.metrics_id, configure.metrics_dir, metrics.PushMetrics.KINDS)
    asyncio.run(PushWorker(channel, configure).run())
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
