"""The command line: help, checks, dry run, resume, and then Hydra."""

import os
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from compress.config.compose import compose_jobs
from compress.config.help import help_text
from compress.errors import UserError
from compress.files import make_chosen, make_directory
from compress.paths import CONF
from compress.pipeline.checks import checked_jobs
from compress.pipeline.resume import latest, requeued
from compress.stopping import StoppedError, stoppable


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 0 done, 2 a mistake of the user (one line on stderr)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Let exceptions come through Hydra whole: a user's mistake becomes one line below, ours keeps its traceback.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        with stoppable():
            return _main(arguments)
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader, `head` perhaps, has had enough; the interpreter must not complain about it on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except StoppedError as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_code


def _main(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(help_text())
        return 0
    # Not at the top: PyTorch takes seconds to import, and help needs none of it.

    dry_run = "--dry-run" in arguments
    arguments = [argument for argument in arguments if argument != "--dry-run"]
    parser = get_args_parser()
    parser.error = _refuse  # argparse prints a page and exits
    # Options may stand between the overrides, where Hydra would not find the later ones.
    parsed, unknown = parser.parse_known_intermixed_args(arguments)
    overrides = parsed.overrides
    arguments = [*_without(arguments, overrides), *overrides]
    if unknown:
        raise UserError(f"{unknown[0]}: unknown option; accepted: --help, --dry-run, -m, --cfg job, --info, key=value")
    if parsed.experimental_rerun:
        raise UserError("--experimental-rerun: it reads a pickle; accepted: resume=DIRECTORY")
    resume = [override for override in overrides if override.startswith("resume=")]
    if resume and (len(arguments) > len(overrides) or dry_run):
        raise UserError("resume: found it beside an option; accepted: resume=DIRECTORY, trainer.*=... and logger.*=...")
    if resume:
        others = [each for each in overrides if each not in resume]
        return _resume(*_chosen(resume[0].removeprefix("resume="), others, latest))
    sweep = [override for override in overrides if override.startswith("sweep=")]
    if sweep and (len(arguments) > len(overrides) or dry_run):
        raise UserError(
            "sweep: found it beside an option; accepted: sweep=DIRECTORY, trainer.*=..., logger.*=... and "
            "hydra/launcher=..."
        )
    if sweep:
        from compress.sweeps import jobs as sweeps

        others = [each for each in overrides if each not in sweep]
        return sweeps.resume(*_chosen(sweep[0].removeprefix("sweep="), others, sweeps.latest))
    multirun = parsed.multirun or "hydra.mode=MULTIRUN" in overrides
    inspecting = parsed.cfg or parsed.info or parsed.hydra_help or parsed.shell_completion
    if not inspecting:
        jobs = checked_jobs(overrides, multirun)
        if dry_run:
            from compress.pipeline.dry_run import show

            for typed, config in jobs:
                show(config, typed)
            return 0
        from compress.pipeline.run import worker_command
        from compress.sweeps import jobs as sweeps
        from compress.training import distributed
        from compress.training.processes import node_rank

        sweeps.check_launcher(overrides, multirun)
        again = None if multirun else requeued(Path(jobs[0][1].output_directory), overrides)
        if again is not None:
            return _resume(again, [])
        directory = _own_directory(jobs[0][1], overrides, multirun)
        if not multirun and node_rank(jobs[0][1].trainer) > 0:
            # Without Hydra, which would write to the directory that the first machine is to find empty.
            distributed.join(jobs[0][1], directory, worker_command(directory))
            return 0
        if multirun:
            return sweeps.start(directory, [typed for typed, _ in jobs], overrides)
        arguments.append(sweeps.hydra_override("hydra.run.dir", str(directory)))
    else:
        if multirun:
            raise UserError("-m: found it beside an option that only prints; accepted: one of them")
        compose_jobs(overrides)
    sys.argv = [sys.argv[0], *arguments]
    failures: list[Exception] = []

    @hydra.main(config_path=str(CONF), config_name="run", version_base="1.3")
    def job(config: DictConfig) -> None:
        from compress.config.compose import add_stems
        from compress.pipeline import checks, stages

        hydra_config = HydraConfig.get()
        try:
            add_stems(config, hydra_config.runtime.choices)
            checks.check_values(config)
            stages.run(config, Path(hydra_config.runtime.output_dir), list(hydra_config.overrides.task))
        except Exception as failure:
            # Hydra would print a line of its own before ours.
            failures.append(failure)

    job()
    if failures:
        raise failures[0]
    return 0


def _without(arguments: list[str], overrides: list[str]) -> list[str]:
    rest = list(arguments)
    for override in overrides:
        rest.remove(override)
    return rest


def run_directory(config: DictConfig) -> Path:
    """A new directory for one run of `config`."""
    from compress.config.compose import method_name

    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}-{method_name(config)}-{config.student.stem}"
    return make_directory(Path(config.output_directory) / "runs", name)


def _refuse(message: str) -> None:
    raise UserError(f"command line: {message}")


def _own_directory(config: DictConfig, overrides: list[str], multirun: bool) -> Path:
    """A directory made just now; one that the user names has to be new."""
    # Not at the top: it imports PyTorch.
    from compress.training.processes import node_rank

    key = "hydra.sweep.dir" if multirun else "hydra.run.dir"
    typed = [override for override in overrides if override.startswith(f"{key}=")]
    # Every machine runs the command, and they have to meet in one directory.
    if config.trainer.get("num_nodes", 1) > 1 and not typed:
        raise UserError(f"{key}: found none for several machines; accepted: one directory for all of them")
    if typed:
        directory = Path(str(OverridesParser.create().parse_override(typed[-1]).value()))
        if node_rank(config.trainer) > 0:
            return directory
        if directory.is_dir() and any(directory.iterdir()):
            raise UserError(
                f"{key}: found {directory}, which is not empty; accepted: a new directory, or "
                f"{'sweep' if multirun else 'resume'}={directory}"
            )
        make_chosen(directory, key)
        return directory
    if multirun:
        return make_directory(Path(config.output_directory) / "sweeps", f"{datetime.now():%Y-%m-%d_%H-%M-%S}")
    return run_directory(config)


def _chosen(value: str, overrides: list[str], latest: Callable[[Path], Path]) -> tuple[Path, list[str]]:
    """The directory that `resume=value` or `sweep=value` means, and the other overrides."""
    if value != "latest":
        return Path(value), overrides
    elsewhere = [override for override in overrides if override.startswith("output_directory=")]
    default = OmegaConf.load(CONF / "run.yaml").output_directory
    output_directory = Path(elsewhere[-1].partition("=")[2] if elsewhere else default)
    return latest(output_directory), [each for each in overrides if each not in elsewhere]


def _resume(directory: Path, overrides: list[str]) -> int:
    """Continues the run in `directory` under its own configuration, but for overrides of trainer.* and logger.*"""
    from compress.config import compose as configuration
    from compress.pipeline import checks, stages

    config = configuration.read_config(directory)
    for override in overrides:
        if not override.startswith(("trainer.", "logger.")) or "=" not in override:
            raise UserError(
                f"{override}: a resumed run keeps its configuration; accepted: trainer.*=... and logger.*=..."
            )
        if config.get("stages"):
            stages.refuse_epochs(override)
        configuration.apply_override(config, override)
    if config.get("stages"):
        checks.check_values(config)
    else:
        checks.check(config)
    stages.run(config, directory, overrides)
    return 0
