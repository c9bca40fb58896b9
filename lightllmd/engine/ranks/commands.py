"""What rank 0 tells the others: each call of its runner, as one message in MessagePack."""

from __future__ import annotations

from typing import Literal

import msgspec

from lightllmd.engine.step import Masks, Step

Method = Literal["load", "prepare", "stage", "unstage", "release", "restore"]


class Call(msgspec.Struct, tag="call"):
    """That method of the `Runner`; its end is acknowledged."""

    method: Method


class LaunchStep(msgspec.Struct, tag="launch"):
    """`Runner.launch`. It is collected without a word: when more steps are out than the runner overlaps."""

    step: Step
    late: bool = False  # `LateMasks` follows, while the forward computes


class LateMasks(msgspec.Struct, tag="masks"):
    """Those of the step before it."""

    masks: Masks


Command = Call | LaunchStep | LateMasks

encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Command).decode
