"""Every error this project raises on purpose, with its exit code and HTTP status: the one table.

An error is a name with parameters. It travels to HTTP clients as ``{"message": …}``, over the control socket as
``{"error": name, "message": …, **parameters}``, and to the shell as an exit code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

# Exit codes of the daemon and of its children (sysexits where one fits).
EXIT_OK = 0
EXIT_FAILED = 1
EXIT_NO_DEVICE = 69
EXIT_SYSTEM = 71
EXIT_TRY_AGAIN = 75
EXIT_CONFIG = 78
EXIT_OUT_OF_MEMORY = 80  # a worker's device or host memory ran out: never retried with the same parameters
EXIT_RANK_GONE = 81  # an engine rank: another rank of its generation ended, and that one's end tells why

# Exit codes of lightllmctl, one table for all verbs.
CTL_DONE = 0
CTL_FAILED = 1
CTL_USAGE = 2
CTL_NOT_ACTIVE = 3
CTL_NOT_FOUND = 4
CTL_NOT_PERMITTED = 5
CTL_CONFIG_INVALID = 6
CTL_BUSY = 7
CTL_DOES_NOT_FIT = 8
CTL_ROLLED_BACK = 9
CTL_TIMED_OUT = 10
CTL_INTERRUPTED = 130


class LightllmdError(Exception):
    """Base of all. ``status`` is the HTTP status, ``exit_code`` the daemon's, ``ctl_code`` lightllmctl's."""

    status: ClassVar[int] = 500
    exit_code: ClassVar[int] = EXIT_FAILED
    ctl_code: ClassVar[int] = CTL_FAILED
    retry_after: float | None = None  # seconds; sent as Retry-After where set

    def __init__(self, message: str, *, retry_after: float | None = None, **parameters: Any) -> None:
        super().__init__(message)
        self.message = message
        self.parameters = parameters
        if retry_after is not None:
            self.retry_after = retry_after

    @property
    def name(self) -> str:
        """The class's name, which is part of the control plane's protocol."""
        return type(self).__name__

    def as_dict(self) -> dict[str, Any]:
        """The control plane's form of this error."""
        return {"error": self.name, "message": self.message, **self.parameters}


def show(value: Any) -> str:
    """A value as the file would write it, shortened."""
    if isinstance(value, bool):
        text = "true" if value else "false"
    elif isinstance(value, str):
        text = '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    elif isinstance(value, list):
        text = "[" + ", ".join(show(element) for element in value[:8]) + (", …]" if len(value) > 8 else "]")
    elif isinstance(value, dict):
        text = "{" + ", ".join(f"{key} = {show(inner)}" for key, inner in list(value.items())[:4]) + "}"
    elif isinstance(value, int) and abs(value) >= 10**60:
        text = "an integer of more than 60 digits"
    else:
        text = str(value)
    text = "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text)
    return text if len(text) <= 80 else text[:77] + "…"


# --- configuration and start ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """One fault of a configuration: where it is and what was allowed there."""

    key: str  # dotted path, such as "http.workers"
    message: str  # says the value and the bound
    file: str | None = None  # None: the fault is on the command line
    line: int | None = None  # 1-based; None where the key is missing altogether

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.file and self.line else (self.file or "command line")
        return f"{where}: {self.key}: {self.message}" if self.key else f"{where}: {self.message}"


class ConfigInvalid(LightllmdError):
    """The configuration can't be used; carries every problem that was found, not just the first."""

    status = 400
    exit_code = EXIT_CONFIG
    ctl_code = CTL_CONFIG_INVALID

    def __init__(self, problems: list[Problem], short_of: tuple[int, int] | None = None) -> None:
        """`short_of`: bytes needed and to be had, where memory is all that is missing."""
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems, self.short_of = problems, short_of
        self.parameters = {"problems": [vars(problem) for problem in problems]}


class NoUsableDevice(LightllmdError):
    """No device of the configured kind can be used."""

    exit_code = EXIT_NO_DEVICE


class RankGone(LightllmdError):
    """Another rank of the engine's generation has ended, whose end tells why."""

    exit_code = EXIT_RANK_GONE


class SystemFailure(LightllmdError):
    """Address in use, no permission, no descriptor left: the host refuses."""

    exit_code = EXIT_SYSTEM


class TryAgain(LightllmdError):
    """Not possible now, but perhaps soon."""

    status = 503
    exit_code = EXIT_TRY_AGAIN


# --- requests of HTTP clients ----------------------------------------------------------------------------


class RequestError(LightllmdError):
    """Base of what a client is told. Raised before or instead of running the request."""

    status = 400


