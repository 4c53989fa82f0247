"""Tables of README.md and docs/*.md, from results/*.csv: one file per subject;
see ../result_tables.py."""
