"""Embeddings: the exact arithmetic, centroids, nearest clusters and near-duplicates."""
