"""What the ledgers of one api worker count together."""

from __future__ import annotations

from lightllmd.ipc import messages


class Tally:
    """What all ledgers of one api worker share: whose requests they have, their numbers, the totals of their ends."""

    def __init__(self, api: int, epoch: int) -> None:
        self.api = api
        self.epoch = epoch
        self.counts = {"ok": 0, "cancelled": 0, "failed": 0, "resumed": 0}
        self._sequence = 0

    def next_number(self) -> int:
        """A request's, that no other request of any api worker has."""
        self._sequence += 1
        return messages.request_id(self.api, self.epoch, self._sequence)
