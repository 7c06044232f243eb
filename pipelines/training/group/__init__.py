"""The workers of a training: how Ray runs them, and what they send to the driver."""
