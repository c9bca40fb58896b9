"""``python -m lightllmd.api CHANNEL_FD PARENT_PID``: the process of one api worker."""

from __future__ import annotations

import os
import sys

from lightllmd.config.plan import decode_plan
from lightllmd.errors import EXIT_CONFIG, EXIT_FAILED, EXIT_OK, EXIT_TRY_AGAIN, LightllmdError
from lightllmd.ipc import child_setup as child
from lightllmd.ipc import messages
from lightllmd.observe import log


def main() -> int:
    channel = child.adopt(sys.argv[1:])
    configure = child.first_message(channel)
    if not isinstance(configure, messages.ApiConfigure):
        channel.send(messages.Failed("error", f"the first message is {type(configure).__name__}, not ApiConfigure"))
        return EXIT_FAILED
    plan = decode_plan(configure.plan)
    log.set_up_child(plan.config.log.level)
    channel.send(messages.Heartbeat("boot", progress=0, busy=False))
    # prometheus_client reads it once, when it is imported.
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = configure.metrics_dir
    import uvloop

    from lightllmd.api.worker import ApiWorker
    from lightllmd.observe import metrics

    metrics.use_files(configure.metrics_id, configure.metrics_dir)
    try:
        uvloop.run(ApiWorker(channel, configure, plan).run())
    except LightllmdError as failure:
        kind = {EXIT_CONFIG: "config", EXIT_TRY_AGAIN: "changed"}.get(failure.exit_code, "error")
        channel.send(messages.Failed(kind, failure.message))
        return failure.exit_code
    except Exception as failure:
        channel.send(messages.Failed("error", f"{type(failure).__name__}: {failure}"))
        raise
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
