"""What the parts of a sweep tell each other: plain data. Imports no torch, so that processes start at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# unjudged: the sweep itself failed, which counts as a fault so that nobody overlooks it.
FAULTS = ("opara_wrong", "opara_raises", "crashed", "unjudged")
VERDICTS = ("agrees", "both_wrong", "skipped", *FAULTS)


@dataclass(frozen=True, order=True)
class Case:
    """The name of one sample: an operator, variant included, and the sample's place among the operator's."""

    operator: str
    index: int

    def __str__(self) -> str:
        return f"{self.operator}[{self.index}]"


@dataclass(frozen=True)
class Setting:
    """What all jobs of a sweep share.

    limit: seconds for one compilation and its calls. both: compile with inductor even what agrees with eager.
    unbacked: compile data-dependent shapes too, instead of breaking the graph. options: of `torch.compile`.
    """

    device: str
    both: bool = False
    limit: float = 120.0
    unbacked: bool = False
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Job:
    """Samples to be compiled together. only_theirs: leave `opara` out, to see whether inductor survives them."""

    cases: tuple[Case, ...]
    only_theirs: bool = False


@dataclass(frozen=True)
class Result:
    """What came of one sample: a verdict of VERDICTS, and how it was reached.

    graphs, captured, replays: graphs lowered by opara, those of them captured, and calls that replayed one.
    theirs: what the other backend did, if it was asked. together: how many samples were compiled as one function.
    """

    case: Case
    verdict: str
    detail: str = ""
    dtype: str = ""
    graphs: int = 0
    captured: int = 0
    replays: int = 0
    fallbacks: dict[str, int] = field(default_factory=dict)
    theirs: str = "not asked"
    together: int = 1
    seconds: float = 0.0
