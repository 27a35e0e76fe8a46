"""The rehearsal itself, in the working folder: `python -m rollout.rehearsal_run QUERIES SEED STORED|MODEL`.

Writes result.json at its end; the exit code is 0 only if everything held.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

from alembic import command as alembic
from rollout import backfill, import_sql, owners, steps, verify
from rollout.control import Control, control
from rollout.errors import InconclusiveError, RefusedError, RolloutError
from rollout.logs import log_to
from rollout.output import exit_code_of, stderr
from rollout.rehearsal import DELETES, REFUSED, UPLOADS, Observed, Talker, start_traffic
from rollout.saved import missing_from_saved
from rollout.schema import alembic_config
from rollout.traffic import learn, stored
from rollout.transitions import Target
from src.database import Role, conninfo
from src.tools.rag_tools.migration.causes import EXPLAINED, Cause
from src.tools.rag_tools.migration.stages import ROUTING, Stage, Store
from src.tools.rag_tools.store import StoreError, legacy_chunk_id

GATE_SECONDS = 60.0
STAGE_SECONDS = 120.0
CHANGE_SECONDS = 2.0
KNOWN_SHARE = 0.95
NO_MODEL = {"model": "rehearsal: the model is not at hand, stored vectors stand in for it"}

# The whole way, with one step back from the ramp and one from the end.
ROUTE: tuple[Target, ...] = (
    Target(Stage.DUALWRITE, 0),
    Target(Stage.SHADOW, 0),
    Target(Stage.LIVE, 1),
    Target(Stage.LIVE, 10),
    Target(Stage.LIVE, 0),
    Target(Stage.LIVE, 1),
    Target(Stage.LIVE, 10),
    Target(Stage.LIVE, 50),
    Target(Stage.LIVE, 100),
    Target(Stage.RAMPDOWN, 100),
    Target(Stage.COMPLETE, 100),
    Target(Stage.RAMPDOWN, 100),
    Target(Stage.COMPLETE, 100),
)

DIFFS = """
SELECT cause, count(*), count(*) FILTER (WHERE overlap_at_k = 1) FROM shadow_diffs
WHERE transition_id = %s GROUP BY cause
"""
LATENCY = """
SELECT percentile_cont(ARRAY[0.5, 0.99]) WITHIN GROUP (
    ORDER BY CASE served_by WHEN %(store)s THEN served_ms ELSE shadow_ms END)
