"""A plan in words, for the log at start."""

from __future__ import annotations

from lightllmd.config.amount import count, size
from lightllmd.config.plan import Plan
from lightllmd.errors import show


def budget_table(plan: Plan) -> str:
    """The memory budget, one row a line."""
    rows = [(row.name, size(row.bytes), row.how) for row in plan.budget.rows]
    spare = plan.budget.available - plan.budget.needed
    rows.append(("total", size(plan.budget.needed), f"of {size(plan.budget.available)}; {size(spare)} stay free"))
    names = max(len(name) for name, _, _ in rows)
    sizes = max(len(amount) for _, amount, _ in rows)
    return "\n".join(f"  {name:<{names}}  {amount:>{sizes}}  {how}" for name, amount, how in rows)


def report(plan: Plan) -> str:
    """What is served, which values were derived and why, and the memory budget."""
    device = plan.device
    lines = [f"model: {_model(plan)}", f"device: {device.kind}, {device.name}, {size(device.memory_free)} free"]
    names = max((len(derived.name) for derived in plan.derived), default=0)
    lines += [f"  {derived.name:<{names}} = {show(derived.value)}  ({derived.reason})" for derived in plan.derived]
    lines += [f"  warning: {warning}" for warning in plan.warnings]
    return "\n".join([*lines, "memory:", budget_table(plan)])


def _model(plan: Plan) -> str:
    model = plan.model
    if model is None:
        return f"{plan.model_name} (fake engine)"
    form = "random weights" if model.format == "dummy" else model.format
    return (
        f"{plan.model_name}: {model.model_type}, {count(model.weight_elements)} parameters, {form}, "
        f"vocabulary {plan.vocab_size}, {model.path}"
    )
