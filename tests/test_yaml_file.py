"""YAML that was received is read, unless its aliases or its depth would cost far more than its text."""

import pytest
from bombs import BOMBS
from yaml import YAMLError

from compress import yaml_file
from compress.errors import UserError

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))


def test_anchors_within_reason_are_read():
    assert yaml_file.load("a: &a {b: [1, 2]}\nc: *a\nd: *a\n") == {k: {"b": [1, 2]} for k in "acd"}


@pytest.mark.parametrize("text", [BOMB, "[" * 100_000, "a: &a [*a]", "- " * 60 + "x"])
def test_bombs_are_refused(text):
    with pytest.raises(YAMLError):
        yaml_file.load(text)


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_file_with_a_bomb_is_named(tmp_path, bomb):
    path = tmp_path / "a.yaml"
    path.write_text(BOMBS[bomb])
    with pytest.raises(UserError, match=r"a\.yaml: found what cannot be read as YAML \(.+\); accepted: a YAML file$"):
        yaml_file.read(path)
    path.write_text("a: [1")
    with pytest.raises(UserError, match=r"a\.yaml, line 1: found what cannot be read as YAML \(.+\); accepted: "):
        yaml_file.read(path)
