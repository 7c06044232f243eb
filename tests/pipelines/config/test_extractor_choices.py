"""The extractors that a recipe offers, and the names that it refuses."""

import pytest

from evaluation.features.extractor_names import NETWORKS, extractor_kind
from evaluation.features.extractor_table import EXTRACTORS
from pipelines.config.evaluate import EvaluateConfig
from pipelines.config.reader import apply_override
from raydit.errors import InvalidInput


def test_a_recipe_offers_every_network():
    assert NETWORKS == tuple(EXTRACTORS)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("inception", "network"),
        ("clip-vit-l-14-336px", "network"),
        ("timm:vit_base_patch16_224.augreg", "timm"),
        ("transformers:facebook/dinov2-base", "transformers"),
        ("transformers:models/tiny", "transformers"),
        ("my_module:embed", "function"),
        ("my_package.features:embed", "function"),
    ],
)
def test_names_say_what_extracts(name, kind):
    assert extractor_kind(name) == kind
    assert EvaluateConfig(extractors=(name,)).extractor == name


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("vgg", "Correct the name"),
        ("incption", 'Did you mean "inception"'),
        ("dinov2_vit_l_14", 'Did you mean "dinov2-vit-l-14"'),
        ("Efficientnet Lite1", 'Did you mean "efficientnet-lite1"'),
        ("clip", 'Did you mean "clip-vit'),
        ("timm/resnet50", 'Did you mean "timm:resnet50"'),
        ("timm:", "expected one of"),
        ("my-module:embed", "expected one of"),
        ("module:", "expected one of"),
        ("a:b:c", "expected one of"),
    ],
)
def test_other_names_are_refused_with_what_was_meant(name, hint):
    with pytest.raises(InvalidInput, match="MODULE:FUNCTION") as error:
        EvaluateConfig(extractors=("inception", name))
    assert str(error.value).startswith(f"extractors: found {name!r}") and hint in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"extractors": ("timm:a.b", "timm:a_b")}, "extractors: found 'timm:a.b' and 'timm:a_b', whose metrics"),
        ({"extractor": "infinity:f"}, "extractor: found 'infinity:f', whose fd would have a name of fd_infinity"),
        ({"reference": {"timm:resnet50": "r.npz"}}, "reference: found a path for 'timm:resnet50'.*nothing is scored"),
    ],
)
def test_names_that_would_be_confused_are_refused(settings, message):
    with pytest.raises(InvalidInput, match=message):
        EvaluateConfig(**settings)


def test_functions_are_known_by_their_names():
    chosen = ("inception", "my_module:embed", "timm:resnet50")
    assert EvaluateConfig(extractors=chosen).functions == ["my_module:embed"]
    assert EvaluateConfig(extractor="my_module:embed").functions == ["my_module:embed"]


def test_overrides_take_names_with_dots_in_quotes():
    content = {}
    apply_override(content, 'evaluate.reference."timm:resnet50.a1_in1k"=r.npz')
    apply_override(content, "evaluate.reference.inception=i.npz")
    assert content == {"evaluate": {"reference": {"timm:resnet50.a1_in1k": "r.npz", "inception": "i.npz"}}}
