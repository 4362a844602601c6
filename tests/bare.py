"""`make test-bare`: the README's commands on a newly installed Debian machine.

The machine is a root of mmdebstrap's `minbase` with make, git and ca-certificates. It gets a clone of HEAD, the mounts
that a machine has, and this machine's configuration of apt, pip and npm, and nothing else.

Rule 1: process IDs are this machine's own, because tests compare what BPF reports with /proc. Mounts are in a mount
namespace of their own, and end with its last process.
Rule 2: a guardian process cleans up. It notices the end of this program, however that comes, kills every process that
is left in the root or the mount namespace, and removes the root. It never enters that namespace: there, the root
contains folders of this machine. A guardian that is killed too leaves the rest to the next run.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).with_name("support")))
import mirrors

CHECKOUT = Path(__file__).resolve().parents[1]
CACHE = Path(os.environ.get("UDPWATCH_BARE", Path.home() / ".cache/udpwatch/bare"))

RELEASES = ("bookworm", "trixie")
PACKAGES = ("make", "git", "ca-certificates")
TMP_IN_MEMORY = ("trixie",)  # Debian mounts a tmpfs on /tmp since 13
#: targets that need no root are run by a user who has none; all that root does for that user is to install python3-venv
UNPRIVILEGED = ("lint", "unit")
USER, UID = "developer", 1000
HOMES = {"root": "root", USER: f"home/{USER}"}
CLONES = {"root": "srv/udpwatch", USER: f"{HOMES[USER]}/udpwatch"}  # another user cannot read root's home

FAREWELL_SECONDS = 30  # for tests to tidy up when they are interrupted
SWEEP_SECONDS = 30
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

CA_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
CONFIGURATION = ("/etc/pip.conf", "/etc/xdg/pip", "/etc/npmrc", "/usr/etc/npmrc", "/etc/resolv.conf", CA_BUNDLE)
HOME_CONFIGURATION = (".pip", ".config/pip", ".npmrc")
#: environment variables that say where packages come from
_ENVIRONMENT = re.compile(r"(?i).*_proxy$|PIP_|NPM_CONFIG_|(SSL_CERT_(FILE|DIR)|(REQUESTS|CURL)_CA_BUNDLE)$")
_LOCAL_PATH = re.compile(r"(?:^|[\s='\"]|file://)(/[^\s'\"]+)")

#: Becomes the root of the mount namespace, as a machine's is: a chroot is left by whatever enters a namespace again.
_PIVOT = 'cd "$1" && pivot_root . mnt && umount -l /mnt && cd "/$2" && shift 2 && exec "$@"'
#: The machine's network is shared: a package's daemon would be started there.
_POLICY = "#!/bin/sh\nexit 101\n"
_HOSTS = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n"

_CLONE_NEWNS = 0x20000
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class Unavailable(Exception):
    """The machine cannot be made; the message says why and what to do."""


class Terminated(BaseException):
    """SIGTERM or SIGHUP."""


def main() -> int:
    """Exit status 0: every target succeeded; 77: this machine cannot run it; else that of the target that failed."""
    parser = argparse.ArgumentParser(description="run the README's commands in a minimal Debian root")
    parser.add_argument("--release", choices=RELEASES, default=RELEASES[0])
    parser.add_argument("--targets", type=str.split, default=[], help="default: demo test")
    parser.add_argument("--pytest-args", default="")
    options = parser.parse_args()
    targets = options.targets or ["demo", "test"]
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminate)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    times: dict[str, float] = {}
    status = 1
    try:
        with guarded(CACHE / options.release) as folder:
            with timed(times, "root"):
                machine = make(folder, options.release)
            for target in targets:
                with timed(times, target):
                    status = run(machine, target, options.pytest_args)
                if status:
                    break
    except Unavailable as error:
        print(f"test-bare: {error}", file=sys.stderr)
        return 77
    except (KeyboardInterrupt, Terminated):
        print("test-bare: interrupted", file=sys.stderr)
        return 130
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in times.items())
    result = f"make {list(times)[-1]} failed with status {status}" if status else "passed"
    print(f"test-bare: {options.release}: {spent}: {result}", flush=True)
    return status


def _terminate(_number: int, _frame: object) -> None:
    raise Terminated


@contextlib.contextmanager
def timed(times: dict[str, float], name: str) -> Iterator[None]:
    print(f"test-bare: {name}", flush=True)
    begin = time.monotonic()
    try:
        yield
    finally:
        times[name] = time.monotonic() - begin


# ---- cleaning up ----


@contextlib.contextmanager
def guarded(folder: Path) -> Iterator[Path]:
    """Yield an empty folder, in a mount namespace of this program's own; nothing of it is left afterwards."""
    if os.geteuid():
        raise Unavailable("cannot make a root: not root; run `sudo make test-bare`")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Unavailable(f"cannot use {folder}: another test-bare is using it; wait until it ends") from None
        sweep(folder)
        guardian, alive = _guard(folder)
        try:
            _check(_libc.unshare(_CLONE_NEWNS), "unshare")
            _mount("--make-rprivate", "/")
            os.write(alive, b".")
            folder.mkdir()
            yield folder
        finally:
            os.close(alive)
            _, status = os.waitpid(guardian, 0)
        if status:
            raise Unavailable(f"cannot remove {folder}: see above; remove it when no process uses it")


