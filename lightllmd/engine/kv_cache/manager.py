"""Which slots of the KV cache are whose: the running sequences', and the prompt cache's.

The slots of a running sequence are those of its tokens in order. The first `shared` of them belong to the radix tree,
where the sequence holds a lock on them; it has a reference of its own to each of the others. So a slot has at most one
owner unless sequences of one request have a prefix in common (siblings, beams), which then have a reference each.
"""

from __future__ import annotations

from lightllmd.engine.kv_cache.image_numbers import ImageNumbers
from lightllmd.engine.kv_cache.radix_tree import Match, Node, RadixTree
from lightllmd.engine.kv_cache.slots import Slots
from lightllmd.engine.scheduling.sequence import Sequence

# Tokens that another sequence computes in the step that is made now, and that are worth waiting for.
WORTH_WAITING = 64


class KvCacheManager:
    """Gives slots to sequences, and finds what the prompt cache has of their tokens. All counts are tokens."""

    def __init__(self, total: int, cache: bool, forks: bool) -> None:
        """`cache`: what sequences leave behind is kept for others. `forks`: sequences of one request share its
        prompt."""
        self.slots = Slots(total)
        self.cache = cache
        self._tree = RadixTree(self.slots) if cache or forks else None
        self.images = ImageNumbers()
        self._looked_up = self._found = self._evicted = 0  # tokens

    # --- how much there is ----------------------------------------------------------------------------------------
    @property
    def available(self) -> int:
        """Slots that can be had now."""
        return self.slots.free + (self._tree.evictable if self._tree is not None else 0)

    @property
    def used(self) -> int:
        """Slots that can't."""
        return self.slots.total - self.available

    @property
    def locked(self) -> int:
        """Slots of the tree that running sequences hold a lock on."""
        return self._tree.tokens - self._tree.evictable if self._tree is not None else 0

    def stats(self) -> dict[str, float]:
        """Of the prompt cache; empty without one."""
        if not self.cache or self._tree is None:
            return {}
        return {
            "cache_tokens": self._tree.tokens,
            "cache_evictable": self._tree.evictable,
            "cache_lookups_tokens": self._looked_up,
            "cache_hits_tokens": self._found,
            "cache_evicted_tokens": self._evicted,
        }

    # --- entering ---------------------------------------------------------------------------------------------------
    def find(self, sequence: Sequence, step: int) -> None:
        """Locks the longest prefix of a sequence that steps before `step` computed; `enter` or `cancel` follows."""
        if self._tree is not None and self._reads(sequence):
            match = self._match(self._tree, sequence, step)
            self._lock(sequence, match.node, match.length)

    @staticmethod
    def _match(tree: RadixTree, sequence: Sequence, step: int) -> Match:
        """As `RadixTree.match`, of the tokens that it need not feed; no image is parted that is fed whole."""
        key = sequence.key[: sequence.needless]
        match = tree.match(key, step)
        uncut = match.length if sequence.images is None else sequence.images.uncut(match.length)
        if uncut == match.length:
            return match
        return tree.match(key[:uncut], step)._replace(fresh=match.fresh)

    def cancel(self, sequence: Sequence) -> None:
        """It was found a cached prefix and is not admitted."""
        self._unlock(sequence)
        sequence.common = 0

    def enter(self, sequence: Sequence) -> None:
        """Gives it slots for all its tokens."""
        past = self._tree.slots_of(sequence.node) if self._tree is not None and sequence.node is not None else []
        new = sequence.length - len(past)
        self._make_room(new)
        room = len(sequence.prompt_ids) + max(0, sequence.params.max_new_tokens - 1)
        sequence.slots = past + self.slots.take(new, room - len(past))
        sequence.fed, sequence.target = len(past), sequence.length

    def find_more(self, sequence: Sequence, step: int) -> bool:
        """Right before the first of its tokens is fed: others may have computed more of them by now. False: they do so
        in `step` itself, and it should wait for that."""
        if self._tree is None or not self._reads(sequence):
            return True
        match = self._match(self._tree, sequence, step)
        if match.fresh >= WORTH_WAITING or (match.fresh and sequence.forks):
            return False
        if match.length > sequence.shared:
            own = sequence.slots[sequence.shared : match.length]
            self._lock(sequence, match.node, match.length)
            sequence.slots[: match.length] = self._tree.slots_of(match.node)
            sequence.fed = match.length
            self.slots.release(own)
        if self.cache:
            self._looked_up += sequence.length
            self._found += sequence.shared
        return True

    def follow(self, sequence: Sequence, lead: Sequence) -> None:
        """`sequence` has the past of `lead`, whose fork it is in."""
        self.slots.share(lead.slots[lead.shared :])
        if self._tree is not None and lead.node is not None:
            self._tree.lock(lead.node)
        sequence.node, sequence.shared, sequence.slots = lead.node, lead.shared, list(lead.slots)
        sequence.fed = sequence.target = len(sequence.slots)

    def rearrange(self, members: list[Sequence], parents: list[int]) -> list[Sequence]:
        """Beams: member i goes on from the past of member ``parents[i]``; those beyond have none. Returns whose past is
        another one now."""
        lead = members[0]
        pasts = [member.slots for member in members]
        moved = []
        for at, member in enumerate(members):
            if at < len(parents) and parents[at] != at:
                past = pasts[parents[at]]
                self.slots.share(past[lead.shared :])
                moved.append((member, list(past)))
            elif at >= len(parents) and member.slots:
                moved.append((member, []))
        for member, past in moved:
            if self._tree is not None and lead.node is not None and member.node is None:
                self._tree.lock(lead.node)
                member.node, member.shared = lead.node, lead.shared
            self.slots.release(member.slots[lead.shared :])
            member.slots, member.fed, member.target = past, len(past), max(1, len(past))
        return [member for member, past in moved if past]

    def grow(self, sequences: list[Sequence]) -> None:
        """One more slot for each."""
        self._make_room(len(sequences))
        self.slots.grow([sequence.slots for sequence in sequences])

    # --- what others may use ----------------------------------------------------------------------------------------
    def publish(self, sequence: Sequence, step: int) -> None:
        """What has been fed of its tokens, in `step` at the latest, may be read by later steps."""
        if self._tree is None or not self._shares(sequence):
            return
        key = sequence.key[: sequence.fed]
        if self._tree.match(key, step + 1).length > sequence.shared:
            return  # another sequence computed it too; its own slots stay its own
        node, _ = self._tree.insert(key, sequence.slots[: sequence.fed], step)
        self._lock(sequence, node, sequence.fed)

    def release(self, sequence: Sequence) -> None:
        """It leaves. What it knows of its tokens stays in the prompt cache."""
        own = sequence.slots[sequence.shared :]
        if self._tree is not None:
            if self.cache and self._shares(sequence):
                own = self._cache_finished(sequence)
            self._unlock(sequence)
        self.slots.release(own)
        sequence.slots, sequence.common = [], 0
        if sequence.fork is not None and not sequence.beam:
            sequence.fork.leave(sequence)
        if self._tree is not None and not self.cache:
            self._tree.clear()

    def _cache_finished(self, sequence: Sequence) -> list[int]:
        """Returns the slots that the tree does not take: of what it had, of tokens that are still out, and those that
        others have a reference to."""
        assert self._tree is not None
        slots, shared = sequence.slots, sequence.shared
        known = min(sequence.computed, sequence.length)
        known = next((at for at in range(shared, known) if self.slots.references(slots[at]) > 1), known)
        if known == shared:
            return slots[shared:]
        _, have = self._tree.insert(sequence.key[:known], slots[:known], 0)
        return slots[shared : max(shared, have)] + slots[known:]

    def flush(self) -> int:
        """Evicts what no running sequence uses; returns how many tokens that were."""
        return self._tree.clear() if self._tree is not None else 0

    # --- inside -----------------------------------------------------------------------------------------------------
    def _shares(self, sequence: Sequence) -> bool:
        """Others than the members of its fork may have its slots, and it theirs."""
        return sequence.params.use_cache and (self.cache or sequence.forks)

    def _reads(self, sequence: Sequence) -> bool:
        if sequence.params.prompt_logprobs >= 0 and not sequence.emitted:
            return False  # they need the whole prompt's logits
        return self._shares(sequence)

    def _make_room(self, count: int) -> None:
        if self._tree is not None and count > self.slots.free:
            self._evicted += self._tree.evict(count - self.slots.free)

    def _lock(self, sequence: Sequence, node: Node, length: int) -> None:
        """Instead of what it has locked."""
        assert self._tree is not None
        self._tree.lock(node)
        self._unlock(sequence)
        sequence.node = node
        sequence.shared = sequence.common = length

    def _unlock(self, sequence: Sequence) -> None:
        if self._tree is not None and sequence.node is not None:
            self._tree.unlock(sequence.node)
        sequence.node, sequence.shared = None, 0

    def check(self, running: list[Sequence]) -> None:
        """Raises RuntimeError unless each slot has as many references as the tree and `running` have to it."""
        self.slots.check()
        owners = bytearray(self.slots.total)
        for sequence in running:
            for slot in sequence.slots[sequence.shared :]:
                owners[slot] += 1
        if self._tree is not None:
            self._tree.check()
            for slot in self._tree.every_slot():
                owners[slot] += 1
        if owners != self.slots.counts:
            wrong = next(slot for slot in range(len(owners)) if owners[slot] != self.slots.references(slot))
            raise RuntimeError(
                f"slot {wrong} has {self.slots.references(wrong)} references, and {owners[wrong]} owners"
            )
