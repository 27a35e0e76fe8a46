"""A line to PostgreSQL that stalls, is reset, or is cut after some bytes, while documents are written."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from src.database import Role
from src.tools.rag_tools.migration.stages import Stage
from tests.acceptance.faults.conftest import FULL
from tests.acceptance.faults.site import Site
from tests.acceptance.faults.tally import Tally
from tests.acceptance.faults.victims import Ended
from tests.support.proxy import BadLine, bad_line

pytestmark = pytest.mark.migration

Record = Callable[[str, object], None]
# A start takes some 20,000 bytes, an upload some 30,000 more.
CUTS = range(1_000, 60_000, 1_000 if FULL else 4_000)


@pytest.fixture
def line(site: Site) -> Iterator[BadLine]:
    folder = Path(tempfile.mkdtemp(prefix="victus-line-"))
    with bad_line(folder, site.database.conninfo(Role.APP)) as made:
        site.conninfo = made.conninfo
        yield made
    shutil.rmtree(folder)


def told(ended: Ended) -> None:
    """Answered, or refused in words."""
    assert not ended.killed, f"hung: {ended}"
    assert (ended.acknowledged is None) == (ended.error is not None), ended
    assert ended.error is None or ended.error.startswith("error "), ended.error


@pytest.mark.parametrize("stage", [Stage.DUALWRITE, Stage.LIVE], ids=str)
def test_a_line_cut_after_any_number_of_bytes_loses_nothing(
    site: Site, line: BadLine, stage: Stage, record_property: Record
) -> None:
    tally = Tally("line to PostgreSQL cut after N bytes")
    site.go_to(stage)
    for count in CUTS:
        line.cut_after(count)
        ended = site.upload()[1]
        line.mend()
        told(ended)
        tally.add("cut", within=bool(ended.points) and ended.acknowledged is None)
    site.conninfo = None
    site.settled_and_whole()
    tally.record(record_property)


@pytest.mark.parametrize("stage", [Stage.DUALWRITE, Stage.LIVE], ids=str)
def test_a_line_that_stalls_and_is_reset_loses_nothing(
    site: Site, line: BadLine, stage: Stage, record_property: Record
) -> None:
    tally = Tally("line to PostgreSQL stalls, then is reset")
    site.go_to(stage)
    with ThreadPoolExecutor(1) as thread:
        for count in list(CUTS)[5::2]:
            line.stall_after(count)
            upload = thread.submit(site.upload)
            upload.add_done_callback(lambda _: line.held_back.set())
            line.held_back.wait()
            line.reset()
            ended = upload.result()[1]
            line.mend()
            told(ended)
            tally.add("stall", within=bool(ended.points) and ended.acknowledged is None)
    site.conninfo = None
    site.settled_and_whole()
    tally.record(record_property)
