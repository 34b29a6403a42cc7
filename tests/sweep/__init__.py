"""PyTorch's own operator database, compiled with `opara` and with `inductor`: `python -m tests.sweep --help`."""
