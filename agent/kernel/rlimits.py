"""Raise the resource limits of this process."""

from __future__ import annotations

import contextlib
import resource


def raise_descriptor_limit(wanted: int) -> bool:
    """Let this process open ``wanted`` files, or as many as its hard limit allows; return whether it is ``wanted``.

    The limit is never lowered.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    reachable = hard == resource.RLIM_INFINITY or wanted <= hard
    limit = wanted if reachable else hard
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return reachable


def raise_memory_lock_limit() -> None:
    """Let this process create maps of any size, if it may.

    Maps and programs count as locked memory before Linux kernel commit 97306be45fbe ("Merge branch 'switch to
    memcg-based memory accounting'") (in v5.11).
    """
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
