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
from typing import Any

from alembic import command as alembic
from rollout import backfill, import_sql, owners, repair, steps, verify
from rollout.control import Control, control
from rollout.errors import InconclusiveError, RefusedError, RolloutError
from rollout.explain import explain
from rollout.logs import log_to
from rollout.output import exit_code_of, stderr
from rollout.rehearsal import DELETES, REFUSED, UPLOADS, Observed, Talker, start_traffic
from rollout.rehearsal_faults import Faults
from rollout.rehearsal_result import SPOILED, result
from rollout.saved import missing_from_saved
from rollout.schema import alembic_config
from rollout.traffic import learn, stored
from rollout.transitions import Instance, Target, fleet, wait_for_fleet
from rollout.verify_report import VerifyReport
from src.database import Role, conninfo
from src.tools.rag_tools.migration.flags import View
from src.tools.rag_tools.migration.settings import migration_settings
from src.tools.rag_tools.migration.stages import ROUTING, Stage, Store
from src.tools.rag_tools.store import StoreError

GATE_SECONDS = 60.0
STAGE_SECONDS = 120.0
NO_MODEL = {"model": "rehearsal: the model is not at hand, stored vectors stand in for it"}

# The whole way. In the ramp pgvector is spoiled, and the guard goes back; then one step back from there, and one from
# the end.
UP_TO_THE_FAULT: tuple[Target, ...] = (
    Target(Stage.DUALWRITE, 0),
    Target(Stage.SHADOW, 0),
    Target(Stage.LIVE, 1),
    Target(Stage.LIVE, 10),
)
TAKEN_BACK = Target(Stage.LIVE, 0)
AFTER_THE_GUARD = Target(Stage.LIVE, 1)
AFTER_IT: tuple[Target, ...] = (
    Target(Stage.SHADOW, 0),
    Target(Stage.LIVE, 1),
    Target(Stage.LIVE, 10),
    Target(Stage.LIVE, 50),
    Target(Stage.LIVE, 100),
    Target(Stage.RAMPDOWN, 100),
    Target(Stage.COMPLETE, 100),
    Target(Stage.RAMPDOWN, 100),
    Target(Stage.COMPLETE, 100),
)

STAGES = 1 + len(UP_TO_THE_FAULT) + 1 + len(AFTER_IT)
GUARD_WINDOW = 2.0
"""Seconds, while the guard is waited for: with its own of a minute the rehearsal would be minutes longer."""
CHUNKS_A_SECOND = 25_000
"""Of so many more, FAISS is so much slower that a window must be a second longer to hold enough answers."""

