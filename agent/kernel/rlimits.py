"""Raise the resource limits of this process."""

from __future__ import annotations

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
