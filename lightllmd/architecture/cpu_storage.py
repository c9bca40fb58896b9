"""What the forms take in which a CPU's linears read quantised weights."""

from __future__ import annotations

from lightllmd.architecture.schemes import Scheme

CPU_GROUPS = (256, 128, 64, 32)  # of inputs, which torch's matmul with 4 bits has


def cpu_group(scheme: Scheme, inputs: int) -> int:
    """The largest that cuts both the scheme's groups and so many inputs without a remainder, or the smallest."""
    stored = scheme.group or inputs
    return next((group for group in CPU_GROUPS if stored % group == inputs % group == 0), CPU_GROUPS[-1])


def cpu_nbytes(scheme: Scheme, shape: tuple[int, ...], item_bytes: int) -> int:
    """As `Scheme.nbytes`, of a weight whose outputs fill torch's and oneDNN's blocks of 64."""
    if scheme.values == scheme.inputs == "int8":
        return scheme.nbytes(shape, item_bytes) + 4 * shape[0]  # the sum of each row, for inputs stored unsigned
    if scheme.values != "uint4":
        return scheme.nbytes(shape, item_bytes)
    rows, columns = shape
    group = cpu_group(scheme, columns)
    groups = -(-columns // group)
    order = 4 * columns if scheme.ordered else 0
    return rows * groups * (group // 2 + 2 * item_bytes) + order  # the zero is stored as a number, too
