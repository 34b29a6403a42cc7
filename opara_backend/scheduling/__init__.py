"""KernelGraph + profile -> Schedule. Pure Python: nothing below this folder imports torch."""
