"""Commands that are killed, or refused by the machine, at one of their operations on files."""

import errno
import math
import os
import signal
import sys
from contextlib import contextmanager

import pytest
import torch
from processes import PROCESSES

from compress.cli import main
from compress.errors import UserError
from compress.methods.classifier import Classifier

OPERATIONS = ("os.rename", "os.remove", "os.mkdir", "os.chmod")


def perform(arguments, folder, moment=math.inf, kill=True, said=None):
    """In a process of its own: the command line in `folder`, disturbed at its `moment`-th operation on files there.

    Those are opening for writing, renaming, removing, making directories and changing rights. It is killed, or from
    then on every one of them finds the disk full. `said` gets how many there were.
    """
    os.chdir(folder)
    for stream, name in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    torch.set_num_threads(1)
    count = 0

    def watch(event, about):
        nonlocal count
        writes = event == "open" and isinstance(about[2], int) and about[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (writes or event in OPERATIONS) and "outputs" in str(about[0]):
            count += 1
            if count >= moment and kill:
                os.kill(os.getpid(), signal.SIGKILL)
            if count >= moment and event != "os.remove":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(about[0]))

    sys.addaudithook(watch)
    code = main(arguments)
    if said is not None:
        said.send(count)
    sys.exit(code)


def performed(arguments, folder, *options):
    """The exit code of `perform` and what it printed as errors; negative where a signal ended it."""
    process = PROCESSES.Process(target=perform, args=(arguments, folder, *options))
    process.start()
    process.join()
    return process.exitcode, (folder / "stderr").read_text()


@contextmanager
def stopped_in_the_second_epoch():
    """Within it, trainings in this process, but for those of teachers, end when their second epoch begins."""
    begin = Classifier.on_train_epoch_start

    def stop(module):
        if module.trainer.current_epoch == 1 and "teachers" not in str(module.trainer.default_root_dir):
            raise UserError("stopped")
        begin(module)

    with pytest.MonkeyPatch.context() as stopping:
        stopping.setattr(Classifier, "on_train_epoch_start", stop)
        yield
