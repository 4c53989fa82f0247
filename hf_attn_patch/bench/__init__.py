"""Benchmarks: one CSV schema (`results`), one FLOP count (`flops`), one file per subject."""
