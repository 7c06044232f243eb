"""The model registry: promotion, lineage, queries and the served model."""
