"""`result.json`: what ran, on what, how long it took and what came out. Needs neither PyTorch nor Hydra."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, ValidationError

from compress.checksums import read_text
from compress.errors import UserError, first_line
from compress.files import write_json
from compress.results.tradeoff import Row, Share

FILE = "result.json"
SavedRow = Annotated[Row, PlainSerializer(asdict)]


class Part(BaseModel):
    """A mapping of the file. Keys that it does not know are those of later versions, and no damage.

    A key without a value is not written, so a default stands for what a run does not have or did not have yet.
    """

    model_config = ConfigDict(frozen=True, populate_by_name=True)


class Hardware(Part):
    processor: str = ""
    features: list[str] = []  # of the processor, such as avx512_vnni, amx_int8 and avx512_bf16
    cores: int | None = None
    threads: int | None = None  # that PyTorch trained on
    precision: str | None = None  # in which the student was trained, as `trainer.precision`; null: nothing was trained
    memory_gb: float | None = None
    accelerator: str | None = None  # the GPU's name; null: the CPU


class Data(Part):
    name: str  # the class of the data set
    class_names: list[str] = []
    images: dict[str, int] = {}  # their number in train, validation and test
    input_shape: list[int] = []  # channels, height, width
    mean: list[float] = []  # of each channel, of images in 0..1, as they are normalised
    standard_deviation: list[float] = []
    licence: str | None = None  # null: not known
    hub_name: str | None = None  # on the Hugging Face Hub


class Network(Part):
    """What the records of a teacher and of a student share."""

    model: str  # its stem, its name in a library, or its class
    parameters: int | None = None
    macs: int | None = None  # multiply-accumulates of one image
    validation_accuracy: Share | None = None
    test_accuracy: Share | None = None
    test_accuracy_per_class: dict[str, float] = {}  # by class name, 0..1


class TeacherCache(Part):
    """Logits of the teacher for training images, computed once for each view of an image."""

    views: int = 1
    files: list[str] = []
    bytes: int = 0  # of these
    computed: int = 0  # logits by this run; those of the other images were there
    read: int = 0  # logits in all steps of the training
    seconds: float = 0.0  # to find or compute them


class Teacher(Network):
    """The teacher as it was found or trained, before it learns on."""

    file: str | None = None
    trained_in_this_run: bool = False
    seconds: float | None = None  # to find or train it
    validation_accuracy_after: Share | None = None  # of a teacher that learned on beside the student
    cache: TeacherCache | None = None
    members: list["Teacher"] = []  # of an ensemble, without accuracies on the test set


class Student(Network):
    """The float32 student of the best epoch."""

    own_class: bool = False  # whether `model` names a class of the user's own, which packed files have to be given
    network: str = "model"  # which of the method's networks it was; `others.0`: the first other peer of dml
    checkpoint: str | None = None  # the file that was quantized, where nothing was trained
    weights: str | None = None  # the published ones that it started from, by their name
    licence: str | None = None  # of these; null: not known
    epochs: int | None = None  # that were trained
    best_epoch: int | None = None  # the one of the highest validation accuracy, counted from 1


class Pruning(Part):
    recipe: str
    weights: int | None = None  # under masks
    pruned: int | None = None  # of these, at zero
    sparsity: float | None = None  # pruned / weights
    layers: dict[str, dict[str, int]] = {}  # `weights` and `pruned` of each layer with a mask
    dense: dict[str, str] = {}  # why each other layer has none
    channels: dict[str, list[int]] = {}  # of each layer, where the recipe is structured


class Stage(Part):
    """A stage of a run in stages."""

    name: str
    directory: Annotated[str, Field(pattern=r"^\d+-[^/]+$")]  # in that of the run
    overrides: list[str]
    seconds: float
    pruning: Pruning | None
    student: Student
    variant: SavedRow  # the last row of the stage


class Layer(Part):
    bits: float  # width of the codes, or their mean number of bits at a rate
    levels: int | None = None  # values that a weight can take
    error: float | None = None  # relative error of its outputs; null: not measured
    sensitivity: float | None = None  # of a network at a rate: nats an image for an error of 1 in this layer alone
    encoding: str = "dense"  # or bitmap, or entropy


class FileLayers(Part):
    quantized: dict[str, Layer]
    skipped: dict[str, str] = {}  # why each layer that stayed float did
    input_bits: dict[str, int] = {}  # width of the inputs of each layer, where they are quantized


class Comparisons(Part):
    """Differences of logits on calibration images, |changed - reference| / |reference|, where none should be."""

    folded: float | None = None  # the folded student from the student
    rounded_to_16_bits: float | None = None  # the student with rounded weights from the student
    read_back: dict[str, float] = {}  # by file, the network read from it from the one that was written


class Latency(Part):
    """The latency that was asked for, and what its file takes for an image."""

    runtime: str
    wanted: str  # as it was typed
    limit_ms: float
    measured_ms: float
    kept: bool
    saved_ms: dict[str, float]  # by layer, how much longer all of the network takes while this one alone is float


class Runtime(Part):
    """What ran model files; the precisions are those of all that is not on integers, by the runtime's own names."""

    version: str = ""
    accuracy_precision: str = ""  # in which accuracies and logits were computed
    latency_precision: str = ""  # in which latencies were measured, the runtime's default


class Record(Part):
    """What a finished run was and what came out of it; its presence says that the run is finished."""

    format: Literal[1] = 1
    overrides: list[str] = []  # what was typed; the composed configuration is in config.yaml
    started: str = ""  # local time, ISO 8601
    slurm_job: str | None = None  # its number
    versions: dict[str, str | None] = {}  # Python, the packages that decide the numbers, the checkout's `commit`
    hardware: Hardware = Hardware()
    runtimes: dict[str, Runtime] = {}  # by their names in the rows
    configuration: str = ""  # the SHA-256 of config.yaml, which model files name too
    method: str | None = None  # its stem; null: nothing was trained
    seed: int
    seconds: dict[str, float] = {}  # duration of each part, or stage; of a resumed run, those after the last resuming
    data: Data
    teacher: Teacher | None = None
    pruning: Pruning | None = None
    student: Student
    stages: list[Stage] = []  # of a run in stages; all else is that of the last one
    # As in tradeoff.csv, the float32 student first.
    rows: tuple[SavedRow, ...] = Field(alias="tradeoff", min_length=1)
    layers: dict[str, FileLayers] = {}  # by the name of the packed file
    comparisons: Comparisons = Comparisons()
    latency: Latency | None = None  # of quantizer.latency
    files: dict[str, str] = {}  # the SHA-256 of each file that the run left, by its path in the run's directory

    @classmethod
    def read(cls, path: Path) -> "Record":
        """The record in the file `path`. Raises UserError where it is missing or damaged."""
        accepted = f"to remove it, and resume={path.parent} writes it again"
        try:
            return cls.model_validate_json(read_text(path, accepted))
        except OSError as failure:
            problem = failure.strerror
        except ValidationError as failure:
            error = failure.errors()[0]
            problem = f"{'.'.join(map(str, error['loc'])) or 'content'}: {error['msg'].lower()}"
        except UnicodeDecodeError as failure:
            problem = first_line(failure)
        raise UserError(f"{path}: cannot be read ({problem}); accepted: {accepted}")

    def content(self) -> dict[str, Any]:
        """What the file holds."""
        return {"format": self.format, **self.model_dump(by_alias=True, exclude_unset=True)}

    def write(self, directory: Path) -> None:
        write_json(directory / FILE, self.content())
