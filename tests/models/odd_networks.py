"""Small classifiers, for images (3, 12, 12) and 4 classes, that use their weights in unusual ways."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

CLASSES, SHAPE = 4, (3, 12, 12)


class Aliased(nn.Module):
    """A convolution, its norm and the classifier under two names each."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.body = nn.Sequential(self.first, self.norm, nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU())
        self.head = self.classifier = nn.Linear(8, CLASSES)

    def forward(self, images):
        return self.classifier(self.body(images).mean((2, 3)))


class TiedWeights(nn.Module):
    """Two layers with one parameter, a norm behind one of them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.left, self.right = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, stride=2)
        self.right.weight = self.left.weight
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6, CLASSES)

    def forward(self, images):
        hidden = F.relu(self.norm(self.left(F.relu(self.stem(images)))))
        return self.head(F.relu(self.right(hidden)).mean((2, 3)))


class CalledAgain(nn.Module):
    """One layer called three times, the last time on inputs of another size."""

    def __init__(self):
        super().__init__()
        self.stem, self.again, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, CLASSES)

    def forward(self, images):
        hidden = F.relu(self.again(F.relu(self.again(F.relu(self.stem(images))))))
        return self.head(F.relu(self.again(F.max_pool2d(hidden, 2))).mean((2, 3)))


class ReadTwice(nn.Module):
    """The weight of the head is normalised a second time by a function, and that of a convolution before a norm."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, images):
        hidden = self.norm(self.stem(images)).relu() * self.stem.weight.abs().mean((1, 2, 3)).view(1, -1, 1, 1)
        hidden = hidden.mean((2, 3))
        return self.head(hidden) + F.linear(F.normalize(hidden), F.normalize(self.head.weight))


class SharedNorm(nn.Module):
    """One norm behind two convolutions."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.norm = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3, dilation=1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, images):
        return self.head((self.norm(self.left(images)) + self.norm(self.right(images))).relu().mean((2, 3)))


class NormOverPlaces(nn.Module):
    """A BatchNorm1d whose channels are the places of a sequence, as many as the layer before it has outputs."""

    def __init__(self):
        super().__init__()
        self.mix, self.norm, self.head = nn.Linear(36, 12), nn.BatchNorm1d(12), nn.Linear(12, CLASSES)

    def forward(self, images):
        rows = images.transpose(1, 2).flatten(2)  # (B, 12, 36)
        return self.head(self.norm(self.mix(rows)).relu().mean(1))


class Standardised(nn.Conv2d):
    """A subclass that multiplies the standardised weight."""

    def forward(self, images):
        deviation, mean = torch.std_mean(self.weight, (1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / (deviation + 1e-5)
        return F.conv2d(images, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Subclasses(nn.Module):
    def __init__(self):
        super().__init__()

        class Named(nn.Linear):
            pass

        self.stem, self.norm = Standardised(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.middle, self.head = Standardised(6, 6, 3, groups=2), Named(6, CLASSES)

    def forward(self, images):
        return self.head(self.middle(self.norm(self.stem(images)).relu()).relu().mean((2, 3)))


class Computed(nn.Module):
    """Weights that parametrizations and hooks of torch compute."""

    def __init__(self):
        super().__init__()
        self.normed = parametrizations.weight_norm(nn.Conv2d(3, 6, 3))
        self.spectral, self.norm = parametrizations.spectral_norm(nn.Conv2d(6, 6, 3)), nn.BatchNorm2d(6)
        self.hooked, self.head = nn.utils.weight_norm(nn.Conv2d(6, 6, 3)), nn.utils.spectral_norm(nn.Linear(6, CLASSES))

    def forward(self, images):
        hidden = self.norm(self.spectral(self.normed(images).relu())).relu()
        return self.head(self.hooked(hidden).relu().mean((2, 3)))


class Functions(nn.Module):
    """Parameters that functions multiply."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 3, 3, 3) * 0.3)
        self.projection = nn.Parameter(torch.randn(6, 8) * 0.4)
        self.last_weight, self.last_bias = (
            nn.Parameter(torch.randn(CLASSES, 8) * 0.4),
            nn.Parameter(torch.randn(CLASSES)),
        )

    def forward(self, images):
        hidden = F.conv2d(images, self.kernel, stride=2).relu().mean((2, 3))
        return F.linear((hidden @ self.projection).relu(), self.last_weight, self.last_bias)


