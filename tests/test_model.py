"""The modules of the three stages, and the whole model."""

from dataclasses import replace

import numpy as np
import paper
import pytest
import torch
from torch.testing import assert_close

from capsnb import mix, route, squash
from capsnb.capsules import to_capsules
from capsnb.energy import eq18_term
from capsnb.model import CapsuleDecoder, CapsuleEncoder, ConvAutoencoder, ExpertCapsules
from capsnb.settings import (
    PRESETS,
    AutoencoderSettings,
    DecoderSettings,
    EncoderSettings,
    SparsitySettings,
    ViewsSettings,
)
from capsnb.sparsity import explanation, share_out

B, I, J, D, E = 3, 13, 5, 7, 11  # noqa: E741
SPARSITY = SparsitySettings(gamma_first=2.0, gamma_last=2.0, cut=0.2)
both_readings = pytest.mark.parametrize("reading", ["centred", "bias-free"])


def autoencoder(reading="centred", std=0.2, **changes):
    """A small one in double precision, with biases that are not zero where it has any."""
    torch.manual_seed(29)
    module = ConvAutoencoder(AutoencoderSettings(reading=reading, channels=5, **changes)).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)
    if reading == "bias-free":
        torch.nn.init.zeros_(module.output_bias)
    return module


def encoder(**changes):
    torch.manual_seed(31)
    return CapsuleEncoder(I, E, EncoderSettings(capsules=J, dim=D, initial_deviation=1.0, **changes)).double()


def decoder(rule):
    torch.manual_seed(37)
    settings = EncoderSettings(capsules=J, dim=D, initial_deviation=1.0)
    return CapsuleDecoder(I, E, settings, DecoderSettings(rule=rule)).double()


def some_on(double):
    """Upper capsules of which 1, 2 and all 5 are on."""
    capsules = squash(double(B, J, D))
    capsules[0, 1:] = 0
    capsules[1, [0, 2, 4]] = 0
    return capsules


# Stage 1


def test_the_two_filter_banks_and_leaky_relus_are_section_4_written_as_loops(double):
    module, image = autoencoder(slope=0.3).eval(), double(1, 1, 28, 28)

    def filtered(x, filters, bias, place, stride):
        row, column = stride * place[0], stride * place[1]
        value = np.sum(filters * x[:, row : row + 9, column : column + 9]) + bias
        return max(value, 0.3 * value)

    f1, f2, b1, b2, _ = (p.detach().numpy() for p in (module.filters1, module.filters2, *module.biases))
    first = np.zeros((5, 20, 20))
    for place in np.ndindex(first.shape):
        first[place] = filtered(image[0].numpy(), f1[place[0]], b1[place[0]], place[1:], 1)
    second = np.zeros((5, 6, 6))
    for place in np.ndindex(second.shape):
        second[place] = filtered(first, f2[place[0]], b2[place[0]], place[1:], 2)
    assert_close(module.encode(image).detach(), torch.as_tensor(second)[None])


def test_the_decoder_is_the_transpose_of_the_encoder_where_both_are_linear(double):
    module = autoencoder("bias-free", slope=1.0)
    images, features = double(B, 1, 28, 28), double(B, 5, 6, 6)
    assert_close((module.encode(images) * features).sum(), (images * module.decode_logits(features)).sum())


def test_the_decoder_has_a_leaky_relu_between_its_filters_and_a_sigmoid_at_its_end(double):
    module, features = autoencoder(slope=0.3), double(B, 5, 6, 6)
    conv = torch.nn.functional.conv_transpose2d
    hidden = conv(features + module.origin, module.filters2, module.biases[2], stride=2, output_padding=1)
    logits = conv(torch.where(hidden > 0, hidden, 0.3 * hidden), module.filters1, module.output_bias)
    assert_close(module.image(features), 1 / (1 + (-logits).exp()))


def test_the_loss_is_the_cross_entropy_per_pixel_without_dropout_in_evaluation(rng):
    module = autoencoder(std=0.05).eval().float()
    images = torch.rand(B, 1, 28, 28, generator=rng)
    p = module.decode_logits(module.encode(images)).sigmoid()
    expected = -(images * p.log() + (1 - images) * (1 - p).log()).mean()
    assert_close(module(images), expected)


def test_dropout_acts_while_training_only_and_at_the_rate_of_the_settings(double):
    images = double(B, 1, 28, 28).sigmoid().float()
    dropping, keeping = autoencoder(dropout=0.5).float(), autoencoder(dropout=0.0).float()
    assert not torch.equal(dropping(images), dropping(images))
    assert_close(keeping(images), keeping.eval()(images))
    assert_close(dropping.eval()(images), keeping(images))


