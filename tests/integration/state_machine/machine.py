"""The moves of users, processes, on-call and bad luck, in any order; after each the properties are checked.

What it drives is real: routers with their flags, ledger and settler, the FAISS directory, PostgreSQL, and the steps
of `rollout`. Only time is the test's: a request goes on, a process polls and a lease ends when a move says so.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from src.tools.rag_tools.migration import ledger
from src.tools.rag_tools.migration.stages import ORDER, ROUTING, Stage, Store
from tests.integration.state_machine import properties
from tests.integration.state_machine.actors import AFTER_DELETE, AFTER_READY, Actor, Order
from tests.integration.state_machine.properties import Answers, PropertyViolatedError
from tests.integration.state_machine.world import MANY_ATTEMPTS, Document, Process, World

MOST_REQUESTS = 4
MOST_DOCUMENTS = 6
YOUNGEST = 0

STARTS = [(stage, percent) for stage in Stage for percent in ((0, 50, 100) if stage is Stage.LIVE else (0,))]
PREPARE = ("kept.load", "upload.parse", "kept.write", "kept.link", "kept.sync")
WRITE = {Store.PGVECTOR: "pgvector.present", Store.FAISS: "journal.add"}
APPLY = (*WRITE.values(), "ledger.mark")
STORED = (*APPLY, "upload.ready")
UPLOAD = ("upload.intent", "document.load", *PREPARE, *APPLY, *STORED, AFTER_READY, "settle.after")
ERASE = ("journal.delete", "pgvector.absent", "ledger.mark")
DELETE = (
    "delete.intent", AFTER_DELETE, *ERASE * 3,
    "delete.shared", "kept.forget", "delete.file", "delete.path",
)  # fmt: skip
SETTLE = ("settle.look", "settle.copy", *PREPARE, *APPLY, *ERASE, "settle.after", "settle.stage", "settle.ready")
SLEEPS = (*[None] * 8, *STORED)
some = st.integers(min_value=0, max_value=11)
orders = st.sampled_from([Order.FAIL, Order.LANDED, Order.HANG])


class Left(StrEnum):
    """How a process comes to be left behind; the fleet goes on without it only where it was given up."""

    POLLS = "it polls, but perhaps a request of it sleeps"
    SILENT = "it does not poll"
    LOOKS = "it looks, and adopts nothing"
    GIVEN_UP = "it was declared dead, and lives"


class Machine(RuleBasedStateMachine):
    """`world` is set by the test."""

    world: ClassVar[World]

    def __init__(self) -> None:
        super().__init__()
        self.broken = False
        self.checked: dict[str, Any] = {}
        self.answers: dict[str, Answers] = {}
        self.uploads: dict[Actor, Document] = {}
        self.judged: set[Actor] = set()

    @initialize(
        start=st.sampled_from(STARTS),
        processes=st.sampled_from([2, 2, 2, 3]),
        sleeps=st.sampled_from(SLEEPS),
        user=some,
        how=st.sampled_from(Left),
    )
    def begin(self, start: tuple[Stage, int], processes: int, sleeps: str | None, user: int, how: Left) -> None:
        """Sometimes with an upload that sleeps while the fleet goes, or would go, to the far stages."""
        self.world.reset(*start, processes)
        if sleeps is not None:
            actor = self._upload(0, user, post=False)
            if actor.reach(sleeps):
                self._leave_behind(actor.process, ORDER.index(start[0]) < len(ORDER) / 2, 3, how)
                actor.finish()

    # -- choosing

    def _up(self) -> list[Process]:
        return [process for process in self.world.processes if process.router is not None]

    def _process(self, number: int) -> Process:
        up = self._up()
        return up[number % len(up)]

    def _running(self) -> list[Actor]:
        waited = {actor.waits_for for actor in self.world.actors}
        return [actor for actor in self.world.actors if not actor.done and actor not in waited]

    def _actor(self, number: int) -> Actor:
        running = self._running()
        return running[number % len(running)]

    def _deletable(self) -> list[Document]:
        """The youngest first: its upload may still be under way."""
        return [each for each in reversed(self.world.documents) if each.id is not None and not each.deleted]

    def _may_begin(self) -> bool:
        return bool(self._up()) and len(self._running()) < MOST_REQUESTS

    def _may_upload(self) -> bool:
        return self._may_begin() and len(self.world.documents) < MOST_DOCUMENTS

    # -- users

    @precondition(_may_upload)
    @rule(process=some, user=some, post=st.booleans())
    def upload(self, process: int, user: int, post: bool) -> None:
        self._upload(process, user, post).finish()

    @precondition(_may_upload)
    @rule(process=some, user=some, post=st.booleans(), point=st.sampled_from(UPLOAD))
    def begin_upload(self, process: int, user: int, post: bool, point: str) -> None:
        self._upload(process, user, post).reach(point)

    @precondition(_may_upload)
    @rule(process=some, user=some, post=st.booleans(), point=st.sampled_from(UPLOAD), order=orders)
    def upload_in_trouble(self, process: int, user: int, post: bool, point: str, order: Order) -> None:
        self._trouble(self._upload(process, user, post), point, order)

    @precondition(_may_upload)
    @rule(process=some, user=some, post=st.booleans(), point=st.sampled_from(UPLOAD))
    def upload_until_a_power_cut(self, process: int, user: int, post: bool, point: str) -> None:
        self._upload(process, user, post).reach(point)
        self.world.power_cut()

    @precondition(_may_upload)
    @rule(process=some, user=some, post=st.booleans(), order=orders, settling=st.none() | some)
    def upload_that_a_store_misses(
        self, process: int, user: int, post: bool, order: Order, settling: int | None
    ) -> None:
        """Perhaps settled by a process that nobody has asked anything in between."""
        self._missed(process, user, post, order)
        if settling is not None:
            self.world.settle(self._process(settling)).finish()

    @precondition(_may_upload)
    @rule(process=some, user=some, order=orders, forward=st.booleans(), times=st.integers(1, 4))
    def stores_miss_uploads_before_and_after_steps(
        self, process: int, user: int, order: Order, forward: bool, times: int
    ) -> None:
        self._missed(process, user, False, order)
        for _ in range(times):
            self._all_poll()
            self.world.step(forward)
        self._all_poll()
        if self._may_upload():
            self._missed(process, user, False, order)

    @precondition(_may_upload)
    @rule(
        process=some,
        user=some,
        post=st.booleans(),
        point=st.sampled_from(STORED),
        deleting=some,
        order=st.just(Order.GO) | orders,
    )
    def delete_while_uploading(
        self, process: int, user: int, post: bool, point: str, deleting: int, order: Order
    ) -> None:
        actor = self._upload(process, user, post)
        if actor.reach(point):
            self._delete(deleting, YOUNGEST).finish()
            self.world.hurt |= order is not Order.GO
            actor.obey(order)
            actor.finish()

    @precondition(lambda self: self._may_begin() and self._deletable())
    @rule(process=some, document=some)
    def delete(self, process: int, document: int) -> None:
        self._delete(process, document).finish()

    @precondition(lambda self: self._may_begin() and self._deletable())
    @rule(process=some, document=some, point=st.sampled_from(DELETE))
    def begin_delete(self, process: int, document: int, point: str) -> None:
        self._delete(process, document).reach(point)

    @precondition(lambda self: self._may_begin() and self._deletable())
    @rule(process=some, document=some, point=st.sampled_from(DELETE), order=orders)
    def delete_in_trouble(self, process: int, document: int, point: str, order: Order) -> None:
        self._trouble(self._delete(process, document), point, order)

    # -- what runs

    @precondition(_running)
    @rule(actor=some, operations=st.integers(1, 4))
    def go_on(self, actor: int, operations: int) -> None:
        self._go(self._actor(actor), operations)

    @precondition(_running)
    @rule(actor=some)
    def finish(self, actor: int) -> None:
        self._actor(actor).finish()

    @precondition(_running)
    @rule(actor=some, order=orders)
    def fail(self, actor: int, order: Order) -> None:
        self.world.hurt = True
        self._actor(actor).obey(order)

    @precondition(_may_begin)
    @rule(process=some)
    def settle(self, process: int) -> None:
        self.world.settle(self._process(process)).finish()

    @precondition(_may_begin)
    @rule(process=some, point=st.sampled_from(SETTLE))
    def begin_settling(self, process: int, point: str) -> None:
        self.world.settle(self._process(process)).reach(point)

    @precondition(_may_upload)
    @rule(process=some, user=some, order=orders, point=st.sampled_from(APPLY), deleting=some)
    def delete_while_settling(self, process: int, user: int, order: Order, point: str, deleting: int) -> None:
        self._missed(process, user, False, order)
        settling = self.world.settle(self._process(process))
        if settling.reach(point) and self._deletable():
            self._delete(deleting, YOUNGEST).finish()
            settling.finish()

    @precondition(_may_begin)
    @rule(process=some)
    def settle_the_way_back(self, process: int) -> None:
        self.world.settle_the_way_back(self._process(process)).finish()

    @precondition(_may_begin)
    @rule(process=some, point=st.sampled_from(list(WRITE.values())))
    def set_aside(self, process: int, point: str) -> None:
        self.world.bulk.execute(MANY_ATTEMPTS)
        self._trouble(self.world.settle(self._process(process)), point, Order.BROKEN)

    @rule()
    def try_again(self) -> None:
        ledger.retry_aside(self.world.control)

    @precondition(_may_begin)
    @rule(process=some)
    def save(self, process: int) -> None:
        self._process(process).up.save_faiss()

    # -- processes

    @precondition(_up)
    @rule(process=some)
    def poll(self, process: int) -> None:
        self.world.poll(self._process(process))

    @precondition(_up)
    @rule(process=some)
    def fetch(self, process: int) -> None:
        self.world.fetch(self._process(process))

    @precondition(_may_upload)
    @rule(process=some, user=some, point=st.sampled_from(APPLY), order=orders)
    def upload_while_polling(self, process: int, user: int, point: str, order: Order) -> None:
        self.world.fetch(self._process(process))
        self._trouble(self._upload(process, user, post=False), point, order)
        self.world.poll(self._process(process))

    @precondition(lambda self: self._may_begin() and self._deletable())
    @rule(process=some, document=some, point=st.sampled_from(ERASE), order=orders)
    def delete_while_polling(self, process: int, document: int, point: str, order: Order) -> None:
        self.world.fetch(self._process(process))
        self._trouble(self._delete(process, document), point, order)
        self.world.poll(self._process(process))

    @precondition(_up)
    @rule(process=some)
    def kill(self, process: int) -> None:
        self.world.kill(self._process(process))

    @precondition(lambda self: len(self._up()) < len(self.world.processes))
    @rule()
    def restart(self) -> None:
        for process in self.world.processes:
            if process.router is None:
                self.world.start(process)

    # -- stages

    @rule(forward=st.booleans())
    def step(self, forward: bool) -> None:
        self.world.step(forward)

    @rule(forward=st.booleans(), times=st.integers(1, 4))
    def everybody_moves(self, forward: bool, times: int) -> None:
        for _ in range(times):
            self._all_poll()
            self.world.step(forward)

    @precondition(_up)
    @rule(process=some, forward=st.booleans(), times=st.integers(0, 3), how=st.sampled_from(Left))
    def leave_behind(self, process: int, forward: bool, times: int, how: Left) -> None:
        self._leave_behind(self._process(process), forward, times, how)

    # -- after every move

    @invariant()
    def properties_hold(self) -> None:
        world = self.world
        now = world.look()
        world.recognise(now)
        for actor in [each for each in world.actors if each.done and each not in self.judged]:
            self.judged.add(actor)
            self._judge(properties.of_error(world, actor, self.uploads.get(actor)))
        for process in world.processes:
            self._ask(process, now)
        self._judge(properties.in_every_state(world, now, self.answers))

    def teardown(self) -> None:
        if self.broken or not self.world.processes:
            return
        self.world.rest()
        self.properties_hold()
        now = self.world.look()
        self._judge(properties.at_rest(self.world, now))
        if Store.FAISS in ROUTING[now.stage].writes:
            self._judge(properties.saved(now, self.world.saved()))

    def _ask(self, process: Process, now: Any) -> None:
        """Ask again only where something has changed since."""
        if process.router is None:
            self.answers.pop(process.name, None)
            return
        seen = (process.router, process.up.flags.view(), now)
        if self.checked.get(process.name) != seen or process.name not in self.answers:
            self.answers[process.name] = self.world.answers(process)
            self.checked[process.name] = seen

    def _judge(self, found: Any) -> None:
        for name, what in found:
            self.broken = True
            raise PropertyViolatedError(name, what)

    # -- parts

    def _upload(self, process: int, user: int, post: bool) -> Actor:
        world = self.world
        actor = world.upload(self._process(process), world.users[user % len(world.users)], post=post)
        self.uploads[actor] = world.documents[-1]
        return actor

    def _delete(self, process: int, document: int) -> Actor:
        deletable = self._deletable()
        return self.world.delete(self._process(process), deletable[document % len(deletable)])

    def _go(self, actor: Actor, operations: int) -> None:
        for _ in range(operations):
            if not actor.done:
                actor.obey(Order.GO)

    def _trouble(self, actor: Actor, point: str, order: Order) -> None:
        if actor.reach(point):
            self.world.hurt = True
            actor.obey(order)
            actor.finish()

    def _missed(self, process: int, user: int, post: bool, order: Order) -> None:
        """An upload that the store written last misses."""
        actor = self._upload(process, user, post)
        writes = actor.process.up.flags.view().plan(self.uploads[actor].user_id).writes
        self._trouble(actor, WRITE[writes[-1]], order)

    def _leave_behind(self, left: Process, forward: bool, times: int, how: Left) -> None:
        if how is Left.GIVEN_UP:
            self.world.stall(left)
        silent = None if how is Left.POLLS else left
        for _ in range(times):
            self._all_poll(but=silent)
            if how is Left.LOOKS:
                self.world.fetch(left)
            self.world.step(forward)
        self._all_poll(but=silent)

    def _all_poll(self, but: Process | None = None) -> None:
        for process in self._up():
            if process is not but:
                for _ in range(2):
                    self.world.poll(process)
