"""Image files as a viewer shows them, whatever their mode, and which files of a folder are images."""

import os
import zlib
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps, features

from compress.data.folder import Folder
from compress.data.image_file import BACKGROUND, PIXELS_KEY, image_files, read_rgb, read_square
from compress.errors import UserError


def gradient(height=20, width=30):
    """uint8 (height, width, 3) without any symmetry."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 255 // height, x * 255 // width, (x + y) * 255 // (height + width)], axis=2).astype(np.uint8)


def read(path):
    return np.asarray(read_rgb(path)).astype(int)


@pytest.mark.parametrize("shape", [(1, 20_000_000), (3_000_000, 1), (12_000, 12_000), (50_000, 50_000)])
def test_a_small_file_of_a_huge_picture_is_refused_before_it_is_decoded(tmp_path, shape):
    path, (height, width) = tmp_path / "bomb.png", shape

    def chunk(kind, content):
        return len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4)

    header = width.to_bytes(4) + height.to_bytes(4) + bytes([8, 0, 0, 0, 0])
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")))
    with pytest.raises(UserError, match="pixels"):
        read_rgb(path)


def test_a_bound_holds_for_the_picture_that_it_is_given_for_and_goes_before_the_environment(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.fromarray(gradient()).save(path)
    read_rgb(path)
    pillows = Image.MAX_IMAGE_PIXELS
    read_rgb(path, max_pixels=10**12)
    read_rgb(path)
    assert pillows == Image.MAX_IMAGE_PIXELS
    for bound, given in ((600, None), (500, 600)):
        monkeypatch.setenv(PIXELS_KEY, str(bound))
        assert read_rgb(path, max_pixels=given).size == (30, 20)
    for bound, given in ((599, None), (600, 599)):
        monkeypatch.setenv(PIXELS_KEY, str(bound))
        with pytest.raises(UserError, match=r"30 x 20 pixels; accepted: up to 599, or what data\.max_pixels or"):
            read_rgb(path, max_pixels=given)


@pytest.mark.parametrize("found", ["x", "0", "-5", "", "1e9"])
def test_a_bound_in_the_environment_that_is_no_number_above_zero_is_refused_before_any_work(found, monkeypatch):
    monkeypatch.setenv(PIXELS_KEY, found)
    with pytest.raises(UserError, match=rf"{PIXELS_KEY}: found '{found}'; accepted: a whole number above zero$"):
        Folder(root="nowhere", image_size=16)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_a_picture_is_turned_as_its_exif_orientation_says(tmp_path, orientation, ending):
    path, exif = tmp_path / f"phone.{ending}", Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(gradient()).save(path, exif=exif)
    with Image.open(path) as opened:
        shown = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    assert shown.shape[:2] == ((20, 30) if orientation < 5 else (30, 20))
    assert np.array_equal(read(path), shown)


def test_a_damaged_exif_block_turns_nothing(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "a.jpg", exif=b"Exif\x00\x00not a TIFF header")
    assert read(tmp_path / "a.jpg").shape == (20, 30, 3)


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_grey_of_sixteen_bits_keeps_its_levels(tmp_path, ending):
    values = np.arange(0, 65536, 8, dtype=np.uint16).reshape(64, 128)
    Image.fromarray(values).save(tmp_path / f"a.{ending}")
    assert np.array_equal(read(tmp_path / f"a.{ending}")[:, :, 1], np.rint(values / 257))


@pytest.mark.parametrize("highest", [1, 255])
def test_floats_keep_their_levels(tmp_path, highest):
    values = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    Image.fromarray(values * highest).save(tmp_path / "a.tif")
    assert np.abs(read(tmp_path / "a.tif")[:, :, 2].ravel() - np.arange(256)).max() <= 1


@pytest.mark.parametrize("values", [np.float32([[-1, 2]]), np.float32([[0, np.nan]]), np.int32([[0, 70000]])])
def test_grey_whose_black_and_white_are_not_known_is_refused(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif: cannot be read \((floats from|whole numbers of 32 bits)"):
        read_rgb(tmp_path / "a.tif")


def test_what_is_transparent_lies_on_the_background(tmp_path):
    colours = np.uint8([[[200, 10, 20, 0], [200, 10, 20, 255], [200, 10, 20, 128]]])
    expected = np.array([BACKGROUND, (200, 10, 20), (227, 132, 137)])
    Image.fromarray(colours).save(tmp_path / "alpha.png")
    assert np.abs(read(tmp_path / "alpha.png")[0] - expected).max() <= 1
    palette = Image.fromarray(colours[:, :2]).quantize()
    palette.save(tmp_path / "palette.png")
    assert palette.mode == "P"
    assert np.array_equal(read(tmp_path / "palette.png")[0], expected[:2])
    Image.fromarray(np.uint8([[7, 9]])).save(tmp_path / "grey.png", transparency=7)
    Image.fromarray(np.uint16([[700, 2570]])).save(tmp_path / "deep.png", transparency=700)
    Image.fromarray(np.uint8([[[7, 255], [10, 255], [9, 0]]])).save(tmp_path / "grey_alpha.png")
    assert read(tmp_path / "grey.png")[0, :, 0].tolist() == [255, 9]
    assert read(tmp_path / "deep.png")[0, :, 0].tolist() == [255, 10]
    assert read(tmp_path / "grey_alpha.png")[0, :, 0].tolist() == [7, 10, 255]


def swapped_profile():
    """An ICC profile whose red is the green of sRGB and whose green is its red."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile = bytearray(bytes(profile).replace("sRGB".encode("utf-16-be"), "Swap".encode("utf-16-be")))
    tags = {profile[at : at + 4].decode(): at for at in range(132, 132 + 12 * profile[131], 12)}
    red, green = tags["rXYZ"] + 4, tags["gXYZ"] + 4
    profile[red : red + 8], profile[green : green + 8] = profile[green : green + 8], profile[red : red + 8]
    return bytes(profile)


