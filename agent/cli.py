"""The command line; the only module that prints and exits."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from udpwatch.agent import __version__
from udpwatch.agent.config import SETTINGS, resolve
from udpwatch.agent.errors import UdpwatchError

_EXITS = "exit status: 0 fine, 1 it failed, 2 wrong usage, 77 this machine cannot run it"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="udpwatch",
        description="Finds UDP replies that leave this node from another address than the one the client asked.",
        epilog=_EXITS,
    )
    parser.add_argument("--version", action="version", version=f"udpwatch {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="the agent, in the foreground",
        description="Watch every UDP reply of this node until stopped (SIGTERM, Ctrl-C). Each flag can also be set by "
        "an environment variable UDPWATCH_NAME or in the settings file; flags win, then variables.",
        epilog=_EXITS,
    )
    run.add_argument("--config", metavar="FILE", help="settings file (TOML: name = value)")
    for setting in SETTINGS:
        default = "" if setting.default is None else f" [{setting.default}]"
        if setting.metavar:
            run.add_argument(setting.flag, dest=setting.name, metavar=setting.metavar, help=setting.help + default)
        else:
            switch = argparse.BooleanOptionalAction
            run.add_argument(setting.flag, dest=setting.name, action=switch, default=None, help=setting.help + default)

    doctor = commands.add_parser(
        "doctor",
        help="what this machine allows, and what to change",
        description="Try everything that udpwatch needs and say what follows. Exit status 77: it cannot run here.",
        epilog=_EXITS,
    )
    doctor.add_argument("--json", action="store_true", help="the same as one JSON object")
    for flag, metavar in (("--config", "FILE"), ("--cgroup", "PATH"), ("--btf", "PATH")):
        doctor.add_argument(flag, metavar=metavar, help="as in `udpwatch run`")

    commands.add_parser(
        "dns",
        help="the DNS responder alone, with dnsmasq's options",
        add_help=False,  # it reads its own words, as dnsmasq does
    )

    commands.add_parser(
        "demo",
        help="see it at work, in network namespaces of its own",
        description="Build a container host in network namespaces, let a server answer from the wrong address, and "
        "show what client, conntrack and udpwatch say of it. Takes less than a minute, leaves nothing behind.",
        epilog=_EXITS,
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    _fill_standard_streams()
    try:
        try:
            status = _run(arguments)
        except SystemExit as end:  # argparse's, for --help and wrong usage
            status = end.code if isinstance(end.code, int) else 1
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader of our output went away: nothing more to say, and nothing to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(UdpwatchError(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"))


def _fill_standard_streams() -> None:
    """Started without some of descriptors 0 to 2, the next files opened would take their place."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115  for as long as the process lives
    if sys.stderr is None:
        sys.stderr = sys.stdout


def _fail(error: UdpwatchError) -> int:
    print(f"udpwatch: {error}", file=sys.stderr)
    # What is still buffered for a full disk must not be tried again at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return error.exit_status


def _run(arguments: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["dns"]:
        return _dns(words[1:])
    parsed = _parser().parse_args(words)
    logging.basicConfig(level=logging.INFO, format="udpwatch: %(message)s", stream=sys.stderr)
    try:
        return _dispatch(parsed)
    except UdpwatchError as error:
        print(f"udpwatch: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130


def _dns(words: Sequence[str]) -> int:
    """`udpwatch dns`: dnsmasq's words, and dnsmasq's exit statuses."""
    from udpwatch.dns.errors import DnsError  # noqa: PLC0415
    from udpwatch.dns.options import parse  # noqa: PLC0415
    from udpwatch.dns.values import Information  # noqa: PLC0415

    logging.basicConfig(level=logging.INFO, format="udpwatch: %(message)s", stream=sys.stderr)
    try:
        settings = parse(words)
        if isinstance(settings, Information):
            print(settings.text)
            return 0
        from udpwatch.agent import responder  # noqa: PLC0415

        responder.run(settings)
    except DnsError as error:
        print(f"udpwatch: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    return 0


def _dispatch(parsed: argparse.Namespace) -> int:
    # Imported per command: `udpwatch --help` needs neither prometheus_client nor the kernel.
    file = getattr(parsed, "config", None) or os.environ.get("UDPWATCH_CONFIG")
    config = Path(file) if file else None
    if parsed.command == "run":
        from udpwatch.agent import app  # noqa: PLC0415

        flags = {setting.name: getattr(parsed, setting.name) for setting in SETTINGS}
        app.run(resolve(flags, os.environ, config))
        return 0
    if parsed.command == "doctor":
        from udpwatch.agent import doctor  # noqa: PLC0415

        settings = resolve({"cgroup": parsed.cgroup, "btf": parsed.btf}, os.environ, config)
        report = doctor.examine(settings)
        print(doctor.as_json(report) if parsed.json else doctor.as_text(report, sys.stdout.isatty()))
        return 0 if report.works else 77
    from udpwatch.agent import demo  # noqa: PLC0415

    return demo.run(sys.stdout)


if __name__ == "__main__":
    sys.exit(main())
