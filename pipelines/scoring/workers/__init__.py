"""The unit of scoring, its record, and the Ray actors that compute it."""
