"""Any network as a graph of layers: the same logits, every weight in a layer, nothing folded that is not exact."""

import copy

import pytest
import torch
from torch import nn

from compress.errors import UserError
from compress.models.canonical import canonical, difference, layers, weights_in_layers
from compress.models.folding import find_foldable, fold_batch_norm
from compress.models.inference import frozen_for_inference
from compress.models.outputs import logits
from tests.models.odd_networks import EVERY, SHAPE, Computed, Named, Pair, Shapes, make

FOLDED = {
    "Aliased": [("first", "norm")],
    "Subclasses": [("stem", "norm")],
    "Computed": [("spectral", "norm")],
    "Sequence1d": [("first", "norm")],
    "Transposed": [("down", "norm"), ("again", "norm_again")],
    "Functional": [("stem", "norm")],
    "ReadTwice": [("stem", "norm")],
}


@pytest.mark.parametrize("network", EVERY)
def test_logits_stay_when_a_network_is_taken_apart_and_folded(network):
    model = make(network)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for count in (1, 5):
        images = torch.randn(count, *SHAPE)
        with torch.no_grad():
            expected = logits(model(images))
            assert difference(canonical(model, SHAPE)(images), expected) < 1e-5
            assert difference(fold_batch_norm(model, SHAPE)(images), expected) < 1e-5
            assert difference(logits(frozen_for_inference(model, SHAPE)(images)), expected) < 1e-5
    assert find_foldable(canonical(model, SHAPE)) == FOLDED.get(network.__name__, [])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("network", EVERY)
def test_every_weight_is_that_of_a_layer(network):
    found = canonical(make(network), SHAPE)
    shared = 0.85 if network.__name__ == "Attention" else 0.99  # its token is added and multiplies nothing
    assert weights_in_layers(found) > shared
    assert len(layers(found)) >= 2
    copy.deepcopy(found)


def test_a_weight_that_hooks_compute_is_trained_on_after_its_network_was_taken_apart():
    model = make(Computed).train()
    canonical(model, SHAPE)
    assert model.training
    model(torch.randn(2, *SHAPE)).sum().backward()
    assert model.hooked.weight_v.grad is not None


def test_what_a_graph_depends_on_is_not_taken_from_another_network_that_looks_alike():
    class Padded(Shapes):
        def __init__(self, pad):
            super().__init__()
            self.pad = pad

        def forward(self, images):
            assert images.shape[1] == 3
            return super().forward(nn.functional.pad(images, (self.pad, 0, 0, 0)))

    images = torch.randn(2, *SHAPE)
    for pad in (1, 2):
        torch.manual_seed(0)
        model = Padded(pad).eval()
        assert difference(canonical(model, SHAPE)(images), model(images)) < 1e-5


def test_the_logits_among_several_outputs_are_found_by_name_or_by_the_number_of_classes():
    scores, features = torch.randn(2, 4), torch.randn(2, 6)
    assert logits({"features": features, "logits": scores}) is scores
    assert logits((features, scores), num_classes=4) is scores
    assert logits([[features], scores]) is features
    with pytest.raises(UserError, match=r"a tuple of \(2, 6\).*accepted: logits \(images, 4\)"):
        logits((features,), num_classes=4)
    for network in (Named, Pair):
        model = make(network)
        assert canonical(model, SHAPE)(torch.randn(3, *SHAPE)).shape == (3, 4)


class Branching(nn.Module):
    def forward(self, images):
        return images.flatten(1) if images.sum() > 0 else -images.flatten(1)


class Random(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(432, 4)

    def forward(self, images):
        return self.head(images.flatten(1) + torch.randn(1))


@pytest.mark.parametrize("network", [Branching, Random])
def test_what_no_graph_computes_is_refused_in_one_line(network):
    with pytest.raises(UserError, match=f"^{network.__name__}: found a forward that cannot be traced") as caught:
        canonical(network(), SHAPE)
    assert "\n" not in str(caught.value)


def test_a_forward_that_fails_says_for_which_images():
    with pytest.raises(UserError, match=r"^Random: found a forward that fails for images \(3, 5, 5\): mat1"):
        canonical(Random(), (3, 5, 5))
