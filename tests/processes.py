"""Real processes of our scripts, forked from one that has imported everything, which takes longer than a short run."""

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
import threading
from pathlib import Path

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["compress.pipeline.run", "compress.pipeline.check", "compress.cli", "compress.data.digits"]
)


class Script:
    """`python script *arguments` in `folder`, in the environment of the caller; `group`: in a group of its own."""

    def __init__(self, script, *arguments, folder=".", group=False):
        self._folder = Path(folder).absolute()
        words = [str(script), *map(str, arguments)]
        self._process = PROCESSES.Process(target=_run, args=(words, self._folder, dict(os.environ), group))
        self._process.start()
        self.pid = self._process.pid

    def poll(self):
        return self._process.exitcode

    def wait(self):
        self._process.join()
        return self._process.exitcode

    def send_signal(self, number):
        if self._process.is_alive():
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def said(self):
        """Waits for the end; what was printed to the standard output and to the standard error."""
        self.wait()
        return [(self._folder / f"{self.pid}.{stream}").read_text() for stream in ("out", "err")]


def _run(words, folder, environment, group):
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if group:
        os.setsid()
    for stream, suffix in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(f"{os.getpid()}.{suffix}", os.O_WRONLY | os.O_CREAT), stream.fileno())
    sys.argv = words
    code = 0
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as ended:
        code = ended.code
    # What an interpreter does at its end, and what ends the pools of libraries, is left out by a forked process.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.exit(code)
