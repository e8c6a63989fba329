"""Why a sandbox does not start on this machine, and what mends it."""

from __future__ import annotations

from pathlib import Path

_SWITCHES = {
    "kernel/apparmor_restrict_unprivileged_userns": ("1", "0", "or give bwrap an AppArmor profile that permits userns"),
    "kernel/unprivileged_userns_clone": ("0", "1", ""),
    "user/max_user_namespaces": ("0", "10000", ""),
}
"""Settings of kernels that forbid user namespaces: the value that does, one that does not, another way."""
_CONTAINER = (
    "in a container, start it with `--cap-add SYS_ADMIN --security-opt apparmor=unconfined` or with a seccomp profile "
    "that permits unshare and mount (and with `--security-opt systempaths=unconfined` where proc cannot be mounted); "
    "where that is not to be had, the weaker sandbox called landlock needs no namespaces"
)
_HOME = (
    "bubblewrap cannot reach the interpreter or this package as the user that it runs as: take a Python outside of "
    "another user's home (such as /usr or /opt), or let others enter its folders"
)
_UNREACHED = ("Can't find source path", "execvp", "No module named", "can't open file", "Failed to import")


def remedy(words: str, sysctl: Path = Path("/proc/sys")) -> str:
    """What to do where a sandbox fails with `words`."""
    if any(sign in words for sign in _UNREACHED):
        return _HOME
    for name, (forbids, permits, otherwise) in _SWITCHES.items():
        path = sysctl / name
        if path.is_file() and path.read_text().strip() == forbids:
            told = f"this kernel forbids user namespaces: `sysctl -w {name.replace('/', '.')}={permits}`"
            return f"{told}, {otherwise}" if otherwise else told
    return _CONTAINER
