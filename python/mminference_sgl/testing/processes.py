"""The processes of a server, as Linux tells of them."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_SHARED_MEMORY = Path("/dev/shm")
_SHARED_NAMES = ("sgl_", "sglang_", "psm_", "sem.mp-")
_MAPPED = re.compile(rf"(\d+) +{_SHARED_MEMORY}/")


@dataclass(frozen=True)
class Process:
    """One process; asking about one that has ended raises OSError."""

    pid: int

    @property
    def folder(self) -> Path:
        """What Linux tells of it in files."""
        return Path("/proc", str(self.pid))

    @property
    def name(self) -> str:
        """At most 15 characters; servers that were forked have one name for all of their processes."""
        return (self.folder / "comm").read_text(encoding="utf-8", errors="replace").strip()

    @property
    def resident_bytes(self) -> int:
        """Resident set."""
        return int((self.folder / "statm").read_text(encoding="ascii").split()[1]) * _PAGE_BYTES


def of_group(group: int) -> list[Process]:
    """The processes of a group, by id."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        # Processes come and go, and not all are ours.
        with contextlib.suppress(OSError):
            if os.getpgid(int(folder.name)) == group:
                found.append(Process(int(folder.name)))
    return sorted(found, key=lambda process: process.pid)


def scheduler_of(group: int) -> Process:
    """Of a server's group the process that holds the model, or most of it: the largest one beside the launcher.

    Raises:
        ProcessLookupError: there is none.
    """
    sizes: dict[Process, int] = {}
    for process in of_group(group):
        with contextlib.suppress(OSError):
            if process.pid != group:
                sizes[process] = process.resident_bytes
    if not sizes:
        raise ProcessLookupError(f"process group {group} has no scheduler")
    return max(sizes, key=sizes.__getitem__)


def shared_memory_of(group: int) -> list[Path]:
    """SGLang's and Python's files of shared memory that a process group has mapped; killed, it would leave them."""
    inodes: set[int] = set()
    for process in of_group(group):
        with contextlib.suppress(OSError):
            # By inode: a semaphore is mapped under another name than the one it is left under.
            inodes |= {int(inode) for inode in _MAPPED.findall((process.folder / "maps").read_text())}
    return [path for path in _SHARED_MEMORY.glob("*") if path.name.startswith(_SHARED_NAMES) and _inode(path) in inodes]


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None