@both_readings
def test_the_empty_image_has_zero_features_once_centred_and_zero_features_give_it_back(reading, double):
    module, empty = autoencoder(reading), torch.zeros(1, 1, 28, 28, dtype=torch.float64)
    module.centre()
    assert_close(module.features(empty), torch.zeros(1, 5, 6, 6, dtype=torch.float64))
    images = double(B, 1, 28, 28)
    for image, features in ((empty, torch.zeros(1, 5, 6, 6).double()), (images, module.features(images))):
        assert_close(module.image(features), module.decode_logits(module.encode(image)).sigmoid())


def test_without_biases_the_origin_is_zero_and_the_output_has_the_only_bias():
    module = autoencoder("bias-free")
    module.origin.fill_(7.0)
    module.centre()
    assert_close(module.origin, torch.zeros_like(module.origin))
    assert sorted(module.state_dict()) == ["filters1", "filters2", "origin", "output_bias"]


# Stage 2


@pytest.mark.parametrize("over, agreement", [("upper", "cosine"), ("lower", "inner")])
def test_a_dense_encoder_routes_by_agreement_with_its_options_and_squashes(over, agreement, double):
    options = {"over": over, "rounds": 2, "agreement": agreement, "sharpness": 0.7}
    module, x = encoder(**options), squash(double(B, I, E))
    routed = route(x, module.W.detach(), **options)
    assert_close(module.couplings(x), routed.coupling)
    assert_close(module.encode(x).detach(), squash(routed.z))


def test_the_gradient_of_the_encoders_loss_is_minus_the_update_of_algorithm_1(double):
    module, x = encoder(), squash(double(B, I, E))
    module(x).backward()
    changes = paper.each_image(lambda x, c: paper.update(x, module.W.detach().numpy(), c), x, module.couplings(x))
    assert_close(-module.W.grad, changes.mean(0))


def test_the_same_with_sparsity_takes_the_shared_out_couplings(double):
    module, x = encoder(sparsity=SPARSITY), squash(double(B, I, E))
    W = module.W.detach()
    coupling = share_out(route(x, W).coupling, module.sparsity.mask(explanation(x, W)))
    module(x).backward()
    assert_close(-module.W.grad, eq18_term(x, W, coupling) - eq18_term(mix(x, W, coupling).x, W, coupling))
    assert (coupling == 0).any() and (coupling > 0).sum(2).min() > 1


def test_with_views_a_group_decides_together_and_its_first_views_are_learned_from(double):
    """Two groups of five views; the couplings of a view are its own, the capsules left on its group's."""
    module = encoder(sparsity=SPARSITY, views=ViewsSettings(count=5, learned=3))
    x, W = squash(double(10, I, E)), module.W.detach()
    together = torch.stack([explanation(x[:5], W).mean(0), explanation(x[5:], W).mean(0)])
    mask = module.sparsity.mask(together)
    learned, on = x[[0, 1, 2, 5, 6, 7]], mask[[0, 0, 0, 1, 1, 1]]
    coupling = share_out(route(learned, W).coupling, on)
    module(x).backward()
    assert_close(-module.W.grad, eq18_term(learned, W, coupling) - eq18_term(mix(learned, W, coupling).x, W, coupling))
    assert (explanation(x, W).argmax(1) != together.argmax(1).repeat_interleave(5)).any()


def test_views_without_sparsity_are_refused():
    with pytest.raises(ValueError, match="give sparsity settings too, or leave views out"):
        encoder(views=ViewsSettings())


def test_statistics_move_while_training_and_stay_in_evaluation(double):
    module, x = encoder(sparsity=SPARSITY), squash(double(B, I, E))
    module(x)
    assert module.sparsity.updates == 1
    assert (module.sparsity.share != 1 / J).any()
    before = {name: value.clone() for name, value in module.eval().state_dict().items()}
    module.encode(x)
    assert_close(dict(module.state_dict()), before, rtol=0, atol=0)


def test_after_training_one_capsule_is_on_for_every_image_and_takes_all_couplings(double):
    module, x = encoder(sparsity=SPARSITY).eval(), squash(double(B, I, E))
    coupling = module.couplings(x)
    assert_close(coupling.sum(2), torch.ones(B, I, dtype=torch.float64))
    winner = explanation(x, module.W.detach()).argmax(1)
    on = torch.linalg.vector_norm(module.encode(x), dim=2) > 0
    assert on.sum(1).tolist() == [1] * B and (on.int().argmax(1) == winner).all()


