"""The handwritten digits that come with scikit-learn: 1,797 gray images of 8x8 pixels, no network needed."""

import torch
from sklearn.datasets import load_digits

from compress.data.draws import stratified_order
from compress.data.module import DataModule
from compress.data.source import Source, pixel_statistics

# The data set comes in one piece; a fifth of it, always the same, is the test set.
TEST_IMAGES = 360


class Digits(DataModule):
    """`data=digits`."""

    licence = "CC BY 4.0"  # archive.ics.uci.edu/dataset/80

    def read(self) -> Source:
        bundled = load_digits()
        images = torch.from_numpy(bundled.images / 16 * 255).round().to(torch.uint8)[:, None]
        labels = torch.from_numpy(bundled.target).long()
        order = stratified_order(labels, seed=0)
        test, train = order[:TEST_IMAGES].sort().values, order[TEST_IMAGES:].sort().values
        mean, deviation = pixel_statistics(images[train])
        names = tuple(str(name) for name in bundled.target_names)
        return Source(images[train], labels[train], images[test], labels[test], names, mean, deviation)
