"""`python -m jmoe.convert COMMAND ...`: see `jmoe.convert`. Exit codes: 0 done, 1 it failed, 2 bad input."""

import importlib
import logging
import sys

from jmoe import recipe
from jmoe.checkpoint import CheckpointError
from jmoe.config import require

# Each module has `main(argv: list[str]) -> None`, argv[0] being the first argument after the command.
COMMANDS = {
    "export": "jmoe.convert.exporting",
    "import": "jmoe.convert.importing",
    "upcycle": "jmoe.convert.upcycle",
    "prune": "jmoe.convert.prune",
    "merge": "jmoe.convert.merge",
}


def main(argv: list[str]) -> None:
    """Runs the command that `argv` begins with. Raises InputError."""
    command, *rest = argv or [""]
    if command in ("-h", "--help"):
        print("usage: python -m jmoe.convert COMMAND ...\n\nCOMMAND is one of", ", ".join(COMMANDS))
        print("python -m jmoe.convert COMMAND --help tells what it takes")
        return
    require(command in COMMANDS, f"unknown command {command!r}; it must be one of {', '.join(COMMANDS)}")
    sys.argv[0] = f"-m jmoe.convert {command}"  # for the help
    importlib.import_module(COMMANDS[command]).main(rest)


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, force=True)
    with recipe.exit_on_input_error():
        try:
            main(sys.argv[1:])
        except CheckpointError as error:
            sys.exit(f"error: {error}")
