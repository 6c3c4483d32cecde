"""What a run gives on a GPU is what it gives on the CPU, but for rounding: `scripts/benchmark.py gpu` runs these."""

import csv
import gc
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from faults import stopped_in_the_second_epoch
from omegaconf import OmegaConf

import compress
from compress import models
from compress.arguments import build
from compress.config.compose import compose_jobs
from compress.cuda_graph import Recorded
from compress.data.shared import DataSets
from compress.errors import UserError
from compress.losses.cross_entropy import CrossEntropy
from compress.methods import step_graph
from compress.methods.cached_teacher import CachedTeacher
from compress.methods.classifier import Classifier
from compress.methods.frozen_teacher import FrozenTeacher
from compress.methods.logit_file import LogitFile
from compress.methods.step_graph import StepGraph
from compress.methods.supervised import Supervised
from compress.optim.schedules import Cosine
from compress.training.fit import fit

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

RUN = ["student=resnet8", "trainer.max_epochs=2", "data.limit=400", "trainer.log_every=0"]
KD = ["method=kd", "teacher=resnet8", "teacher.training.epochs=2"]
QUANTIZED = ["quantizer.bits=[4]", "quantizer.calibration_images=64"]
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def weights(directory):
    saved = torch.load(directory / "checkpoints" / "best.ckpt", map_location="cpu", weights_only=True)
    return saved["state_dict"]


def test_a_run_on_the_gpu_is_close_to_the_one_on_the_cpu():
    cpu, gpu = (
        compress.run(
            ["method=supervised", *RUN, *QUANTIZED, "trainer.precision=32-true", f"trainer.accelerator={name}"]
        )
        for name in ("cpu", "gpu")
    )
    for one, other in zip(cpu.rows, gpu.rows, strict=True):
        assert one.name == other.name
        assert one.accuracy_on("test") == pytest.approx(other.accuracy_on("test"), abs=0.05)
    assert gpu.record.hardware.accelerator == torch.cuda.get_device_name()


@pytest.mark.parametrize(
    "options",
    [
        [*KD, "student.dropout=0.2", "trainer.ema_decay=0.9", "trainer.gradient_clip_val=1", "optimizer.fused=false"],
        [*KD, "method.teacher_cache=2", "data.crop_padding=1"],
        ["method=qat"],
    ],
)
def test_a_run_that_is_resumed_on_the_gpu_ends_as_the_undisturbed_one(options):
    typed = [*RUN, *options, "quantizer=none", f"trainer.accelerator={GPU}"]
    whole = compress.run([*typed, "hydra.run.dir=whole"])
    with stopped_in_the_second_epoch(), pytest.raises(UserError, match="stopped"):
        compress.run([*typed, "hydra.run.dir=stopped"])
    resumed = compress.run(["resume=stopped"])
    assert resumed.record.student.best_epoch == whole.record.student.best_epoch
    for name, value in weights(Path("whole")).items():
        assert torch.equal(value, weights(Path("stopped"))[name]), name


