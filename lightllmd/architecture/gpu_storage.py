"""Which quantised weights a GPU's kernels read as they are stored, and the memory that a matmul with one takes."""

from __future__ import annotations

from lightllmd.architecture.schemes import Scheme

BLOCK_INPUTS = 64  # of the blocks that weights of 4 and 8 bits are packed in
DENSE_ROWS, DENSE_BYTES = 2048, 32 << 20  # a weight is made dense so many rows at a time, or so many bytes if more
# fp32 sums of the programs that share a weight's inputs: three tiles of 64 by 128 for each of 132 multiprocessors.
SHARED_SUMS = 16 << 20
# Of each element of a matrix that `kernels.dequantised_linear` makes dense: its values and spread scales in fp32, and
# spread zeros before them or the dense matrix behind them.
DEQUANTISED_BYTES = 12


def packs(scheme: Scheme) -> bool:
    """Whether weights of 16-bit inputs are packed by this scheme: groups of 16 inputs or of a multiple, or none."""
    return scheme.name in ("w4a16", "w8a16") and not scheme.inputs and scheme.rows == 1 and scheme.group % 16 == 0


def dense_rows(rows: int, columns: int, item_bytes: int) -> int:
    """Rows of a packed weight that are dense at a time: few enough to stay in the second-level cache, which the matmul
    then reads them from, but enough for cuBLAS to have tiles for all multiprocessors."""
    return min(rows, max(DENSE_ROWS, DENSE_BYTES // (columns * item_bytes) // 256 * 256))


def scratch_nbytes(scheme: Scheme, shape: tuple[int, int], item_bytes: int) -> int:
    """The most that a matmul with a weight of this shape takes beside inputs and outputs."""
    rows, columns = shape
    if packs(scheme) and columns % BLOCK_INPUTS == 0:
        return dense_rows(rows, columns, item_bytes) * columns * item_bytes + SHARED_SUMS
    return rows * columns * DEQUANTISED_BYTES
