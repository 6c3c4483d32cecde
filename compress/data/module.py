"""The Lightning DataModule that all data sets share."""

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar

import pytorch_lightning as pl
import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader

from compress.arguments import Supplied, annotations, has_mark
from compress.data.augmentation import Augmentation
from compress.data.dataset import Batch, EpochSampler, ImageBatches, Share, evaluation_batches, identity_collate
from compress.data.disk_loader import DiskLoader, cores
from compress.data.draws import stratified_order
from compress.data.grouped_loader import GroupedLoader
from compress.data.memory import free_bytes
from compress.data.normalisation import Normalisation
from compress.data.randaugment import GREATEST_MAGNITUDE
from compress.data.source import Images, Source, SourceSplit, Split, resized_rgb
from compress.data.undecoded import OnDisk, Undecoded
from compress.errors import UserError

Count = Annotated[int, Field(ge=1)]
Pixels = Annotated[int, Field(ge=0)]
_BATCH_OPTION = object()
T = TypeVar("T")
# The annotation of an argument that decides how batches are made of the images, and not which images there are.
BatchOption = Annotated[T, _BATCH_OPTION]


class DataModule(pl.LightningDataModule):
    """Training, validation and test batches `(B, 3, image_size, image_size)` with labels `(B,)`.

    A data set implements `read`, and `prepare_data` where it needs files. `split_seed` decides which training images
    are for validation; `seed`, which the run supplies, decides order and augmentation. `limit` takes only that many
    images of each split that the data set comes with, for quick tries. Training images are kept at `stored_size` pixels
    (null: `image_size`), from which `random_resized_crop` cuts. `mean` and `standard_deviation` (one number or
    three) replace those of the data set.
    """

    def __init__(
        self,
        *,
        image_size: Annotated[int, Field(ge=4)],
        batch_size: BatchOption[Count] = 64,
        evaluation_batch_size: BatchOption[Count] = 500,
        validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1,
        split_seed: Pixels = 0,
        limit: Count | None = None,
        crop_padding: BatchOption[Pixels] = 0,
        horizontal_flip: BatchOption[bool] = False,
        cutout: BatchOption[Pixels] = 0,
        randaugment: BatchOption[Annotated[int, Field(ge=0, le=100)]] = 0,
        randaugment_magnitude: BatchOption[Annotated[int, Field(ge=0, le=GREATEST_MAGNITUDE)]] = 9,
        random_resized_crop: BatchOption[list[Annotated[float, Field(gt=0, le=1)]] | None] = None,
        colour_jitter: BatchOption[list[Annotated[float, Field(ge=0)]] | None] = None,
        stored_size: Annotated[int, Field(ge=4)] | None = None,
        mean: BatchOption[list[float] | None] = None,
        standard_deviation: BatchOption[list[Annotated[float, Field(gt=0)]] | None] = None,
        seed: Supplied[int] = 0,
        device: Supplied[torch.device | str] = "cpu",
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.input_shape = (3, image_size, image_size)
        self.batch_size = batch_size
        self.evaluation_batch_size = evaluation_batch_size
        self.validation_fraction = validation_fraction
        self.split_seed = split_seed
        self.limit = limit
        self.stored_size = stored_size or image_size
        if crop_padding > image_size:  # padded images take memory, and crops beyond would be all black
            raise UserError(f"data.crop_padding: found {crop_padding}; accepted: from 0 to image_size, {image_size}")
        _check_photo_options(image_size, stored_size, random_resized_crop, colour_jitter)
        self.augmentation = Augmentation(
            crop_padding,
            horizontal_flip,
            cutout,
            randaugment,
            randaugment_magnitude,
            random_resized_crop,
            colour_jitter,
        )
        self.given = {"mean": mean, "standard_deviation": standard_deviation}
        for key, values in self.given.items():
            if values is not None and len(values) not in (1, 3):
                raise UserError(f"data.{key}: found {len(values)} values; accepted: 1 or 3")
        self.seed = seed
        self.device = torch.device(device)
        self.splits: dict[str, Split] = {}
        self.views: int | None = None

    labelled: ClassVar[bool] = True
    licence: ClassVar[str | None] = None
    hub_name: str | None = None
    workers: int | None = 0  # that decode images which stay on disk, see `DiskLoader`

    @abstractmethod
    def read(self) -> Source:
        """The data set, from files that `prepare_data` has checked or downloaded. Raises UserError for damaged ones."""

    def label(self, network: Callable[[Tensor], Tensor]) -> None:
        """Of images that are not `labelled`, gives those for validation and test the classes that `network` finds."""
        raise NotImplementedError

    @classmethod
    def image_options(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the constructor's `options` that decide which images there are."""
        annotated = annotations(cls)
        return {name: value for name, value in options.items() if not has_mark(annotated.get(name), _BATCH_OPTION)}

    def setup(self, stage: str | None = None) -> None:
        """Reads and splits the images, unless the module has some."""
        if not self.splits:
            self.set_images(self.load())

    def load(self) -> Images:
        """The images of this data set, read, split and resized."""
        source = self.read()
        classes = len(source.class_names)
        train = self._limited(SourceSplit(source.train_images, source.train_labels), "training", classes)
        test = self._limited(SourceSplit(source.test_images, source.test_labels), "test", classes)
        if source.validation is None:
            order = stratified_order(train.labels, self.split_seed)
            count = round(self.validation_fraction * len(train))
            self._check_classes(train, order, count, classes)
            train, validation = train[order[count:].sort().values], train[order[:count].sort().values]
        else:
            validation = self._limited(SourceSplit(*source.validation), "validation", classes)
        read = {"train": train, "validation": validation, "test": test}
        sizes = {name: self.stored_size if name == "train" else self.image_size for name in read}
        decoded_bytes = sum(len(split) * 3 * sizes[name] ** 2 for name, split in read.items())
        on_disk = self.stays_on_disk(decoded_bytes)
        # Of what stays on disk one image at a time is decoded by each process.
        needed = 3 * max(sizes.values()) ** 2 if on_disk else decoded_bytes
        if needed > (free := free_bytes(self.device)):
            key = "image_size" if self.stored_size == self.image_size else "stored_size"
            raise UserError(
                f"data.{key}: found {max(sizes.values())}, at which the images take {needed / 1e6:,.0f} MB of the "
                f"{free / 1e6:,.0f} that are free; accepted: a smaller one, or a smaller data.limit"
            )
        splits = {
            name: Split(self._held(split.images, sizes[name], on_disk), split.labels.to(self.device))
            for name, split in read.items()
        }
        return Images(splits, source.class_names, source.mean, source.standard_deviation)

    def stays_on_disk(self, decoded_bytes: int) -> bool:
        """Whether images that `read` has not decoded, which would take `decoded_bytes`, are not held in memory."""
        return False

    def _held(self, images: Tensor | Undecoded, size: int, on_disk: bool) -> Tensor | OnDisk:
        if isinstance(images, Tensor):
            return resized_rgb(images, size).to(self.device)
        if on_disk:
            return OnDisk(images, size)
        return images.decoded(range(len(images)), size, threads=cores()).to(self.device)

    def set_images(self, images: Images) -> None:
        """Makes batches of `images`, those that `load` returns or has returned to an equal module."""
        self.splits, self.class_names = images.splits, images.class_names
        self.num_classes = len(images.class_names)
        self.mean = _three(self.given["mean"] or images.mean)
        self.standard_deviation = _three(self.given["standard_deviation"] or images.standard_deviation)

    def replay(self, views: int) -> None:
        """From now on epoch e augments as epoch `e % views`, and training batches have the index of each image."""
        self.views = views

    def training_view(self, view: int, batches: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """The images of each of `batches`, lists of indices of training images, as the epoch `view` shows them."""
        images = self._images("train", self.augmentation, self.seed)
        images.set_epoch(view)
        # A generator of its own, as for the loader of training batches.
        for batch in self._loader(images, batch_sampler=batches, generator=torch.Generator()):
            yield batch[0]

    def training_identity(self) -> str:
        """A hash of all that the images of `training_view` follow from but `view`."""
        images = self.splits["train"].images
        if isinstance(images, OnDisk):
            content = f"{images.size} {images.images.identity()}"
        else:
            # As they lie in memory.
            pixels = images.cpu().permute(0, 2, 3, 1).contiguous().numpy()
            content = hashlib.sha256(pixels.data).hexdigest()
        shown = [repr(self.augmentation), *self.mean, *self.standard_deviation, self.image_size]
        if self.augmentation.is_random:
            shown.append(self.seed)
        return f"{content} {shown}"

    def train_dataloader(self) -> DataLoader[Batch]:
        images = self._images("train", self.augmentation, self.seed, self.views)
        rank, world_size = self._place()
        # A last batch of one image would break BatchNorm; the order of another epoch has its images earlier.
        return self._loader(
            images,
            batch_size=self.batch_size // world_size,
            sampler=EpochSampler(images, self.seed, Share(rank, world_size, self.batch_size)),
            drop_last=len(images) >= self.batch_size,
            # A loader draws a number at the start of each epoch, and where a run is resumed, Lightning starts the epoch
            # earlier: from the global generator it would shift every later draw, such as those of dropout.
            generator=torch.Generator(),
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        images = self._images("validation")
        rank, world_size = self._place()
        if world_size > 1:
            batches = evaluation_batches(len(images), self.evaluation_batch_size, rank, world_size)
            return self._loader(images, batch_sampler=batches)
        return self._loader(images, batch_size=self.evaluation_batch_size)

    def _place(self) -> tuple[int, int]:
        """The rank of this process among those that train together, and their number."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self._images("test"), batch_size=self.evaluation_batch_size)

    def _loader(self, images: ImageBatches, **options: Any) -> DataLoader[Batch]:
        if isinstance(images.images, OnDisk):
            return DiskLoader(images, workers=self.workers, **options)
        if images.device.type == "cuda":
            return GroupedLoader(images, **options)
        return DataLoader(images, collate_fn=identity_collate, **options)

    def calibration_batches(self, count: int, batch_size: int = 128) -> list[Tensor]:
        """Normalised images of `count` training images without augmentation, classes in their shares.

        The choice follows from `split_seed`; a count above the number of training images takes all of them.
        """
        images = self._images("train")
        order = stratified_order(self.splits["train"].labels, self.split_seed)
        return [images.__getitems__(part.tolist())[0] for part in order[:count].split(batch_size)]

    def record(self) -> dict[str, Any]:
        """What `result.json` says of the data."""
        published = {"licence": self.licence, "hub_name": self.hub_name}
        return {
            "name": type(self).__name__,
            "class_names": list(self.class_names),
            "images": {name: len(images) for name, images in self.splits.items()},
            "input_shape": list(self.input_shape),
            "mean": list(self.mean),
            "standard_deviation": list(self.standard_deviation),
            **{key: value for key, value in published.items() if value},
        }

    def _limited(self, split: SourceSplit, name: str, classes: int) -> SourceSplit:
        if self.limit is None or self.limit >= len(split):
            return split
        order = stratified_order(split.labels, self.split_seed)
        chosen = split[order[: self.limit].sort().values]
        if len(chosen.labels.unique()) < classes or self.limit < 2 * classes:
            raise UserError(
                f"data.limit: found {self.limit}, too few {name} images for {classes} classes; "
                f"accepted: at least {2 * classes}, or null"
            )
        return chosen

    def _check_classes(self, train: SourceSplit, order: Tensor, count: int, classes: int) -> None:
        for part in (order[:count], order[count:]):
            if len(train.labels[part].unique()) < classes:
                raise UserError(
                    f"data.validation_fraction: found {self.validation_fraction}, {count} of {len(train)} images, "
                    "which leaves a class without one; accepted: one that leaves each class an image on either side"
                )

    def _images(
        self, split: str, augmentation: Augmentation | None = None, seed: int = 0, views: int | None = None
    ) -> ImageBatches:
        normalisation = Normalisation(self.mean, self.standard_deviation, self.image_size).to(self.device)
        held = self.splits[split]
        return ImageBatches(held.images, held.labels, normalisation, augmentation, seed, views)


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    """One number or three as three."""
    red, green, blue = [*values] * 3 if len(values) == 1 else values
    return red, green, blue


def _check_photo_options(
    image_size: int,
    stored_size: int | None,
    random_resized_crop: Sequence[float] | None,
    colour_jitter: Sequence[float] | None,
) -> None:
    if random_resized_crop is not None and (
        len(random_resized_crop) != 2 or random_resized_crop[0] > random_resized_crop[1]
    ):
        raise UserError(
            f"data.random_resized_crop: found {random_resized_crop}; accepted: the least and the greatest share of the "
            "area, such as [0.08,1], or null"
        )
    if colour_jitter is not None and (len(colour_jitter) != 4 or colour_jitter[3] > 0.5):
        raise UserError(
            f"data.colour_jitter: found {colour_jitter}; accepted: the strengths of brightness, contrast, saturation "
            "and hue, the last at most 0.5, or null"
        )
    if stored_size is not None and (stored_size < image_size or random_resized_crop is None):
        raise UserError(
            f"data.stored_size: found {stored_size}; accepted: null, or at least data.image_size ({image_size}), with "
            "data.random_resized_crop, which cuts from it"
        )
