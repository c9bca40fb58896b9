"""supervisor.swap = "beside": what is planned leaves room for any other model of [models], planned by the same rule."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightllmd.architecture.families import architecture_of
from lightllmd.config import budget, models
from lightllmd.config.load import load
from lightllmd.config.parameters import Config
from lightllmd.config.plan import RESERVE_ROW, DeviceFacts, Facts, ModelFacts, Other, Plan
from lightllmd.config.resolve import report, resolve
from lightllmd.errors import ConfigInvalid, Problem
from long_run import LONG
from several_devices import gpus

SHAPE = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_hidden_layers": 24,
    "head_dim": 128,
    "vocab_size": 32000,
}
GPU = DeviceFacts("cuda", "Test GPU", 1, 80 * 10**9, 78 * 10**9, ["bfloat16"], 8)
CPU = DeviceFacts("cpu", "Test CPU", 1, 80 * 10**9, 78 * 10**9, ["bfloat16"], 8)
GB = 10**9
COLUMN = 3 * 2048 * 24  # parameters for each of the MLP's columns
BESIDES_MLP = architecture_of("llama", SHAPE).parameters - 8192 * COLUMN


def model(gigabytes: float = 4, **shape: Any) -> ModelFacts:
    """With as wide an MLP as makes so many gigabytes."""
    inner = 1 + max(0, int(gigabytes * GB / 2) - BESIDES_MLP) // COLUMN
    config, elements = SHAPE | {"intermediate_size": inner} | shape, BESIDES_MLP + inner * COLUMN
    return ModelFacts("/m", "dummy", "llama", config, [], elements, 0, "bfloat16", 8192, [2], False, False)


def configured(entries: dict[str, dict[str, Any]], **flags: Any) -> Config:
    """`entries`: overrides by name, beside their model_dir."""
    config = load(None, {"model_dir": "/first", "supervisor.swap": "beside", "load_way": "DUMMY", **flags})
    named = {name: {"model_dir": f"/{name}", **entry} for name, entry in entries.items()}
    return msgspec.structs.replace(config, models=named)


def planned(config: Config, known: dict[str, ModelFacts], device: DeviceFacts = GPU) -> Plan:
    """`known`: by model_dir without the slash; what is not there can't be read. As the probe child would tell it."""
    found = {}
    for name, params in models.others(config).items():
        facts = known.get((params.model_dir or "")[1:])
        found[name] = Other(params, facts, "" if facts else f"{params.model_dir} does not exist")
    return resolve(config, Facts(known[(config.params.model_dir or "")[1:]], device, found), "/etc/test.toml")


def refused(config: Config, known: dict[str, ModelFacts], device: DeviceFacts = GPU) -> Problem:
    with pytest.raises(ConfigInvalid) as raised:
        planned(config, known, device)
    (problem,) = raised.value.problems
    assert raised.value.short_of is not None
    needed, free = raised.value.short_of
    assert needed > free
    return problem


def own(plan: Plan) -> int:
    return plan.budget.needed - plan.budget.reserve


def reason(plan: Plan, name: str) -> str:
    return next(derived.reason for derived in plan.derived if derived.name == name)


# --- what is kept ---------------------------------------------------------------------------------------------------


def test_of_two_equal_models_each_has_half_of_what_their_weights_leave() -> None:
    config, known = configured({"first": {}, "second": {}}), {"first": model(), "second": model()}
    plan = planned(models.with_model(config, "first"), known)
    assert plan.budget.needed <= plan.budget.available
    assert plan.budget.reserve == pytest.approx(own(plan), rel=1e-3)
    assert plan.budget.available - plan.budget.needed < 10**6
    assert plan.budget.rows[-1].name == RESERVE_ROW
    text = report(plan)
    assert "room for second beside it: " in text
    assert f"slots x {budget.size(24 * 2 * 8 * 128 * 2)}" in text
    assert "with room for second beside it" in reason(plan, "max_total_token_num")
    again = planned(models.with_model(config, "second"), known)
    assert again.max_total_token_num == plan.max_total_token_num


def test_the_largest_other_model_is_reckoned_with_and_only_one() -> None:
    known = {"first": model(), "small": model(1), "large": model(20), "middle": model(8)}
    plan = planned(models.with_model(configured({name: {} for name in known}), "first"), known)
    assert "room for large beside it" in plan.budget.rows[-1].how
    two = planned(models.with_model(configured({"first": {}, "large": {}}), "first"), known)
    assert plan.max_total_token_num == two.max_total_token_num


@pytest.mark.parametrize("how", ["auto", "after"])
def test_nothing_is_kept_where_room_was_not_asked_for(how: str) -> None:
    """The facts are read without the others then."""
    config = configured({"first": {}, "second": {}}, **{"supervisor.swap": how})
    plan = resolve(config, Facts(model(), GPU))
    assert plan.budget.reserve == 0
    assert RESERVE_ROW not in [row.name for row in plan.budget.rows]


