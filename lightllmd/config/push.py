"""Pushed metrics: what a Pushgateway's address, job and grouping key may be, and whose name and password it is told."""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Mapping

import msgspec

from lightllmd.config.parameters import Config, Params
from lightllmd.errors import show

USER, PASSWORD = "USERNAME", "PASSWORD"  # environment variables, with the original's names
LONGEST_GROUP = 8192  # bytes of job and grouping key
LONGEST_HOST, LONGEST_HOST_PART = 253, 63  # characters (RFC 1035)
PORTS = range(1, 65536)
# Labels that metrics have by themselves: the gateway would put the group's value in the place of each of theirs.
METRIC_LABELS = ("le", "method", "reason")


class Credentials(msgspec.Struct, frozen=True):
    """For basic authentication (RFC 7617)."""

    user: str
    password: str


def group(params: Params) -> dict[str, str]:
    """The labels of `grouping_key`."""
    return dict(_pairs(params))


def _pairs(params: Params) -> list[tuple[str, str]]:
    """Split at the first "=": a value may have more."""
    return [(key, value) for key, _, value in (written.partition("=") for written in params.grouping_key)]


def gateway_fault(config: Config) -> str:
    """What is wrong with an address that has the form host:port; empty: nothing is."""
    if config.params.metric_gateway is None:
        return ""
    host, _, port = config.params.metric_gateway.rpartition(":")
    faults = []
    if int(port) not in PORTS:
        faults.append(f"port {port} is out of bounds: {PORTS.start} … {PORTS[-1]}")
    if host.startswith("["):
        try:
            ipaddress.IPv6Address(host[1:-1])
        except ValueError as fault:
            faults.append(f"{show(host)} is no IPv6 address: {fault}")
    elif len(host) > LONGEST_HOST or not all(0 < len(part) <= LONGEST_HOST_PART for part in _parts(host)):
        faults.append(
            f"{show(host)} is no host name: at most {LONGEST_HOST} characters, 1 … {LONGEST_HOST_PART} between two dots"
        )
    return "; ".join(faults)


def _parts(host: str) -> list[str]:
    return host.removesuffix(".").split(".")


def group_fault(config: Config) -> str:
    """What is wrong with labels that have the form key=value; empty: nothing is."""
    pairs = _pairs(config.params)
    faults = [f"{key} occurs {count} times" for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    for key in dict(pairs):
        if key == "job":
            faults.append("job is set by job_name")
        elif key.startswith("__"):
            faults.append(f"{key} begins with __: such labels are Prometheus' own")
        elif key in METRIC_LABELS:
            faults.append(f"{key} is a label of the metrics themselves, as are {' and '.join(METRIC_LABELS)}")
    faults += [f"{key} = {fault}" for key, value in pairs if (fault := _value_fault(value))]
    size = sum(len(part.encode(errors="replace")) for pair in pairs for part in pair)
    if size > LONGEST_GROUP:
        faults.append(f"{size} bytes of labels: at most {LONGEST_GROUP}")
    return "; ".join(faults)


def job_fault(config: Config) -> str:
    """What is wrong with job_name; empty: nothing is."""
    return _value_fault(config.params.job_name)


def _value_fault(value: str) -> str:
    if value in (".", ".."):
        return f"{show(value)} can't be a part of the gateway's path"
    return "" if _is_unicode(value) else f"{show(value)} is not valid UTF-8"


def _is_unicode(text: str) -> bool:
    """Not so where bytes of the command line or the environment could not be decoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def credentials(environment: Mapping[str, str]) -> Credentials:
    """What the environment holds. Raises ValueError, which names what is missing or can't be sent."""
    if missing := [name for name in (USER, PASSWORD) if not environment.get(name)]:
        unset = " and ".join(missing)
        raise ValueError(f"the environment variable{'s' if len(missing) > 1 else ''} {unset} must be set")
    found = Credentials(environment[USER], environment[PASSWORD])
    if ":" in found.user:
        raise ValueError(f"the environment variable {USER} contains a colon, which basic authentication has no way for")
    for name, value in ((USER, found.user), (PASSWORD, found.password)):
        if not _is_unicode(value):
            raise ValueError(f"the environment variable {name} is not valid UTF-8")
    return found