def test_several_capsules_left_on_after_training_share_the_couplings_that_routing_gives(double):
    module, x = encoder(sparsity=replace(SPARSITY, on_after_training=2)).eval(), squash(double(B, I, E))
    mask = module.sparsity.mask(explanation(x, module.W.detach()))
    assert_close(module.couplings(x), share_out(route(x, module.W.detach()).coupling, mask))
    assert ((module.couplings(x) > 0).all(1).sum(1) == 2).all()


@pytest.mark.parametrize("sparsity", [None, SPARSITY])
def test_the_encoder_negates_what_is_negated(sparsity, double):
    module, x = encoder(sparsity=sparsity).eval(), squash(double(B, I, E))
    assert_close(module.encode(-x), -module.encode(x))


def test_initial_weights_have_the_deviation_of_the_settings():
    module = CapsuleEncoder(101, 7, EncoderSettings(initial_deviation=0.3))
    assert_close(module.W.std(), torch.tensor(0.3), rtol=0.02, atol=0)
    assert_close(module.W.mean(), torch.tensor(0.0), rtol=0, atol=0.01)


# Stage 3


def test_the_decoder_routes_over_the_capsules_that_are_on_written_as_loops(double):
    module, capsules = decoder("gradient"), some_on(double)
    U, expected = module.U.detach(), []
    for image in capsules:
        on = image.abs().sum(1) > 0
        expected.append(torch.as_tensor(paper.routing(image[on].numpy(), U[on].numpy(), 3, "lower")[1]))
    assert_close(module.decode(capsules).detach(), torch.stack(expected))


def test_a_capsule_that_is_alone_is_coupled_fully_and_one_that_is_off_not_at_all(double):
    coupling = decoder("gradient").couplings(some_on(double))
    assert_close(coupling[0, 0], torch.ones(I, dtype=torch.float64))
    assert_close(coupling[0, 1:], torch.zeros(J - 1, I, dtype=torch.float64))
    assert_close(coupling.sum(1), torch.ones(B, I, dtype=torch.float64))


def test_the_gradient_rule_descends_the_squared_error_per_image(double):
    module, capsules, z = decoder("gradient"), some_on(double), double(B, I, E)
    expected = sum(((found - true) ** 2).sum() for found, true in zip(module.decode(capsules), z)) / B
    assert_close(module(capsules, z), expected)


def test_the_literal_rule_is_the_update_printed_in_section_4_written_as_loops(double):
    module, capsules, z = decoder("literal"), some_on(double), double(B, I, E)
    module(capsules, z).backward()
    e, U = module.couplings(capsules), module.U.detach().numpy()
    changes = paper.each_image(lambda capsules, z, e: paper.decoder_update(capsules, z, U, e), capsules, z, e)
    assert_close(-module.U.grad, changes.mean(0))


# The whole model


def test_encode_and_decode_are_the_three_stages_one_after_the_other(small_model, digits):
    images, model = digits[0][:5], small_model
    with torch.no_grad():
        scale = model.settings.encoder.input_scale
        z = to_capsules(scale * model.autoencoder.features(images), 3)
        assert_close(model.lower_preactivations(images), z)
        assert_close(model.lower_capsules(images), squash(z))
        assert_close(model.encode(images), model.encoder.encode(squash(z)))
        lower = model.decoder.decode(model.encode(images))
        features = lower.view(5, 6, 6, 2, 3).permute(0, 3, 4, 1, 2).reshape(5, 6, 6, 6)
        assert_close(model.decode(model.encode(images)), model.autoencoder.image(features / scale))
        assert_close(model.image(z), model.autoencoder.image(model.autoencoder.features(images)))
    assert_close(model.reconstruct(images), model.decode(model.encode(images)))


def test_route_gives_the_couplings_and_capsules_behind_encode(small_model, digits):
    images = digits[0][:5]
    coupling, z = small_model.route(images)
    assert_close(squash(z).detach(), small_model.encode(images))
    assert_close(coupling, small_model.encoder.couplings(small_model.lower_capsules(images)))


def test_images_do_not_see_each_other_however_many_there_are(small_model, digits):
    images = digits[0][:509]
    capsules = small_model.encode(images)
    places = [0, 249, 250, 508]
    assert_close(capsules[places], small_model.encode(images[places]))
    assert_close(small_model.decode(capsules)[places], small_model.decode(capsules[places]))


