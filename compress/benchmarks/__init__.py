"""What `scripts/benchmark.py` measures; a module has `add_arguments(parser)` and `run(arguments)`."""
