"""Benchmarks: one CSV schema (`rows`), one FLOP count (`flops`), one file per subject."""
