"""Folding BatchNorm: the same logits, only where it is exact, and the original left alone."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from compress.errors import UserError
from compress.models.canonical import canonical
from compress.models.folding import find_foldable, fold_batch_norm, fold_pairs

SHAPE = (3, 7, 7)


def randomise_statistics(model):
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.2, 3.0, generator=generator)
            if module.affine:
                with torch.no_grad():
                    module.weight.normal_(generator=generator)
                    module.bias.normal_(generator=generator)
    return model


class PostActivation(nn.Module):
    """A ResNet basic block: both convolutions fold, in-place ReLU and in-place addition included."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, groups=2, bias=True), nn.BatchNorm2d(6, affine=False)
        self.relu = nn.ReLU(inplace=True)
        self.fc, self.bn3 = nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5)

    def forward(self, images):
        first = self.relu(self.bn1(self.conv1(images)))
        second = self.bn2(self.conv2(first))
        second += first
        return self.bn3(self.fc(self.relu(second).mean((2, 3))))


class PreActivation(nn.Module):
    """A wide ResNet: bn1 reads a sum, bn2 reads conv1, bn3 reads a convolution whose output has two readers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1, self.conv1 = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn3, self.fc = nn.BatchNorm2d(6), nn.Linear(6, 4)

    def forward(self, images):
        stem = self.stem(images)
        out = self.conv1(torch.relu(self.bn1(stem)))
        out = stem + self.conv2(torch.relu(self.bn2(out)))
        return self.fc(torch.relu(self.bn3(out)).mean((2, 3)))


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, images):
        return self.bn(self.conv(self.bn(self.conv(images))))


@pytest.mark.parametrize(
    ("network", "pairs"),
    [
        (PostActivation, [("conv1", "bn1"), ("conv2", "bn2"), ("fc", "bn3")]),
        (PreActivation, [("conv1", "bn2")]),
        (CalledTwice, []),
    ],
)
def test_logits_stay_and_only_exact_pairs_are_folded(network, pairs):
    torch.manual_seed(0)
    model = randomise_statistics(network()).eval()
    images = torch.randn(8, 3, 7, 7)
    before = copy.deepcopy(model.state_dict())
    folded = fold_batch_norm(model, SHAPE)
    assert find_foldable(canonical(model, SHAPE)) == pairs
    with torch.no_grad():
        torch.testing.assert_close(folded(images), model(images), rtol=1e-4, atol=1e-4)
    for layer, norm in pairs:
        assert isinstance(folded.get_submodule(norm), nn.Identity)
        assert not torch.equal(folded.get_submodule(layer).weight, model.get_submodule(layer).weight)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    copy.deepcopy(folded)


def test_a_model_in_training_is_folded_in_eval_mode_and_keeps_its_own_mode():
    model = randomise_statistics(PostActivation()).train()
    model.bn1.eval()
    folded = fold_batch_norm(model, SHAPE)
    assert model.training
    assert model.conv1.training
    assert not model.bn1.training
    assert not any(module.training for module in folded.modules())


def test_structure_folded_from_names_takes_the_folded_state():
    model = randomise_statistics(PostActivation()).eval()
    folded = fold_batch_norm(model, SHAPE)
    rebuilt = canonical(PostActivation(), SHAPE)
    fold_pairs(rebuilt, find_foldable(canonical(model, SHAPE)))
    rebuilt.load_state_dict(folded.state_dict(), strict=True)
    images = torch.randn(4, 3, 7, 7)
    assert torch.equal(rebuilt(images), folded(images))


def test_a_parametrized_weight_is_baked_and_the_original_keeps_its_parametrization():
    class Masked(nn.Module):
        def forward(self, weight):
            return weight * (weight > 0)

    model = randomise_statistics(PostActivation()).eval()
    parametrize.register_parametrization(model.conv1, "weight", Masked())
    folded = fold_batch_norm(model, SHAPE)
    images = torch.randn(4, 3, 7, 7)
    torch.testing.assert_close(folded(images), model(images), rtol=1e-4, atol=1e-4)
    assert parametrize.is_parametrized(model.conv1)
    assert type(folded.conv1) is nn.Conv2d


def test_a_model_that_branches_on_values_is_refused_by_name():
    class Branching(nn.Module):
        def forward(self, images):
            return images if images.sum() > 0 else -images

    with pytest.raises(UserError, match=r"^Branching: found a forward that cannot be traced") as caught:
        fold_batch_norm(Branching(), SHAPE)
    assert "\n" not in str(caught.value)
