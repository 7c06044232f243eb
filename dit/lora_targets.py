"""The words by which a recipe may call the layers of a low-rank adapter. Imports no torch."""

KINDS = {
    "attention": r"(.+\.)?(attn\.(qkv|proj)|cross_attn\.(q|kv|proj))",
    "mlp": r"(.+\.)?mlp\.fc[12]",
    "modulation": r"(.+\.)?(adaLN_modulation|token_modulation)\.1",
}
"""Expressions for the names of the linear layers that each word stands for."""
