"""Disks that are full or may only be read, under the FAISS directory and under the uploads: real ones, of memory."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from src.tools.rag_tools.migration.stages import Stage
from tests.acceptance.faults.site import Site
from tests.acceptance.faults.tally import Tally
from tests.acceptance.faults.victims import Ended, Victims

Record = Callable[[str, object], None]

SIZE = "8m"


def _may_mount() -> bool:
    return (
        os.geteuid() == 0
        and subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode == 0
    )


pytestmark = [
    pytest.mark.migration,
    pytest.mark.skipif(not _may_mount(), reason="only root may mount a small disk"),
]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@contextmanager
def full(disk: Path, left: int) -> Iterator[None]:
    """All but `left` bytes are taken."""
    ballast = disk / "ballast"
    room = os.statvfs(disk)
    ballast.write_bytes(b"\0" * max(room.f_bavail * room.f_frsize - left, 0))
    yield
    ballast.unlink()


@contextmanager
def read_only(disk: Path) -> Iterator[None]:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    yield
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)


def site_on(database: Any, victims: Victims, tmp_path: Path, disk: Path, part: str) -> Site:
    """With this part on the small disk."""
    places = {"uploads": tmp_path / "uploads", "faiss": tmp_path / "faiss_index", part: disk / part}
    return Site(database, victims, places["uploads"], places["faiss"])


def refused_or_kept(ended: Ended) -> None:
    assert not ended.killed
    assert (ended.error is None) == (ended.acknowledged is not None)
    if ended.error is not None:
        assert ended.error.startswith("error "), ended.error
        assert any(word in ended.error for word in ("space", "disk", "room", "rights", "writ")), ended.error


@pytest.mark.parametrize("stage", [Stage.OFF, Stage.DUALWRITE, Stage.LIVE], ids=str)
@pytest.mark.parametrize("part", ["faiss", "uploads"])
def test_a_full_disk_refuses_or_keeps_a_write(
    database: Any, victims: Victims, tmp_path: Path, disk: Path, part: str, stage: Stage, record_property: Record
) -> None:
    tally = Tally(f"full disk under {'the FAISS directory' if part == 'faiss' else 'the uploads'}")
    site = site_on(database, victims, tmp_path, disk, part)
    site.go_to(stage)
    with site.router() as router:
        there = [site.uploaded(router) for _ in range(3)]
        router.stores.faiss.save()
        for left in (0, 4_096, 16_384, 40_000):
            document = site.new()
            with full(disk, left):
                ended = site.victims.run(site.request("upload", path=str(site.path(document)), user=document.user))
                site.heard(document, ended)
                refused_or_kept(ended)
                tally.add(f"{left} bytes left", within=bool(ended.points))
        leaving = there.pop()
        with full(disk, 0):
            refused_or_kept(site.delete(leaving))
            site.victims.run(site.request("save"))
    site.settled_and_whole()
    tally.record(record_property)


@pytest.mark.parametrize("stage", [Stage.OFF, Stage.DUALWRITE, Stage.LIVE], ids=str)
def test_a_faiss_directory_that_may_only_be_read_loses_nothing(
    database: Any, victims: Victims, tmp_path: Path, disk: Path, stage: Stage, record_property: Record
) -> None:
    tally = Tally("read-only FAISS directory")
    site = site_on(database, victims, tmp_path, disk, "faiss")
    site.go_to(stage)
    with site.router() as router:
        there = [site.uploaded(router) for _ in range(3)]
        router.stores.faiss.save()
    leaving = there.pop()
    with read_only(disk):
        ended = site.upload()[1]
        refused_or_kept(ended)
        tally.add("upload", within=bool(ended.points))
        refused_or_kept(site.delete(leaving))
        site.victims.run(site.request("save"))
    site.settled_and_whole()
    tally.record(record_property)
