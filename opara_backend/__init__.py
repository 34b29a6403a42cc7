"""Opara for PyTorch: `torch.compile(model, backend="opara")`.

Schedules the kernels that Inductor makes: independent ones on several CUDA streams, launched in an order that looks
at what each demands of the GPU, captured in one CUDA Graph. Importing this package compiles nothing and changes
nothing; torch finds the backend by its entry point.
"""

from opara_backend._version import __version__

__all__ = ["__version__"]
