"""Memory, planned before anything is loaded: what the weights, the worst step and each KV slot take. Pure arithmetic.

All sizes in bytes, for one device; with several, each has a budget of its own (`rank_budget`). The engine measures what
it really took; this is the only place that decides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from lightllmd.architecture.dtypes import ITEM_BYTES
from lightllmd.architecture.family import Architecture
from lightllmd.architecture.kv_layout import KvLayout
from lightllmd.architecture.outline import Outline
from lightllmd.architecture.ranks import ALONE, Rank
from lightllmd.architecture.spec import DecoderSpec, GroupedQuery
from lightllmd.architecture.weight_schemes import ALL_DENSE, WeightSchemes
from lightllmd.config import gpu_budget
from lightllmd.config.amount import size
from lightllmd.config.bounds import GATHER_PADDING, LOGIT_ROWS, MASK_ROWS, SHORT_ROW, SPARE_WIDTH
from lightllmd.config.parameters import Config
from lightllmd.config.plan import RESERVE_ROW, Budget, BudgetRow
from lightllmd.config.weight_budget import dequantised_rows, input_rows, weights_row

# For each logit the copies that ranking makes (probabilities, sorted values and ids, running sums in fp64).
BYTES_PER_LOGIT = 64
CAPPED_BYTES = 8  # scores that are capped, and their softmax, in fp32; keys and values likewise
CPU_RUNTIME = 600_000_000  # interpreter, torch and its thread pools
MARGIN_SHARE, MARGIN_LEAST = 0.02, 256_000_000
# A CPU decodes a few sequences at a time; more KV cache than this would only take memory from other programs.
CPU_KV_CAP = 2_000_000_000


@dataclass(frozen=True)
class Demand:
    """What a model takes, all but its slots; says what is left for them."""

    rows: list[BudgetRow]  # all that does not depend on the number of slots, weights first
    available: int
    slot_bytes: int  # keys and values of one token in all layers
    gather_bytes: int = 0  # per slot: one layer's keys and values, gathered for attention
    spare_slots: int = 0  # that no request ever owns
    co_residents: tuple[CoResident, ...] = ()  # models for any one of which there has to be room beside this one
    processes: int = 1  # that take it together

    @property
    def rest(self) -> int:
        """All that does not depend on the number of slots."""
        return sum(row.bytes for row in self.rows) + self.spare_slots * self.slot_bytes

    @property
    def slot_cost(self) -> int:
        """Bytes that one more slot takes, all told."""
        return self.slot_bytes + self.gather_bytes

    @property
    def alone(self) -> int:
        """Left for slots where there is no co-resident; negative when even the rest does not fit."""
        return self.available - self.rest

    @property
    def room(self) -> int:
        """Left for slots."""
        return min([self.alone, *(co_resident.leaves(self.alone) for co_resident in self.co_residents)])

    @property
    def spare_room(self) -> int:
        """As `most_slots`, in slots; negative where there is no room even for none."""
        return self.room // self.slot_cost

    @property
    def most_slots(self) -> int:
        """That fit into `room`."""
        return max(0, self.spare_room)

    def largest_co_resident(self, slots: int) -> CoResident | None:
        """That takes the most beside so many slots of this one."""
        kv = slots * self.slot_cost
        return max(self.co_residents, key=lambda co_resident: co_resident.takes(kv), default=None)

    def with_slots(self, slots: int) -> Budget:
        """The whole budget with a KV cache of so many slots."""
        spare = f" and {self.spare_slots} for padding" if self.spare_slots else ""
        how = f"{slots} slots{spare} x {size(self.slot_bytes)}"
        if self.processes > 1:
            how += f", in {self.processes} processes"
        slot_rows = [BudgetRow("kv cache", (slots + self.spare_slots) * self.slot_bytes, how)]
        if self.gather_bytes:
            how = f"one layer's keys and values gathered, padded x {GATHER_PADDING}"
            slot_rows.append(BudgetRow("attention", slots * self.gather_bytes, how))
        weights, *rest = self.rows
        if co_resident := self.largest_co_resident(slots):
            rest.append(co_resident.row(slots * self.slot_cost))
        return Budget(rows=[weights, *slot_rows, *rest], available=self.available)


@dataclass(frozen=True)
class CoResident:
    """A model that shall fit beside the one that is planned. Alone it would have `least` to `most` slots.

    Planned by this rule, any two models fit beside each other, X with Y for a co-resident and Y with X. Of what is
    available let P be what the rest of both leaves, and B the bytes of their slots: least <= B <= most. `leaves` grants
    X at most P - most(Y), or at most P / 2 (and P - least(Y)); and Y the like. If X has at most P - most(Y), or Y at
    most P - most(X), both fit; else each has at most P / 2, and both fit too. Neither needs to know what the other was
    given: the same models get the same slots whichever of them came before.
    """

    name: str
    demand: Demand
    least: int
    most: int  # the same as `least` where the number is written

    def leaves(self, room: int) -> int:
        """Bytes of `room` that the slots of the planned model may take; `room` is what its rest leaves."""
        left, cost = room - self.demand.rest, self.demand.slot_cost
        return max(left - self.most * cost, min(left // 2, left - self.least * cost))

    def slots(self, kv: int) -> int:
        """As many bytes of slots as the planned model's `kv`, within its bounds."""
        return min(max(self.least, kv // self.demand.slot_cost), self.most)

    def takes(self, kv: int) -> int:
        """Bytes of this model beside `kv` bytes of the planned model's slots."""
        return self.demand.rest + self.slots(kv) * self.demand.slot_cost

    def row(self, kv: int) -> BudgetRow:
        """Of the planned model's budget: what stays free for this one, whose size `takes` says."""
        slots, cost = self.slots(kv), self.demand.slot_cost
        how = f"{size(self.demand.rest)} and {slots} slots x {size(cost)}"
        return BudgetRow(RESERVE_ROW, self.takes(kv), f"room for {self.name} beside it: {how}")


@dataclass(frozen=True)
class Footprint:
    """What one rank takes of a device, or all ranks together of a CPU's memory."""

    rows: list[BudgetRow]  # all that does not depend on the number of slots, weights first
    slot_bytes: int
    gather_bytes: int = 0
    spare_slots: int = 0
    processes: int = 1

    def and_rows(self, rows: Iterable[BudgetRow]) -> Footprint:
        """With what another process takes there."""
        return replace(self, rows=[*self.rows, *rows])

    def on(self, memory_free: int, fraction: float, co_residents: tuple[CoResident, ...] = ()) -> Demand:
        """Of a device with so many bytes free, a `fraction` of which may be planned with."""
        available = int(memory_free * fraction)
        how = f"{MARGIN_SHARE:.0%}, at least {size(MARGIN_LEAST)}"
        margin = BudgetRow("margin", max(MARGIN_LEAST, int(available * MARGIN_SHARE)), how)
        rows = [*self.rows, margin]
        return Demand(
            rows, available, self.slot_bytes, self.gather_bytes, self.spare_slots, co_residents, self.processes
        )


def footprint(
    config: Config,
    architecture: Architecture | Outline,
    kind: str,
    data_type: str,
    batch_max_tokens: int,
    kv_scheme: str = "dense",
    schemes: WeightSchemes = ALL_DENSE,
    rank: Rank = ALONE,
) -> Footprint:
    """What one rank, whose `architecture` it is, takes of a device of this kind. Raises ConfigInvalid."""
    spec = architecture if isinstance(architecture, Outline) else architecture.spec
    item = ITEM_BYTES[data_type]
    kv = KvLayout.of(spec.attention, data_type, kv_scheme)
    if kind == "cuda":
        rows = gpu_budget.rows(config, architecture, data_type, item, batch_max_tokens, schemes, rank)
        return Footprint(rows, kv.slot_bytes, spare_slots=1)
    gathered = gathered_bytes(spec.attention, kv)
    rows = [
        weights_row(architecture, data_type, schemes, packed_head=data_type != "float16", on_cpu=True),
        *dequantised_rows(architecture, schemes),
        *input_rows(architecture, schemes, batch_max_tokens, on_cpu=True),
        _activations(spec, batch_max_tokens, data_type),
        *([_logits(spec, item)] if spec.generates else []),
        gpu_budget.embeddings(spec, item, config.params.running_max_req_size)
        if spec.scores is None
        else gpu_budget.scores(spec, spec.scores, item),
        _tables(config, spec),
        _prefix_masks(config, spec, item),
        _short_rows(config, gathered),
        *_communication(spec, batch_max_tokens, rank),
        BudgetRow("graphs", 0, "none on a CPU"),
        BudgetRow("runtime", CPU_RUNTIME, "the process before it has loaded anything"),
    ]
    return Footprint(rows, kv.slot_bytes, gather_bytes=GATHER_PADDING * gathered)


# --- on a CPU -----------------------------------------------------------------------------------------------------


def together(footprints: Sequence[Footprint], replicas: int) -> Footprint:
    """Of all ranks of so many replicas, which share one memory; each kind of row is said once."""
    if len(footprints) * replicas == 1:
        return footprints[0]
    rows = []
    for of_each in zip(*(footprint.rows for footprint in footprints), strict=True):
        alike = Counter((row.bytes, row.how) for row in of_each)
        how = "; ".join(
            f"{count * replicas} x {size(nbytes)}: {how}" if nbytes else how for (nbytes, how), count in alike.items()
        )
        rows.append(BudgetRow(of_each[0].name, replicas * sum(row.bytes for row in of_each), how))
    return Footprint(
        rows,
        slot_bytes=replicas * sum(footprint.slot_bytes for footprint in footprints),
        gather_bytes=replicas * sum(footprint.gather_bytes for footprint in footprints),
        processes=replicas * len(footprints),
    )


def _communication(spec: DecoderSpec | Outline, tokens: int, rank: Rank) -> Iterator[BudgetRow]:
    """Of a step's hidden states, an fp32 copy that the ranks sum, and the sum."""
    if rank.count > 1:
        each = 2 * 4 * spec.hidden
        yield BudgetRow("communication", tokens * each, f"sums over ranks in fp32: {tokens} tokens x {size(each)}")


def gathered_bytes(attention: Iterable[GroupedQuery], kv: KvLayout) -> int:
    """What attention takes of one gathered token, in the layer where that is most: its keys and values; where scores
    are capped also those of one key/value head in fp32, and twice the fp32 scores of that head's group."""

    def capped(attention: GroupedQuery) -> int:
        if attention.soft_cap is None:
            return 0
        return CAPPED_BYTES * (attention.head_dim + attention.heads // attention.kv_heads)

    return max(stored.gathered_bytes + capped(each) for stored, each in zip(kv.layers, attention, strict=True))


def _short_rows(config: Config, gathered: int) -> BudgetRow:
    """A full batch of short rows, one of them SHORT_ROW long, is padded far beyond the slots that it holds."""
    rows = config.params.running_max_req_size
    how = f"{rows} rows x {SHORT_ROW} tokens x {size(gathered)}, gathered together"
    return BudgetRow("short rows", rows * SHORT_ROW * gathered, how)


def _activations(spec: DecoderSpec | Outline, tokens: int, data_type: str) -> BudgetRow:
    """The largest prefill step: residual and norm, then either attention or the MLP's two halves and their product;
    where a norm stands behind a block, the block's result and that norm of it."""
    item = ITEM_BYTES[data_type]
    attention = max(4 * each.q_size + 3 * each.kv_size for each in spec.attention)
    if isinstance(spec, Outline):
        step = spec.step[data_type]
        per_token = step.each + attention * item
        how = f"prefill of {tokens} tokens x {size(per_token)}, as a run without weights had them"
        return BudgetRow("activations", step.fixed + tokens * per_token, how)
    inner = 3 * max(layer.feed_forward.intermediate for layer in spec.layers)
    hidden = 4 if spec.norms_results else 2
    per_token = (hidden * spec.hidden + max(attention, inner) + 2 * spec.rotated) * item
    return BudgetRow("activations", tokens * per_token, f"prefill of {tokens} tokens x {size(per_token)}")


def _logits(spec: DecoderSpec | Outline, item: int) -> BudgetRow:
    return BudgetRow(
        "logits",
        LOGIT_ROWS * spec.vocab * (BYTES_PER_LOGIT + item),
        f"{LOGIT_ROWS} rows at a time x {spec.vocab} x {BYTES_PER_LOGIT + item} B, sorted",
    )


def _tables(config: Config, spec: DecoderSpec | Outline) -> BudgetRow:
    """request->slot table and penalty history, 32 bits an entry; each row's mask, one bit for each token."""
    rows, width = config.params.running_max_req_size + 1, config.params.max_req_total_len + SPARE_WIDTH
    words = -(-spec.vocab // 32)
    how = f"request table and history, each {rows} x {width} x 4 B, and masks, {rows} x {size(4 * words)}"
    return BudgetRow("tables", rows * (2 * width + words) * 4, how)


def _prefix_masks(config: Config, spec: DecoderSpec | Outline, item: int) -> BudgetRow:
    """Which tokens are seen by those that are fed behind a prefix, or as a later part of a prompt; where scores are
    capped, the scores of so many queries, too."""
    width = config.params.max_req_total_len
    each = item + (CAPPED_BYTES if any(each.soft_cap is not None for each in spec.attention) else 0)
    how = f"tokens fed behind others, {MASK_ROWS} at a time x {width} x {each} B"
    return BudgetRow("prefix masks", MASK_ROWS * width * each, how)
