"""Image files of any size and mode, made square and RGB."""

from pathlib import Path

from PIL import Image, UnidentifiedImageError

from compress.errors import UserError


def read_rgb(path: Path, accepted: str) -> Image.Image:
    """The image in the file `path` as RGB; grey is repeated. Raises UserError, saying what is `accepted`."""
    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as failure:
        raise UserError(f"{path}: cannot be read ({failure}); accepted: {accepted}") from None


def centred(image: Image.Image, size: int) -> Image.Image:
    """`image` with its shorter side resized to `size` pixels, bilinearly, and the centre cut out: (size, size)."""
    factor = size / min(image.size)
    width, height = (max(size, round(side * factor)) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return resized.crop((left, top, left + size, top + size))
