"""The jobs: encode, train and evaluate on Ray, tracked in MLflow, behind one command line."""
