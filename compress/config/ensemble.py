"""A teacher's networks in the configuration: one, or each of `teacher.members` as what it would be on its own."""

from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from compress import models
from compress.arguments import check_arguments, plain
from compress.errors import UserError

# What a member may say; in a complete configuration it says all of it, as a single teacher does.
MEMBER = ("model", "checkpoint", "pretrained", "classes", "mean", "standard_deviation", "training")


def is_ensemble(config: DictConfig) -> bool:
    """Whether the teacher of `config` is several networks."""
    return "members" in config.teacher


def keys(config: DictConfig) -> list[str]:
    """Where `config` has the teacher's networks: none, `teacher`, or `teacher.members[0]` and so on."""
    if not config.teacher:
        return []
    if not is_ensemble(config):
        return ["teacher"]
    return [f"teacher.members[{index}]" for index in range(len(config.teacher.members))]


def complete_members(config: DictConfig) -> None:
    """Replaces each member, a stem or a mapping of what it has of its own, by a single teacher's whole node.

    Its training is `teacher.training` but for what it says itself. Members that are complete stay as they are.
    """
    members: Any = OmegaConf.to_container(config.teacher.members, resolve=True)
    training = plain(config.teacher.training)
    if len(members) < 2:
        raise UserError(
            f"teacher.members: found {members}; accepted: at least two, such as [resnet50,wrn_40_2]; "
            "for one network teacher=STEM"
        )
    complete = [_complete(member, key, training) for member, key in zip(members, keys(config), strict=True)]
    for index, member in enumerate(complete):
        first = complete.index(member)
        if first < index:
            raise UserError(
                f"teacher.members[{index}]: found the same as teacher.members[{first}]; "
                "accepted: another model, checkpoint or training.seed"
            )
    with open_dict(config):
        config.teacher.members = complete


def _complete(member: Any, where: str, training: dict[str, Any]) -> dict[str, Any]:
    if isinstance(member, str):
        member, where_stem = {"model": member}, where
    elif not isinstance(member, dict):
        raise UserError(f"{where}: found {member!r}; accepted: a model, or a mapping with some of {', '.join(MEMBER)}")
    else:
        check_arguments({}, member, where, accepted=MEMBER)
        where_stem = f"{where}.model"
    model = member.get("model")
    model = model if isinstance(model, dict) else {"stem": model}
    stem: Any = model.get("stem")  # whatever was typed
    given = member.get("training", {})
    return {
        "model": models.described(stem, where_stem) | model,
        "checkpoint": member.get("checkpoint"),
        "pretrained": member.get("pretrained", False),
        "classes": member.get("classes"),
        "mean": member.get("mean"),
        "standard_deviation": member.get("standard_deviation"),
        "training": plain(OmegaConf.merge(training, given), resolve=False) if isinstance(given, dict) else given,
    }
