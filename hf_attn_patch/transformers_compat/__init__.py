"""What differs between releases of transformers, in one folder; imports nothing of ours."""
