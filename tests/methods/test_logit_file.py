"""A file of logits gives back what was written to it, or says that it is not there; never anything else."""

import errno
import os
import resource
import signal
import sys

import numpy as np
import pytest
import torch
from processes import PROCESSES

from compress.errors import UserError
from compress.methods.logit_file import CHUNK, HEADER, LogitFile

IMAGES, CLASSES = 2 * CHUNK + 44, 10
ABOUT = {"teacher": "abc", "view": 0}


def opened(path, images=IMAGES, classes=CLASSES, about=ABOUT):
    return LogitFile(path, images, classes, about)


def logits(chunk, rows=CHUNK):
    return torch.randn(rows, CLASSES, generator=torch.Generator().manual_seed(chunk))


def fill(path):
    file = opened(path)
    for chunk in range(file.chunks):
        file.write(chunk, logits(chunk, len(file.rows(chunk))))
    return file


@pytest.mark.parametrize("in_memory", [False, True])
def test_what_is_written_is_read_back_in_float16_by_others_too(tmp_path, in_memory):
    path = None if in_memory else tmp_path / "a.logits"
    file = opened(path)
    assert [len(file.rows(chunk)) for chunk in range(file.chunks)] == [CHUNK, CHUNK, 44]
    assert not any(map(file.has, range(file.chunks)))
    file.write(1, logits(1))
    for reader in [file] if in_memory else [file, opened(path)]:
        assert [reader.has(chunk) for chunk in range(3)] == [False, True, False]
        assert np.array_equal(reader.values[CHUNK : 2 * CHUNK], logits(1).half().numpy())
    if path is not None:
        assert path.stat().st_size == file.bytes == LogitFile.size(IMAGES, CLASSES)


def test_every_changed_bit_of_a_chunk_or_of_its_checksum_takes_it_away(tmp_path):
    path = tmp_path / "a.logits"
    fill(path)
    content = path.read_bytes()
    generator = np.random.default_rng(0)
    for place in generator.integers(HEADER, len(content), 60):
        changed = bytearray(content)
        changed[place] ^= 1 << generator.integers(8)
        path.write_bytes(changed)
        file = opened(path)
        at = (place - HEADER) // 8 if place < HEADER + 8 * file.chunks else None
        at = (place - HEADER - 8 * file.chunks) // (2 * CLASSES * CHUNK) if at is None else at
        assert [chunk for chunk in range(file.chunks) if not file.has(chunk)] == [at]
    path.write_bytes(content)
    assert all(map(opened(path).has, range(3)))


@pytest.mark.parametrize(
    "change",
    [
        lambda path: os.truncate(path, path.stat().st_size // 2),
        lambda path: os.truncate(path, 10),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"x" * path.stat().st_size),
        lambda path: path.write_bytes(path.read_bytes() + b"more"),
    ],
)
def test_a_file_that_was_cut_short_or_is_no_such_file_is_made_anew(tmp_path, change):
    path = tmp_path / "a.logits"
    fill(path)
    change(path)
    file = opened(path)
    assert not any(map(file.has, range(file.chunks)))
    fill(path)
    assert all(map(file.has, range(file.chunks)))


@pytest.mark.parametrize("other", [{"images": IMAGES + 1}, {"classes": 20}, {"about": {"teacher": "abd", "view": 0}}])
def test_logits_of_others_are_not_read(tmp_path, other):
    path = tmp_path / "a.logits"
    fill(path)
    assert not any(map(opened(path, **other).has, range(3)))


def test_one_of_another_teacher_is_not_read_under_a_changed_header(tmp_path):
    path, other = tmp_path / "a.logits", tmp_path / "b.logits"
    fill(path)
    about = {"teacher": "xyz", "view": 0}
    header = opened(other, about=about)._header
    other.write_bytes(header + path.read_bytes()[HEADER:])
    assert not any(map(opened(other, about=about).has, range(3)))


def test_logits_that_float16_cannot_hold_are_refused(tmp_path):
    file = opened(tmp_path / "a.logits")
    with pytest.raises(UserError, match=r"^method.teacher_cache: found logits of the teacher up to 7e\+04, .*: null$"):
        file.write(0, torch.full((CHUNK, CLASSES), 7e4))
    assert not file.has(0)


def _without_room(path, said):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (HEADER, HEADER))
    try:
        opened(path)
    except OSError as failure:
        said.send(failure.errno)
    else:
        said.send(None)


def test_without_room_for_all_of_it_nothing_is_left(tmp_path):
    receive, send = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_without_room, args=(tmp_path / "teachers" / "a.logits", send))
    process.start()
    process.join()
    assert receive.recv() is not None
    assert [path.suffix for path in (tmp_path / "teachers").iterdir()] == [".lock"]


def _fill_some(path, chunks):
    file = opened(path, images=40 * CHUNK)
    for chunk in chunks:
        file.write(chunk, logits(chunk))


def test_two_processes_fill_one_file(tmp_path):
    path = tmp_path / "a.logits"
    processes = [PROCESSES.Process(target=_fill_some, args=(path, range(first, 40, 2))) for first in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    file = opened(path, images=40 * CHUNK)
    assert all(map(file.has, range(40)))
    assert np.array_equal(file.values, torch.cat([logits(chunk).half() for chunk in range(40)]).numpy())


def _may_only_read(path, said):
    def refuse(event, about):
        if event == "open" and isinstance(about[2], int) and about[2] & os.O_RDWR and about[0] == str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    sys.addaudithook(refuse)
    file = opened(path)
    file.write(1, logits(1))
    said.send([file.has(chunk) for chunk in range(3)])


def test_what_is_added_to_a_file_that_can_only_be_read_stays_there(tmp_path):
    path = tmp_path / "a.logits"
    opened(path).write(0, logits(0))
    receive, send = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_may_only_read, args=(path, send))
    process.start()
    process.join()
    assert receive.recv() == [True, True, False]
    assert [opened(path).has(chunk) for chunk in range(3)] == [True, False, False]