def _guard(folder: Path) -> tuple[int, int]:
    """Start the guardian: (its process ID, what must be closed to have it clean up; a byte: the namespace is made)."""
    reading, writing = os.pipe()
    parent = os.getpid()
    guardian = os.fork()
    if guardian:
        os.close(reading)
        return guardian, writing
    status = 1
    try:
        os.close(writing)
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        namespace = None
        if os.read(reading, 1):
            # An open descriptor keeps the kernel from giving the namespace's number to another one.
            with contextlib.suppress(FileNotFoundError):
                namespace = os.open(f"/proc/{parent}/ns/mnt", os.O_RDONLY)
            os.read(reading, 1)
        sweep(folder, namespace, parent)
        status = 0
    except BaseException as error:  # this is a forked child: nothing may return into the parent's code
        print(f"test-bare: cannot clean up {folder}: {error}", file=sys.stderr)
    os._exit(status)


def sweep(folder: Path, namespace: int | None = None, spared: int = 0) -> None:
    """Kill the processes whose root is the folder's or whose mount namespace is this one, then remove the folder."""
    deadline = time.monotonic() + SWEEP_SECONDS
    while left := [pid for pid in _processes(folder / "root", namespace) if pid not in (spared, os.getpid())]:
        if time.monotonic() > deadline:
            raise Unavailable(f"processes {left} do not end")
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    if folder.exists():
        subprocess.run(["rm", "-rf", "--one-file-system", folder], check=True)


def _processes(root: Path, namespace: int | None) -> Iterator[int]:
    wanted = [*([root.stat()] if root.exists() else []), *([os.fstat(namespace)] if namespace else [])]
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            found = [(entry / name).stat() for name in ("root", "ns/mnt")]
            if any(os.path.samestat(each, other) for each in found for other in wanted):
                yield int(entry.name)


# ---- making the machine ----


