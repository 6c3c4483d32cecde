"""Real images: what GPFQ costs a ResNet trained on a slice of Fashion-MNIST, and that rounding costs far more."""

import os
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import compress
from compress.arguments import build
from compress.evaluation import evaluate
from compress.export.packed import read_model
from compress.paths import CONF
from compress.pipeline.parts import Parts

ROOT = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
# Points of test accuracy that a width may cost; the figures of the full training are in docs/results.md.
ALLOWED = {8: 0.3, 4: 0.6, 3: 1.0, 2: 2.5}


@pytest.mark.slow
@pytest.mark.fashion_mnist
@pytest.mark.skipif(not ROOT.exists(), reason=f"no Fashion-MNIST in {ROOT}")
@pytest.mark.parametrize(
    ("images", "batch_size"),
    [
        # A small network on a small slice, on which the claims hold as well; a ResNet-20 on more takes minutes.
        (["student=resnet8", "data.limit=3000", "data.image_size=14"], 32),
        pytest.param(["data.limit=6000", "data.image_size=14"], 64, marks=pytest.mark.soak, id="twice as many"),
        pytest.param(["data.limit=10000"], 64, marks=pytest.mark.soak, id="of their full size"),
    ],
)
def test_gpfq_keeps_the_accuracy_that_rounding_loses(images, batch_size, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ["experiment=fashion_mnist_resnet20", f"data.root={ROOT}", *images]
    result = compress.run([*common, "trainer.max_epochs=3", f"data.batch_size={batch_size}", "quantizer.rates=[]"])
    reference, *variants = result.rows
    assert reference.test_accuracy > 0.7
    for row in variants:
        assert 100 * (reference.test_accuracy - row.test_accuracy) <= ALLOWED[row.bits], row

    config = OmegaConf.load(result.directory / "config.yaml")
    data = Parts(config).data
    student, _ = read_model(result.directory / reference.file)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        rounding = build(compose("quantizer/rtn").quantizer, "quantizer")
    rounded = rounding(student, data.calibration_batches(128), 2).model
    accuracy = evaluate(rounded, data.test_dataloader(), data.num_classes).accuracy
    assert 100 * (variants[-1].test_accuracy - accuracy) >= 10

    # Training on two-bit grids from there; docs/results.md has what a longer training gives.
    start = f"student.checkpoint={result.directory / reference.file}"
    options = ["method=qat", "method.weight_bits=2", start, "trainer.max_epochs=1", "optimizer.lr=0.02"]
    options += [f"data.batch_size={2 * batch_size}"]
    trained = compress.run([*common, *options, "quantizer=gpfq", "quantizer.bits=[2]"])
    same, learned, solved = trained.rows
    assert same.test_accuracy == reference.test_accuracy
    assert solved.test_accuracy == variants[-1].test_accuracy
    assert 100 * (reference.test_accuracy - learned.test_accuracy) <= 1.0