class Attention(nn.Module):
    """torch's MultiheadAttention, a norm of its own, and a class token."""

    def __init__(self):
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, 8, 4, stride=4), nn.Parameter(torch.zeros(1, 1, 8))
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, images):
        patches = self.patch(images).flatten(2).transpose(1, 2)
        tokens = self.norm(torch.cat([self.token.expand(len(images), -1, -1), patches], 1))
        return self.head((tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0])[:, 0])


class Shapes(nn.Module):
    """Asserts, branches and loops over shapes, and optional arguments."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, CLASSES)

    def forward(self, images, features=False, mask=None):
        assert images.shape[1] == 3
        batch, _, height, width = images.shape
        if height % 2 == 0:
            images = F.pad(images, (0, 1, 0, 1))
        hidden = self.stem(images).relu()
        for _ in range(width // 6):
            hidden = F.max_pool2d(hidden, 2)
        hidden = hidden.mean((2, 3)).view(batch, -1)
        if mask is not None:
            hidden = hidden * mask
        return (self.head(hidden), hidden) if features else self.head(hidden)


class InPlace(nn.Module):
    """A norm reads what an operation has changed in place since the convolution."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, CLASSES)

    def forward(self, images):
        hidden = self.stem(images)
        hidden.mul_(0.5).add_(0.1)
        return self.head(self.norm(hidden).relu_().mean((2, 3)))


class Sequence1d(nn.Module):
    """Conv1d over the rows of an image, strided, dilated and grouped."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv1d(36, 12, 3, stride=2, padding=1), nn.BatchNorm1d(12)
        self.second, self.head = nn.Conv1d(12, 8, 2, dilation=2, groups=4), nn.Linear(8, CLASSES)

    def forward(self, images):
        hidden = self.norm(self.first(images.flatten(1, 2))).relu()
        return self.head(self.second(hidden).relu().mean(2))


class Transposed(nn.Module):
    """Transposed convolutions before norms: grouped and dilated, and one that is told the size of its output."""

    def __init__(self):
        super().__init__()
        self.down, self.norm = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, groups=2, dilation=2, output_padding=1)
        self.again, self.norm_again = nn.ConvTranspose2d(8, 6, (4, 3), stride=(3, 2), padding=1), nn.BatchNorm2d(6)
        self.row, self.head = nn.ConvTranspose1d(6, 6, 3, padding=1, bias=False), nn.Linear(6, CLASSES)

    def forward(self, images):
        hidden = self.up(self.norm(self.down(images)).relu())
        hidden = self.norm_again(self.again(hidden, [len(hidden[0, 0]) * 3, 28])).relu()
        return self.head(self.row(hidden.mean(2)).mean(2))


class Functional(nn.Module):
    """F.batch_norm on a norm's tensors, dropout, an auxiliary head in training and a layer that is never called."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.never = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3)
        self.auxiliary, self.head = nn.Linear(6, CLASSES), nn.Linear(6, CLASSES)

    def forward(self, images):
        norm = self.norm
        hidden = F.batch_norm(
            self.stem(images), norm.running_mean, norm.running_var, norm.weight, norm.bias, self.training
        )
        hidden = F.dropout(hidden.relu().mean((2, 3)), 0.5, self.training)
        return (self.head(hidden), self.auxiliary(hidden)) if self.training else self.head(hidden)


class Named(nn.Module):
    """Logits in a mapping, behind features of another width."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, CLASSES)

    def forward(self, images):
        hidden = self.stem(images).relu().mean((2, 3))
        return {"features": hidden, "logits": self.head(hidden)}


class Pair(Named):
    """Logits and features in a tuple."""

    def forward(self, images):
        found = super().forward(images)
        return found["logits"], found["features"]


EVERY = [
    Aliased,
    TiedWeights,
    CalledAgain,
    ReadTwice,
    SharedNorm,
    NormOverPlaces,
    Subclasses,
    Computed,
    Functions,
    Attention,
    Shapes,
    InPlace,
    Sequence1d,
    Transposed,
    Functional,
    Named,
    Pair,
]


def make(network):
    """One of the networks in eval mode, every norm with statistics of its own."""
    torch.manual_seed(0)
    model = network()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return model.eval()
