"""One call of attention: from what transformers hands over to the kernels."""
