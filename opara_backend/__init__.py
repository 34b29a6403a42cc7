"""Opara for PyTorch: `torch.compile(model, backend="opara")`.

Schedules the kernels that Inductor makes: independent ones on several CUDA streams, launched in an order that looks
at what each demands of the GPU, captured in one CUDA Graph. Importing this package compiles nothing and changes
nothing; torch finds the backend by its entry point.
"""

from typing import TYPE_CHECKING, Any

from opara_backend._version import __version__

if TYPE_CHECKING:
    from opara_backend.fallback import OparaFallbackError
    from opara_backend.report.explain import explain
    from opara_backend.report.model import Report

__all__ = ["OparaFallbackError", "Report", "__version__", "explain"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    # Importing the package is to cost nothing: these load torch, and only when asked for.
    if name == "explain":
        from opara_backend.report.explain import explain

        return explain
    if name == "Report":
        from opara_backend.report.model import Report

        return Report
    if name == "OparaFallbackError":
        from opara_backend.fallback import OparaFallbackError

        return OparaFallbackError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