@pytest.mark.parametrize("method", ["supervised", "kd", "dkd", "kd_mixup", "dml", "at", "fitnet", "rkd", "qat"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_every_method_runs(method, precision):
    teacher = [] if method in ("supervised", "dml", "qat") else KD[1:]
    quantizer = [] if method == "qat" else QUANTIZED
    on = [f"trainer.accelerator={GPU}", f"trainer.precision={precision}"]
    result = compress.run([*RUN, f"method={method}", *teacher, *quantizer, *on])
    assert len(result.rows) == 2


@pytest.mark.parametrize("devices", [1, "auto"])
def test_processes_train_together(devices):
    together = ["trainer=ddp", f"trainer.devices={devices}", "data.batch_size=64"]
    result = compress.run(["method=supervised", *RUN, *QUANTIZED, *together])
    assert result.record.student.epochs == 2


@pytest.mark.parametrize("name", ["gpfq", "spfq", "gptq", "qronos", "rtn"])
@pytest.mark.parametrize("bits", [4, 2])
def test_every_quantizer_has_the_codes_of_the_cpu_but_for_ties(name, bits):
    [job] = compose_jobs(["method=supervised", f"quantizer={name}", "quantizer.first_last_bits=null"])
    quantizer = build(OmegaConf.to_container(job.config.quantizer), "quantizer")
    torch.manual_seed(0)
    network = models.build("resnet8", 10).eval()
    images = [torch.randn(64, 3, 8, 8) for _ in range(2)]
    on_cpu = quantizer(network, images, bits)
    on_gpu = quantizer(network.to(GPU), [batch.to(GPU) for batch in images], bits)
    check_close(on_cpu, on_gpu, network, images[0])


def test_a_rate_has_the_codes_of_the_cpu_but_for_ties():
    [job] = compose_jobs(["method=supervised"])
    quantizer = build(OmegaConf.to_container(job.config.quantizer), "quantizer")
    torch.manual_seed(0)
    network = models.build("resnet8", 10).eval()
    images = [torch.randn(64, 3, 8, 8) for _ in range(2)]
    on_cpu = quantizer.at_rates(network, images)(2.0)
    on_gpu = quantizer.at_rates(network.to(GPU), [batch.to(GPU) for batch in images])(2.0)
    assert on_gpu.rate == pytest.approx(on_cpu.rate, rel=0.03)
    check_close(on_cpu, on_gpu, network, images[0])


def check_close(on_cpu, on_gpu, network, images):
    first = next(iter(on_cpu.layers))
    same = (on_cpu.layers[first].codes == on_gpu.layers[first].codes.cpu()).float().mean()
    assert same > 0.99
    # A tie that falls the other way changes the inputs of what follows.
    with torch.no_grad():
        outputs = [quantized.model(images.to(GPU)).cpu() for quantized in (_moved(on_cpu), on_gpu)]
        exact = network(images.to(GPU)).cpu()
    errors = [float((output - exact).norm() / exact.norm()) for output in outputs]
    assert errors[1] == pytest.approx(errors[0], rel=0.1, abs=0.01)


def _moved(quantized):
    quantized.model.to(GPU)
    return quantized


def test_cached_logits_are_the_live_ones(tmp_path):
    node = {"_target_": "compress.data.digits.Digits", "image_size": 8, "batch_size": 32, "crop_padding": 1}
    data = DataSets().module(node, device=GPU)
    data.replay(2)
    torch.manual_seed(0)
    teacher = FrozenTeacher(models.build("resnet8", 10).eval(), (3, 8, 8))
    teacher.to(GPU)

    def opened(view):
        return LogitFile(tmp_path / f"{view}.logits", len(data.splits["train"]), 10, {})

    cached = CachedTeacher(teacher, 2, opened, data.training_view, GPU)
    loader = data.train_dataloader()
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        cached.begin_epoch(epoch)
        for images, _, index in loader:
            torch.testing.assert_close(cached.at(index, images), teacher(images), rtol=2e-2, atol=2e-2)


class NoWaiting(pl.Callback):
    """Within an epoch, but for its first step, the process never waits for the GPU."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_index):
        last = batch_index + 1 == trainer.num_training_batches
        torch.cuda.set_sync_debug_mode("default" if last else "error")

    def on_exception(self, *arguments):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", [["method=supervised"], KD, [*KD, "method.teacher_cache=1"]])
def test_no_step_waits_for_the_gpu(options, monkeypatch):
    configure = Classifier.configure_callbacks
    monkeypatch.setattr(Classifier, "configure_callbacks", lambda self: [*configure(self), NoWaiting()])
    augmentation = ["data.crop_padding=1", "data.horizontal_flip=true", "data.cutout=2"]
    compress.run([*RUN, *options, *augmentation, "quantizer=none", f"trainer.accelerator={GPU}"])


@pytest.fixture
def recorded(monkeypatch):
    """The modules whose steps are recorded, once for every record."""
    modules = []
    record = StepGraph._record
    monkeypatch.setattr(StepGraph, "_record", lambda self, batch: [record(self, batch), modules.append(self.module)])
    return modules


@pytest.mark.parametrize(
    "options",
    [
        ["method=supervised", "student=wrn_16_2", "student.dropout=0.3"],
        KD,
        ["method=dkd", *KD[1:]],
        [*KD, "method.teacher_cache=2", "data.crop_padding=1"],
        [*KD, "method.update_teacher=true"],
        ["method=at", *KD[1:]],
        ["method=fitnet", *KD[1:]],
        ["method=rkd", *KD[1:]],
        ["method=qat", "method.activation_bits=8"],
        ["method=supervised", "pruning=magnitude", "pruning.when=start"],
    ],
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_steps_that_are_replayed_are_those_that_are_taken(options, precision, recorded):
    run = RUN[1:] if options[1].startswith("student=") else RUN
    typed = [*run, *options, "quantizer=none", f"trainer.accelerator={GPU}", f"trainer.precision={precision}"]
    replayed = compress.run([*typed, "hydra.run.dir=replayed"])
    assert len(recorded) >= 2
    count = len(recorded)
    compress.run([*typed, "trainer.cuda_graph=false", "hydra.run.dir=taken"])
    assert len(recorded) == count
    one, other = (metrics(name) for name in ("replayed", "taken"))
    assert one == pytest.approx(other, rel=2e-2, abs=2e-2)
    # The first epoch begins alike, and hardly drifts.
    for name, value in weights(Path("taken")).items():
        torch.testing.assert_close(weights(Path("replayed"))[name].float(), value.float(), rtol=0.1, atol=0.02)
    assert replayed.record.student.epochs == 2


def metrics(directory):
    with (Path(directory) / "metrics.csv").open() as stream:
        return [float(row["train/loss"]) for row in csv.DictReader(stream) if row.get("train/loss")]


class Waiting(torch.nn.Module):
    """A network whose step waits for the GPU."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(192, 10)
        self.dropout = torch.nn.Dropout(0.1)

    def forward(self, images):
        logits = self.layer(self.dropout(images.flatten(1)))
        return logits if logits.sum().item() < float("inf") else -logits


def test_a_step_that_cannot_be_recorded_is_taken(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(step_graph, "KNOWN", step_graph.KNOWN | {Waiting.__module__.partition(".")[0]})
    module = Supervised(
        student=Waiting(),
        loss=CrossEntropy(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, fused=True),
        scheduler=Cosine(),
        num_classes=10,
        input_shape=(3, 8, 8),
    )
    data = DataSets().module({"_target_": "compress.data.digits.Digits", "image_size": 8, "batch_size": 32}, device=GPU)
    options = {"max_epochs": 2, "accelerator": "gpu", "devices": 1, "precision": "32-true", "log_every": 1}
    fit(module, data, {**options, "early_stopping": None}, tmp_path, label="student")
    said = capsys.readouterr().out
    assert said.count("trainer.cuda_graph: off, as a step cannot be recorded") == 1
    assert "epoch 2/2" in said
    torch.rand((), device=GPU)  # which a generator that is left within a recording refuses


def test_a_record_that_nobody_needs_is_not_destroyed_within_another():
    numbers = torch.ones(3, device=GPU)
    dead = [Recorded(torch.neg, numbers)]
    dead.append(dead)  # so that the collector alone can find it
    del dead

    def work(values):
        [[] for _ in range(200_000)]  # which calls the collector
        return values + 1

    assert Recorded(work, numbers)(numbers).tolist() == [2.0, 2.0, 2.0]
    assert gc.isenabled()


def test_a_network_of_another_package_is_not_recorded():
    module = Supervised(
        student=Waiting(), loss=CrossEntropy(), optimizer=None, scheduler=None, num_classes=10, input_shape=(3, 8, 8)
    )
    assert "Waiting" in step_graph.hindrance(module, {"precision": "32-true"})
