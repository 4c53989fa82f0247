"""Every shipped kernel configuration, compiled ahead of time without a GPU."""
