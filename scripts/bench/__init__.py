"""Benchmarks beside those of `hf-attn bench`: on a GPU, and by other libraries."""
