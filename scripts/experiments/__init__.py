"""Experiments and models, each a script; what they found is in results/ and docs/."""
