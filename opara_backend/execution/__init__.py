"""Schedule -> callable: one captured CUDA Graph per shape, or the same schedule in order on the host."""
