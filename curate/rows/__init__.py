"""Decisions on tables: which rows stay, by rule, by rank and by sample."""
