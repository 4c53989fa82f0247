"""Which keys a query sees: masks in compact formats, read from transformers' patterns."""
