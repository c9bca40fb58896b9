"""A plan in words, for the log at start."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from lightllmd.config.amount import count, size
from lightllmd.config.plan import Plan
from lightllmd.errors import show


def budget_table(plan: Plan) -> str:
    """The memory budget, one row a line: with several devices that of the fullest, in relation to what it has."""
    rows = [(row.name, size(row.bytes), row.how) for row in plan.budget.rows]
    spare = plan.budget.available - plan.budget.needed
    rows.append(("total", size(plan.budget.needed), f"of {size(plan.budget.available)}; {size(spare)} stay free"))
    names = max(len(name) for name, _, _ in rows)
    sizes = max(len(amount) for _, amount, _ in rows)
    return "\n".join(f"  {name:<{names}}  {amount:>{sizes}}  {how}" for name, amount, how in rows)


def report(plan: Plan) -> str:
    """What is served, on which devices, which values were derived and why, and the memory budget."""
    device = plan.device
    lines = [f"model: {_model(plan)}"]
    if plan.device_budgets:
        lines += _devices(plan)
    else:
        lines.append(f"device: {device.kind}, {device.name}, {size(device.memory_free)} free")
    lines += _rendezvous(plan)
    names = max((len(derived.name) for derived in plan.derived), default=0)
    lines += [f"  {derived.name:<{names}} = {show(derived.value)}  ({derived.reason})" for derived in plan.derived]
    lines += [f"  warning: {warning}" for warning in plan.warnings]
    return "\n".join([*lines, f"memory{_fullest(plan)}:", budget_table(plan)])


def _model(plan: Plan) -> str:
    model = plan.model
    if model is None:
        return f"{plan.model_name} (fake engine)"
    form = "random weights" if model.format == "dummy" else model.format
    return (
        f"{plan.model_name}: {model.model_type}, {count(model.weight_elements)} parameters, {form}, "
        f"vocabulary {plan.vocab_size}, {model.path}"
    )


class Place(msgspec.Struct, frozen=True):
    """A device that one rank computes on, and what is planned for it. All sizes in bytes."""

    replica: int
    rank: int
    device: str  # its title
    free: int
    needed: int
    available: int  # of what is free, what may be planned with


def places(plan: Plan) -> list[Place]:
    """By replica and rank; none where there is one device."""
    by_index = {device.index: device for device in plan.device.usable}
    found = []
    for number, (index, budget) in enumerate(zip(plan.devices, plan.device_budgets, strict=False)):
        replica, rank = divmod(number, plan.ranks)
        device = by_index[index]
        found.append(Place(replica, rank, device.title, device.memory_free, budget.needed, budget.available))
    return found


def _devices(plan: Plan) -> Iterator[str]:
    """One a line: who computes there, what it has free, what is planned; then those that can't be used."""
    facts = plan.device
    yield f"devices: {facts.kind}, {len(plan.devices)} of {len(facts.usable)} usable"
    for number, place in enumerate(places(plan)):
        planned = f"{size(place.needed)} of {size(place.available)} planned with"
        yield f"  {_process(plan, number)}: {place.device}, {size(place.free)} free, {planned}"
    yield from (f"  {device.title}: can't be used: {device.fault}" for device in facts.devices if device.fault)


def _process(plan: Plan, number: int) -> str:
    """Which one computes on `Plan.devices` [number]."""
    replica, rank = divmod(number, plan.ranks)
    named = [(f"replica {replica}", plan.replicas > 1), (f"rank {rank}", plan.ranks > 1)]
    return ", ".join(name for name, counts in named if counts)


def _rendezvous(plan: Plan) -> Iterator[str]:
    if plan.ranks > 1 or plan.replicas > 1:
        processes = f"{plan.replicas} x " if plan.replicas > 1 else ""
        yield f"processes: {processes}{plan.ranks} rank{'s' if plan.ranks > 1 else ''}"
    if plan.ranks > 1 and plan.model is not None:  # fake ranks have nothing to compute together
        ports = (f"127.0.0.1:{plan.rendezvous_port(replica)}" for replica in range(plan.replicas))
        yield f"rendezvous: {', '.join(ports)}, or free ports where these are taken"


def _fullest(plan: Plan) -> str:
    """Whose budget is shown."""
    if not plan.device_budgets:
        return ""
    return f" of {_process(plan, plan.device_budgets.index(plan.budget))}"
