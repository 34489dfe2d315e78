"""Near-duplicates: rows by cluster, the forest of their similarities, and which rows stay."""
