"""Wrong values for every key of a configuration: each is taken as it is meant or refused in one line that names it."""

import random

import pytest
from omegaconf import DictConfig

from compress.config.compose import compose_jobs
from compress.config.rules import check_rules
from compress.config.values import check_values
from compress.errors import UserError
from compress.pipeline.parts import Parts

# Between them they choose an option of every group, and one with many keys of most.
COMMANDS = (
    ["method=dkd", "student=resnet8", "teacher=resnet20", "logger=[tensorboard,csv]", "export=[packed,onnx]"],
    ["method=dml", "student=wrn_16_2", "peer=mobilenetv2", "mixup=images", "pruning=magnitude", "optimizer=sgd"],
    ["method=qat", "student=vgg8", "quantizer=gptq", "scheduler=multistep", "data=cifar10", "trainer=ddp_cpu"],
    ["experiment=prune_distill_quantize"],
)
WRONG = (
    *("null", "nan", "inf", "-inf", "-1", "0", "0.5", "1e30", "-1e400", "100000000000000000000000", "true", "''", "x"),
    *("[]", "[1]", "[nan]", "[[x]]", "[null]", "{}", "{a: 1}", "{_target_: os.getcwd}", "'../..'", "'a b'", "'${x}'"),
)


def keys(node, before=""):
    for name in node:
        key = f"{before}{name}"
        yield key
        value = node._get_node(name)
        if isinstance(value, DictConfig) and not value._is_none():
            yield from keys(value, f"{key}.")


def wrong_overrides(count, seed):
    """`count` pairs of a command line and one more override of it, every key about as often as every other."""
    draw = random.Random(seed)
    per_command = [(command, list(keys(compose_jobs(command)[0].config))) for command in COMMANDS]
    pairs = [(command, key) for command, every in per_command for key in every]
    for _ in range(count):
        command, key = draw.choice(pairs)
        kind = draw.choice(("value",) * 6 + ("removed", "added", "unknown"))
        value = draw.choice(WRONG)
        if kind == "removed":
            yield command, key, f"~{key}"
        elif kind == "unknown":
            yield command, key, f"{key}x={value}"
        else:
            yield command, key, f"{'++' if kind == 'added' else ''}{key}{'.unknown' if kind == 'added' else ''}={value}"


def refusal(command, override):
    """The one line that says why a configuration is refused; None where it is taken."""
    try:
        [job] = compose_jobs([*command, override])
        check_values(job.config)
        check_rules(job.config, job.overrides)
        Parts(job.config).build_small()
    except UserError as mistake:
        return str(mistake)
    return None


def failures(count, seed):
    found = []
    for command, key, override in wrong_overrides(count, seed):
        try:
            line = refusal(command, override)
        except Exception as failure:
            line = f"{type(failure).__name__}\n{failure}"
        group, _, name = key.rpartition(".")
        # A constructor that checks its arguments together speaks of their node.
        if line is not None and ("\n" in line or not any(named and named in line for named in (key, group, name))):
            found.append(f"{' '.join(command)} {override!r}: {line}")
    return found


@pytest.mark.parametrize("group", ["student", "peer", "data", "teacher", "loss"])
def test_a_group_that_refers_to_nothing_is_named(group):
    assert refusal(["method=kd"], f"{group}='${{x}}'").startswith(f"{group}: Error resolving interpolation '${{x}}'")


@pytest.mark.slow
def test_sixty_wrong_overrides_are_refused_by_their_key_or_taken():
    assert failures(60, seed=0) == []


@pytest.mark.soak
def test_five_hundred_wrong_overrides_are_refused_by_their_key_or_taken():
    assert failures(500, seed=1) == []
