"""What fails says so in one line, unless the program is at fault or `--debug` was typed."""

import errno
import gc
import os
from pathlib import Path

import pytest

from compress.errors import COLLECT_AFTER, UserError, exit_code
from compress.files import write_atomically
from compress.stopping import under_way
from compress.training.fit import epoch_of


class OutOfMemoryError(RuntimeError):
    """As PyTorch calls its own."""


def failing(failure):
    def work():
        raise failure

    return work


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EMFILE, errno.EIO])
def test_what_the_machine_refuses_is_one_line_with_the_file(capsys, number):
    assert exit_code(failing(OSError(number, os.strerror(number), "runs/best.ckpt"))) == 1
    expected = f"error: runs/best.ckpt: {os.strerror(number)}; to go on after that: the same command\n"
    assert capsys.readouterr().err == expected


def test_a_command_looks_for_garbage_less_often_than_python_does():
    usual, found = gc.get_threshold(), []
    gc.set_threshold(700)
    try:
        assert exit_code(lambda: found.append(gc.get_threshold()[0])) == 0
    finally:
        gc.set_threshold(*usual)
    assert found == [COLLECT_AFTER]


@pytest.mark.parametrize("failure", [MemoryError(), OutOfMemoryError("CUDA out of memory")])
def test_too_little_memory_is_one_line(capsys, failure):
    assert exit_code(failing(failure)) == 1
    assert "found too little memory; accepted: a smaller data.batch_size" in capsys.readouterr().err


@pytest.mark.parametrize("failure", [KeyError("a"), ZeroDivisionError(), ConnectionError("lost"), RecursionError()])
def test_a_fault_of_the_program_is_seen_whole(failure):
    with pytest.raises(type(failure)):
        exit_code(failing(failure))


@pytest.mark.parametrize("failure", [UserError("a key: found"), OSError(errno.ENOSPC, "No space left on device", "f")])
def test_debug_shows_any(failure):
    with pytest.raises(type(failure)):
        exit_code(failing(failure), debug=True)


def test_the_command_that_goes_on_is_that_of_the_run_once_it_can(tmp_path, capsys):
    def work():
        with under_way(tmp_path / "config.yaml", "resume=one"):
            raise OSError(errno.ENOSPC, "No space left on device", "f")

    assert exit_code(work) == 1
    assert capsys.readouterr().err.endswith("the same command\n")
    (tmp_path / "config.yaml").touch()
    assert exit_code(work) == 1
    assert capsys.readouterr().err.endswith("python scripts/run.py resume=one\n")


def test_a_library_that_hides_why_it_could_not_write_is_asked_no_further(tmp_path):
    """/dev/full refuses every byte, as a full disk does."""

    def write(temporary):
        temporary.unlink()
        temporary.symlink_to("/dev/full")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    with pytest.raises(OSError, match="No space left on device") as found:
        write_atomically(tmp_path / "last.ckpt", write)
    assert Path(found.value.filename) == tmp_path / "last.ckpt"
    assert not list(tmp_path.iterdir())


def test_a_library_that_fails_for_reasons_of_its_own_fails_for_those(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write_atomically(tmp_path / "last.ckpt", lambda temporary: 1 / 0)
    assert not list(tmp_path.iterdir())


def test_a_failure_of_a_library_that_is_no_refusal_of_the_machine_keeps_what_it_says(tmp_path):
    with pytest.raises(OSError, match="encoder error -2"):
        write_atomically(tmp_path / "a.png", lambda temporary: failing(OSError("encoder error -2"))())


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(tmp_path):
    with pytest.raises(IsADirectoryError):
        epoch_of(tmp_path)


def test_what_the_machine_refused_is_said_of_a_librarys_own_error_too(tmp_path, capsys):
    refused = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/run.log")

    def configure():
        try:
            raise refused
        except OSError as failure:
            raise ValueError("Unable to configure handler 'file'") from failure

    assert exit_code(configure) == 1
    assert capsys.readouterr().err == (
        "error: runs/run.log: No space left on device; to go on after that: the same command\n"
    )


def test_a_fault_that_was_only_met_on_the_way_from_another_shows_its_traceback():
    def work():
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/run.log")
        except OSError:
            raise KeyError("a fault of the program")  # noqa: B904  # which nothing says the refusal led to

    with pytest.raises(KeyError):
        exit_code(work)