class InvalidRequest(RequestError):
    """The request is malformed, or a value of it is out of bounds."""

    status = 400


class Unauthorized(RequestError):
    """No API key, or an unknown one."""

    status = 401


class Forbidden(RequestError):
    """The API key is known, and not for this route."""

    status = 403


class NotFound(RequestError):
    """No such route or model."""

    status = 404


class BodyTooLarge(RequestError):
    """The body has more bytes than may be."""

    status = 413


class UrlTooLong(RequestError):
    """The URL has more bytes than may be."""

    status = 414


class HeaderTooLarge(RequestError):
    """A header field, all of them together, or their number."""

    status = 431


class RequestTimeout(RequestError):
    """The request did not come in time."""

    status = 408


class QueueFull(RequestError):
    """As many requests wait as may."""

    status = 429
    retry_after = 1.0


class RateLimited(RequestError):
    """The API key has used up one of its limits. Parameter: limit, the field of the key that says so. Without
    `retry_after` the same request will never pass."""

    status = 429


class ClientClosed(RequestError):
    """The client went away; no answer is sent."""

    status = 499


class RequestFailed(RequestError):
    """The request itself ended the engine more than once; it is not tried again."""

    status = 500


class NotReady(RequestError):
    """No engine can answer now; the message says why."""

    status = 503
    retry_after = 5.0


class DeadlineExceeded(RequestError):
    """The request waited longer than it may."""

    status = 504


# --- engine --------------------------------------------------------------------------------------------------


class EngineError(LightllmdError):
    """The engine can't go on; the generation ends."""


class OutOfMemory(EngineError):
    """The memory of the device or the host ran out; not tried again with the same plan."""

    exit_code = EXIT_OUT_OF_MEMORY


class WeightsInvalid(EngineError):
    """A checkpoint is missing tensors, is truncated or has other shapes than its config says."""

    exit_code = EXIT_CONFIG


class ModelChanged(EngineError):
    """The model's files are not those that the plan was made from. It is tried again: they may be put back."""

    exit_code = EXIT_TRY_AGAIN


# --- control plane --------------------------------------------------------------------------------------------


class ControlError(LightllmdError):
    """Base of what lightllmctl is told."""

    status = 400


class Usage(ControlError):
    """A control request is malformed."""

    ctl_code = CTL_USAGE


class DaemonNotRunning(ControlError):
    """No daemon listens on the control socket."""

    ctl_code = CTL_NOT_ACTIVE


class NoSuchModel(ControlError):
    """Neither a name of [models] nor a path. Parameters: model, candidates."""

    status = 404
    ctl_code = CTL_NOT_FOUND


class NoSuchWorker(ControlError):
    """Parameters: worker, candidates."""

    status = 404
    ctl_code = CTL_NOT_FOUND


class NoSuchJob(ControlError):
    """No job has that number, or it is forgotten. Parameter: id."""

    status = 404
    ctl_code = CTL_NOT_FOUND


class NoSuchCrash(ControlError):
    """No crash report has that number. Parameter: id."""

    status = 404
    ctl_code = CTL_NOT_FOUND


class NotPermitted(ControlError):
    """This user may not change the daemon. Parameter: uid."""

    status = 403
    ctl_code = CTL_NOT_PERMITTED


class Busy(ControlError):
    """Another job has to be finished first. Parameter: job."""

    status = 409
    ctl_code = CTL_BUSY


class PromptCacheOff(ControlError):
    """There is no prompt cache to look at or to flush."""

    status = 409


class DoesNotFit(ControlError):
    """The model needs more memory than can be had. Parameters: needed, free, in bytes."""

    status = 507
    ctl_code = CTL_DOES_NOT_FIT


class NotAvailableYet(ControlError):
    """The verb exists in the design, its feature is not built in this version."""

    status = 501
    ctl_code = CTL_USAGE


class StaleGeneration(ControlError):
    """``If-Match`` named another generation than the one in force."""

    status = 412
    ctl_code = CTL_BUSY


class JobFailed(ControlError):
    """The job that lightllmctl waited for came to a bad end."""

    ctl_code = CTL_FAILED


class RolledBack(ControlError):
    """It failed, and what ran before runs again."""

    ctl_code = CTL_ROLLED_BACK


class JobGoesOn(ControlError):
    """lightllmctl waited long enough; the job itself continues."""

    ctl_code = CTL_TIMED_OUT


class ConnectionLost(ControlError):
    """The daemon closed the control connection before its answer was complete."""


class NoAnswer(ControlError):
    """The daemon accepted the control connection and said nothing in time."""


class BadAnswer(ControlError):
    """What listens on the socket does not speak the control plane's protocol."""
