"""How many slots the KV cache has: what the devices have room for, or a refusal that says what would fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import msgspec

from lightllmd.architecture.family import Architecture
from lightllmd.architecture.outline import Outline
from lightllmd.architecture.ranks import Rank
from lightllmd.config import budget
from lightllmd.config.amount import size
from lightllmd.config.budget import Demand, Footprint
from lightllmd.config.devices import Groups, groups_of
from lightllmd.config.parameters import Config, Params
from lightllmd.config.plan import BudgetRow, Device, DeviceFacts
from lightllmd.config.quantisation import Quantisation
from lightllmd.config.rank_budget import CoResidentNeeds, Needs, Ranks, needs_of
from lightllmd.config.value import Value, batch_max_tokens

MOST_RANKS_TRIED = 16  # of a tp that is proposed where there are too few devices for it


class NoRoom(Exception):
    """What is asked for does not fit; `keys` say it, the last one that is written is the one to change."""

    def __init__(self, message: str, keys: tuple[str, ...], needed: int, available: int) -> None:
        super().__init__(message)
        self.message, self.keys, self.needed, self.available = message, keys, needed, available


def _image_embeddings(tokens: int, each: int) -> BudgetRow:
    """All tokens of the largest prefill are images': their embeddings are on each rank's device while it computes."""
    return BudgetRow("image embeddings", tokens * each, f"a step of {tokens} tokens of images x {size(each)}")


@dataclass(frozen=True)
class Fitting:
    """One model under one configuration, on the devices that its `groups` have."""

    config: Config
    architecture: Architecture | Outline
    device: DeviceFacts
    data_type: str
    quantisation: Quantisation
    groups: Groups
    can_share: Callable[[int], bool]  # whether so many ranks can share the model
    co_residents: tuple[CoResidentNeeds, ...] = ()
    beside: tuple[BudgetRow, ...] = ()  # of the visual worker, on the first device
    image_token_bytes: int = 0  # of one token's image embedding; 0: no images are served
    cut: dict[int, Ranks] = field(default_factory=dict)  # by how many ranks, as needed

    @cached_property
    def own_needs(self) -> Needs:
        """As it is configured. Raises ConfigInvalid."""
        return self.needs()

    def needs(self, params: Params | None = None, groups: Groups | None = None) -> Needs:
        """Under these parameters; unset: the configuration's, and on its own devices. Raises ConfigInvalid."""
        groups = groups or self.groups
        config = msgspec.structs.replace(self.config, params=params) if params else self.config
        tokens = batch_max_tokens(config.params).value

        def footprint(architecture: Architecture | Outline, rank: Rank) -> Footprint:
            schemes, kv_scheme = self.quantisation.schemes, self.quantisation.kv_scheme
            made = budget.footprint(
                config, architecture, self.device.kind, self.data_type, tokens, kv_scheme, schemes, rank
            )
            each = self.image_token_bytes
            return made.and_rows([_image_embeddings(tokens, each)]) if each else made

        fraction = self.config.engine.memory_fraction
        return needs_of(
            self._ranks(groups.ranks).footprints(footprint),
            groups,
            self.device,
            fraction,
            self.co_residents,
            self.beside,
        )

    def _ranks(self, count: int) -> Ranks:
        if count not in self.cut:
            self.cut[count] = Ranks(self.architecture, self.quantisation.schemes, count)
        return self.cut[count]

    def slots(self) -> Value:
        """The size of the KV cache. Raises NoRoom."""
        params = self.config.params
        written, total = params.max_total_token_num, params.max_req_total_len
        replace = msgspec.structs.replace
        needs = self.own_needs
        if written == "auto":
            if needs.most_slots > total:
                return self._auto(needs)
            largest = _largest(lambda n: self.needs(replace(params, max_req_total_len=n)).most_slots > n, 2, total)
            raise self._no_room(needs, "max_req_total_len", total, total + 1, largest)
        if needs.most_slots >= written:
            return Value(written)
        largest = _largest(lambda n: self.needs(replace(params, max_total_token_num=n)).most_slots >= n, total, written)
        if largest is not None and self.groups.lost:
            return Value(largest, f"what is left of max_total_token_num = {written}: more does not fit")
        raise self._no_room(needs, "max_total_token_num", written, written, largest)

    def _no_room(self, needs: Needs, key: str, asked: int, slots: int, largest: int | None) -> NoRoom:
        demand, total = needs.least, self.config.params.max_req_total_len
        budget = demand.with_slots(asked)
        short, keys = "does not fit", ("model_dir",)
        if len(needs.demands) > 1:
            short += f" on {needs.places[needs.scarcest]}"
        if co_resident := demand.largest_co_resident(asked):
            kept = f'{size(budget.reserve)} for {co_resident.name} beside it, which supervisor.swap = "beside" keeps'
            short = f"{short} with {kept}"
            if demand.alone > total * demand.slot_cost:
                keys = ("supervisor.swap",)
        short += f": {size(demand.available)} ({self.config.engine.memory_fraction:g} of the free memory) may be used"
        elsewhere = self._other_cut(slots)
        if largest is None:
            message = f"{short}; without KV cache it needs {_rows(demand)}"
        else:
            keys = (key,)
            message = (
                f"{key} = {asked} {short}; a slot takes {size(demand.slot_cost)}, the rest {_rows(demand)}; "
                f"at most {key} = {largest} fits"
            )
        joined = (", or it fits with " if largest is not None else "; it fits with ") + elsewhere if elsewhere else ""
        return NoRoom(message + joined, keys, budget.needed, demand.available)

    def _other_cut(self, slots: int) -> str:
        """Another tp with room for so many slots, in words; nothing where there is none."""
        ranks, replicas, cpu = self.groups.ranks, self.groups.replicas, self.device.kind == "cpu"
        if cpu:  # more ranks take more of the one memory
            for fewer in range(ranks - 1, 0, -1):
                if self._fits(groups_of(self.device, fewer, replicas), slots):
                    return f"tp = {fewer}"
            return ""
        usable = self.device.usable
        for more in range(ranks + 1, MOST_RANKS_TRIED + 1):
            left = min(replicas, len(usable) // more)
            alike = _alike(usable, more) if not left else usable[: more * left]
            if not self._fits(Groups(more, max(left, 1), alike), slots):
                continue
            if not left:
                return f"tp = {more}, on {more} GPUs like this"
            return f"tp = {more}" + (f" and engine.replicas = {left}" if left < replicas else "")
        return ""

    def _fits(self, groups: Groups, slots: int) -> bool:
        return self.can_share(groups.ranks) and self.needs(groups=groups).most_slots >= slots

    def _auto(self, needs: Needs) -> Value:
        params, demand, most = self.config.params, needs.least, needs.most_slots
        useful = params.running_max_req_size * params.max_req_total_len + 1
        rest = "after the rest"
        if co_resident := demand.largest_co_resident(most):
            rest += f" and with room for {co_resident.name} beside it"
        if len(needs.demands) > 1:
            rest += f", on {needs.places[needs.scarcest]}, which has the least room"
        chosen = Value(most, f"what {size(demand.room)} hold at {size(demand.slot_bytes)} a slot, {rest}")
        if useful < most:
            chosen = Value(useful, "running_max_req_size x max_req_total_len + 1: more could never be used")
        if self.device.kind != "cpu":
            return chosen
        capped = max(budget.CPU_KV_CAP // demand.slot_bytes, params.max_req_total_len + 1)
        if capped >= chosen.value:
            return chosen
        return Value(
            capped,
            f"{size(capped * demand.slot_bytes)} of KV cache: on a CPU no more than {size(budget.CPU_KV_CAP)} (or one "
            f"longest request) is taken unasked; {most} slots would fit, max_total_token_num = N takes as many",
        )


def _alike(devices: list[Device], count: int) -> list[Device]:
    """So many GPUs, those that aren't there like the one of `devices` with the least free."""
    scarcest = min(devices, key=lambda device: device.memory_free)
    more = range(len(devices), count)
    return [*devices, *(msgspec.structs.replace(scarcest, index=index) for index in more)][:count]


def _largest(fits: Callable[[int], bool], low: int, high: int) -> int | None:
    """The largest number in low … high that fits, where every smaller one does too; None if not even `low` does."""
    if low > high or not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _rows(demand: Demand) -> str:
    total = size(sum(row.bytes for row in demand.rows))
    return f"{total} ({', '.join(f'{row.name} {size(row.bytes)}' for row in demand.rows if row.bytes)})"