def test_written_slots_are_kept_as_written_and_no_others() -> None:
    known = {"first": model(), "second": model()}
    config = configured({"first": {}, "second": {"max_total_token_num": 8000, "batch_max_tokens": 8192}})
    plan = planned(models.with_model(config, "first"), known)
    slot = 24 * 2 * 8 * 128 * 2
    assert "8000 slots" in plan.budget.rows[-1].how
    alone = resolve(models.with_model(config, "second"), Facts(model(), GPU))
    assert alone.budget.needed == plan.budget.reserve
    assert plan.max_total_token_num == (plan.budget.available - plan.budget.reserve - rest(plan)) // slot


def rest(plan: Plan) -> int:
    """Of the model itself, on a GPU: one slot is for padding."""
    return own(plan) - plan.max_total_token_num * 24 * 2 * 8 * 128 * 2


def test_a_model_that_can_use_little_leaves_the_rest_to_the_other() -> None:
    known = {"first": model(), "second": model()}
    config = configured({"first": {}, "second": {"running_max_req_size": 2, "batch_max_tokens": 8192}})
    plan = planned(models.with_model(config, "first"), known)
    assert f"{2 * 3072 + 1} slots" in plan.budget.rows[-1].how
    assert own(plan) > 4 * plan.budget.reserve


def test_one_models_overrides_say_nothing_of_the_next() -> None:
    config = configured({"first": {"max_req_total_len": 8000}, "second": {"data_type": "fp16"}, "third": {}})
    for name in (*config.models, None):
        served = models.with_model(config, name) if name else models.with_path(config, "/elsewhere")
        found = models.others(served)
        assert set(found) == set(config.models) - {name} | {models.TOP}  # no entry says what the top does
        for other, params in found.items():
            assert params == (config if other == models.TOP else models.with_model(config, other)).params


def test_the_model_at_the_top_counts_as_one_unless_it_has_a_name() -> None:
    unnamed, named = configured({"second": {}, "third": {}}), configured({"first": {}, "second": {}})
    assert list(models.others(unnamed)) == ["second", "third"]
    assert list(models.others(models.with_model(unnamed, "second"))) == ["third", models.TOP]
    assert list(models.others(models.with_model(named, "second"))) == ["first"]
    assert list(models.others(models.with_path(unnamed, "/first"))) == ["second", "third"]
    assert models.others(models.with_path(configured({}), "/second")) == {}


# --- what doesn't fit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [GPU, CPU], ids=["GPU", "CPU"])
def test_written_slots_that_leave_no_room_are_refused_with_the_number_that_does(device: DeviceFacts) -> None:
    known = {"first": model(), "second": model(20)}

    def config(slots: int) -> Config:
        return models.with_model(configured({"first": {"max_total_token_num": slots}, "second": {}}), "first")

    problem = refused(config(500_000), known, device)
    assert problem.key == "max_total_token_num"
    assert 'for second beside it, which supervisor.swap = "beside" keeps' in problem.message
    assert "70.2 GB (0.9 of the free memory) may be used" in problem.message
    most = int(problem.message.split("at most max_total_token_num = ")[1].split(" ")[0])
    assert 100_000 < most < 500_000
    assert planned(config(most), known, device).max_total_token_num == most
    refused(config(most + 1), known, device)


def test_two_models_that_can_never_be_in_memory_together_are_told() -> None:
    problem = refused(configured({"first": {}, "second": {}}), {"first": model(30), "second": model(50)})
    assert problem.key == "supervisor.swap"
    assert "for second beside it" in problem.message
    alone = refused(configured({"first": {}, "second": {}}), {"first": model(90), "second": model(5)})
    assert alone.key == "model_dir"


def test_what_cant_be_served_hinders_nothing_and_is_named() -> None:
    known = {"first": model(), "second": model(), "huge": model(200), "odd": model(head_dim=100)}
    config = models.with_model(configured({name: {} for name in (*known, "gone")}), "first")
    plan = planned(config, known)
    assert "room for second" in plan.budget.rows[-1].how
    assert "/gone does not exist" in reason(plan, "room for gone")
    assert "does not fit" in reason(plan, "room for huge")
    assert "head_dim 100" in reason(plan, "room for odd")
    assert "room for gone" in report(plan)
    without = planned(models.with_model(configured({"first": {}, "gone": {}}), "first"), known)
    assert without.budget.reserve == 0


