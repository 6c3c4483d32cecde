"""The page in a real browser without a network: nothing is complained of, points show their runs, filters filter."""

import csv
import json
import os
import re
import shutil
import statistics
from pathlib import Path

import pytest
import yaml
from playwright.sync_api import sync_playwright

from compress.benchmarks.synthetic import write_runs
from compress.checksums import read_text
from compress.report.comparison import pareto_front
from compress.report.formats import write_reports

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; Debian's package: chromium, or CHROMIUM=PATH"),
]
HOSTILE = "<img src=x onerror=alert(1)><b>&amp;"


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def window(browser):
    """A window of 1280x900 without a network: its context, its pages by file, what they complained of and asked for."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    yield context, {}, [], []
    context.close()


@pytest.fixture
def opened(window):
    """Opens a file, or begins anew where it is open; the page must complain of nothing and ask for nothing else."""
    context, pages, complaints, requests = window

    def open_page(path):
        if path in pages:
            pages[path].set_viewport_size({"width": 1280, "height": 900})
            pages[path].locator("#reset").click()
            return pages[path]
        page = pages[path] = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        assert requests.count(path.as_uri()) == 1
        return page

    yield open_page
    assert complaints == []
    assert [url for url in requests if url not in {path.as_uri() for path in pages}] == []


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """60 runs with invented figures: five methods, three students, four or five seeds."""
    folder = tmp_path_factory.mktemp("many")
    write_runs(folder / "runs", 60, epochs=5, layers=6)
    write_reports([folder / "runs"], [folder / "report.html"])
    return folder / "report.html"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two runs of different sizes, in folders with names of their own."""
    folder = tmp_path_factory.mktemp("two")
    drawn = write_runs(folder / "drawn", 26, epochs=5, layers=6)
    (folder / "runs").mkdir()
    drawn[0].rename(folder / "runs" / "small")
    drawn[25].rename(folder / "runs" / "large one")
    write_reports([folder / "runs"], [folder / "report.html"])
    return folder / "report.html"


def records(report):
    return {path.parent.name: json.loads(path.read_text()) for path in (report.parent / "runs").glob("*/result.json")}


def cells(page, heading):
    """The texts of a column of the table."""
    headings = page.locator("#table thead th").all_text_contents()
    column = [text.split(" ▾")[0].split(" ▴")[0] for text in headings].index(heading)
    return page.locator(f"#table tbody td:nth-child({column + 1})").all_text_contents()


def points(page):
    """The points of the scatter by trace, the Pareto front's apart."""
    return page.evaluate(
        "document.getElementById('tradeoff').data.filter(t => t.mode === 'markers')"
        ".map(t => ({name: t.name, x: t.x, y: t.y, spread: t.error_y.array}))"
    )


def search(page, text, count):
    page.locator("#search").fill(text)
    page.wait_for_function("text => document.getElementById('count').textContent.startsWith(text)", arg=f"{count} of")


def test_every_point_shows_its_run_under_the_mouse(opened, two):
    page = opened(two)
    marks = page.locator("#tradeoff .points path.point")
    assert marks.count() == 10
    seen = []
    for index in range(10):
        box = marks.nth(index).bounding_box()
        page.mouse.move(5, 5)
        page.wait_for_function("document.querySelectorAll('#tradeoff .hovertext').length === 0")
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.wait_for_selector("#tradeoff .hovertext")
        seen.append(page.locator("#tradeoff .hovertext").first.text_content())
    for name, record in records(two).items():
        for row in record["tradeoff"]:
            variant = "fp32" if row["bits"] == 32 else f"{row['quantizer']} {row['bits']} bit"
            said = [f"run {name}, seed {record['seed']}", f", {variant}run"]
            [text] = [text for text in seen if all(part in text for part in said)]
            accuracy = float(re.search(r"test ([\d.]+) %", text)[1])
            assert accuracy == pytest.approx(100 * row["test_accuracy"], abs=0.0051)


def test_no_chart_offers_to_upload_itself(opened, two):
    page = opened(two)
    buttons = page.evaluate("[...document.querySelectorAll('.modebar-btn')].map(b => b.dataset.title)")
    offered = {"Download plot as a PNG", "Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes"}
    assert set(buttons) == offered
    assert len(buttons) == 3 * len(offered)


