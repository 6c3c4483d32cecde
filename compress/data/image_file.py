"""Image files of any size and mode, as a viewer shows them: found in folders, made RGB, square and of one size.

A picture is turned as its EXIF orientation says, what is transparent lies on white, grey of 16 bits or floats keeps its
levels, and of an animation the first frame counts. Colours of an embedded profile, such as the Display P3 of phones,
become those of sRGB, where Pillow has littleCMS.
"""

import contextlib
import io
import os
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageCms, UnidentifiedImageError, features
from torch import Tensor
from torch.nn import functional

from compress.errors import UserError, first_line

JPEG = (".jfif", ".jpe", ".jpeg", ".jpg")
HEIC = (".heic", ".heif")
NETPBM = (".pbm", ".pgm", ".pnm", ".ppm")
ENDINGS = frozenset({*JPEG, *HEIC, *NETPBM, ".avif", ".bmp", ".gif", ".png", ".tif", ".tiff", ".webp"})
ACCEPTED = f"an image ({', '.join(sorted(ENDINGS))})"
BACKGROUND = (255, 255, 255)
# EXIF 2.32, tag 0x0112: how the stored picture is turned to be shown.
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# A larger picture is refused before it is decoded: a small file may stand for any number of pixels. The variable is for
# those who have such pictures; processes that decode take it over.
PIXELS_KEY = "COMPRESS_MAX_PIXELS"
MAX_PIXELS = 100_000_000
# Pillow warns beyond its own bound, and refuses at twice that.
PILLOWS_MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 0
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
# Resizing keeps the ratio, so that a picture of one row would become far larger than it is.
MAX_RATIO = 100
# A large JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that leaves this many times the pixels wanted on each side.
REDUCING_GAP = 2


def image_files(folder: Path) -> list[Path]:
    """The image files in `folder` and below, sorted; what is hidden is left out, at every depth.

    Links are followed, but each folder is entered once, and none that `folder` lies in. Raises UserError for a folder
    that cannot be listed.
    """

    def refuse(failure: OSError) -> None:
        raise UserError(f"{failure.filename}: cannot be listed ({failure.strerror}); accepted: a readable folder")

    files, entered = [], {os.path.realpath(parent) for parent in folder.absolute().parents}
    for path, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(path)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        # File managers write hidden files between the images, such as ._cat.png.
        shown = (Path(path, name) for name in names if not name.startswith("."))
        # A link to nothing is kept, so that reading names it; a pipe would wait for ever.
        files += [file for file in shown if is_image(file) and (file.is_file() or file.is_symlink())]
    return sorted(files)


def is_image(path: Path) -> bool:
    """Whether the name of the file ends like that of an image."""
    return path.suffix.lower() in ENDINGS


def accepted_pixels(given: int | None = None) -> int:
    """How many pixels a picture may have: as many as `given`, or else as the environment says, or MAX_PIXELS.

    Raises UserError where the environment says no number.
    """
    if given is not None:
        return given
    found = os.environ.get(PIXELS_KEY)
    if found is None:
        return MAX_PIXELS
    with contextlib.suppress(ValueError):
        if int(found) > 0:
            return int(found)
    raise UserError(f"{PIXELS_KEY}: found {found!r}; accepted: a whole number above zero")