def test_zero_capsules_decode_to_the_reconstruction_of_the_empty_image(small_model):
    module = small_model.autoencoder
    expected = module.decode_logits(module.encode(torch.zeros(1, 1, 28, 28))).sigmoid()
    assert_close(small_model.decode(torch.zeros(2, 5, 7)), expected.expand(2, -1, -1, -1).detach())


def test_empty_batches_pass_through(small_model):
    assert small_model.encode(torch.zeros(0, 1, 28, 28)).shape == (0, 5, 7)
    assert small_model.decode(torch.zeros(0, 5, 7)).shape == (0, 1, 28, 28)


def test_the_order_of_the_upper_capsules_is_no_matter(small_model, small_settings, digits, rng):
    order, permuted = torch.randperm(5, generator=rng), ExpertCapsules(small_settings()).eval()
    weights = dict(small_model.state_dict())
    weights["encoder.W"] = weights["encoder.W"][:, order]
    weights["decoder.U"] = weights["decoder.U"][order]
    for name in ("share", "boost"):
        weights[f"encoder.sparsity.{name}"] = weights[f"encoder.sparsity.{name}"][order]
    permuted.load_state_dict(weights)
    images = digits[0][:31]
    assert_close(permuted.encode(images), small_model.encode(images)[:, order])
    assert_close(permuted.reconstruct(images), small_model.reconstruct(images))


def test_the_paper_sizes_are_those_of_section_4():
    model = ExpertCapsules(PRESETS["paper"])
    assert model.autoencoder.filters1.shape == (128, 1, 9, 9)
    assert model.autoencoder.filters2.shape == (128, 128, 9, 9)
    assert model.encoder.W.shape == (576, 20, 16, 8)
    assert model.decoder.U.shape == (20, 576, 8, 16)


BAD_IMAGES = {
    "not a number": (torch.full((2, 1, 28, 28), float("nan")), "images holds NaN or infinite values; check"),
    "bytes read as floats": (torch.full((2, 1, 28, 28), 255.0), r"expected \[0, 1\]; divide 8-bit images by 255"),
    "negative": (torch.full((2, 1, 28, 28), -0.5), r"images lie in \[-0.5, -0.5\]"),
    "integers": (torch.zeros(2, 1, 28, 28, dtype=torch.uint8), r"images holds torch.uint8.*images\.float\(\)"),
    "without a channel": (torch.zeros(2, 28, 28), r"shape \(2, 28, 28\), expected \(any, 1, 28, 28\)"),
    "of another size": (torch.zeros(2, 1, 32, 32), r"shape \(2, 1, 32, 32\), expected \(any, 1, 28, 28\)"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_images_that_are_not_28_by_28_numbers_from_0_to_1_are_refused(kind, small_model, as_users_run):
    images, message = BAD_IMAGES[kind]
    for method in (small_model.encode, small_model.reconstruct):
        with pytest.raises(ValueError, match=message):
            method(images)


BAD_CAPSULES = {
    "not a number": (torch.full((2, 5, 7), float("inf")), "capsules holds NaN or infinite values"),
    "integers": (torch.zeros(2, 5, 7, dtype=torch.long), r"capsules holds torch.int64.*capsules\.float\(\)"),
    "of another size": (torch.zeros(2, 7, 5), r"shape \(2, 7, 5\), expected \(any, 5, 7\)"),
}


@pytest.mark.parametrize("kind", BAD_CAPSULES)
def test_capsules_that_do_not_fit_the_model_are_refused(kind, small_model, as_users_run):
    capsules, message = BAD_CAPSULES[kind]
    with pytest.raises(ValueError, match=message):
        small_model.decode(capsules)


def test_a_capsule_size_that_does_not_divide_the_channels_is_refused(small_settings):
    settings = small_settings()
    model = ExpertCapsules(replace(settings, autoencoder=replace(settings.autoencoder, channels=7)))
    with pytest.raises(ValueError, match="7 channels do not divide into capsules of 3"):
        model.encode(torch.zeros(1, 1, 28, 28))


def test_a_model_on_an_accelerator_encodes_and_decodes_as_on_the_cpu(small_model, digits, accelerator):
    images = digits[0][:31]
    capsules, pictures = small_model.encode(images), small_model.reconstruct(images)
    small_model.to(accelerator)
    images = images.to(accelerator)
    assert_close(small_model.encode(images).cpu(), capsules, rtol=1e-2, atol=1e-3)
    assert_close(small_model.reconstruct(images).cpu(), pictures, rtol=1e-2, atol=1e-3)
