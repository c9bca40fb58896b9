"""What images take: of the device the vision tower, its connector and what they compute; of the host's memory the
embeddings that are kept. All sizes in bytes."""

from __future__ import annotations

from dataclasses import dataclass

from lightllmd.architecture.dtypes import ITEM_BYTES
from lightllmd.architecture.vision.spec import GridVitSpec, VisionSpec, VitSpec
from lightllmd.config.amount import count, size
from lightllmd.config.bounds import GRAPH_TILES
from lightllmd.config.parameters import Config
from lightllmd.config.plan import VISION_ROWS, BudgetRow

WEIGHTS, ACTIVATIONS, RUNTIME = VISION_ROWS
CUDA_RUNTIME = 700_000_000  # of the visual worker: CUDA context, cuBLAS, cuDNN
CPU_RUNTIME = 600_000_000  # interpreter, torch and its thread pools
TURNED = 16  # of each element of the queries or keys of a patch in a grid: in fp32, while they are turned
MAX_HOST_SHARE = 0.5  # of the host's free memory, for embeddings


@dataclass(frozen=True)
class VisionNeeds:
    """Of one visual worker."""

    spec: VisionSpec
    data_type: str

    @property
    def most_tokens(self) -> int:
        """Of one image."""
        return self.spec.geometry.most.tokens

    @property
    def token_bytes(self) -> int:
        """Of one token's embedding, with what further layers are given."""
        return self.spec.embedding_bytes(1, ITEM_BYTES[self.data_type])

    @property
    def image_bytes(self) -> int:
        """Of the largest image's embeddings."""
        return self.spec.embedding_bytes(self.most_tokens, ITEM_BYTES[self.data_type])

    def kept(self, host_free: int) -> int:
        """Images whose embeddings may be in host memory."""
        return int(host_free * MAX_HOST_SHARE) // self.image_bytes

    def rows(self, config: Config, kind: str) -> list[BudgetRow]:
        """What it takes of a device of this kind."""
        item, weights = ITEM_BYTES[self.data_type], self.spec.parameters
        runtime = CUDA_RUNTIME if kind == "cuda" else CPU_RUNTIME
        return [
            BudgetRow(WEIGHTS, weights * item, f"tower and connector, {count(weights)} parameters x {item} B"),
            self._activations(config.images.batch, item, kind),
            BudgetRow(RUNTIME, runtime, "the visual worker's process before it has loaded anything"),
        ]

    def _activations(self, batch: int, item: int, kind: str) -> BudgetRow:
        """A block at its widest: residual, its norm and an fp32 copy of its input; queries, keys, values, their result
        and its parts, of fused attention, which keeps no scores, or one of them turned; or the MLP's inner rows, with
        what is multiplied and the result; the pixels, in fp32, too; then the results, twice. CUDA graphs of towers that
        see squares keep what theirs takes."""
        tower = self.spec.tower
        patches, images = self.patches(batch), self._images(batch)
        grid = isinstance(tower, GridVitSpec)
        rows = 4 if isinstance(tower, GridVitSpec) and tower.gated else 3
        attention = max(5 * item, 3 * item + TURNED * grid) * tower.hidden
        inner = max(rows * item * tower.intermediate, attention)
        frames = tower.frames if isinstance(tower, GridVitSpec) else 1
        pixels = 3 * frames * tower.patch**2 * (4 + item)
        each = 2 * tower.hidden * item + inner + 4 * tower.hidden + pixels
        made = images * self.image_bytes
        graphs = GRAPH_TILES * tower.positions if kind == "cuda" and isinstance(tower, VitSpec) else 0
        captured = f" and {graphs} in CUDA graphs" if graphs else ""
        how = f"{patches} patches at a time{captured} x {size(each)}, {size(made)} for results, twice"
        return BudgetRow(ACTIVATIONS, (patches + graphs) * each + 2 * made, how)

    def patches(self, batch: int) -> int:
        """Rows of the tower at a time: those of an image are encoded together, however many tiles or patches it has."""
        tower, largest = self.spec.tower, self.spec.patches(self.spec.geometry.most)
        return largest if isinstance(tower, GridVitSpec) else max(batch * tower.positions, largest)

    def _images(self, batch: int) -> int:
        """The largest, whose results are there at a time."""
        return max(1, self.patches(batch) // self.spec.patches(self.spec.geometry.most))
