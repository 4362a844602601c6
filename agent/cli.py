"""The command line; the only module that prints and exits."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from udpwatch.agent import __version__, asking
from udpwatch.agent.config import SETTINGS, resolve
from udpwatch.agent.errors import UdpwatchError

if TYPE_CHECKING:
    from udpwatch.agent.client.top import sources
    from udpwatch.agent.client.top.rows import Key

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
        description="Try everything that udpwatch needs and say what follows. Exit status 77: it cannot run here. With "
        "--agent ask the agent that runs here instead: exit status 0 if it is ready, 1 if not.",
        epilog=_EXITS,
    )
    doctor.add_argument("--agent", action="store_true", help="what the running agent says of itself; nothing is tried")
    doctor.add_argument("--json", action="store_true", help="the same as one JSON object")
    for flag, metavar in (("--config", "FILE"), ("--cgroup", "PATH"), ("--btf", "PATH")):
        doctor.add_argument(flag, metavar=metavar, help="as in `udpwatch run`")
    doctor.add_argument("--connect", metavar="SOCKET", help="the agent's socket [/run/udpwatch/udpwatch.sock]")

    _add_top(commands)

    asking.add_commands(commands, _EXITS)

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


def _add_top(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    top = commands.add_parser(
        "top",
        help="live view of the servers that answer wrongly",
        description="Attach to the agent that runs here; where none does, start one for as long as this runs (root). "
        "Without a terminal: a line for each row that changed, every interval.",
        epilog=_EXITS,
    )
    where = top.add_mutually_exclusive_group()
    where.add_argument("--connect", metavar="SOCKET", help="the agent's socket [/run/udpwatch/udpwatch.sock]")
    where.add_argument("--prometheus", metavar="URL", help="all nodes that this Prometheus knows, instead")
    where.add_argument("--replay", metavar="FILE", help="play what `udpwatch run --events FILE` wrote, instead")
    top.add_argument("--interval", metavar="SECONDS", type=_interval, default=1.0, help="between two looks [1]")
    top.add_argument("--once", action="store_true", help="one table, with rates over one interval")
    top.add_argument("--json", action="store_true", help="JSON: one object an interval, or one with --once")


def _interval(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted; it takes a number from 0.1 to 3600")
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    _prepare_standard_streams()
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


def _prepare_standard_streams() -> None:
    """Open those of descriptors 0 to 2 that are missing, since the next files opened would take their place, and let
    no character that standard output's encoding lacks end the program."""
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
        from udpwatch.agent.commands import dns  # noqa: PLC0415

        dns.run(settings)
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
        from udpwatch.agent.daemon import app  # noqa: PLC0415

        flags = {setting.name: getattr(parsed, setting.name) for setting in SETTINGS}
        app.run(resolve(flags, os.environ, config))
        return 0
    if parsed.command == "doctor":
        from udpwatch.agent.commands import doctor  # noqa: PLC0415

        flags = {"cgroup": parsed.cgroup, "btf": parsed.btf, "socket": parsed.connect}
        settings = resolve(flags, os.environ, config)
        report = doctor.ask(settings.socket) if parsed.agent else doctor.examine(settings)
        print(doctor.as_json(report) if parsed.json else doctor.as_text(report, sys.stdout.isatty()))
        return 0 if report.works else 1 if parsed.agent else 77
    if parsed.command == "top":
        return _top(parsed)
    if parsed.command in asking.COMMANDS:
        return _answer(parsed)
    from udpwatch.agent.commands import demo  # noqa: PLC0415

    return demo.run(sys.stdout)


def _answer(parsed: argparse.Namespace) -> int:
    """`events` and `explain`."""
    terminal = sys.stdout.isatty()
    for said in asking.answer(parsed, terminal, terminal and not os.environ.get("NO_COLOR")):
        print(said.text, file=sys.stderr if said.aside else sys.stdout, flush=True)
    return 0


def _top(parsed: argparse.Namespace) -> int:
    def end(*_: object) -> NoReturn:
        sys.exit(0)

    # Whatever ends it, it cleans up.
    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with contextlib.closing(_source(parsed)) as source:
            return _show(source, parsed)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _source(parsed: argparse.Namespace) -> sources.Source:
    from udpwatch.agent.client.top import sources  # noqa: PLC0415
    from udpwatch.agent.testing import lab  # noqa: PLC0415

    if parsed.prometheus:
        from udpwatch.agent.client.top.prometheus import PrometheusSource  # noqa: PLC0415

        return PrometheusSource(parsed.prometheus)
    if parsed.replay:
        return sources.open_replay(parsed.replay, lab.die_with_parent)
    return sources.open_agent(parsed.connect, lab.die_with_parent)


def _show(source: sources.Source, parsed: argparse.Namespace) -> int:
    """A table or an object, once; lines or objects, without end; the screen."""
    from udpwatch.agent.client import explain  # noqa: PLC0415
    from udpwatch.agent.client.top import text  # noqa: PLC0415

    if parsed.once:
        look = text.once(source, parsed.interval)
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print(json.dumps(text.as_json(look)) if parsed.json else text.table(look, width, source.name))
        return 0
    terminal = sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    if terminal and not parsed.json:
        return text.interactive(source, parsed.interval, explain.short)
    seen: dict[Key, int] = {}
    for look in text.looks(source, parsed.interval, lambda line: print(f"udpwatch: {line}", file=sys.stderr)):
        for line in [json.dumps(text.as_json(look))] if parsed.json else text.changes(look, seen):
            print(line)
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
