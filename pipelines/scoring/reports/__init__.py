"""From the records of shards to a report, its curves and pictures, and its log in MLflow."""
