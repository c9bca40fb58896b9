"""Logging of child processes: records go to stderr, a pipe that the supervisor reads line by line.

The supervisor adds the time and the worker's name and renders text or JSON, as [log] says; a child only marks the
level, by sd-daemon's prefix (``<4>`` for a warning, see sd-daemon(3)).
"""

from __future__ import annotations

import logging
import sys

_PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))


class ChildFormatter(logging.Formatter):
    """One line per record, whatever the message holds; a traceback's lines follow with the same mark."""

    def format(self, record: logging.LogRecord) -> str:
        """As logging's; each line begins with sd-daemon's priority."""
        priority = next((number for level, number in _PRIORITIES if record.levelno >= level), 7)
        lines = [record.getMessage().replace("\r", "\\r").replace("\n", "\\n")]
        if record.exc_info:
            lines += self.formatException(record.exc_info).splitlines()
        if record.stack_info:
            lines += record.stack_info.splitlines()
        return "\n".join(f"<{priority}>{line}" for line in lines)


def set_up_child(level: str) -> None:
    """Replaces the root logger's handlers. `level` is the name in [log]."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(ChildFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
