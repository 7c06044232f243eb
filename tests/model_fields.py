"""Fields of small models of every kind, to be drawn by property tests."""

from hypothesis import strategies as st

DITS = {
    "conditioning": st.sampled_from(["adaln_zero", "adaln", "cross_attention", "in_context"]),
    "learn_sigma": st.booleans(),
    "qk_norm": st.booleans(),
    "norm": st.sampled_from(["layer", "rms"]),
    "mlp": st.sampled_from(["gelu", "swiglu"]),
    "position": st.sampled_from(["sincos", "rope"]),
    "flow_time": st.sampled_from([None, "noise"]),
}
WIDE_HEADS = DITS | {
    "conditioning": st.just("adaln_zero"),
    "head_width": st.sampled_from([20, 128, 256]),
    "head_depth": st.integers(1, 2),
}
UVITS = {
    "architecture": st.just("uvit"),
    "qkv_bias": st.booleans(),
    "mlp_time_embed": st.booleans(),
    "final_conv": st.booleans(),
}
SHAPES = {
    "input_size": st.tuples(st.sampled_from([4, 8]), st.sampled_from([4, 8])),
    "in_channels": st.integers(1, 3),
    "hidden_size": st.just(48),
    "depth": st.sampled_from([2, 4]),
    "num_heads": st.sampled_from([1, 4]),
    "mlp_ratio": st.sampled_from([2.0, 4.0]),
    "num_classes": st.integers(0, 2),
    "class_dropout_prob": st.sampled_from([0.0, 0.1]),
}
"""For models that are counted: too small for anything else."""
SMALL = {"input_size": 16, "hidden_size": 96, "depth": 6, "num_heads": 4, "num_classes": 10}
"""A model that is large enough for its memory to be measured."""
