"""The command line: parses, dispatches to a module of commands/, and turns errors into exit statuses."""

from __future__ import annotations

import argparse
import importlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, Protocol, cast

from udpwatch.agent import __version__
from udpwatch.agent.errors import UdpwatchError

EXIT_STATUSES = "exit status: 0 success, 1 failure, 2 wrong usage, 77 this machine cannot run udpwatch"

#: command -> what `udpwatch --help` says about it
COMMANDS = {
    "run": "run the agent in the foreground",
    "doctor": "check what this machine supports and what to change",
    "top": "show the servers that send wrong replies, live",
    "events": "print each wrong reply as it happens, one line each",
    "audit": "list the UDP servers that will reply from the wrong address",
    "explain": "explain wrong replies, or why UDP to a port does not work, and how to fix it",
    "heal": "show, switch on or switch off the healing of replies",
    "detach": "remove the programs that an agent has kept with --state",
    "dns": "run only the DNS responder, with dnsmasq's options",
    "demo": "show udpwatch at work, in network namespaces of its own",
}


class Command(Protocol):
    """A module of commands/. It is imported only when it is called: `udpwatch --help` loads neither prometheus_client
    nor anything of the kernel."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the description and the arguments."""

    def run(self, parsed: argparse.Namespace) -> int:
        """Do the work; return the exit status. Raises UdpwatchError."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    _prepare_standard_streams()
    try:
        try:
            status = _run(list(sys.argv[1:] if arguments is None else arguments))
        except SystemExit as end:  # argparse's, for --help and wrong usage
            status = end.code if isinstance(end.code, int) else 1
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader of our output has exited: there is nowhere to write an error to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(UdpwatchError(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"))


def parse(words: Sequence[str]) -> tuple[Command, argparse.Namespace]:
    """The command and its parsed arguments. Raises SystemExit for --help, --version and wrong usage."""
    name = words[0] if words and words[0] in COMMANDS else None
    command = cast(Command, importlib.import_module(f"udpwatch.agent.commands.{name}")) if name else None
    # `udpwatch dns` has dnsmasq's options, which argparse cannot read.
    parsed = argparse.Namespace(words=words[1:]) if name == "dns" else _parser(name, command).parse_args(words)
    assert command  # parse_args() has exited without one
    return command, parsed


def _run(words: Sequence[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="udpwatch: %(message)s", stream=sys.stderr)
    try:
        command, parsed = parse(words)
        return command.run(parsed)
    except UdpwatchError as error:
        print(f"udpwatch: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130


class _CommandParser(argparse.ArgumentParser):
    """A parser that reports unknown arguments with the usage of its command. argparse leaves them to the main parser,
    whose usage does not list the command's options."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse the arguments; exit for unknown ones."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed, unknown


def _parser(wanted: str | None, command: Command | None) -> argparse.ArgumentParser:
    """The parser of all commands; only ``wanted`` has its arguments."""
    parser = argparse.ArgumentParser(
        prog="udpwatch",
        description="Find UDP replies that leave this node from a different address than the one the client asked.",
        epilog=EXIT_STATUSES,
    )
    parser.add_argument("--version", action="version", version=f"udpwatch {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_CommandParser)
    for name, summary in COMMANDS.items():
        own = commands.add_parser(name, help=summary, epilog=EXIT_STATUSES)
        if command and name == wanted:
            command.add_arguments(own)
    return parser


def _prepare_standard_streams() -> None:
    """Open those of descriptors 0 to 2 that are missing, or the next files opened would take their place; and make
    standard output replace characters that its encoding lacks."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115  for as long as the process lives
    if sys.stderr is None:
        sys.stderr = sys.stdout
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _fail(error: UdpwatchError) -> int:
    print(f"udpwatch: {error}", file=sys.stderr)
    # What is still buffered for a full disk must not be written again at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return error.exit_status


if __name__ == "__main__":
    sys.exit(main())