def test_the_probe_tells_what_it_cant_read_of_the_others_and_goes_on(tmp_path: Path) -> None:
    for name in ("first", "second", "broken"):
        (tmp_path / name).mkdir()
        text = json.dumps(SHAPE | {"torch_dtype": "bfloat16"})
        (tmp_path / name / "config.json").write_text(text[:-9] if name == "broken" else text)
    entries = {name: {"model_dir": str(tmp_path / name)} for name in ("first", "second", "broken", "gone")}
    config = configured(entries, model_dir=str(tmp_path / "first"), **{"engine.device": "cpu"})
    asked = {
        "model_dir": config.params.model_dir,
        "load_way": "DUMMY",
        "device": "cpu",
        "others": models.others(config),
    }
    done = subprocess.run(
        [sys.executable, "-m", "lightllmd.probe"],
        input=msgspec.json.encode(asked),
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    facts = msgspec.json.decode(done.stdout.splitlines()[-1], type=Facts)
    assert {name: other.model is not None for name, other in facts.others.items()} == {
        "second": True,
        "broken": False,
        "gone": False,
    }
    assert "does not exist" in facts.others["gone"].fault
    assert "no valid JSON" in facts.others["broken"].fault


# --- any chain of swaps ---------------------------------------------------------------------------------------------

ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "max_total_token_num": st.integers(8192, 400_000),
        "running_max_req_size": st.integers(1, 2000),
        "batch_max_tokens": st.integers(8192, 30_000),
        "data_type": st.sampled_from(["bf16", "fp32"]),
    },
)
MODELS = st.builds(
    model,
    st.floats(0.1, 40),
    num_hidden_layers=st.integers(1, 80),
    num_key_value_heads=st.sampled_from([1, 2, 8, 16]),
    vocab_size=st.integers(300, 250_000),
)


@settings(deadline=None, max_examples=100 if LONG else 25)
@given(
    known=st.lists(st.tuples(MODELS, ENTRIES), min_size=2, max_size=5),
    free=st.integers(10 * GB, 300 * GB),
    kind=st.sampled_from(["cpu", "cuda"]),
    total=st.integers(2, 8192),
    fraction=st.floats(0.3, 1),
)
def test_any_model_fits_beside_any_other(
    known: list[tuple[ModelFacts, dict[str, Any]]], free: int, kind: str, total: int, fraction: float
) -> None:
    """Whichever was first, as long as each can be planned at all."""
    names = [*(f"m{n}" for n in range(len(known) - 1)), "first"]  # the last one is at the top alone
    facts = {name: facts for name, (facts, _) in zip(names, known, strict=True)}
    entries = {name: entry for name, (_, entry) in zip(names, known, strict=True) if name != "first"}
    flags = {"max_req_total_len": total, "max_req_input_len": total - 1, "engine.memory_fraction": fraction}
    config = configured(entries, **flags)
    device = msgspec.structs.replace(GPU if kind == "cuda" else CPU, memory_free=free)
    plans = {}
    for name in names:
        try:
            plans[name] = planned(models.with_model(config, name) if name in entries else config, facts, device)
        except ConfigInvalid:
            continue
    for name, plan in plans.items():
        assert plan.budget.needed <= plan.budget.available == int(free * fraction)
        written = entries.get(name, {}).get("max_total_token_num")
        assert plan.max_total_token_num == written if written else plan.max_total_token_num > total
        for other in plans:
            if other != name:
                assert own(plan) + own(plans[other]) <= plan.budget.available
                assert plan.budget.reserve > 0


@settings(deadline=None, max_examples=40 if LONG else 6)
@given(
    known=st.lists(st.tuples(MODELS, ENTRIES, st.integers(1, 3)), min_size=2, max_size=3),
    free=st.lists(st.floats(10, 300), min_size=3, max_size=3),
    replicas=st.integers(1, 3),
)
def test_any_model_fits_beside_any_other_on_each_of_several_devices(
    known: list[tuple[ModelFacts, dict[str, Any], int]], free: list[float], replicas: int
) -> None:
    """Each cut over as many of them as it says."""
    facts = {f"m{number}": facts for number, (facts, _, _) in enumerate(known)}
    entries = {f"m{number}": {**entry, "tp": tp} for number, (_, entry, tp) in enumerate(known)}
    lengths = {"max_req_total_len": 4096, "max_req_input_len": 4000, "engine.replicas": replicas}
    config = configured(entries, **lengths)
    plans = []
    for name in facts:
        try:
            plans.append(planned(models.with_model(config, name), facts, gpus(*free)))
        except ConfigInvalid:
            continue
    taken = []
    for plan in plans:
        budgets = dict(zip(plan.devices, plan.device_budgets or [plan.budget], strict=True))
        assert all(budget.needed <= budget.available for budget in budgets.values())
        assert len(budgets) == plan.ranks * plan.replicas
        taken.append(budgets)
    for one, other in itertools.combinations(taken, 2):
        for device in one.keys() & other.keys():
            both = sum(budget.needed - budget.reserve for budget in (one[device], other[device]))
            assert both <= one[device].available
            assert min(one[device].reserve, other[device].reserve) > 0
