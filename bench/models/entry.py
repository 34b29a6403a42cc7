"""What the benchmark knows about one model: how to build it, how to feed it, where it comes from.

An entry holds functions, never modules or tensors, so listing the models costs nothing. Everything the functions
return lives on the CPU in fp32 or int64 and depends on fixed seeds only; the runner moves and casts it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn

__all__ = ["BenchModel"]


@dataclass(frozen=True, kw_only=True)
class BenchModel:
    """A model of the benchmark, at full size and in a reduced size for machines without a GPU."""

    name: str
    build: Callable[[], nn.Module]
    """A fresh module in eval mode; two calls give equal weights."""
    inputs: Callable[[int], tuple[Tensor, ...]]
    """The forward's arguments for a batch size."""
    source: str
    """The paper or reference the model follows."""
    batches: tuple[int, ...]
    """Batch sizes worth measuring."""
    build_small: Callable[[], nn.Module]
    """The same topology with fewer layers, smaller widths or smaller images."""
    inputs_small: Callable[[int], tuple[Tensor, ...]]
    small: bool = False
    """Whether ``build`` and ``inputs`` are those of the reduced size."""

    def reduced(self) -> BenchModel:
        """This entry with the reduced size as the one that ``build`` and ``inputs`` give."""
        return replace(self, build=self.build_small, inputs=self.inputs_small, small=True)
