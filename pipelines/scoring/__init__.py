"""Scoring: samples, features and references on Ray actors, protocols and reports."""
