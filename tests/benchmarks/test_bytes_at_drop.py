"""Sizes at a loss of accuracy, from synthetic measurements."""

import pytest

from compress.benchmarks.bytes_at_drop import Point, bytes_at, drop_table, front
from compress.benchmarks.quantizer_study import tables


def line(*pairs):
    """Points from pairs of bytes and drop, for functions that do not look at the validation accuracy."""
    return [Point(size, 0.0, drop) for size, drop in pairs]


def test_the_logarithm_of_the_bytes_is_linear_in_the_drop_between_neighbours():
    points = line((40_000, 1.0), (160_000, 0.0), (640_000, -0.5))
    assert bytes_at(points, 0.5) == pytest.approx(80_000)
    assert bytes_at(points, 0.25) == pytest.approx(40_000 * 4**0.75)
    assert bytes_at(points, -0.25) == pytest.approx(320_000)
    assert [bytes_at(points, drop) for drop in (1.0, 0.0, -0.5)] == pytest.approx([40_000, 160_000, 640_000])


def test_of_several_sizes_at_a_drop_the_smallest_counts():
    points = line((40_000, 0.6), (60_000, 0.2), (80_000, 0.4), (100_000, 0.0))
    assert bytes_at(points, 0.3) == pytest.approx(40_000 * 1.5**0.75)


def test_a_drop_beyond_the_measured_ones_has_no_size():
    points = line((40_000, 0.6), (60_000, 0.2))
    assert bytes_at(points, 0.7) is None
    assert bytes_at(points, 0.1) is None
    assert bytes_at(line((40_000, 0.6)), 0.6) == 40_000


def test_points_are_chosen_on_validation():
    small, worse, large = Point(40, -0.5, 1.0), Point(60, -0.6, 0.0), Point(80, 0.0, 0.5)
    assert front([large, worse, small]) == [small, large]


def seed(shift=0.0, **settings):
    """The measurements of a network: for each setting quantizer, levels, and rows of bytes, change in points."""
    float32 = {"validation_accuracy": 0.9, "test_accuracy": 0.9}
    measured = {}
    for name, (quantizer, levels, *rows) in settings.items():
        entries = []
        for size, change in rows:
            accuracy = 0.9 + (change + shift) / 100
            row = {"quantizer": quantizer, "bits": None if quantizer == "nncodec" else 2, "levels": levels}
            entries.append({**row, "bytes": size, "validation_accuracy": accuracy, "test_accuracy": accuracy})
        errors = [None if quantizer == "nncodec" else 0.5] * len(rows)
        measured[name] = {"float": float32, "rows": entries, "errors": errors}
    return measured


WIDTHS = {"widths": ("gpfq", 4, (80_000, -0.2), (120_000, -0.05)), "rtn": ("rtn", 4, (90_000, -30))}
RATES = {"rates": ("gpfq", None, (20_000, -2.0), (80_000, 0.0))}
CODEC = {"nncodec, qp -8": ("nncodec", None, (40_000, -2.0)), "nncodec, qp -16": ("nncodec", None, (160_000, 0.0))}


def test_kinds_stand_side_by_side_with_what_they_save_against_the_codec():
    # Changes that are 0.1 points off in either seed, so that the means are those above.
    settings = WIDTHS | RATES | CODEC
    table = drop_table("resnet20", [seed(0.1, **settings), seed(-0.1, **settings)])
    title, _, head, _, *lines = table.splitlines()
    assert "resnet20" in title
    assert "2 seeds" in title
    assert head.startswith("| drop, points | fixed widths, kB | rates, kB | nncodec, kB | fixed widths: saved")
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines] == [
        ["0.1", "104.8", "74.6", "149.3", "30 %", "50 %"],
        ["0.3", "not reached: 0.20 at 80.0", "65.0", "130.0", "", "50 %"],
        ["0.5", "not reached: 0.20 at 80.0", "56.6", "113.1", "", "50 %"],
        ["1.0", "not reached: 0.20 at 80.0", "40.0", "80.0", "", "50 %"],
    ]


def test_where_every_file_loses_more_the_best_one_is_named():
    table = drop_table("resnet20", [seed(rates=("gpfq", None, (20_000, -0.9), (80_000, -0.2)))])
    assert "| 0.1 | not reached: 0.20 at 80.0 |" in table


def test_a_setting_of_one_seed_alone_does_not_count():
    other = {"other": ("gpfq", None, (10_000, 0.0))}
    both = [seed(**RATES, **other), seed(**RATES)]
    assert drop_table("resnet20", both) == drop_table("resnet20", [seed(**RATES)] * 2)
    assert drop_table("resnet20", both[:1]) != drop_table("resnet20", [seed(**RATES)])


def test_without_the_codec_nothing_is_compared_with_it():
    table = drop_table("resnet20", [seed(**WIDTHS, **RATES)])
    assert "nncodec" not in table
    assert "| 1.0 | not reached: 0.20 at 80.0 | 40.0 |" in table


def test_rows_of_the_codec_have_neither_a_width_nor_an_error():
    text = tables({"resnet20": {"0": seed(**RATES, **CODEC)}})
    assert "fp32 90.00 % on the test set\n" in text
    assert "| nncodec, qp -8 |  | -2.00 | -2.00 |  | 40.0 |" in text
    assert "| rates | 2 | -2.00 | -2.00 | 0.500 | 20.0 |" in text
    assert "| drop, points | rates, kB | nncodec, kB |" in text
