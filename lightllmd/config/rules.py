"""Which settings contradict each other. Every rule is one entry of `RULES`; those of generation are in features.py."""

from __future__ import annotations

import grp
import pwd
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import ip_network

from lightllmd.config import push
from lightllmd.config.features import Feature, pairs
from lightllmd.config.images import network_faults
from lightllmd.config.modes import MODES, groups, of_kind
from lightllmd.config.parameters import DATA_TYPES, Config, Params

UNIX_SOCKET_PATH_MAX = 107  # bytes, sun_path without its NUL
UNIX = "unix"  # among http.trusted_proxies: clients of http.unix_socket


@dataclass(frozen=True)
class Rule:
    """`broken` says in words what is wrong, or nothing. The problem is put where the last of `keys` that was set is."""

    keys: tuple[str, ...]
    broken: Callable[[Config], str]


def _input_below_total(config: Config) -> str:
    params = config.params
    if params.max_req_input_len < params.max_req_total_len:
        return ""
    return (
        f"max_req_input_len = {params.max_req_input_len} must be less than max_req_total_len = "
        f"{params.max_req_total_len}: at least one token is generated"
    )


def _total_fits_slots(config: Config) -> str:
    slots, total = config.params.max_total_token_num, config.params.max_req_total_len
    if slots == "auto" or total <= slots:
        return ""
    return f"max_req_total_len = {total} must be at most max_total_token_num = {slots}"


def _prefill_takes_longest(config: Config) -> str:
    """splitfuse_mode cuts prompts, so that a step need not hold a whole one."""
    params = config.params
    key = "splitfuse_block_size" if params.splitfuse_mode else "max_req_total_len"
    batch, least = params.batch_max_tokens, getattr(params, key)
    if batch is None or batch >= least:
        return ""
    return f"batch_max_tokens = {batch} must be at least {key} = {least}"


def _too_long(path: str) -> str:
    if len(path.encode()) <= UNIX_SOCKET_PATH_MAX:
        return ""
    return f"a socket path of {len(path.encode())} bytes; at most {UNIX_SOCKET_PATH_MAX} are possible"


def _listens_somewhere(config: Config) -> str:
    return "" if config.http.tcp or config.http.unix_socket else "http.tcp = false needs http.unix_socket"


def _sockets_differ(config: Config) -> str:
    path = config.http.unix_socket
    return f"{path} is the control socket" if path and path == config.supervisor.control_socket else ""


def _known_owner(config: Config) -> str:
    user, _, group = config.http.unix_socket_owner.partition(":")
    unknown = []
    for name, kind, find in ((user, "user", pwd.getpwnam), (group, "group", grp.getgrnam)):
        try:
            if name and not name.isdecimal():
                find(name)
        except KeyError:
            unknown.append(f"there is no {kind} {name}")
    return "; ".join(unknown)


def _backoff_order(config: Config) -> str:
    initial, longest = config.supervisor.backoff_initial, config.supervisor.backoff_max
    return "" if initial <= longest else f"backoff_initial = {initial:g} s must be at most backoff_max = {longest:g} s"


def _tls_pair(config: Config) -> str:
    if bool(config.http.tls_certificate) == bool(config.http.tls_key):
        return ""
    return "http.tls_certificate and http.tls_key must be set together"


def _client_ca_needs_tls(config: Config) -> str:
    if not config.http.tls_client_ca or config.http.tls_certificate:
        return ""
    return "http.tls_client_ca needs http.tls_certificate and http.tls_key: certificates are asked for over TLS alone"


def _room_for_bodies(config: Config) -> str:
    memory, body = config.http.max_body_bytes_in_flight, config.http.max_body_bytes
    if memory == "auto" or memory >= 2 * body:
        return ""
    return f"max_body_bytes_in_flight = {memory} must be at least twice max_body_bytes = {body}"


def _proxies_are_networks(config: Config) -> str:
    wrong = []
    for written in config.http.trusted_proxies:
        if written == UNIX:
            continue
        try:
            ip_network(written, strict=False)
        except ValueError as fault:
            wrong.append(str(fault))
    return "; ".join(wrong)


def _one_cache_mode(config: Config) -> str:
    names = of_kind(config.params.mode, "attention", "kv")
    if len(names) < 2:
        return ""
    return f"{' and '.join(names)} exclude each other: each says how the KV cache is stored and read"


def _one_weight_mode(config: Config) -> str:
    names = of_kind(config.params.mode, "weights")
    if len(names) < 2:
        return ""
    return f"{' and '.join(names)} exclude each other: each says how weights are stored"


