"""KV caches of this package."""