def make(folder: Path, release: str) -> Path:
    """Return the root of a machine, mounted, with a clone of HEAD for root and one for the user."""
    root, temporary = folder / "root", folder / "tmp"
    temporary.mkdir()
    sources = mirrors.sources(release)
    if not sources:
        raise Unavailable("cannot find a Debian mirror: apt knows none; run `apt-get update` on a Debian machine")
    options = [f"--aptopt={line}" for line in mirrors.apt_options()]
    if release == "bookworm":  # the other package for a merged /usr brings all of Perl
        options += ["--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr", "--include=usr-is-merged"]
    options.append(f"--include={','.join(PACKAGES)}")
    command = ["mmdebstrap", "--quiet", "--variant=minbase", *options, release, str(root), *sources]
    done = subprocess.run(
        command,
        env={**os.environ, "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=_die_with_parent,
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("E:")]
        reason = errors[0] if errors else f"status {done.returncode}"
        raise Unavailable(f"cannot make a root of {release}: {reason}; check that `apt-get update` succeeds here")
    (root / "usr/sbin/policy-rc.d").write_text(_POLICY)
    (root / "usr/sbin/policy-rc.d").chmod(0o755)
    (root / "etc/hosts").write_text(_HOSTS)
    _mount_all(root, release)
    if _call(root, "root", "", "useradd", "--create-home", f"--uid={UID}", "--shell=/bin/bash", USER):
        raise Unavailable("cannot make a user in the root: see above")
    _carry_in(root)
    for user, place in CLONES.items():
        _clone(root / place, user)
    return root


def _mount_all(root: Path, release: str) -> None:
    """What a machine has: the root is a mount point, and the kernel's file systems are there."""
    _mount("--bind", str(root), str(root))
    for name in ("proc", "sys", "dev"):
        _mount("--rbind", f"/{name}", str(root / name))
    for kind, where in (("bpf", "sys/fs/bpf"), ("tracefs", "sys/kernel/tracing")):
        if (root / where).is_dir() and not (root / where).is_mount():
            _mount("-t", kind, kind, str(root / where))
    _mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", str(root / "run"))
    (root / "run/lock").mkdir(mode=0o1777)
    if release in TMP_IN_MEMORY:
        _mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", str(root / "tmp"))


def _carry_in(root: Path) -> None:
    """Copy this machine's configuration of pip and npm and its CA bundle. Local folders of packages are mounted."""
    for name in CONFIGURATION:
        _copy(Path(name), root / name[1:])
    for name in HOME_CONFIGURATION:
        for user in CLONES:
            _copy(Path.home() / name, root / HOMES[user] / name)
    subprocess.run(["chown", "-R", f"{UID}:{UID}", root / HOMES[USER]], check=True)
    done = subprocess.run(
        [shutil.which("pip") or "true", "config", "list"], capture_output=True, text=True, check=False
    )
    words = [*_environment().values(), *done.stdout.splitlines()]
    for name in sorted({found for word in words for found in _LOCAL_PATH.findall(word)}):
        # The files that an index names lie beside its pages.
        path = Path(name).parent if Path(name).name == "simple" else Path(name)
        target = root / path.relative_to("/")
        if path.is_dir() and not target.exists():
            target.mkdir(parents=True)
            _mount("--bind", "-o", "ro", str(path), str(target))
        elif path.is_file() and not target.exists():
            _copy(path, target)


def _copy(path: Path, target: Path) -> None:
    """Copy a file or a folder, if there is one."""
    if not path.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.copytree(path, target, dirs_exist_ok=True)
    else:
        target.unlink(missing_ok=True)
        shutil.copyfile(path, target)


def _clone(place: Path, user: str) -> None:
    git = ["git", "-C", str(CHECKOUT)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    subprocess.run([*git, "clone", "--quiet", "--no-hardlinks", str(CHECKOUT), str(place)], check=True)
    subprocess.run(["git", "-C", str(place), "checkout", "--quiet", "--detach", head], check=True)
    if user != "root":
        subprocess.run(["chown", "-R", f"{UID}:{UID}", place], check=True)


# ---- running ----


def run(root: Path, target: str, pytest_args: str) -> int:
    """Run `make TARGET`, as a user without privileges where the target needs none. Return its status."""
    user = USER if target in UNPRIVILEGED else "root"
    if user != "root" and (status := _call(root, "root", CLONES["root"], "make", "packages-python")):
        return status
    words = ["make", target, *([f"PYTEST_ARGS={pytest_args}"] if pytest_args and target == "test" else [])]
    return _call(root, user, CLONES[user], *words)


def _call(root: Path, user: str, place: str, *command: str) -> int:
    """Run a command in the machine, to its end; interrupted, it may tidy up."""
    become = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--no-new-privs"]
    known = {"HOME": f"/{HOMES[user]}", "USER": user, "LOGNAME": user, "PATH": PATH, "LANG": "C.UTF-8"}
    inside = [*(become if user != "root" else []), *command]
    process = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", _PIVOT, "sh", str(root), place, *inside],
        env={"TERM": os.environ.get("TERM", "dumb"), **_environment(), **known},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )
    try:
        return process.wait()
    except BaseException:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGINT)
            process.wait(FAREWELL_SECONDS)
        raise


def _environment(names: Mapping[str, str] = os.environ) -> dict[str, str]:
    return {name: value for name, value in names.items() if _ENVIRONMENT.match(name)}


def _mount(*words: str) -> None:
    done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"cannot mount: {done.stderr.strip()}; run this where root may mount")


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _check(result: int, what: str) -> None:
    if result:
        raise Unavailable(f"cannot {what}: {os.strerror(ctypes.get_errno())}; run this where root has CAP_SYS_ADMIN")


if __name__ == "__main__":
    sys.exit(main())