STEPPED_BACK = """
SELECT id, actor, reason, stage, read_percent, extract(epoch FROM created_at - %s)::float8
FROM rollout_transitions WHERE id > %s ORDER BY id LIMIT 1
"""
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
    faults: Faults = field(default_factory=Faults)
    fault: dict[str, Any] = field(default_factory=dict)
    """What came of the spoiled pgvector."""

    def run(self) -> None:
        self.in_stage("off", None)
        for target in UP_TO_THE_FAULT:
            self.in_stage(self._name(target), self.change(target))
        self.drill()
        for target in AFTER_IT:
            self.in_stage(self._name(target), self.change(target))

    # -- one stage

    def in_stage(self, name: str, gate: dict[str, Any] | None) -> None:
        begun, view = time.monotonic(), self.control.view()
        stderr.print(f"stage {name}")
        self._tell(do="stage", stage=name)
        if Store.PGVECTOR in ROUTING[view.stage].writes and len(self.stages) == 1:
            self._backfill()
        self._write()
        share = max(1, -(-self.queries // STAGES))
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
        if differences := self._verify().differences:
            raise RefusedError(f"verify found {differences} differences after the backfill")

    # -- writes

    def _write(self) -> None:
        """Uploads in every stage, deletions in some: of what was uploaded here, and of a legacy document."""
        count = len(self.stages)
        for number in range(UPLOADS * count // STAGES, UPLOADS * (count + 1) // STAGES):
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

    # -- the fault

    def drill(self) -> None:
        """Spoil pgvector: the guard must go back by itself, the gate refuse, and repair mend it."""
        begun, view = time.monotonic(), self.control.view()
        stderr.print("spoiling pgvector, and waiting for the guard")
        window = max(GUARD_WINDOW, self.legacy / CHUNKS_A_SECOND)
        self._tell(do="stage", stage=SPOILED)
        self._tell(do="guard", window_seconds=window)
        with self.control.connection() as connection:
            self.faults.spoil(connection)
        guard = self._guarded(view, window)
        self._tell(do="guard", window_seconds=migration_settings.GUARD_WINDOW_SECONDS)
        self.in_stage(self._name(TAKEN_BACK), None)
        with self.control.connection() as connection:
            self.faults.mix_up(connection)
        refused = self._refused()
        explained = {cause.value: self._explained(number) for cause, number in self.faults.examples.items()}
        repaired = self._repair()
        self.fault = {
            **self.faults.as_dict(),
            "explained": explained,
            "guard": guard,
            "refused": refused,
            "repaired": repaired,
            "seconds": round(time.monotonic() - begun, 1),
        }

    def _guarded(self, view: View, window: float) -> dict[str, Any]:
        """Wait for the guard of one of the backend processes; RolloutError where it does not act."""
        end = time.monotonic() + 10 * window + GATE_SECONDS
        while True:
            begun = time.monotonic()
            with self.control.connection() as connection:
                row = connection.execute(STEPPED_BACK, (self.faults.since, view.transition_id)).fetchone()
            if row is not None:
                break
            if begun > end:
                raise RolloutError(f"the guard did not go back though pgvector was spoiled {10 * window:.0f} s ago")
            # Another process steps; the table is what tells.
            time.sleep(0.1)
        number, actor, reason, stage, percent, seconds = row
        late = wait_for_fleet(self._fleet, number, self.control.profile, seconds=STAGE_SECONDS)
        self.changes.append((begun, time.monotonic()))
        return {
            "transition": number,
            "actor": actor,
            "to": str(Target(Stage(stage), percent)),
            "reason": reason,
            "after_seconds": round(seconds, 1),
            "window_seconds": window,
            "late": [str(each) for each in late],
        }

    def _fleet(self) -> list[Instance]:
        with self.control.connection() as connection:
            return fleet(connection)

    def _refused(self) -> dict[str, Any]:
        """What the gate says while the fault is there, once comparisons have shown each kind of it."""
        end = time.monotonic() + GATE_SECONDS
        while True:
            late = time.monotonic() > end
            try:
                self._advance(AFTER_THE_GUARD)
            except InconclusiveError:
                if late:
                    raise
            except RefusedError as error:
                with self.control.connection() as connection:
                    self.faults.judge(connection)
                # Some kinds are never met where users have a handful of chunks.
                if late or not self.faults.unseen:
                    return dict(error.data["gate"])
            else:
                raise RolloutError("the gate let a spoiled pgvector pass")
            # Comparisons come with traffic; the gate is asked again.
            time.sleep(0.5)

    def _explained(self, number: int) -> dict[str, Any]:
        """What `rollout explain` says of a comparison."""
        said = explain(self.control, number)
        return {"diff": number, "proof": said["proof"][0], "mend": said["mend"]}

    def _repair(self) -> dict[str, int]:
        """As the runbook has it: verify, repair, settle, verify again."""
        found = self._verify()
        mended = repair.repair(self.control.pool, found, execute=True)
        self.control.router.settler.run(at_once=True)
        again = self._verify()
        return {
            "differences": found.differences,
            "documents": len({act.document_id for act in mended.acts}),
            "left": len(mended.left),
            "differences_afterwards": again.differences,
        }

    def _verify(self) -> VerifyReport:
        return verify.verify(self.control.pool, self.control.faiss, progress=lambda *_: None)

    def _tell(self, **command: Any) -> None:
        for talker in self.talkers:
            talker.ask(**command)

    def result(self) -> dict[str, Any]:
        self.observed.read()
        found = [talker.ask(do="find") for talker in self.talkers]
        return result(self, [document for answer in found for document in answer.get("missing", ["unknown"])])


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
        found = rehearsal.result()
    Path("result.json").write_text(json.dumps(found, indent=2, default=str), encoding="utf-8")
    return 0 if found["verdict"] == "pass" else 1


def _users(made: Control) -> set[int]:
    with made.connection() as connection:
        return {int(row[0]) for row in connection.execute("SELECT id FROM users")}


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
