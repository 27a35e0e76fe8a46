"""What every writer of the FAISS directory needs of the disk: fsync, one lock, links swapped whole,
and whether the directory lies on a disk of this host alone.

Nothing here leaves a half state behind: a link is either the old one or the new one, a lock ends
with its process, and a leftover temporary link is overwritten by the next attempt.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from src.tools.rag_tools.store import StoreError
from src.utils.file_lock import Mode, acquire

# Locks and shared memory of SQLite do not hold across the clients of these. 9p is left out:
# sandboxes and virtual machines show a local disk so, and a second host is caught by the host record.
_NETWORK = ("nfs", "nfs4", "cifs", "smb", "smb2", "smb3", "smbfs", "afs", "ncpfs", "fuse.sshfs")
_CLUSTER = ("ceph", "fuse.ceph", "glusterfs", "fuse.glusterfs", "lustre", "beegfs", "gpfs", "ocfs2", "gfs2")
_BUCKET = ("fuse.s3fs", "fuse.gcsfuse", "fuse.rclone")
NETWORK_FILE_SYSTEMS = frozenset((*_NETWORK, *_CLUSTER, *_BUCKET))
MOUNTINFO = Path("/proc/self/mountinfo")
MACHINE_ID = Path("/etc/machine-id")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class FaissDirectoryError(StoreError):
    """The FAISS directory cannot be used as it stands; every error of its files derives from this."""


class ForeignDirectoryError(FaissDirectoryError):
    """The directory lies on a network file system, or belongs to another host."""


class BusyError(FaissDirectoryError):
    """Another process holds the lock."""


@dataclass(frozen=True, slots=True)
class Host:
    """Who uses a directory. Empty fields are unknown; a container often has no machine id of its own."""

    machine_id: str
    hostname: str
    boot_id: str

    def same_as(self, other: Host) -> bool:
        """One kernel is one host, whatever containers are called; else the machine id decides, else the name."""
        if self.boot_id and self.boot_id == other.boot_id:
            return True
        if self.machine_id and other.machine_id:
            return self.machine_id == other.machine_id
        return self.hostname == other.hostname

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))


def this_host() -> Host:
    return Host(_line(MACHINE_ID), socket.gethostname(), _line(BOOT_ID))


def refuse_network(directory: Path, mountinfo: str | None = None) -> None:
    """ForeignDirectoryError where `directory` lies on a network file system, by `mountinfo` of proc(5)."""
    text = _read(MOUNTINFO) if mountinfo is None else mountinfo
    mount, kind = file_system(directory, text)
    if kind in NETWORK_FILE_SYSTEMS:
        raise ForeignDirectoryError(
            f"{directory} lies on {kind} (mounted at {mount}): several hosts could write it at once and lose writes;"
            " move the directory to a local disk and point FAISS_INDEX_PATH there"
        )


def file_system(directory: Path, mountinfo: str) -> tuple[str, str]:
    """(mount point, type) of the file system that holds `directory`; ("", "") where it is not
    listed."""
    path = directory.resolve()
    best = ("", "")
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        if len(fields) < 5 or not after:
            continue
        mount = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
        # Of two mounts at one point the later one covers the earlier.
        if path.is_relative_to(mount) and len(mount) >= len(best[0]):
            best = (mount, after.split()[0])
    return best


def sync(path: Path) -> None:
    """fsync of a file or a folder; a new name is durable only once its folder is synced."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def swap_link(link: Path, target: str) -> None:
    """Makes `link` point at `target`; whoever looks sees what was there before, or the new link."""
    temporary = link.with_name(f".{link.name}.new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)
    sync(link.parent)


def make_folder(path: Path) -> None:
    """Creates `path` with its parents, durably; nothing if it is there."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[None]:
    """Holds the lock file `path` alone, also against threads of this process. BusyError unless `wait`."""
    try:
        descriptor = acquire(path, Mode.EXCLUSIVE if wait else Mode.EXCLUSIVE_NOW)
    except BlockingIOError as error:
        raise BusyError(f"{path} is held by another process; wait for it, or find it with `fuser {path}`") from error
    try:
        yield
    finally:
        os.close(descriptor)


def _line(path: Path) -> str:
    return _read(path).strip()


def _read(path: Path) -> str:
    """Empty where the system has no such file: what is unknown refuses nothing."""
    try:
        return path.read_text()
    except OSError:
        return ""
