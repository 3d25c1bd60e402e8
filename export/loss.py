"""What weights that came quantised lose where their blocks cannot be kept as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

MERGED = "+LoRA"
"""What the dtype of a tensor ends with where adapters were merged into it."""
_MERGED = (
    " An adapter that is merged into quantised weights has them rounded anew: --adapter-mode runtime keeps them, "
    "--precision int8 loses less."
)


@dataclass(frozen=True)
class Loss:
    """What a tensor that came quantised lost.

    dtype: of the checkpoint; format: the bundle's; blocks: how many do not have the checkpoint's values; squared_error,
    squared_norm: sums over the rows that such blocks are in.
    """

    tensor: str
    dtype: str
    format: str
    blocks: int
    squared_error: float
    squared_norm: float

    @property
    def relative(self) -> float:
        """Root mean square of the differences, over that of the values."""
        return float((self.squared_error / self.squared_norm) ** 0.5) if self.squared_norm else 0.0

    def __add__(self, other: Loss) -> Loss:
        return replace(
            self,
            blocks=self.blocks + other.blocks,
            squared_error=self.squared_error + other.squared_error,
            squared_norm=self.squared_norm + other.squared_norm,
        )


def loss_warning(losses: Sequence[Loss]) -> str:
    """All losses in a sentence, the largest by name."""
    worst, blocks = max(losses, key=lambda loss: loss.relative), sum(loss.blocks for loss in losses)
    tensors = "1 tensor" if len(losses) == 1 else f"{len(losses)} tensors"
    return (
        f"{blocks:,} blocks of {tensors} are not exactly the checkpoint's own; {worst.tensor} loses most: "
        f"{worst.dtype} as {worst.format} differs by {worst.relative:.1e} of the weights' size."
        + (_MERGED if any(loss.dtype.endswith(MERGED) for loss in losses) else "")
    )
