"""How many bytes of images an api worker keeps, so that they can be shown again."""

from __future__ import annotations

from lightllmd.errors import InvalidRequest, QueueFull

SETTING = "images.max_held_bytes"


class KeptImageBytes:
    """At most `most`, of all revisions. All calls come from one event loop."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0

    def take(self, size: int, instead_of: int = 0) -> None:
        """So many more, and `instead_of` fewer. Raises QueueFull where there is no room for them, InvalidRequest where
        there never is; nothing has changed then."""
        others = self.held - instead_of
        if size > self.most:
            raise InvalidRequest(f"the request's images are {size} bytes, more than {SETTING} = {self.most}")
        if others + size > self.most:
            raise QueueFull(
                f"the request's images are {size} bytes; of {SETTING} = {self.most} other requests' take {others}",
                retry_after=1.0,
            )
        self.held = others + size

    def give_back(self, size: int) -> None:
        """So many are held no more."""
        self.held -= size
