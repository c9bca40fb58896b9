"""What rank 0 tells the others: each call of its runner, as one message in MessagePack."""

from __future__ import annotations

import msgspec

from lightllmd.engine.step import Masks, Step


class Load(msgspec.Struct, tag="load"):
    """`Runner.load` of the plan that the rank was configured with."""


class Prepare(msgspec.Struct, tag="prepare"):
    """`Runner.prepare`."""


class Launch(msgspec.Struct, tag="launch"):
    """`Runner.launch`. It is collected without a word: when more steps are out than the runner overlaps."""

    step: Step
    late: bool = False  # `LateMasks` follows, while the forward computes


class LateMasks(msgspec.Struct, tag="masks"):
    """Those of the step before it."""

    masks: Masks


class Stage(msgspec.Struct, tag="stage"):
    """`Runner.stage`."""


class Unstage(msgspec.Struct, tag="unstage"):
    """`Runner.unstage`."""


class Release(msgspec.Struct, tag="release"):
    """`Runner.release`."""


class Restore(msgspec.Struct, tag="restore"):
    """`Runner.restore`."""


Command = Load | Prepare | Launch | LateMasks | Stage | Unstage | Release | Restore

encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Command).decode
