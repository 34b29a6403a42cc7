"""The commands of `python -m opara_backend`, a module each.

Each has `register(commands)`, which adds a parser to argparse's subparsers and sets its `run`: a function from the
parsed arguments to an exit code. Nothing heavy is imported before a command runs, so that `--help` is quick.
"""
