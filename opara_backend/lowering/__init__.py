"""FX graph -> KernelGraph, through Inductor. `inductor` is imported only when something is compiled."""
