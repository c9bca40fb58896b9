"""What a model takes on each of the devices that its ranks compute on, and how many slots that leaves."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property

from lightllmd.architecture.family import Architecture
from lightllmd.architecture.outline import Outline
from lightllmd.architecture.ranks import ALONE, Rank, architecture_of_rank, sizes_of_rank
from lightllmd.architecture.weight_schemes import WeightSchemes
from lightllmd.config.budget import CoResident, Demand, Footprint, together
from lightllmd.config.devices import Groups
from lightllmd.config.plan import Budget, BudgetRow, DeviceFacts


@dataclass(frozen=True)
class Needs:
    """A group's, or of several replicas. The rank whose device has room for the fewest slots decides how many all have:
    a token is in the same slot on each rank."""

    demands: tuple[Demand, ...]  # by place in `Plan.devices`; of a CPU one for all processes
    places: tuple[str, ...]  # what they are called

    @property
    def most_slots(self) -> int:
        """That fit everywhere."""
        return min(demand.most_slots for demand in self.demands)

    @property
    def scarcest(self) -> int:
        """The place with the least room, by number."""
        return min(range(len(self.demands)), key=lambda place: self.demands[place].spare_room)

    @property
    def least(self) -> Demand:
        """Of the place with the least room."""
        return self.demands[self.scarcest]

    def budgets(self, slots: int) -> list[Budget]:
        """By place."""
        return [demand.with_slots(slots) for demand in self.demands]


@dataclass(frozen=True)
class CoResidentNeeds:
    """As `CoResident`, on all devices. What holds of two models on one device holds on each, since `least` and `most`
    are the same on all."""

    name: str
    needs: Needs
    devices: tuple[int, ...]  # by place; CUDA's numbers
    least: int
    most: int

    def on(self, device: int) -> CoResident | None:
        """On this device; None where it takes nothing there."""
        if device not in self.devices:
            return None
        return CoResident(self.name, self.needs.demands[self.devices.index(device)], self.least, self.most)


class Ranks:
    """The ranks of a model, cut so many ways. What they hold is found out once, however often a budget is made."""

    def __init__(self, architecture: Architecture | Outline, schemes: WeightSchemes, count: int) -> None:
        self._whole, self._schemes, self.count = architecture, schemes, count

    @cached_property
    def _distinct(self) -> tuple[list[tuple[Rank, Architecture | Outline]], list[int]]:
        """Ranks that hold something different, and which of them each rank is like."""
        if self.count == 1 or isinstance(self._whole, Outline):
            return [(ALONE, self._whole)], [0]
        found: dict[Hashable, int] = {}
        distinct: list[tuple[Rank, Architecture | Outline]] = []
        alike = []
        for rank in (Rank(index, self.count) for index in range(self.count)):
            sizes = sizes_of_rank(self._whole, self._schemes, rank)
            if sizes not in found:
                found[sizes] = len(distinct)
                distinct.append((rank, architecture_of_rank(self._whole, self._schemes, rank)))
            alike.append(found[sizes])
        return distinct, alike

    def footprints(self, footprint: Callable[[Architecture | Outline, Rank], Footprint]) -> list[Footprint]:
        """Of each rank, in their order."""
        distinct, alike = self._distinct
        made = [footprint(architecture, rank) for rank, architecture in distinct]
        return [made[number] for number in alike]


def needs_of(
    footprints: list[Footprint],
    groups: Groups,
    device: DeviceFacts,
    fraction: float,
    co_residents: Iterable[CoResidentNeeds] = (),
    beside: Iterable[BudgetRow] = (),
) -> Needs:
    """Of `groups` whose ranks take these `footprints`; the first device of all has what is `beside`, too."""
    kept, first = tuple(co_residents), tuple(beside)
    if device.kind == "cpu":
        all_of_them = together(footprints, groups.replicas).and_rows(first)
        others = tuple(found for other in kept if (found := other.on(0)) is not None)
        return Needs((all_of_them.on(device.memory_free, fraction, others),), (device.name,))
    demands, places = [], []
    for place, one in enumerate(groups.devices):
        rank = place % groups.ranks
        others = tuple(found for other in kept if (found := other.on(one.index)) is not None)
        taken = footprints[rank] if place else footprints[rank].and_rows(first)
        demands.append(taken.on(one.memory_free, fraction, others))
        places.append(one.title + (f", rank {rank}" if groups.ranks > 1 else ""))
    return Needs(tuple(demands), tuple(places))
