"""A model held against benchmarks: answered over an executor, scored, and set into a table."""