@pytest.mark.skipif(not features.check("littlecms2"), reason="this Pillow has no littleCMS")
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colours_of_an_embedded_profile_become_those_of_srgb(tmp_path, mode):
    picture = Image.fromarray(gradient()).convert(mode)
    picture.save(tmp_path / "plain.png")
    picture.save(tmp_path / "srgb.png", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    picture.save(tmp_path / "damaged.png", icc_profile=b"no profile at all")
    picture.save(tmp_path / "swapped.png", icc_profile=swapped_profile())
    for name in ("plain", "srgb", "damaged"):
        assert np.array_equal(read(tmp_path / f"{name}.png"), gradient())
    # The primaries change places, and with them the channels.
    assert np.abs(read(tmp_path / "swapped.png") - gradient()[:, :, [1, 0, 2]]).max() <= 3


def test_palette_ink_and_bits_become_rgb(tmp_path):
    flat = Image.new("RGB", (8, 8), (250, 10, 20))
    flat.quantize().save(tmp_path / "palette.gif")
    flat.convert("CMYK").save(tmp_path / "ink.jpg", quality=100)
    Image.new("1", (8, 8), 1).save(tmp_path / "bits.png")
    assert np.abs(read(tmp_path / "palette.gif") - (250, 10, 20)).max() <= 4
    assert np.abs(read(tmp_path / "ink.jpg") - (250, 10, 20)).max() <= 4
    assert (read(tmp_path / "bits.png") == 255).all()


@pytest.mark.parametrize("ending", ["jpe", "jfif", "avif"])
def test_the_rarer_endings_are_read(tmp_path, ending):
    if ending == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    Image.fromarray(gradient()).save(tmp_path / f"a.{ending}", format="AVIF" if ending == "avif" else "JPEG")
    assert image_files(tmp_path) == [tmp_path / f"a.{ending}"]
    assert np.abs(read(tmp_path / f"a.{ending}") - gradient()).mean() < 12


def test_what_pillow_cannot_read_is_named_in_one_line(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"\x00\x00\x00\x18ftypheic" + bytes(100))
    (tmp_path / "b.jpg").write_bytes(b"")
    Image.fromarray(gradient()).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:90])
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    for name, reason in (
        ("a.heic", "only with the package pillow-heif" if find_spec("pillow_heif") is None else ""),
        ("b.jpg", "no image"),
        ("cut.png", "truncated"),
        ("gone.png", "No such file"),
    ):
        with pytest.raises(
            UserError, match=rf"{name}: cannot be read \(.*({reason}).*\); accepted: an image"
        ) as caught:
            read_rgb(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_large_jpeg_is_decoded_in_less_detail_and_looks_the_same(tmp_path):
    Image.fromarray(gradient(1200, 1600)).save(tmp_path / "large.jpg", quality=95)
    assert read_rgb(tmp_path / "large.jpg", side=64).size == (200, 150)
    quick = read_square(tmp_path / "large.jpg", 64)
    whole = read_rgb(tmp_path / "large.jpg").resize((85, 64), Image.Resampling.BILINEAR).crop((10, 0, 74, 64))
    assert quick.shape == (3, 64, 64)
    assert (quick.int() - torch.from_numpy(np.array(whole)).permute(2, 0, 1).int()).abs().max() <= 4


def test_hidden_files_and_folders_are_nothing_at_every_depth(tmp_path):
    for name in ("a.png", ".b.png", ".hidden/c.png", "deep/.thumbs/d.png", "deep/er/e.JPG", "deep/er/.f.png", "g.txt"):
        path = tmp_path / ".pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    root = tmp_path / ".pictures"  # named by the user, so not hidden
    assert image_files(root) == [root / "a.png", root / "deep/er/e.JPG"]


def test_links_are_followed_and_loops_end(tmp_path):
    for name in ("train/cat/a.png", "train/dog/b.png", "elsewhere/c.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    cat = tmp_path / "train/cat"
    (cat / "more").symlink_to(tmp_path / "elsewhere")
    (cat / "again").symlink_to(cat)
    (cat / "up").symlink_to(tmp_path / "train")
    (tmp_path / "elsewhere/back").symlink_to(cat)
    (cat / "self.png").symlink_to("self.png")
    (cat / "d.png").symlink_to(tmp_path / "train/dog/b.png")
    names = [file.relative_to(cat).as_posix() for file in image_files(cat)]
    assert names == ["a.png", "d.png", "more/c.png", "self.png"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_with_the_name_of_an_image_is_none(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    assert image_files(tmp_path) == []
