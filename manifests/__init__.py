"""The contract between all parts of Warren: schemas, atomic writers, records, lineage, checks."""
