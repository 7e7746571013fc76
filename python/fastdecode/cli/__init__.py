"""The command line: `fastdecode generate | compare | bench | kv | methods | doctor`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from . import bench, compare, doctor, generate, kv, methods
from .common import UserError

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    """Bad arguments become a UserError, so that they end like every other one."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        exit code: 0; 1 where the result says that something is broken; 2 for a mistake of the user, told in one line
        on stderr; 130 after Ctrl-C; 141 where the reader of the output has gone.
    """
    try:
        arguments = _parser().parse_args(argv)
        code = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # whatever is still buffered must not raise again when Python closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130
    except (UserError, ValueError, ImportError, OSError) as error:
        print("fastdecode: error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastdecode", description="Fast decoding of language models.", allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    for command in (generate, compare, bench, kv, methods, doctor):
        name = command.__name__.rpartition(".")[2]
        summary = (command.__doc__ or "").strip().splitlines()[0]
        own = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        command.add_arguments(own)
        own.set_defaults(run=command.run)
    return parser
