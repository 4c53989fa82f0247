"""What `measure_conversion.py` measures and on which texts."""
