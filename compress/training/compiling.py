"""`trainer.compile`: networks as torch.compile makes them, in place."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterable

from torch import nn

from compress.progress import console

CACHE = "TORCHINDUCTOR_CACHE_DIR"


def compile_networks(networks: Iterable[nn.Module]) -> None:
    """Lets each of `networks` be compiled when it is called first; their modules and tensors stay as they are.

    What the compiler writes lies in a folder of this process, unless the environment names one: a process killed while
    it writes leaves half a file, which PyTorch would take for a whole one from then on.
    """
    if CACHE not in os.environ:
        folder = tempfile.mkdtemp(prefix="compress-compiled-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ[CACHE] = folder
    console.print("compiling, which takes minutes before the first step")
    for network in networks:
        network.compile()
