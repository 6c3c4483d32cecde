"""The command line: help, what only prints, dry run, resume, sweeps and single runs."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from compress.config.help import help_text
from compress.errors import UserError, exit_code, printable
from compress.paths import CONF, import_from_here, searching
from compress.stopping import StoppedError, stoppable


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 0 done, 1 too where `--verify` finds damage.

    For the others see `compress.errors.exit_code`.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        words = [argument for argument in arguments if argument != "--debug"]
        return exit_code(lambda: _main(words), debug=words != arguments)
    except StoppedError as stopped:
        print(printable(str(stopped)), file=sys.stderr)
        return stopped.exit_code


@stoppable()
def _main(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        with searching(_folder_for_help(arguments)):
            print(help_text())
        return 0
    # Not at the top: PyTorch takes seconds to import, and help needs none of it.
    from compress.config.compose import searched_folders

    import_from_here()
    if any(argument.partition("=")[0] == "--verify" for argument in arguments):
        return _verify(arguments)
    dry_run = "--dry-run" in arguments
    arguments = [argument for argument in arguments if argument != "--dry-run"]
    parsed, overrides = _parsed(arguments)
    with searching(searched_folders(overrides, parsed.config_dir)):
        for key in ("resume", "sweep"):
            if any(override.startswith(f"{key}=") for override in overrides):
                _refuse_options(key, parsed, dry_run)
                return _go_on(key, overrides)
        multirun = parsed.multirun or "hydra.mode=MULTIRUN" in overrides
        if parsed.cfg or parsed.info or parsed.hydra_help or parsed.shell_completion:
            if multirun:
                raise UserError("-m: found it beside an option that only prints; accepted: one of them")
            return _inspect(arguments, overrides)
        return _run(overrides, multirun, dry_run)


def _verify(arguments: list[str]) -> int:
    """Reads a finished run again: 0 where it holds, 1 where it does not."""
    from compress.config.compose import searched_folders
    from compress.config.received import ALLOW, allowed_targets
    from compress.pipeline.verify import verify

    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = _refuse  # type: ignore[method-assign,assignment]  # argparse prints a page and exits
    parser.add_argument("--verify", type=Path)
    parser.add_argument("--config-dir")
    parsed, others = parser.parse_known_args(arguments)
    allowed, others = allowed_targets(others)
    if others:
        accepted = f"--verify DIRECTORY, --config-dir DIR, {ALLOW}=[NAME]"
        raise UserError(f"--verify: found it beside {others[0]}; accepted: {accepted}")
    with searching(searched_folders([], parsed.config_dir)):
        return verify(parsed.verify, allowed)


def _folder_for_help(arguments: list[str]) -> list[Path]:
    """What stands behind `--config-dir`, found without Hydra's parser, which takes a second to import."""
    words = " ".join(arguments).replace("--config-dir=", "--config-dir ").split()
    return [Path(after) for word, after in pairwise(words) if word == "--config-dir"]


def _parsed(arguments: list[str]) -> tuple[Namespace, list[str]]:
    """Hydra's own options, and the overrides, wherever they stand between the options."""
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign,assignment]  # argparse prints a page and exits
    parsed, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        raise UserError(
            f"{unknown[0]}: unknown option; accepted: --help, --dry-run, -m, --cfg job, --info, --config-dir DIR, "
            "--debug, key=value"
        )
    if parsed.experimental_rerun:
        raise UserError("--experimental-rerun: it reads a pickle; accepted: resume=DIRECTORY")
    for option in ("config_name", "config_path"):
        if getattr(parsed, option) is not None:
            name = f"--{option.replace('_', '-')}"
            raise UserError(f"{name}: found it, but the configuration is conf/run.yaml; accepted: --config-dir DIR")
    return parsed, parsed.overrides


def _refuse(message: str) -> None:
    raise UserError(f"command line: {message}")


def _refuse_options(key: str, parsed: Namespace, dry_run: bool) -> None:
    """What goes on keeps its configuration, so that nothing but the folder of the user's YAML groups is an option."""
    if dry_run or any(value for option, value in vars(parsed).items() if option not in ("overrides", "config_dir")):
        launcher = " and hydra/launcher=..." if key == "sweep" else ""
        raise UserError(
            f"{key}: found it beside an option; accepted: {key}=DIRECTORY, trainer.*=..., logger.*=...{launcher}"
        )


def _inspect(arguments: list[str], overrides: list[str]) -> int:
    """`--cfg` and the like: Hydra prints, once it is known that the configuration can be composed."""
    import hydra

    from compress.config.compose import compose_jobs

    compose_jobs(overrides)
    # Options may stand between the overrides, where Hydra would not find the later ones.
    rest = list(arguments)
    for override in overrides:
        rest.remove(override)
    sys.argv = [sys.argv[0], *rest, *overrides]
    hydra.main(config_path=str(CONF), config_name="run", version_base="1.3")(lambda config: None)()
    return 0


def _run(overrides: list[str], multirun: bool, dry_run: bool) -> int:
    from compress.config.compose import compose_jobs
    from compress.config.received import allowing
    from compress.config.run_values import check_run_values

    jobs = compose_jobs(overrides, multirun)
    for job in jobs:
        check_run_values(job.config)
    # What was mistyped has been said by now; from here on PyTorch is needed.
    from compress.data.shared import DataSets
    from compress.pipeline.check import check_job
    from compress.pipeline.dry_run import show
    from compress.pipeline.execute import execute
    from compress.pipeline.resume import check_place, requeued, run_directory
    from compress.sweeps.jobs import check_launcher, start

    if not multirun and not dry_run:
        interrupted = requeued(Path(str(jobs[0].config.get("output_directory"))), overrides)
        if interrupted is not None:
            # What the same command names is allowed in what it has left.
            return _go_on("resume", [f"resume={interrupted}", *allowing(jobs[0].config)])
    check_place("sweep" if multirun else "run", jobs[0], overrides)
    data_sets = DataSets()
    jobs = [check_job(job, data_sets) for job in jobs]
    if dry_run:
        for job in jobs:
            show(job, data_sets)
        return 0
    check_launcher(overrides, multirun)
    if multirun:
        return start(jobs, overrides, data_sets)
    execute(jobs[0], run_directory(jobs[0], overrides), data_sets, logging_is_ours=True)
    return 0


def _go_on(key: str, overrides: list[str]) -> int:
    """Continues the run of `resume=` or the sweep of `sweep=` under its own configuration."""
    from compress.data.shared import DataSets
    from compress.pipeline import resume
    from compress.pipeline.execute import execute, resumed_job
    from compress.sweeps import jobs

    if key == "sweep":
        directory, allowed, others = resume.chosen(overrides, key, jobs.latest)
        return jobs.resume(directory, others, allowed)
    directory, allowed, others = resume.chosen(overrides)
    data_sets = DataSets()
    execute(resumed_job(directory, others, data_sets, allowed=allowed), directory, data_sets)
    return 0
