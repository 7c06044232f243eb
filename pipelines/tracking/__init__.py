"""Tracking: runs, metrics, models and pictures on their way to MLflow."""
