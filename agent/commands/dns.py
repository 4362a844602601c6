"""`udpwatch dns`: the responder of dns/ as a program of its own, with the agent's HTTP view for Prometheus."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import grp
import logging
import os
import pwd
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from udpwatch.agent import __version__
from udpwatch.agent.daemon.http import HttpServer
from udpwatch.agent.daemon.log_output import LogOutput
from udpwatch.agent.daemon.metrics import exposition
from udpwatch.agent.errors import UdpwatchError
from udpwatch.agent.kernel import capabilities
from udpwatch.agent.kernel.capabilities import Capability, User
from udpwatch.agent.kernel.cpu import Cpus, favour_servers
from udpwatch.dns import addresses, listen
from udpwatch.dns.conffile import shown
from udpwatch.dns.errors import ConfigError, DnsError, FileError, NetworkError
from udpwatch.dns.host_port import host_port
from udpwatch.dns.option_readers import Information
from udpwatch.dns.options import parse
from udpwatch.dns.service import Service
from udpwatch.dns.settings import Settings

NOBODY = 65_534  # the kernel's overflow id, for a system without a user of the name
#: For addresses that come later.
KEPT = frozenset({Capability.NET_BIND_SERVICE})

LOG_HELP = "docs/dns.md#log"

log = logging.getLogger(__name__)


def add_arguments(_parser: argparse.ArgumentParser) -> None:
    """Declare nothing: `run` parses its own words, because dnsmasq's options are not argparse's."""


def run(parsed: argparse.Namespace) -> int:
    """Parse ``parsed.words`` and answer queries; return dnsmasq's exit statuses."""
    try:
        settings = parse(parsed.words)
        if isinstance(settings, Information):
            print(settings.text)
            if settings.settings:
                _warn(settings.settings)
        else:
            respond(settings)
    except DnsError as error:
        print(f"udpwatch: {error}", file=sys.stderr)
        return error.exit_status
    return 0


def respond(settings: Settings) -> None:
    """Answer until SIGTERM or SIGINT. SIGHUP reads the tables anew, SIGUSR1 logs statistics, SIGUSR2 opens the log file
    again. Raises DnsError."""
    output = LogOutput(settings.log_facility)
    with output.installed():
        asyncio.run(_run(settings, output))


async def _run(settings: Settings, output: LogOutput) -> None:
    loop, done, cpus = asyncio.get_running_loop(), asyncio.Event(), Cpus()
    with contextlib.ExitStack() as opened:
        http = _listen(settings.metrics_listen, cpus)
        if http:
            opened.callback(http.stop)
        service = Service(settings, __version__, cpus)
        service.metrics.log_lost = output.lost
        reloads: set[asyncio.Task[None]] = set()

        def reload() -> None:
            task = loop.create_task(service.reload())
            reloads.add(task)
            task.add_done_callback(reloads.discard)

        def log_statistics() -> None:
            for line in service.statistics():
                log.info("dns: %s", line)

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, done.set)
        loop.add_signal_handler(signal.SIGHUP, reload)
        loop.add_signal_handler(signal.SIGUSR1, log_statistics)
        loop.add_signal_handler(signal.SIGUSR2, output.reopen)
        try:
            if settings.pid_file:
                write_pid(settings.pid_file)
                opened.callback(remove_pid, settings.pid_file)
            _open_log(settings, output)
            if http:
                http.start(exposition(service.collector, http.collector), lambda: (True, "ok"), lambda: ready(service))
            await service.start()
            favour_servers()
            if not settings.foreground:
                log.info("dns: staying in the foreground, as with --keep-in-foreground")
            log.info("ready")
            await done.wait()
        finally:
            await service.stop()


def write_pid(path: Path) -> None:
    """Write our process id to a new file, which replaces an old one. Raises FileError.

    A symbolic link is not followed: who may write to the folder must not choose which file root overwrites.
    """
    try:
        path.unlink(missing_ok=True)
        with path.open("x") as file:  # O_EXCL
            file.write(f"{os.getpid()}\n")
    except OSError as error:
        raise FileError(f"pid-file: cannot write {shown(path)}: {error.strerror}") from None


def remove_pid(path: Path) -> None:
    """Remove the file at the end; as another user this may fail, as in dnsmasq."""
    with contextlib.suppress(OSError):
        path.unlink()


def _open_log(settings: Settings, output: LogOutput) -> None:
    """Open the log, give up root, and start to write the log. Raises DnsError."""
    user = _user(settings.user, settings.group) if os.geteuid() == 0 else None
    servers = (*settings.servers, *(server for each in settings.domain_servers for server in each.servers))
    kept = KEPT
    if any(server.interface for server in servers) and capabilities.binding_to_interface_needs_net_raw():
        kept |= {Capability.NET_RAW}
    with _log_errors(settings.log_facility):
        output.open(user.uid if user else None)
    give_up_root(user, kept, bool(settings.user or settings.group))
    with _log_errors(settings.log_facility):
        output.start()


@contextlib.contextmanager
def _log_errors(file: str) -> Iterator[None]:
    """Raise FileError for an OSError."""
    try:
        yield
    except OSError as error:
        raise FileError(f"log-facility: cannot open {shown(Path(file))}: {error.strerror}; see {LOG_HELP}") from None


def give_up_root(user: User | None, kept: frozenset[Capability], must: bool) -> None:
    """Change from root to this user, and keep only these capabilities. ``must``: the user or the group was given.

    Call it before any thread is started: a running thread keeps its capabilities. Raises DnsError if the change to a
    user or group that was given fails.
    """
    try:
        capabilities.drop_all_but(kept, user)
    except OSError as error:
        if not user:
            raise
        hint = "add CAP_SETUID and CAP_SETGID, or give --user=root"
        problem = f"cannot change to user {user.name}: {error.strerror}"
        if must:
            raise DnsError(f"{problem}; {hint}") from None
        capabilities.drop_all_but(kept)
        log.warning("%s; still root, without its capabilities; %s", problem, hint)
    else:
        if user:
            log.info("changed to user %s", user.name)


def _user(name: str, group: str) -> User | None:
    """Return None for root with its present group."""
    try:
        gid = grp.getgrnam(group).gr_gid if group else None
    except KeyError:
        raise ConfigError(f"--group: there is no group {group!r}") from None
    try:
        entry = pwd.getpwnam(name or "nobody")
    except KeyError:
        if name:
            raise ConfigError(f"--user: there is no user {name!r}") from None
        return User("nobody", NOBODY, NOBODY if gid is None else gid)
    user = User(entry.pw_name, entry.pw_uid, entry.pw_gid if gid is None else gid)
    return user if user.uid or gid not in (None, os.getegid()) else None


def ready(service: Service) -> tuple[bool, str]:
    """For /readyz: one line, and one for each warning."""
    if not service.ready:
        return False, "the tables are being read, or it is stopping"
    return True, "\n".join(["ready", *(f"warning: {line}" for line in service.warnings())])


def _warn(settings: Settings) -> None:
    """Print what would not listen (yet), for --test."""
    for line in listen.warnings(settings, addresses.snapshot()):
        print(f"udpwatch: warning: {line}", file=sys.stderr)


def _listen(where: str, cpus: Cpus) -> HttpServer | None:
    if where == "off":
        return None
    try:
        return HttpServer(*host_port(where), cpus)
    except UdpwatchError as error:
        raise NetworkError(str(error)) from None
