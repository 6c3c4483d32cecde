"""`python -m compress.pipeline.worker DIRECTORY`: one of the processes that `compress.training.distributed` starts."""

import os
import sys
from pathlib import Path
from typing import cast

import torch
from omegaconf import DictConfig, OmegaConf

from compress import yaml_file
from compress.paths import import_from_here
from compress.pipeline.run import train
from compress.progress import console
from compress.training import distributed, processes


def main(directory: Path) -> int:
    import_from_here()
    processes.ignore_signals()
    distributed.end_with_parent()
    # The job has said what there is to say before the training.
    console.quiet = True
    try:
        # As the job that started this process has just written it, checked; unless somebody else did meanwhile.
        yaml_file.check_file(directory / "config.yaml")
        config = cast(DictConfig, OmegaConf.load(directory / "config.yaml"))
        if config.trainer.accelerator != "cpu" and torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        train(config, directory)
    except BaseException as failure:
        distributed.note_failure(failure)
        return 1
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stdout.flush()
    # At once: a process group that lost a member would hold up an orderly end.
    os._exit(code)
