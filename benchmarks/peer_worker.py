"""What the peers do, measured in their own process: `python -m benchmarks.peer_worker`, lines of JSON in and out.

Runs on the peers' packages, without this project's.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import psycopg

from benchmarks.timing import each, in_turn

COLLECTION = "bench"
BATCH = 1_000
STAGES = ("off", "dualwrite", "shadow", "live", "rampdown", "complete")
SCOPE = "SELECT set_config('app.user_id', %s, true), set_config('statement_timeout', %s, true)"


class _Unused:
    """Vectors are given: nothing is embedded here."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        raise NotImplementedError

    def embed_query(self, text: str) -> list[float]:
        raise NotImplementedError


@cache
def _store(url: str) -> Any:
    from langchain_postgres import PGVector

    return PGVector(
        embeddings=_Unused(), collection_name=COLLECTION, connection=url, use_jsonb=True, create_extension=False
    )


def add(url: str, vectors: str, texts: str, count: int) -> float:
    """Seconds of PGVector.add_embeddings for the first `count` rows."""
    store = _store(url)
    rows = np.load(vectors, mmap_mode="r")[:count]
    with open(texts, encoding="utf-8") as file:  # noqa: PTH123
        held = [json.loads(line) for _, line in zip(range(count), file, strict=False)]
    spent = 0.0
    for start in range(0, count, BATCH):
        some = held[start : start + BATCH]
        given = rows[start : start + BATCH].tolist()
        begun = time.perf_counter()
        store.add_embeddings(
            [one["content"] for one in some], given, metadatas=[one["metadata"] for one in some],
            ids=[one["id"] for one in some],
        )  # fmt: skip
        spent += time.perf_counter() - begun
    return spent


def query(url: str, user_id: int, questions: str, k: int) -> list[float]:
    """Milliseconds of each PGVector.similarity_search_by_vector with a filter on the user."""
    store = _store(url)
    given = [row.tolist() for row in np.load(questions)]
    asked = {"user_id": {"$eq": user_id}}
    store.similarity_search_by_vector(given[0], k=k, filter=asked)
    return each(lambda row: store.similarity_search_by_vector(row, k=k, filter=asked), given)


@cache
def _migrator(stage: str) -> tuple[Any, Any]:
    import ldclient
    from ldclient.config import Config
    from ldclient.integrations.test_data import TestData

    source = TestData.data_source()
    source.update(source.flag("move").variations(*STAGES).variation_for_all(STAGES.index(stage)))
    client = ldclient.LDClient(Config("offline", update_processor_class=source, send_events=False))
    return client, ldclient.Context.create("user-3")


def _launchdarkly(stage: str, old: Callable[[Any], Any], new: Callable[[Any], Any]) -> Callable[[Any], Any]:
    from ldclient import Result
    from ldclient.migrations import ExecutionOrder, MigratorBuilder, Stage

    client, context = _migrator(stage)
    builder = MigratorBuilder(client)
    builder.read_execution_order(ExecutionOrder.PARALLEL).track_latency(False).track_errors(False)
    builder.read(lambda row: Result.success(old(row)), lambda row: Result.success(new(row)), lambda a, b: a == b)
    builder.write(lambda row: Result.success(None), lambda row: Result.success(None))
    migrator = builder.build()
    default = Stage.from_str(stage)
    return lambda row: migrator.read("move", context, default, row)


def migrator_overhead(
    conninfo: str, statement: str, user_id: int, questions: str, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of a raw read called directly, and through LaunchDarkly's migrator in `complete`."""
    from pgvector.psycopg import register_vector

    connection = psycopg.connect(conninfo, autocommit=True)
    register_vector(connection)

    def read(row: Any) -> Any:
        with connection.pipeline():
            connection.execute(SCOPE, (str(user_id), "5000"))
            cursor = connection.execute(statement, {"user_id": user_id, "vector": row, "k": 3}, binary=True)
        return cursor.fetchall()

    given = list(np.load(questions))
    through = _launchdarkly("complete", read, read)
    each(read, given[:10])
    each(through, given[:10])
    return in_turn(rounds, {"direct": lambda: each(read, given), "through": lambda: each(through, given)})


def shadow_overhead(old_ms: float, new_ms: float, count: int) -> dict[str, list[float]]:
    """Milliseconds of a read that takes `old_ms`: alone, and with a shadow that takes `new_ms`."""
    from laboratory import Experiment

    def old(_: Any = None) -> int:
        time.sleep(old_ms / 1000)  # the store itself, as slow as the figure says
        return 1

    def new(_: Any = None) -> int:
        time.sleep(new_ms / 1000)  # and the other one
        return 1

    def laboratory(_: Any) -> Any:
        experiment = Experiment()
        experiment.control(old)
        experiment.candidate(new)
        return experiment.conduct()

    acts = {"alone": old, "launchdarkly": _launchdarkly("shadow", old, new), "laboratory": laboratory}
    return in_turn(2, {name: lambda act=act: each(act, range(count)) for name, act in acts.items()})  # type: ignore[misc]


def plot(path: str, series: dict[str, list[list[float]]], labels: dict[str, str]) -> None:
    """A log-log plot; `series`: points (chunks, milliseconds) by name."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=120)
    for name, points in series.items():
        xs, ys = zip(*points, strict=True)
        axes.loglog(xs, ys, marker="o", label=labels[name])
    axes.set_xlabel("chunks in all")
    axes.set_ylabel("milliseconds, p50")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


COMMANDS: dict[str, Callable[..., Any]] = {
    "add": add, "query": query, "migrator_overhead": migrator_overhead, "shadow_overhead": shadow_overhead,
    "plot": plot,
}  # fmt: skip


def main() -> None:
    # Whatever a library prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        what, arguments = json.loads(line)
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(COMMANDS[what](**arguments)), file=answers, flush=True)


if __name__ == "__main__":
    main()