def _groups_of_a_mode(config: Config) -> str:
    sizes = groups(config.params.mode)
    named = [f"g{size}" for size in sizes]
    if len(sizes) > 1:
        return f"{' and '.join(named)} exclude each other: 4-bit weights have groups of one size"
    weights = of_kind(config.params.mode, "weights")
    if not sizes or any(MODES[name].has_groups for name in weights):
        return ""
    others = f"{weights[0]} has none" if weights else "no mode for weights is named"
    known = ", ".join(name for name, mode in MODES.items() if mode.has_groups)
    return f"{named[0]} is the size of groups of 4-bit weights ({known}), and {others}"


def _mixdown_needs_its_mode(config: Config) -> str:
    if not config.params.quantise.mixdown or any(
        MODES[name].mixdown for name in of_kind(config.params.mode, "weights")
    ):
        return ""
    return "quantise.mixdown needs mode ppl_w8a8_mixdown"


def _mode_fits_data_type(config: Config) -> str:
    written = config.params.data_type
    wrong = [
        f'mode {name} computes in {only}, not in data_type = "{written}"'
        for name in of_kind(config.params.mode, "attention", "kv", "weights")
        if (only := MODES[name].data_type) and written != "auto" and DATA_TYPES.get(written, written) != only
    ]
    return "; ".join(wrong)


def _ports_for_replicas(config: Config) -> str:
    first, replicas, last = config.params.nccl_port, config.engine.replicas, 65535
    if first + replicas - 1 <= last:
        return ""
    return (
        f"nccl_port = {first}: each of engine.replicas = {replicas} takes a port from it on, and {last} is the last "
        f"one; at most nccl_port = {last - replicas + 1} leaves room"
    )


def _needs_gateway(key: str) -> Rule:
    def broken(config: Config) -> str:
        changed = getattr(config.params, key) != getattr(Params(), key)
        return f"{key} needs metric_gateway" if changed and config.params.metric_gateway is None else ""

    return Rule((key,), broken)


def _pair(first: Feature, second: Feature, reason: str) -> Rule:
    """Two features that exclude each other."""

    def broken(config: Config) -> str:
        both = first.is_on(config.params) and second.is_on(config.params)
        return f"{first.name} and {second.name} exclude each other: {reason}" if both else ""

    return Rule((first.key, second.key), broken)


RULES: tuple[Rule, ...] = (
    Rule(("max_req_input_len", "max_req_total_len"), _input_below_total),
    Rule(("max_total_token_num", "max_req_total_len"), _total_fits_slots),
    Rule(("max_req_total_len", "splitfuse_block_size", "splitfuse_mode", "batch_max_tokens"), _prefill_takes_longest),
    Rule(("supervisor.control_socket",), lambda config: _too_long(config.supervisor.control_socket)),
    Rule(("http.unix_socket",), lambda config: _too_long(config.http.unix_socket)),
    Rule(("supervisor.control_socket", "http.unix_socket"), _sockets_differ),
    Rule(("http.unix_socket_owner",), _known_owner),
    Rule(("http.unix_socket", "http.tcp"), _listens_somewhere),
    Rule(("supervisor.backoff_initial", "supervisor.backoff_max"), _backoff_order),
    Rule(("http.tls_certificate", "http.tls_key"), _tls_pair),
    Rule(("http.tls_certificate", "http.tls_client_ca"), _client_ca_needs_tls),
    Rule(("http.max_body_bytes", "http.max_body_bytes_in_flight"), _room_for_bodies),
    Rule(("http.trusted_proxies",), _proxies_are_networks),
    Rule(("images.allowed_networks",), lambda config: network_faults(config.images)),
    Rule(("engine.replicas", "nccl_port"), _ports_for_replicas),
    Rule(("mode",), _one_cache_mode),
    Rule(("mode",), _one_weight_mode),
    Rule(("mode",), _groups_of_a_mode),
    Rule(("mode", "quantise.mixdown"), _mixdown_needs_its_mode),
    Rule(("mode", "data_type"), _mode_fits_data_type),
    Rule(("metric_gateway",), push.gateway_fault),
    Rule(("job_name",), push.job_fault),
    Rule(("grouping_key",), push.group_fault),
    _needs_gateway("grouping_key"),
    _needs_gateway("enable_monitor_auth"),
    *(
        _pair(Feature("use_reward_model"), Feature(key), reason)
        for key, reason in {
            "return_all_prompt_logprobs": "a reward model has no next-token probabilities",
            "beam_mode": "a reward model generates nothing, so that there is nothing to search",
            "diverse_mode": "a reward model generates nothing, so that best_of has no meaning",
            "token_healing_mode": "a reward model reads a prompt as it is",
        }.items()
    ),
    *(_pair(first, second, declared.reason) for first, second, declared in pairs() if declared.reason),
)


def contradictions(config: Config, faulty: set[str]) -> Iterator[tuple[tuple[str, ...], str]]:
    """(keys, message) of each broken rule; rules over a `faulty` key are skipped, its value being unknown."""
    for rule in RULES:
        if faulty.isdisjoint(rule.keys) and (message := rule.broken(config)):
            yield rule.keys, message