def test_the_table_and_the_chart_have_every_variant(opened, two):
    page = opened(two)
    assert page.locator("#table tbody tr").count() == 10
    drawn = sorted((x, y) for trace in points(page) for x, y in zip(trace["x"], trace["y"], strict=True))
    rows = sorted(
        (row["bytes"], row["test_accuracy"]) for record in records(two).values() for row in record["tradeoff"]
    )
    assert [(x, pytest.approx(y, rel=1e-5)) for x, y in drawn] == [(size, 100 * accuracy) for size, accuracy in rows]


def test_a_change_that_rounds_to_zero_has_no_minus(opened, two):
    shown = "(change) => printed({signed: true, scale: 100, digits: 2, suffix: ''}, change)"
    texts = [opened(two).evaluate(shown, change) for change in (-0.00002, 0, -0.0002, 12.5)]
    assert texts == ["+0.00", "+0.00", "-0.02", "+1,250.00"]


def test_means_and_deviations_are_those_of_the_seeds(opened, many):
    page = opened(many)
    assert page.locator("#views button[aria-pressed=true]").text_content() == "Means over seeds"
    page.locator("select[data-key=method]").select_option(label="kd")
    page.locator("select[data-key=student]").select_option(label="resnet8")
    page.locator("select[data-key=width]").select_option(label="2 bit")
    accuracies = [
        100 * row["test_accuracy"]
        for record in records(many).values()
        if "method=kd" in record["overrides"] and record["student"]["model"] == "resnet8"
        for row in record["tradeoff"]
        if row["bits"] == 2
    ]
    assert len(accuracies) == 5
    mean, deviation = statistics.mean(accuracies), statistics.stdev(accuracies)
    assert cells(page, "test %") == [f"{mean:.2f} ± {deviation:.2f}"]
    assert cells(page, "seeds") == ["5"]
    [trace] = points(page)
    assert trace["y"] == [pytest.approx(mean, rel=1e-5)]
    assert trace["spread"] == [pytest.approx(deviation, rel=1e-5)]
    mark = page.locator("#tradeoff .points path.point").bounding_box()
    page.mouse.move(mark["x"] + mark["width"] / 2, mark["y"] + mark["height"] / 2)
    page.wait_for_selector("#tradeoff .hovertext")
    assert "5 seeds" in page.locator("#tradeoff .hovertext").first.text_content()


def test_the_cards_name_the_most_accurate_and_the_smallest_close_to_it(opened, many):
    page = opened(many)
    page.get_by_role("button", name="Every run").click()
    rows = [row for record in records(many).values() for row in record["tradeoff"]]
    best = max(row["test_accuracy"] for row in rows)
    smallest = min(row["bytes"] for row in rows if row["test_accuracy"] >= best - 0.01)
    accuracy = max(row["test_accuracy"] for row in rows if row["bytes"] == smallest)
    cards = page.locator("#cards strong").all_text_contents()
    assert cards[0] == "60 runs"
    assert cards[1].startswith(f"{100 * best:.2f} % at ")
    assert cards[2] == f"{100 * accuracy:.2f} % at {smallest / 1e3:.1f} kB"
    page.locator("#cards button").nth(1).click()
    assert f"{100 * accuracy:.2f} %" in page.locator("#details dl").text_content()
    assert page.locator("#table tr[aria-selected=true]").count() == 1


def test_filters_and_search_narrow_the_table_and_the_charts(opened, many):
    page = opened(many)
    page.get_by_role("button", name="Every run").click()
    assert page.locator("#count").text_content() == "300 of 300 variants"
    page.locator("select[data-key=method]").select_option(label="dkd")
    assert sum("method=dkd" in record["overrides"] for record in records(many).values()) == 10
    assert page.locator("#count").text_content() == "50 of 300 variants"
    assert set(cells(page, "method")) == {"dkd"}
    assert [trace["name"] for trace in points(page)] == ["dkd"]
    curves = page.evaluate("document.getElementById('curves').data.map(t => t.name)")
    assert set(curves) == {"dkd", "chosen"}
    search(page, "resnet20 2 bit", 5)
    assert set(cells(page, "student")) == {"resnet20"}
    assert set(cells(page, "variant")) == {"gpfq 2 bit"}
    assert sum(len(trace["x"]) for trace in points(page)) == 5
    page.locator("#reset").click()
    assert page.locator("#count").text_content() == "60 of 60 variants"
    assert page.locator("#search").input_value() == ""


def test_what_matches_nothing_is_said_everywhere(opened, many):
    page = opened(many)
    search(page, "no such thing", 0)
    assert "No variant matches" in page.locator("#table").text_content()
    for place in ("tradeoff", "curves", "layers", "details"):
        assert page.locator(f"#{place} .empty").is_visible()
    search(page, "", 60)
    for place in ("tradeoff", "curves", "layers"):
        assert page.locator(f"#{place} .empty").count() == 0
        assert page.locator(f"#{place} .main-svg").first.is_visible()


def test_a_heading_sorts_both_ways(opened, many):
    page = opened(many)
    page.get_by_role("button", name="Every run").click()
    page.locator("#more").click()
    page.locator("#table thead").get_by_role("button", name="same %").click()
    values = [float(text) for text in cells(page, "same %")]
    assert len(values) == 300
    assert values == sorted(values, reverse=True)
    page.locator("#table thead").get_by_role("button", name="same %").click()
    assert [float(text) for text in cells(page, "same %")] == sorted(values)
    page.locator("#table thead").get_by_role("button", name="run", exact=True).click()
    assert cells(page, "run") == [str(number) for number in range(60) for _ in range(5)]


@pytest.mark.parametrize("kind", ["Test", "Validation"])
def test_the_front_is_that_of_what_is_shown(opened, many, kind):
    page = opened(many)
    page.get_by_role("button", name="Every run").click()
    page.get_by_role("button", name=kind, exact=True).click()
    rows = [row for record in records(many).values() for row in record["tradeoff"]]
    expected = [(row["bytes"], 100 * row[f"{kind.lower()}_accuracy"]) for row in rows]
    expected = [expected[index] for index in pareto_front(expected)]
    [(x, y)] = page.evaluate(
        "document.getElementById('tradeoff').data.filter(t => t.mode === 'lines').map(t => [t.x, t.y])"
    )
    assert [(a, pytest.approx(b, rel=1e-5)) for a, b in zip(x, y, strict=True)] == expected
    page.locator("#more").click()
    assert cells(page, "front").count("●") == len(expected)


def test_a_chosen_variant_shows_its_layers_its_course_and_links_to_its_files(opened, two):
    page = opened(two)
    page.locator("#table tbody tr", has_text="large one").filter(has_text="3 bit").click()
    record, directory = records(two)["large one"], two.parent / "runs" / "large one"
    [row] = [row for row in record["tradeoff"] if row["bits"] == 3]
    layers = record["layers"][Path(row["file"]).name]["quantized"]
    bars, errors = page.evaluate("document.getElementById('layers').data.map(t => t.y)")
    assert bars == [layer["bits"] for layer in layers.values()]
    assert errors == [pytest.approx(100 * layer["error"], rel=1e-5) for layer in layers.values()]
    assert page.evaluate("document.getElementById('layers').layout.xaxis.ticktext") == list(layers)

    [chosen] = page.evaluate("document.getElementById('curves').data.filter(t => t.name === 'chosen')")
    with (directory / "metrics.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert chosen["x"][:-1] == [int(line["epoch"]) + 1 for line in lines]
    assert chosen["y"][:-1] == [pytest.approx(float(line["val/accuracy"]), rel=1e-5) for line in lines]

    targets = page.evaluate("[...document.querySelectorAll('#details a')].map(a => a.href)")
    files = [
        Path.from_uri(target) if hasattr(Path, "from_uri") else Path(target[7:].replace("%20", " "))
        for target in targets
    ]
    assert {path.name for path in files} == {"result.json", "tradeoff.csv", "config.yaml", "metrics.csv"} | {
        Path(row["file"]).name for row in record["tradeoff"]
    }
    assert all(path.is_file() and path.is_relative_to(directory) for path in files)
    assert "method=kd" not in page.locator("#details code").text_content()
    assert " ".join(record["overrides"]) in page.locator("#details code").text_content()


def test_another_metric_can_be_drawn(opened, two):
    page = opened(two)
    page.locator("#metric").select_option(label="train/loss")
    assert page.evaluate("document.getElementById('curves').layout.yaxis.title.text") == "train/loss"


@pytest.mark.parametrize("width", [1280, 800])
def test_nothing_sticks_out_sideways(opened, many, width):
    page = opened(many)
    page.set_viewport_size({"width": width, "height": 900})
    for view in ("Means over seeds", "Every run"):
        page.get_by_role("button", name=view).click()
        assert page.evaluate("document.documentElement.scrollWidth") == width
    if width == 1280:
        assert page.evaluate("(t => t.scrollWidth <= t.clientWidth)(document.getElementById('table').parentElement)")


def test_text_from_runs_stays_text(opened, tmp_path):
    drawn, harmless = write_runs(tmp_path / "drawn", 6, epochs=2, layers=3)[:6:5]
    directory = tmp_path / "runs" / "x" / HOSTILE
    directory.parent.mkdir(parents=True)
    drawn.rename(directory)
    harmless.rename(tmp_path / "runs" / "z")
    record = json.loads(read_text(directory / "result.json"))
    config = yaml.safe_load((directory / "config.yaml").read_text())
    config["method"]["stem"] = HOSTILE
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    record["overrides"] = [f"method={HOSTILE}", "a=</script x><script>alert(2)</script>", "b={{content}}"]
    record["data"]["name"] = record["student"]["model"] = HOSTILE
    layers = record["layers"]["student-gpfq-2bit.safetensors"]["quantized"]
    layers[HOSTILE] = layers.pop("conv1")
    (directory / "result.json").write_text(json.dumps(record))
    text = (directory / "metrics.csv").read_text()
    (directory / "metrics.csv").write_text(text.replace("val/accuracy", HOSTILE))
    (tmp_path / "runs" / "y" / HOSTILE).mkdir(parents=True)
    (tmp_path / "runs" / "y" / HOSTILE / "result.json").write_text("{")
    write_reports([tmp_path / "runs"], [tmp_path / "report.html"])

    page = opened(tmp_path / "report.html")
    page.locator("select[data-key=data]").select_option(label=HOSTILE)
    page.locator("#table tbody tr", has_text="2 bit").click()
    page.locator("#metric").select_option(label=HOSTILE)
    assert page.locator("h1").text_content() == f"Accuracy per byte: {HOSTILE} and FashionMNIST"
    assert cells(page, "method") == [HOSTILE] * 5
    assert page.locator("#details h3").text_content().endswith(HOSTILE)
    assert "alert(2)" in page.locator("#details code").text_content()
    assert HOSTILE in page.locator("#left-out").text_content()
    assert HOSTILE in page.locator("#tradeoff .legend").text_content()
    assert HOSTILE in page.locator("#layers .xaxislayer-above").first.text_content()
    assert page.locator("img").count() == 0


def test_runs_without_metrics_and_layers_are_shown_all_the_same(opened, tmp_path):
    [directory] = write_runs(tmp_path / "runs", 1, epochs=2, layers=3)
    (directory / "metrics.csv").unlink()
    record = json.loads(read_text(directory / "result.json"))
    del record["layers"]
    record["tradeoff"] = record["tradeoff"][:1]
    (directory / "result.json").write_text(json.dumps(record))
    write_reports([directory], [tmp_path / "report.html"])
    page = opened(tmp_path / "report.html")
    assert "no metrics.csv" in page.locator("#curves .empty").text_content()
    assert "No layers" in page.locator("#layers .empty").text_content()
    assert page.locator("#table tbody tr").count() == 1


def test_of_several_data_sets_each_has_its_own_front(opened, tmp_path):
    directories = write_runs(tmp_path / "runs", 3, epochs=2, layers=3)
    record = json.loads(read_text(directories[2] / "result.json"))
    record["data"]["name"] = "Digits"
    (directories[2] / "result.json").write_text(json.dumps(record))
    write_reports([tmp_path / "runs"], [tmp_path / "report.html"])
    page = opened(tmp_path / "report.html")
    fronts = "document.getElementById('tradeoff').data.filter(t => t.mode === 'lines').length"
    assert page.locator("select[data-key=data] option:checked").text_content() == "FashionMNIST"
    assert page.evaluate(fronts) == 1
    page.locator("select[data-key=data]").select_option(label="all data")
    assert page.evaluate(fronts) == 2
    assert set(cells(page, "data")) == {"FashionMNIST", "Digits"}


def test_a_page_of_500_runs_opens_and_filters(opened, tmp_path):
    write_runs(tmp_path / "runs", 500, epochs=10, layers=6)
    write_reports([tmp_path / "runs"], [tmp_path / "report.html"])
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("plotly.js v") == 1
    page = opened(tmp_path / "report.html")
    page.get_by_role("button", name="Every run").click()
    assert page.locator("#count").text_content() == "2,500 of 2,500 variants"
    assert sum(len(trace["x"]) for trace in points(page)) == 2500
    search(page, "resnet56 lr=0.03", 125)
