"""Weights as other people save them: each file gives the right weights, or one clear refusal."""

import argparse
import json
import pickle
import tarfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from dit.checkpoint import import_diffusers, import_official
from dit.formats.foreign_weights import choose_weights, to_float32
from dit.formats.official import read_official


class State(dict):
    """A state dict with a few ways to change it."""

    def renamed(self, rename):
        return State({rename(name): value for name, value in self.items()})

    def mapped(self, change):
        return State({name: change(value) for name, value in self.items()})

    def but(self, **changes):
        """Change tensors by names with __ for dots; None removes one."""
        changed = {**self, **{name.replace("__", "."): value for name, value in changes.items()}}
        return State({name: value for name, value in changed.items() if value is not None})


@pytest.fixture(scope="module")
def state(small_model):
    """The weights of a small DiT."""
    return State({name: value.clone() for name, value in small_model().state_dict().items()})


def sharded(folder, state, *, suffix="safetensors", index="model.safetensors.index.json", **listed):
    """Write a state dict in two shards with their index, with further entries in the index."""
    names = sorted(state)
    parts = [names[: len(names) // 2], names[len(names) // 2 :]]
    files = [f"model-0000{number}-of-00002.{suffix}" for number in (1, 2)]
    for part, file in zip(parts, files, strict=True):
        (save_file if suffix == "safetensors" else torch.save)({name: state[name] for name in part}, folder / file)
    weight_map = {name: file for part, file in zip(parts, files, strict=True) for name in part}
    (folder / index).write_text(json.dumps({"weight_map": weight_map | listed}))
    return folder


def saved(content, name="weights.pt"):
    """Return a maker of a PyTorch file or a safetensors file, for `CASES`."""

    def make(folder, state):
        (save_file if name.endswith(".safetensors") else torch.save)(plain(content(state)), folder / name)
        return folder / name

    return make


def plain(content):
    """Return content without `State`, which a file of weights cannot hold."""
    return {key: plain(value) for key, value in content.items()} if isinstance(content, dict) else content


HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
PLAIN = [
    ("a bare state dict", saved(lambda s: dict(s)), ""),
    ("safetensors under another name", saved(lambda s: dict(s), "a.safetensors"), ""),
    (
        "an official training",
        saved(lambda s: {"model": s, "ema": s, "opt": {}, "args": argparse.Namespace()}),
        "ema and",
    ),
    ("averaged weights alone", saved(lambda s: {"ema": s}), "ema"),
    ("an average without weights", saved(lambda s: {"ema": s, "model": None, "step": 3}), "ema (not model, step)"),
    ("trained weights alone", saved(lambda s: {"model": s, "ema": {}}), "model (not ema)"),
    ("a state_dict", saved(lambda s: {"state_dict": s, "epoch": 3, "optimizer": {}}), "state_dict (not epoch, optim"),
    ("wrappers in wrappers", saved(lambda s: {"state_dict": {"model": {"module": s}}}), "state_dict.model.module"),
    ("DDP", saved(lambda s: s.renamed("module.{}".format)), "names without module."),
    ("torch.compile", saved(lambda s: s.renamed("_orig_mod.{}".format)), "names without _orig_mod."),
    ("compiled DDP", saved(lambda s: s.renamed("_orig_mod.module.{}".format)), "without _orig_mod. and module."),
    ("DDP of compiled", saved(lambda s: {"ema": s.renamed("module._orig_mod.{}".format)}), "module. and _orig_mod."),
    ("thrice wrapped", saved(lambda s: s.renamed("module._orig_mod.module.{}".format)), "without module. and _orig_m"),
    (
        "compiled blocks",
        saved(lambda s: s.renamed(lambda name: name.replace("blocks.1.", "blocks.1._orig_mod."))),
        "names without _orig_mod.",
    ),
    (
        "FSDP with recomputation",
        saved(lambda s: s.renamed(lambda n: n.replace("blocks.0.", "blocks.0._fsdp_wrapped_module."))),
        "names without _fsdp_wrapped_module.",
    ),
    (
        "torch's average",
        saved(lambda s: {"n_averaged": torch.tensor(7), **s.renamed("module.{}".format)}),
        "names without n_averaged and module.",
    ),
    (
        "model. and ema. in a safetensors file",
        saved(lambda s: s.renamed("model.{}".format) | s.mapped(torch.clone).renamed("ema.{}".format), "a.safetensors"),
        "names without ema. and model.",
    ),
    ("a prefix of Lightning", saved(lambda s: {"state_dict": s.renamed("model.{}".format)}), "names without model."),
    ("torch's format before zip", lambda folder, s: old_format(folder / "old.pth", s), ""),
    ("double precision", saved(lambda s: s.mapped(torch.Tensor.double)), "float64 converted to float32"),
    ("parameters", saved(lambda s: s.mapped(torch.nn.Parameter)), ""),
    ("views of one buffer", saved(lambda s: views(s)), ""),
    ("not contiguous", saved(lambda s: s.mapped(lambda v: v.mT.contiguous().mT if v.ndim == 2 else v)), ""),
    ("shards", lambda folder, s: sharded(folder, s), "the shards of model.safetensors.index.json"),
    ("shards of PyTorch", lambda folder, s: sharded(folder, s, suffix="bin"), "the shards of"),
    ("an index", lambda folder, s: sharded(folder, s) / "model.safetensors.index.json", "the shards of"),
    ("shards of DDP", lambda folder, s: sharded(folder, s.renamed("module.{}".format)), "names without module."),
    ("safetensors named .pt", saved(lambda s: dict(s), "a.safetensors"), ""),
]


def old_format(file, state):
    torch.save(dict(state), file, _use_new_zipfile_serialization=False)
    return file


def views(state):
    """The same weights as views of one tensor."""
    flat = torch.cat([value.reshape(-1) for value in state.values()])
    parts = flat.split([value.numel() for value in state.values()])
    return {name: part.view_as(value) for part, (name, value) in zip(parts, state.items(), strict=True)}


@pytest.mark.parametrize(("make", "taken"), [case[1:] for case in PLAIN], ids=[case[0] for case in PLAIN])
def test_weights_are_found_whatever_is_around_them(state, tmp_path, tiny_autoencoder, make, taken):
    found = import_official(make(tmp_path, state), tmp_path / "out", num_heads=4, autoencoder=str(tiny_autoencoder))
    for which in ("ema", "model"):
        weights = found.weights(which)
        assert weights.keys() == state.keys()
        assert all(torch.equal(weights[name], value) for name, value in state.items())
    source = found.config["source"]
    assert taken in source.get("taken", "") and bool(taken) == ("taken" in source)


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_the_content_of_a_file_counts_and_not_its_suffix(state, tmp_path, name):
    (save_file if name == "weights.pt" else torch.save)(dict(state), tmp_path / name)
    assert read_official(tmp_path / name, num_heads=4).ema.keys() == state.keys()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors", "shards"])
def test_half_precision_becomes_float32(state, tmp_path, dtype, name):
    half = state.mapped(lambda value: value.to(HALF[dtype]))
    path = sharded(tmp_path, half) if name == "shards" else saved(lambda s: dict(s), name)(tmp_path, half)
    found = read_official(path, num_heads=4)
    assert found.taken.endswith(f"{dtype} converted to float32")
    assert all(torch.equal(found.ema[name], value.float()) for name, value in half.items())
    assert {value.dtype for value in found.ema.values()} == {torch.float32}


def test_average_and_weights_stay_apart(state, tmp_path):
    doubled = state.mapped(lambda value: 2 * value)
    nested = {"model": state.renamed("module.{}".format), "ema": doubled}
    flat = state.renamed("model.{}".format) | doubled.renamed("ema.{}".format)
    inside = {"state_dict": {"model": state, "ema_model": doubled}}
    for content in (nested, flat, inside):
        found = choose_weights(content, "a.pt")
        assert all(torch.equal(found.model[name], value) for name, value in state.items())
        assert all(torch.equal(found.ema[name], value) for name, value in doubled.items())


def test_one_state_dict_stays_one_object(state):
    for content in (state, {"ema": state}, state.renamed("module.{}".format), state.renamed("model.{}".format)):
        found = choose_weights(content, "a.pt")
        assert found.model is found.ema


class Code:
    """Calls a function when it is unpickled."""

    def __reduce__(self):
        return (print, ("executed",))


def written(name, data):
    def make(folder, state):
        (folder / name).write_bytes(data(folder, state) if callable(data) else data)
        return folder / name

    return make


def truncated(name, keep):
    def make(folder, state):
        file = saved(lambda s: dict(s), name)(folder, state)
        file.write_bytes(file.read_bytes()[:keep])
        return file

    return make


def tar_of(folder, state):
    """A tar, which torch wrote before it wrote pickles."""
    with tarfile.open(folder / "weights.pt", "w") as tar:
        (folder / "pickle").write_bytes(b"x")
        tar.add(folder / "pickle", "pickle")
    return folder / "weights.pt"


def script(folder, state):
    """A TorchScript archive, which holds code."""
    torch.jit.script(torch.nn.Linear(2, 2)).save(folder / "weights.pt")
    return folder / "weights.pt"


def with_duplicate(folder, state):
    """Shards of which the second has a tensor of the first too."""
    folder = sharded(folder, state)
    names = sorted(state)
    second = {name: state[name] for name in names[len(names) // 2 :]} | {names[0]: state[names[0]]}
    save_file(second, folder / "model-00002-of-00002.safetensors")
    return folder


def without_shard(folder, state):
    (sharded(folder, state) / "model-00002-of-00002.safetensors").unlink()
    return folder


def two_indexes(folder, state):
    sharded(folder, state)
    return sharded(folder, state, index="other.safetensors.index.json")


FUSED, SQUARE = "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc1.weight"
NAN, INFINITE = float("nan"), float("inf")
OTHER = "these weights are of another model"
NEITHER = "neither those of a DiT nor of a U-ViT"
REFUSED = [
    ("empty file", written("a.pt", b""), "cannot be read"),
    ("empty safetensors", written("a.safetensors", b""), "cannot be read"),
    ("text", written("a.pt", b"not weights"), "cannot be read"),
    ("html", written("a.safetensors", b"<!doctype html><title>404</title>"), "cannot be read"),
    ("git lfs pointer", written("a.pt", b"version https://git-lfs.github.com/spec/v1\noid"), "Git LFS pointer"),
    ("cut off zip", truncated("a.pt", 5000), "cannot be read"),
    ("cut off header", truncated("a.safetensors", 100), "cannot be read"),
    ("cut off values", truncated("a.safetensors", -8), "cannot be read"),
    ("header of garbage", written("a.safetensors", (40).to_bytes(8, "little") + b"{" + b"\xff" * 60), "cannot be read"),
    ("huge header", written("a.safetensors", (2**60).to_bytes(8, "little") + b"{}"), "cannot be read"),
    ("tar", tar_of, "cannot be read"),
    ("TorchScript", script, "cannot be read|would run code"),
    ("code", saved(lambda s: {**s, "hook": Code()}), "refers to .*print, which would run code"),
    (
        "a bare pickle of code",
        written("a.pt", lambda f, s: pickle.dumps(Code(), 2)),
        "refers to .*, which would run co",
    ),
    ("code in the arguments", saved(lambda s: {"ema": s, "args": Code()}), "which would run code"),
    ("a list", saved(lambda s: list(s.values())), "contains a list, expected a dict of tensors"),
    ("a tensor", saved(lambda s: s[FUSED]), "contains a Tensor, expected a dict of tensors"),
    ("an empty dict", saved(lambda s: {}), f"{NEITHER}: found nothing"),
    ("an empty state_dict", saved(lambda s: {"state_dict": {}}), f"{NEITHER}: found state_dict"),
    ("an optimizer", saved(lambda s: {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []}), NEITHER),
    (
        "names of numbers",
        saved(lambda s: {**s, 0: torch.zeros(1)}),
        "a dict with the key 0, .*expected a dict of tensors by name",
    ),
    ("numbers for tensors", saved(lambda s: s.but(pos_embed=3)), f"{NEITHER}: found"),
    ("a string", saved(lambda s: s.but(blocks__0__attn__qkv__bias="none")), r"found a str, expected \(96,\)"),
    ("shadow parameters", saved(lambda s: {"shadow_params": list(s.values()), "decay": 0.9}), NEITHER),
    ("another network", saved(lambda s: {"conv1.weight": torch.zeros(4, 3, 7, 7)}), NEITHER),
    ("a ViT", saved(lambda s: {**s.renamed(lambda n: n.replace("x_embedder", "patch_embed"))}), NEITHER),
    ("a missing tensor", saved(lambda s: s.but(blocks__1__mlp__fc2__bias=None)), r"fc2.bias: found nothing, expected"),
    (
        "a missing block",
        saved(lambda s: State({k: v for k, v in s.items() if "blocks.1" not in k or "fc1" in k})),
        OTHER,
    ),
    ("one tensor too many", saved(lambda s: s.but(more=torch.zeros(2))), r"more: found \(2,\), expected nothing"),
    (
        "a transposed tensor",
        saved(lambda s: {**s, FUSED: s[FUSED].T.contiguous()}),
        r"found \(32, 96\), transposed, exp",
    ),
    (
        "all layers transposed",
        saved(lambda s: s.mapped(lambda v: v.T.contiguous() if v.ndim == 2 else v)),
        rf"{OTHER}(.|\n)*transposed",
    ),
    (
        "another width of an MLP",
        saved(lambda s: {**s, SQUARE: torch.zeros(96, 32)}),
        r"found \(96, 32\), expected \(128",
    ),
    ("a zero-size tensor", saved(lambda s: {**s, FUSED: torch.zeros(0, 32)}), r"qkv.weight: found \(0, 32\), expected"),
    ("a scalar", saved(lambda s: s.but(final_layer__linear__weight=torch.tensor(1.0))), NEITHER),
    ("patches without size", saved(lambda s: s.but(x_embedder__proj__weight=torch.zeros(32, 4, 0, 0))), NEITHER),
    ("NaN", saved(lambda s: {**s, FUSED: torch.full_like(s[FUSED], NAN)}), "qkv.weight is NaN or infinite in 3,072 of"),
    ("infinite in safetensors", saved(lambda s: {**s, FUSED: s[FUSED] * INFINITE}, "a.safetensors"), "NaN or infinite"),
    ("too large for float32", saved(lambda s: {**s, FUSED: s[FUSED].double() * 1e300}), "qkv.weight is NaN or infini"),
    ("integers", saved(lambda s: {**s, FUSED: s[FUSED].to(torch.int8)}), "qkv.weight is int8, expected one of float16"),
    ("complex", saved(lambda s: {**s, FUSED: s[FUSED].to(torch.complex64)}), "qkv.weight is complex64"),
    ("float8", saved(lambda s: {**s, FUSED: s[FUSED].to(torch.float8_e4m3fn)}), "qkv.weight is float8_e4m3fn"),
    ("sparse", saved(lambda s: {**s, FUSED: s[FUSED].to_sparse()}), "is no dense tensor|cannot be read"),
    ("without values", saved(lambda s: {**s, FUSED: s[FUSED].to("meta")}), "is no dense tensor|cannot be read"),
    ("a table without bytes", saved(lambda s: s.but(a=torch.zeros(1).expand(9**9))), "the values of every tensor"),
    (
        "a hidden table without bytes",
        saved(lambda s: {"a": {"b": {"c": [torch.zeros(1).expand(9**9)]}}}),
        "the values of every tensor",
    ),
    ("one name twice", saved(lambda s: s | s.renamed("module.{}".format)), "both of which are"),
    ("a missing shard", without_shard, "found 1 of 2 shards; model-00002-of-00002.safetensors is missing"),
    ("a tensor in two shards", with_duplicate, "model-00002.* which another shard is listed to hold"),
    (
        "a tensor that no shard has",
        lambda folder, s: sharded(folder, s, more="model-00001-of-00002.safetensors"),
        "model-00001-of-00002.safetensors lacks more, which is listed for it",
    ),
    ("a shard elsewhere", lambda folder, s: sharded(folder, s, more="../x.safetensors"), r"\.\./x"),
    ("an index of nothing", written("a.safetensors.index.json", b"{}"), "found no index of shards"),
    ("a broken index", written("a.safetensors.index.json", b"{"), "found no index of shards"),
    ("two indexes", two_indexes, "found 2 indexes of shards"),
    ("no file", lambda folder, s: folder / "none.pt", "no weights at"),
]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(("make", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_a_wrong_file_gives_one_clear_error(state, tmp_path, capfd, make, message):
    (tmp_path / "in").mkdir()
    path = make(tmp_path / "in", state)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        import_official(path, tmp_path / "out", num_heads=4)
    assert hasattr(caught.value, "found"), "one of raydit's errors"
    assert not (tmp_path / "out").exists() and "executed" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({"model": "DiT-S/2"}, rf"{OTHER}(.|\n)*The weights look like a DiT of no named size"),
        ({"model": "U-ViT-S/2"}, rf"{OTHER}"),
        ({"num_heads": 5}, "hidden_size is 32, expected a multiple of num_heads = 5"),
        ({"num_heads": 4, "depth": 3}, r"blocks.2.*found nothing"),
        ({"num_heads": 4, "qk_norm": True}, r"k_norm.weight: found nothing"),
        ({"num_heads": 4, "conditioning": "cross_attention"}, OTHER),
        ({"num_heads": 4, "learn_sigma": False}, r"final_layer.linear.bias: found \(32,\), expected \(16,\)"),
        ({"num_heads": 4, "num_classes": 12}, r"embedding_table.weight: found \(11, 32\), expected \(13, 32\)"),
    ],
    ids=lambda value: " ".join(f"{key}={each}" for key, each in value.items()) if isinstance(value, dict) else "",
)
def test_weights_of_another_model_than_the_one_named_are_refused(state, tmp_path, known, message):
    save_file(dict(state), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        read_official(tmp_path / "a.safetensors", **known)


def test_float32_keeps_the_memory_of_tensors_that_have_their_own(state):
    converted = to_float32(state, "a.pt")
    assert all(converted[name].data_ptr() == value.data_ptr() for name, value in state.items())


def test_shards_with_other_values_than_weights_are_refused(state, tmp_path):
    bias = "final_layer.linear.bias"
    save = {"safetensors": state[bias].to(torch.float8_e5m2), "bin": {"values": state[bias]}}
    for (suffix, value), kind in zip(save.items(), ("float8_e5m2", "no dense tensor"), strict=True):
        (tmp_path / suffix).mkdir()
        folder = sharded(tmp_path / suffix, {**state, bias: value}, suffix=suffix)
        with pytest.raises(ValueError, match=f"the tensor {bias} is {kind}, expected one of float16"):
            read_official(folder, num_heads=4)


def test_a_pipeline_with_other_values_than_weights_is_refused(tmp_path, small_model, save_model, tiny_autoencoder):
    from dit.checkpoint import export_diffusers

    folder = export_diffusers(save_model(small_model()), tmp_path / "pipeline", autoencoder=tiny_autoencoder)
    weights = next((folder / "transformer").glob("*.safetensors"))
    tensors = load_file(weights)
    for dtype, name in ((torch.int8, "int8"), (torch.float8_e4m3fn, "float8_e4m3fn")):
        save_file({key: value.to(dtype) for key, value in tensors.items()}, weights)
        with pytest.raises(ValueError, match=f"is {name}, expected one of float16"):
            import_diffusers(folder, tmp_path / "out")
    weights.unlink()
    torch.save({"state_dict": tensors}, weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match="the tensor state_dict is no dense tensor, expected one of float16"):
        import_diffusers(folder, tmp_path / "out")
    (folder / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="model_index.json: found no JSON object"):
        import_diffusers(folder, tmp_path / "out")
