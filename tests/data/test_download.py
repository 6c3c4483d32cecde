"""Fetching archives: what cannot be had or is not what was asked for leaves nothing behind."""

import hashlib
import socket
import threading

import pytest

from compress.data import cifar
from compress.data.download import download
from compress.errors import UserError


def answering(content):
    """The address of a server that answers one request with these bytes."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        with server, server.accept()[0] as connection:
            connection.recv(65536)
            connection.sendall(content)

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{server.getsockname()[1]}/archive"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_a_file_is_fetched_and_nothing_lies_beside_it(tmp_path):
    url = answering(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
    download(url, hashlib.md5(b"hello").hexdigest(), tmp_path / "new" / "file")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]
    assert (tmp_path / "new" / "file").read_bytes() == b"hello"


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhell",
        b"HTTP/1.1 404 No\r\n\r\n",
        b"no HTTP at all\r\n\r\n",
        b"",
    ],
    ids=["broken off", "not found", "garbage", "nothing"],
)
def test_a_download_that_fails_leaves_no_folder_behind(tmp_path, answer):
    with pytest.raises(OSError, match=r".+"):
        download(answering(answer), hashlib.md5(b"hello").hexdigest(), tmp_path / "new" / "deep" / "file")
    assert list(tmp_path.iterdir()) == []


def test_cifar_that_cannot_be_downloaded_says_which_archive_to_put_where(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    monkeypatch.setattr(cifar.CIFAR10.published, "url", f"http://127.0.0.1:{closed}/archive")
    with pytest.raises(UserError, match=r"nowhere.*cifar-10-python.tar.gz") as caught:
        cifar.CIFAR10(root=str(tmp_path / "nowhere"), image_size=32).prepare_data()
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
