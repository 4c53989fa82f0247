"""Files: checkpoints read, written, resumed and finished by a rename."""