def read_square(path: Path, size: int, content: BinaryIO | None = None, max_pixels: int | None = None) -> Tensor:
    """The image in the file `path` as uint8 `(3, size, size)`: the shorter side resized, bilinearly with
    antialiasing, the centre cut out.

    `content` replaces what is in the file; max_pixels: see `accepted_pixels`. Raises UserError for what cannot be
    read, or not without doubt.
    """
    pixels = torch.from_numpy(np.array(read_rgb(path, content, size, max_pixels)))[None].permute(0, 3, 1, 2)
    height, width = pixels.shape[2:]
    factor = size / min(height, width)
    shape = [max(size, round(length * factor)) for length in (height, width)]
    if shape != [height, width]:
        # Half the time of Pillow's, from which it differs in rounding alone.
        pixels = functional.interpolate(pixels, shape, mode="bilinear", antialias=True)
    top, left = ((length - size) // 2 for length in shape)
    return pixels[0, :, top : top + size, left : left + size]


def read_rgb(
    path: Path, content: BinaryIO | None = None, side: int | None = None, max_pixels: int | None = None
) -> Image.Image:
    """The image as RGB, a JPEG in less detail if it is far larger than `side` pixels; the rest as in `read_square`."""
    accepted = accepted_pixels(max_pixels)
    # Pillow's bound is one for the process; set for each picture, it is nobody else's that was read before.
    Image.MAX_IMAGE_PIXELS = max(PILLOWS_MAX_PIXELS, accepted)
    ending = path.suffix.lower()
    if ending in HEIC:
        with contextlib.suppress(ImportError):
            from pillow_heif import register_heif_opener

            register_heif_opener()
    try:
        with Image.open(content or path) as opened:
            if side is not None:
                opened.draft(None, (REDUCING_GAP * side, REDUCING_GAP * side))
            width, height = opened.size
            if width * height > accepted or max(width, height) > MAX_RATIO * min(width, height):
                raise ValueError(
                    f"{width} x {height} pixels; accepted: up to {accepted:,}, or what data.max_pixels or "
                    f"{PIXELS_KEY} in the environment says, and a longer side up to {MAX_RATIO} times the shorter"
                )
            opened.load()
            image = _on_background(_in_srgb(opened))
            turn = TURNS.get(_orientation(opened))
            return image if turn is None else image.transpose(turn)
    except UnidentifiedImageError:
        reason = "no image, or of a kind that Pillow does not know"
        if ending in HEIC:
            reason = "Pillow reads it only with the package pillow-heif"
        elif ending == ".avif" and not features.check("avif"):
            reason = "this Pillow was built without AVIF"
    except Exception as failure:  # whatever a reader of one of forty formats meets in a damaged file
        reason = failure.strerror if isinstance(failure, OSError) and failure.strerror else first_line(failure)
    raise UserError(f"{path}: cannot be read ({reason}); accepted: {ACCEPTED}")


def _orientation(image: Image.Image) -> int:
    try:
        orientation: int = image.getexif().get(ORIENTATION, 1)
        return orientation
    except Exception:  # a damaged EXIF block says nothing, and the picture is there
        return 1


def _in_srgb(image: Image.Image) -> Image.Image:
    """`image` in the colours of sRGB, if it is RGB and has a profile of other colours that can be read."""
    profile = image.info.get("icc_profile")
    if image.mode not in ("RGB", "RGBA") or not profile or not features.check("littlecms2"):
        return image
    try:
        found = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(found):
            return image
        return ImageCms.profileToProfile(image, found, ImageCms.createProfile("sRGB")) or image
    except (ImageCms.PyCMSError, OSError, ValueError):  # a damaged profile says nothing, and the picture is there
        return image


def _on_background(image: Image.Image) -> Image.Image:
    """RGB, with what is transparent over BACKGROUND."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    background = Image.new("RGBA", image.size, BACKGROUND)
    return Image.alpha_composite(background, image.convert("RGBA")).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits or floats as grey of 8 bits with its levels. Raises ValueError where their range is not known."""
    values = np.asarray(image)
    if image.mode == "F":
        # Floats are 0..1 in most programs, in some 0..255.
        highest = 1 if values.max() <= 1 else 255
        if not (values >= 0).all() or not (values <= highest).all():
            raise ValueError(f"floats from {values.min():g} to {values.max():g}, and those of grey are 0..1 or 0..255")
    elif image.mode != "I" or image.format in ("PNG", "PPM"):
        highest = 65535
    else:
        raise ValueError("whole numbers of 32 bits, whose black and white are not known")
    grey = Image.fromarray(np.rint(values * (255 / highest)).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey
