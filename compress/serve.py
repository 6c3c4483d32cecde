"""A page for a browser: drop a picture, and see what each of several model files answers, its size and milliseconds.

Nothing on it comes from another host, and nothing goes to one. The package `gradio` is the optional extra `demo`.
"""

import base64
import html
import io
import os
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image
from torch import Tensor

from compress.cpu import processor
from compress.data.image_file import read_square
from compress.errors import UserError, printable
from compress.evaluation import paired_latency_ms
from compress.export.exporter import import_package
from compress.export.formats import exporter_of
from compress.models.own_class import OwnNetwork
from compress.predict import Predictor
from compress.stopping import StoppedError, stoppable

EXTRA = "demo"
TOP = 3
CALLS = 9  # whose median is the latency
SHOWN_SIDE = 256  # pixels of the picture on the page
# What waits behind the one picture that is answered, and the size of a picture; the page refuses more with a line.
WAITING = 16
MAX_UPLOAD = "200mb"
# Uploads older than this are deleted while the page runs, and all of them when it ends.
KEPT_SECONDS = 600


@dataclass(frozen=True)
class Served:
    """A model file on the page: its `name` there, the `runtime` that runs it, and its `bytes`."""

    name: str
    runtime: str
    bytes: int
    predictor: Predictor


def read_files(paths: Sequence[Path], network: OwnNetwork | None = None) -> list[Served]:
    """Reads the model files, each for one thread; `network`: see `Predictor.read`.

    Raises UserError, naming the file, where one cannot be read, or has other classes or another image size than the
    first, so that the answers could not stand side by side.
    """
    names, exporters = [path.name for path in paths], [exporter_of(path) for path in paths]
    if network is not None and not any(exporter.takes_network for exporter in exporters):
        raise UserError(f"network: found it for {paths[0]}; accepted: no network=, as none of the files needs one")
    files: list[Served] = []
    for path, exporter in zip(paths, exporters, strict=True):
        predictor = Predictor.read(path, network=network if exporter.takes_network else None)
        name = path.name if names.count(path.name) == 1 else str(path)
        files.append(Served(name, exporter.runtime, path.stat().st_size, predictor))
        first = files[0].predictor
        for what, found, accepted in (
            ("classes", predictor.class_names, first.class_names),
            ("image sizes", predictor.size, first.size),
        ):
            if found != accepted:
                raise UserError(
                    f"{path}: found other {what} than in {paths[0]} ({_short(found)} and {_short(accepted)}); "
                    "accepted: files for the same ones, such as those of one run"
                )
    return files


def serve(paths: Sequence[Path], host: str, port: int, network: OwnNetwork | None = None) -> None:
    """Serves the page until Ctrl-C or SIGTERM. Raises UserError before that for what cannot be served.

    host: a name, an IPv4 address, or one of IPv6, with or without the brackets that it has in a URL.
    """
    host = host.removeprefix("[").removesuffix("]")
    try:
        with stoppable(), _bound(host, port) as listener, TemporaryDirectory(prefix="compress-serve-") as uploads:
            os.environ["GRADIO_TEMP_DIR"] = uploads
            gradio, uvicorn = import_gradio(), import_package("uvicorn", EXTRA)
            files = read_files(paths, network)
            options = uvicorn.Config(page(gradio, files), log_level="warning", timeout_graceful_shutdown=1)
            listener.listen()
            address = f"[{host}]" if ":" in host else host
            count = f"{len(files)} file{'' if len(files) == 1 else 's'}"
            print(f"http://{address}:{listener.getsockname()[1]}/ serves {count}; Ctrl-C ends it", flush=True)
            uvicorn.Server(options).run(sockets=[listener])
    except StoppedError:
        print("stopped")


def import_gradio() -> Any:
    """The package, told to send no telemetry. Raises UserError, naming the extra, where it is not installed."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return import_package("gradio", EXTRA)


def page(gradio: Any, files: Sequence[Served]) -> Any:
    """The ASGI application that shows `files`; one picture is answered at a time."""
    fastapi = import_package("fastapi", EXTRA)
    fonts = ["system-ui", "sans-serif"]  # those of the system: others would come from elsewhere
    theme = gradio.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"])
    with gradio.Blocks(
        title="compress", analytics_enabled=False, fill_width=True, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)
    ) as blocks:
        gradio.HTML("<h1>One picture, every file</h1>", elem_classes="compress")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=280):
                dropped = gradio.File(label="Picture", height=150)
                pictures = gradio.HTML(elem_id="pictures", elem_classes="compress")
            with gradio.Column(scale=3, min_width=280):
                table = gradio.HTML(table_of(files), elem_id="answers", elem_classes="compress")
        dropped.change(
            lambda path: answer(files, path),
            dropped,
            [pictures, table],
            api_visibility="private",
            concurrency_limit=1,
            show_progress_on=[table],
        )
    blocks.queue(max_size=WAITING, api_open=False)
    return gradio.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=MAX_UPLOAD,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        theme=theme,
        css_paths=[Path(__file__).with_suffix(".css")],
    )


def answer(files: Sequence[Served], path: str | None) -> tuple[str, str]:
    """HTML of the picture in the file `path` and of what `files` say of it; of no picture where there is none.

    A picture that cannot be read, or that a network has no answer to, is a line in the place of the picture.
    """
    if path is None:
        return "", table_of(files)
    size = files[0].predictor.size
    try:
        shown, seen = (_read(Path(path), side, files[0].predictor.max_pixels) for side in (SHOWN_SIDE, size))
        answers = []
        for file in files:
            normalised = file.predictor.normalisation(seen[None])
            [ranked] = file.predictor.ranked(normalised, min(TOP, len(file.predictor.class_names)))
            answers.append(ranked)
        latencies = paired_latency_ms([file.predictor.model for file in files], (3, size, size), repeats=CALLS)
    except UserError as mistake:
        return f'<p class="problem" role="alert">{_escaped(str(mistake))}</p>', table_of(files)
    figures = _figure(shown, "the picture, cut to its centre") + _figure(
        seen, f"as the networks see it: {size} x {size}"
    )
    return figures, table_of(files, list(zip(answers, latencies, strict=True)))


Answer = tuple[tuple[tuple[str, ...], tuple[float, ...]], float]


def table_of(files: Sequence[Served], answers: Sequence[Answer] | None = None) -> str:
    """HTML of a line per file: name, size, and of its `((classes, probabilities), milliseconds)`, if there are any."""
    rows = []
    for index, file in enumerate(files):
        likeliest, milliseconds = "", ""
        if answers is not None:
            (classes, probabilities), latency = answers[index]
            differs = classes[0] != answers[0][0][0][0]
            likeliest = "".join(_bar(*pair) for pair in zip(classes, probabilities, strict=True))
            likeliest += '<span class="differs">not the class of the first file</span>' if differs else ""
            milliseconds = f"{latency:.2f}"
        rows.append(
            f'<tr><th scope="row">{_escaped(file.name)}<small>{_escaped(file.runtime)}</small></th>'
            f'<td class="likeliest">{likeliest}</td><td>{file.bytes / 1e3:,.1f}</td>'
            f"<td>{files[0].bytes / file.bytes:.1f}x</td><td>{milliseconds}</td></tr>"
        )
    note = (
        "smaller: than the first file. ms: the network alone for one picture on one thread, median of "
        f"{CALLS} calls after a warm-up, the files taking turns, on {processor()}. What is not on integers is computed "
        "in float32, as for accuracies."
    )
    return (
        '<table><thead><tr><th scope="col">file</th><th scope="col">answer</th><th scope="col">kB</th>'
        '<th scope="col">smaller</th><th scope="col">ms</th></tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table><p class="note">{_escaped(note)}</p>'
    )


def _bar(name: str, probability: float) -> str:
    percent = f"{100 * probability:.1f}"
    return f'<div class="bar"><span style="width: {percent}%"></span><b>{_escaped(name)}</b><i>{percent} %</i></div>'


def _figure(pixels: Tensor, caption: str) -> str:
    """`pixels` `(3, side, side)`, uint8, as a figure that has the picture inside."""
    content = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(content, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
    return f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def _read(path: Path, side: int, max_pixels: int) -> Tensor:
    """`read_square` of an upload, whose folder an error does not name."""
    with path.open("rb") as content:
        return read_square(Path(path.name), side, content, max_pixels)


def _escaped(text: str) -> str:
    return html.escape(printable(text))


def _short(value: Any) -> str:
    text = ", ".join(value) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _bound(host: str, port: int) -> socket.socket:
    """A socket on that address that does not listen yet. Raises UserError where it cannot be had."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port: found {port}; accepted: 0 to 65535, 0 for a free one")
    with ExitStack() as unless_bound:
        try:
            listener = unless_bound.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
            if os.name == "posix":  # elsewhere it would share the port of another program
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
        except (OSError, UnicodeError) as failure:
            reason = getattr(failure, "strerror", None) or failure
            raise UserError(
                f"--host, --port: found {host} and {port} ({reason}); accepted: an address of this machine and a free "
                "port"
            ) from None
        unless_bound.pop_all()
    return listener
