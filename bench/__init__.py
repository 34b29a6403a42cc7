"""Benchmarks: models, a runner, comparisons with other ways to run them, plots and recorded results."""
