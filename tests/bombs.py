"""Short YAML files that stand for far more than their text.

They are small enough that a reader without bounds ends all the same: 20,000 nodes, and more levels than Python's stack.
"""

BOMBS = {
    "aliases": f"bomb: [&a [{'x, ' * 200}], {'*a, ' * 100}]\n",
    "depth": f"bomb: {'[' * 600}{']' * 600}\n",
}