FROM shadow_diffs WHERE transition_id = %(transition_id)s AND shadow_ms IS NOT NULL
"""
LEGACY = "SELECT docstore_id, status, reason, user_id, document_id FROM legacy_chunks"
CHUNKS = "SELECT id, user_id, document_id FROM document_chunks"
DELETED = "SELECT id FROM documents WHERE status = 'deleted'"
# The smallest, and never a user's last: they could find nothing any more, which is what a loss looks like.
SMALL = """
WITH live AS (
    SELECT l.document_id, l.user_id, count(*) AS chunks, count(*) OVER (PARTITION BY l.user_id) AS documents
    FROM legacy_chunks l JOIN documents d ON d.id = l.document_id AND d.status = 'ready'
    WHERE l.status = 'assigned' GROUP BY 1, 2
)
SELECT document_id, user_id FROM live WHERE documents > 1 ORDER BY chunks, document_id LIMIT 1
"""
# Decided are the owners by then; a deletion erases the file at its path, which must be the copy's.
INSIDE = r"""
UPDATE documents SET path = 'uploads/' || regexp_replace(filename, '^.*[/\\]', '')
WHERE path ~ '^([/\\]|[A-Za-z]:)' OR path ~ '(^|[/\\])\.\.([/\\]|$)'
"""


@dataclass
class Rehearsal:
    """What is being rehearsed, and what has been seen of it."""

    control: Control
    talkers: list[Talker]
    queries: int
    provider: str
    users: set[int]
    legacy: int
    observed: Observed = field(default_factory=Observed)
    stages: list[dict[str, Any]] = field(default_factory=list)
    changes: list[tuple[float, float]] = field(default_factory=list)
    uploads: list[tuple[Talker, int, int]] = field(default_factory=list)
    deleted: set[int] = field(default_factory=set)
    failed: list[str] = field(default_factory=list)

    def run(self) -> None:
        self.in_stage("off", None)
        for target in ROUTE:
            gate = self.change(target)
            self.in_stage(self._name(target), gate)

    # -- one stage

    def in_stage(self, name: str, gate: dict[str, Any] | None) -> None:
        begun, view = time.monotonic(), self.control.view()
        stderr.print(f"stage {name}")
        for talker in self.talkers:
            talker.ask(do="stage", stage=name)
        if Store.PGVECTOR in ROUTING[view.stage].writes and len(self.stages) == 1:
            self._backfill()
        self._write()
        share = max(1, -(-self.queries // (len(ROUTE) + 1)))
        self.observed.wait(name, share, self.users, STAGE_SECONDS)
        saved = self._saved() if Store.FAISS in ROUTING[view.stage].writes else None
        self.stages.append(
            {
                "name": name,
                "transition": view.transition_id,
                "seconds": 0.0,
                "gate": gate,
                "saved": saved,
            }
        )
        self.stages[-1]["seconds"] = round(time.monotonic() - begun, 3)

    def change(self, target: Target) -> dict[str, Any]:
        """Step while queries are in flight; an inconclusive gate waits for evidence, a failing one ends it."""
        view = self.control.view()
        back = target.stage in list(Stage)[: list(Stage).index(view.stage)] or (
            target.stage is view.stage and target.percent < view.read_percent
        )
        end = time.monotonic() + GATE_SECONDS
        while True:
            begun = time.monotonic()
            try:
                if back:
                    stepped = steps.roll_back(
                        self.control,
                        target=target,
                        execute=True,
                        actor="rehearsal",
                        reason="rehearsing the way back",
                    )
                else:
                    stepped = self._advance(target)
            except InconclusiveError:
                if time.monotonic() > end:
                    raise
                # Evidence comes with time and traffic; the gate is asked again.
                time.sleep(0.5)
                continue
            self.changes.append((begun, time.monotonic()))
            if stepped.late:
                self.failed.append(f"{target}: processes late: {', '.join(map(str, stepped.late))}")
            return stepped.gate.as_dict()

    def _advance(self, target: Target) -> steps.Stepped:
        with self.control.connection() as connection:
            row = connection.execute("SELECT count(*) FROM legacy_chunks WHERE status = 'quarantined'").fetchone()
        entering = self.control.view().stage is Stage.OFF
        return steps.advance(
            self.control,
            target=target,
            execute=True,
            actor="rehearsal",
            reason="rehearsal",
            acknowledged=int(row[0]) if row and entering else None,
            overrides=NO_MODEL if self.provider == "STORED" and entering else {},
        )

    def _backfill(self) -> None:
        backfill.backfill(self.control.pool, self.control.faiss, execute=True, progress=lambda _: None)
        self.control.router.settler.run(at_once=True)
        report = verify.verify(self.control.pool, self.control.faiss, progress=lambda *_: None)
        if report.differences:
            raise RefusedError(f"verify found {report.differences} differences after the backfill")

    # -- writes

    def _write(self) -> None:
        """Uploads in every stage, deletions in some: of what was uploaded here, and of a legacy document."""
        count = len(self.stages)
        for number in range(UPLOADS * count // (len(ROUTE) + 1), UPLOADS * (count + 1) // (len(ROUTE) + 1)):
            talker = self.talkers[number % len(self.talkers)]
            answer = talker.ask(do="upload", number=number)
            if not self._failed("upload", answer):
                self.uploads.append((talker, answer["document"], answer["user"]))
        if count % 2 == 1 and len(self.deleted) < DELETES:
            self._delete(*self._victim(count))

    def _victim(self, count: int) -> tuple[Talker, int, int]:
        if count % 4 == 1:
            with self.control.connection() as connection:
                row = connection.execute(SMALL).fetchone()
            if row is not None:
                return self.talkers[0], int(row[0]), int(row[1])
        return next(upload for upload in self.uploads if upload[1] not in self.deleted)

    def _delete(self, talker: Talker, document_id: int, user_id: int) -> None:
        if not self._failed("delete", talker.ask(do="delete", document=document_id, user=user_id)):
            self.deleted.add(document_id)
            for other in self.talkers:
                other.ask(do="deleted", document=document_id)

    def _failed(self, doing: str, answer: dict[str, Any]) -> bool:
        if "failed" in answer:
            self.failed.append(f"{doing}: {answer['failed']}")
        return "failed" in answer

    def _saved(self) -> dict[str, int]:
        """Save the directory, and open it as the old release would."""
        steps.settle_store(self.control, Store.FAISS)
        return missing_from_saved(self.control)

    def _name(self, target: Target) -> str:
        names = Counter(stage["name"] for stage in self.stages)
        plain = f"{target.stage} {target.percent}" if len(ROUTING[target.stage].reads) == 2 else str(target.stage)
        again = names[plain] + sum(count for name, count in names.items() if name.startswith(f"{plain} ("))
        return f"{plain} ({again + 1})" if again else plain

    # -- the result

    def result(self) -> dict[str, Any]:
        self.observed.read()
        found = [talker.ask(do="find") for talker in self.talkers]
        lost = [document for answer in found for document in answer.get("missing", ["unknown"])]
        answers = self._answers()
        chunks = self._chunks()
        stages = [self._stage(stage) for stage in self.stages]
        failures = [
            *self.failed,
            *([f"{answers['failed']} answers failed"] if answers["failed"] else []),
            *([f"{answers['foreign']} answers held a foreign chunk"] if answers["foreign"] else []),
            *([f"{answers['deleted']} answers held a deleted document"] if answers["deleted"] else []),
            *([] if answers["known_share"] >= KNOWN_SHARE else [f"known chunks found: {answers['known_share']:.1%}"]),
            *([] if chunks["balanced"] else ["legacy chunks do not add up"]),
            *([f"uploads not found afterwards: {lost}"] if lost else []),
            *[f"{each['name']}: saved directory lacks {each['saved']['missing']} chunks" for each in stages
              if each["saved"] and each["saved"]["missing"]],
            *([] if answers["total"] >= self.queries else [f"only {answers['total']} queries"]),
            *([] if answers["least_in_flight_at_a_change"] else ["no query was in flight at one of the changes"]),
            *([] if len(self.uploads) >= UPLOADS else [f"only {len(self.uploads)} of {UPLOADS} uploads"]),
            *([] if len(self.deleted) >= DELETES else [f"only {len(self.deleted)} of {DELETES} deletes"]),
        ]  # fmt: skip
        return {
            "verdict": "fail" if failures else "pass",
            "failures": failures,
            "stages": stages,
            "answers": answers,
            "chunks": chunks,
            "uploads": {"made": len(self.uploads), "missing": lost},
            "deletes": len(self.deleted),
            "provider": self.provider,
        }

    def _answers(self) -> dict[str, Any]:
        lines = self.observed.lines
        asked = [line["known"] for line in lines if line.get("known") is not None]
        around = [
            line["ms"]
            for line in lines
            if any(line["begun"] < end + CHANGE_SECONDS and line["begun"] + line["ms"] / 1000 > begun
                   for begun, end in self.changes)
        ]  # fmt: skip
        return {
            "total": len(lines),
            "failed": sum("failed" in line for line in lines),
            "first_failures": [line["failed"] for line in lines if "failed" in line][:5],
            "foreign": sum(bool(line.get("foreign")) for line in lines),
            "deleted": sum(bool(line.get("deleted")) for line in lines),
            "known_share": round(sum(asked) / len(asked), 4) if asked else 0.0,
            "around_changes": len(around),
            "least_in_flight_at_a_change": min((self._in_flight(*change) for change in self.changes), default=0),
            "slowest_around_a_change_ms": round(max(around, default=0.0), 1),
        }

    def _in_flight(self, begun: float, end: float) -> int:
        """How many queries were asked or under way while a step was taken and the fleet arrived."""
        return sum(line["begun"] < end and line["begun"] + line["ms"] / 1000 > begun for line in self.observed.lines)

    def _chunks(self) -> dict[str, Any]:
        """Every legacy chunk is where it belongs, in quarantine, or deleted with its document."""
        with self.control.connection() as connection:
            rows = connection.execute(LEGACY).fetchall()
            held = {row[0]: (row[1], row[2]) for row in connection.execute(CHUNKS)}
            deleted = {int(row[0]) for row in connection.execute(DELETED)}
        migrated = gone = 0
        quarantined: Counter[str] = Counter()
        for docstore_id, status, reason, user_id, document_id in rows:
            there = held.get(legacy_chunk_id(docstore_id))
            if status != "assigned":
                quarantined[reason] += there is None
            elif document_id in deleted:
                gone += there is None
            else:
                migrated += there == (user_id, document_id)
        total = self.legacy
        return {
            "legacy": total,
            "migrated": migrated,
            "quarantined": sum(quarantined.values()),
            "quarantined_by_reason": dict(quarantined),
            "deleted": gone,
            "balanced": total == migrated + gone + sum(quarantined.values()),
        }

    def _stage(self, stage: dict[str, Any]) -> dict[str, Any]:
        lines = self.observed.of(stage["name"])
        parameters = {"transition_id": stage["transition"]}
        with self.control.connection() as connection:
            diffs = connection.execute(DIFFS, (stage["transition"],)).fetchall()
            latency = {
                store.value: (connection.execute(LATENCY, {**parameters, "store": store}).fetchone() or (None,))[0]
                for store in Store
            }
        total = sum(count for _, count, _ in diffs)
        return {
            **stage,
            "queries": len(lines),
            "users": len({line["user"] for line in lines}),
            "answer_ms": _percentiles([line["ms"] for line in lines]),
            "store_ms": {
                store: None if not ms else {"p50": round(ms[0], 2), "p99": round(ms[1], 2)}
                for store, ms in latency.items()
            },
            "comparisons": total,
            "agreement": round(sum(same for _, _, same in diffs) / total, 4) if total else None,
            "explained": round(sum(n for cause, n, _ in diffs if Cause(cause) in EXPLAINED) / total, 4)
            if total
            else None,
            "causes": {cause: count for cause, count, _ in diffs},
        }


def main(queries: int, seed: int, provider: str) -> int:
    """The exit code; what the copy is refused for is told in a file."""
    log_to(sys.stdout)
    try:
        return rehearsed(queries, seed, provider)
    except Exception as error:
        code = exit_code_of(error)
        if code is None:
            raise
        Path(REFUSED).write_text(json.dumps({"error": str(error), "exit_code": code}), encoding="utf-8")
        return code


def rehearsed(queries: int, seed: int, provider: str) -> int:
    alembic.upgrade(alembic_config(), "head")
    import_sql.import_sql("sqlite:///victus.db", conninfo(Role.ROLLOUT), execute=True, progress=lambda *_: None)
    with ExitStack() as stack:
        made = stack.enter_context(control())
        with made.connection() as connection:
            positions = owners.positions_of(made.faiss.base_positions())
            left_behind = owners.rows_left_behind(connection, "sqlite:///victus.db")
            owners.assign_owners(connection, positions, actor="rehearsal", execute=True, left_behind=left_behind)
            connection.execute(INSIDE)
        made.reload_owners()
        if provider == "STORED":
            made.embeddings = stored(learn(made.router))
        stderr.print("starting the traffic")
        rehearsal = Rehearsal(
            made,
            start_traffic(stack, seed, provider),
            queries,
            provider,
            _users(made),
            len(positions),
        )
        try:
            rehearsal.run()
        except (RolloutError, StoreError) as error:
            rehearsal.failed.append(f"{type(error).__name__}: {error}")
        result = rehearsal.result()
    Path("result.json").write_text(json.dumps(result, indent=2, default=str), encoding="utf-8")
    return 0 if result["verdict"] == "pass" else 1


def _users(made: Control) -> set[int]:
    with made.connection() as connection:
        return {int(row[0]) for row in connection.execute("SELECT id FROM users")}


def _percentiles(values: list[float]) -> dict[str, float] | None:
    if len(values) < 2:
        return None
    cuts = quantiles(values, n=100, method="inclusive")
    return {"p50": round(cuts[49], 2), "p99": round(cuts[98], 2)}


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
