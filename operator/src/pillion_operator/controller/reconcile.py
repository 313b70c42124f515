"""
The whole of: writing the status of policies and Checkpoint objects, one key at a time, at a bounded rate.

Called from: `app`; `run` is one task of the process. The write is computed each time a key is due, so that
the queue holds only keys, and nothing is lost when a write fails.
Must never: write more than `WRITES_PER_S`, or stop because one object cannot be written.
"""

import asyncio
import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Final, TypeVar

from pillion_operator import metrics
from pillion_operator.cluster import client, paths
from pillion_operator.cluster.client import Json
from pillion_operator.controller import checkpoints, claims, commands, conditions, mirror, policies, work_queue
from pillion_operator.controller.checkpoints import Checkpoint, Checkpoints
from pillion_operator.home.registry import Job, JobKey, Registry
from pillion_operator.log import Field

WRITES_PER_S: Final = 20.0
"""Maximum writes a second to the API server, of all kinds. Kubernetes' scalability tests assume as much for a whole cluster."""
BURST: Final = 20.0
BATCH: Final = 10
"""Maximum number of writes for one job in a row, so that a job with a thousand checkpoints does not block the others."""
DEBOUNCE_S: Final = 0.2
"""Delay between a change and its processing, so that changes at one time are written together."""
POLICY_PAUSE_S: Final = 2.0
"""Minimum time between two writes of one policy's status, so that a thousand new pods cause few writes."""
TICK_S: Final = 1.0
"""Interval between two looks for jobs that stopped reporting."""
RESYNC_S: Final = 60.0
"""Interval between two looks at everything, for changes that only time causes, such as the expiry of a request."""

_log = logging.getLogger(__name__)
PolicyKey = policies.Key
K = TypeVar("K", bound=tuple[str, str])


def operations(objects: Collection[Checkpoint], job: Job | None, now_s: float) -> list[mirror.Operation]:
    """
    What is to be done to the Checkpoint objects of a job: nothing, once it is done.

    Requests come first, and each object is written once.
    """
    answers = {each.checkpoint.name: each for each in commands.plan(objects, job, now_s)}
    if job is None:
        return list(answers.values())
    as_answered = [
        dataclasses.replace(each, status=answers[each.name].status) if each.name in answers else each
        for each in objects
    ]
    originals = {each.name: each for each in objects}
    result: dict[str, mirror.Operation] = dict(answers)
    for each in mirror.plan(job.report, as_answered, now_s):
        if isinstance(each, mirror.SetStatus):
            each = mirror.SetStatus(checkpoint=originals[each.checkpoint.name], status=each.status)
        result[each.name if isinstance(each, mirror.Create) else each.checkpoint.name] = each
    return list(result.values())


class Pace:
    """At most so many writes a second, a few at once."""

    def __init__(self, per_s: float, burst: float) -> None:
        self._per_s, self._burst = per_s, burst
        self._tokens, self._filled_s = burst, time.monotonic()

    async def wait(self) -> None:
        """Blocks: until one more is allowed."""
        now_s = time.monotonic()
        self._tokens = min(self._burst, self._tokens + (now_s - self._filled_s) * self._per_s)
        self._filled_s = now_s
        self._tokens -= 1
        if self._tokens < 0:
            await asyncio.sleep(-self._tokens / self._per_s)


class Reconciler:
    """The one writer of policies' status and of Checkpoint objects."""

    def __init__(
        self,
        api: client.Client,
        registry: Registry,
        count_pods: Callable[[PolicyKey], int],
        post: Callable[..., None],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            api: access to the API server.
            registry: the jobs that report.
            count_pods: injected pods under a policy.
            post: `cluster.events.Events.post`.
            clock: seconds since 1970.
        """
        self.checkpoints = Checkpoints(self.mark_job)
        self.policies = policies.Policies(self.mark_policy)
        self.last_turn_s = time.monotonic()
        """When the loop last came round; a loop that hangs is seen by it."""
        self._api = api
        self._registry = registry
        self._count_pods = count_pods
        self._post = post
        self._clock = clock
        self._claims = claims.Claims(api)
        self._pace = Pace(WRITES_PER_S, BURST)
        self._due_policies = work_queue.WorkQueue[PolicyKey]()
        self._due_requests = work_queue.WorkQueue[JobKey]()
        self._due_jobs = work_queue.WorkQueue[JobKey]()
        self._wake = asyncio.Event()
        self._resynced_s = time.monotonic()

    def mark_job(self, key: JobKey) -> None:
        """Something about a job changed: its report, or an object that names it."""
        due = self._due_requests if self.checkpoints.open_requests(key) else self._due_jobs
        due.mark(key, time.monotonic() + DEBOUNCE_S)
        self._wake.set()

    def mark_policy(self, key: PolicyKey) -> None:
        """Something about a policy changed: its spec, its pods, or a job under it."""
        self._due_policies.mark(key, time.monotonic() + DEBOUNCE_S)
        self._wake.set()

    async def run(self) -> None:
        """Process keys that are due. Blocks: until it is cancelled."""
        while True:
            self.last_turn_s = now_s = time.monotonic()
            self._tick(now_s)
            num_due = len(self._due_policies) + len(self._due_requests) + len(self._due_jobs)
            metrics.RECONCILE_WAITING.set(num_due)
            # In turns, so that none of the three queues can starve the others.
            did_policy = await self._turn(self._due_policies, self._write_policy)
            did_request = await self._turn(self._due_requests, self._write_job)
            did_job = await self._turn(self._due_jobs, self._write_job)
            if did_policy or did_request or did_job:
                # Most turns find nothing to write, and so nothing to wait for: reports are answered in between.
                await asyncio.sleep(0)
                continue
            times = (self._due_policies.next_s(), self._due_requests.next_s(), self._due_jobs.next_s())
            pause_s = min([TICK_S, *(each - time.monotonic() for each in times if each is not None)])
            self._wake.clear()
            try:
                async with asyncio.timeout(max(pause_s, 0.01)):
                    await self._wake.wait()
            except TimeoutError:
                pass

    def _tick(self, now_s: float) -> None:
        for job in self._registry.forget_silent(now_s):
            _log.info("job stopped reporting", extra={Field.NAMESPACE: job.key.namespace, Field.JOB: job.key.job_id})
            self.mark_job(job.key)
            self.mark_policy((job.report.namespace, job.report.policy))
        if now_s - self._resynced_s >= RESYNC_S:
            self._resynced_s = now_s
            for key in {*self.checkpoints.keys_with_requests(), *(job.key for job in self._registry.jobs())}:
                self.mark_job(key)
            for policy_key in self.policies.all_keys():
                self.mark_policy(policy_key)

    async def _turn(self, due: work_queue.WorkQueue[K], write: Callable[[K], Awaitable[None]]) -> bool:
        """Do what one key needs; whether there was one."""
        taken = due.take(time.monotonic())
        if taken is None:
            return False
        key, failures = taken
        try:
            await write(key)
        except (client.ApiError, client.Unreachable) as err:
            # A namespace that is on its way out refuses for a minute; that is no news after the first time.
            level = logging.WARNING if not failures else logging.DEBUG
            _log.log(level, "a write failed and will be retried: %s", err, extra={Field.NAMESPACE: key[0]})
            due.failed(key, failures, time.monotonic())
        except Exception:
            # The boundary of the process: one job's or policy's state that we cannot deal with must not stop all the others.
            _log.exception("deciding what to write failed", extra={Field.NAMESPACE: key[0]})
            metrics.RECONCILE_ERRORS.inc()
            due.failed(key, failures, time.monotonic())
        return True

    # --- Checkpoint objects

    async def _write_job(self, key: JobKey) -> None:
        planned = operations(list(self.checkpoints.for_job(key)), self._registry.get(key), self._clock())
        for operation in planned[:BATCH]:
            self.last_turn_s = time.monotonic()
            await self._write(operation)
        if len(planned) > BATCH:
            self.mark_job(key)

    async def _write(self, operation: mirror.Operation) -> None:
        name = type(operation).__name__
        try:
            if isinstance(operation, mirror.Create):
                await self._create(operation)
            elif isinstance(operation, mirror.SetStatus):
                await self._set_status(operation)
            else:
                await self._pace.wait()
                path = paths.CHECKPOINTS.one(operation.checkpoint.namespace, operation.checkpoint.name)
                await self._api.delete(path, uid=operation.checkpoint.uid)
                self.checkpoints.remove(operation.checkpoint)
        except client.NotFound:
            if isinstance(operation, mirror.Create):
                raise
            # A deleted object needs nothing more; the watch reports the deletion as well.
            self.checkpoints.remove(operation.checkpoint)
        except client.Conflict:
            if isinstance(operation, mirror.Create):
                raise
            # Another object has taken the name; the watch brings it.
            self.checkpoints.remove(operation.checkpoint)
        except (client.ApiError, client.Unreachable):
            metrics.CHECKPOINT_WRITES.labels(_OPERATION[name], "failed").inc()
            raise
        metrics.CHECKPOINT_WRITES.labels(_OPERATION[name], "done").inc()

    async def _create(self, operation: mirror.Create) -> None:
        await self._pace.wait()
        made = await self._api.create(paths.CHECKPOINTS.within(operation.namespace), operation.body)
        checkpoint = checkpoints.project(made)
        self.checkpoints.put(checkpoint)
        await self._patch(checkpoint, operation.status)

    async def _set_status(self, operation: mirror.SetStatus) -> None:
        before, status = operation.checkpoint.status, operation.status
        await self._patch(operation.checkpoint, status)
        is_news = (before.ready, before.reason) != (status.ready, status.reason) and operation.checkpoint.is_request
        if is_news and (
            status.ready in (checkpoints.TRUE, checkpoints.FALSE) or status.reason == commands.Reason.SAVING
        ):
            is_warning = status.ready == checkpoints.FALSE
            about = operation.checkpoint.about
            self._post(about, status.reason, status.message, warning=is_warning, action="Save")

    async def _patch(self, checkpoint: Checkpoint, status: checkpoints.Status) -> None:
        await self._pace.wait()
        # With the UID, as a successor of the same name is another object.
        body: Json = {"metadata": {"uid": checkpoint.uid}, "status": status.to_json()}
        path = paths.CHECKPOINTS.one(checkpoint.namespace, checkpoint.name)
        self.checkpoints.put(checkpoints.project(await self._api.patch(path, body, subresource="status")))

    # --- policies

    async def _write_policy(self, key: PolicyKey) -> None:
        entry = self.policies.get(*key)
        if entry is None:
            return
        claim = await self._claims.of_policy(entry)
        jobs = self._registry.under(*key)
        after = conditions.status(
            entry.parsed, entry.status, jobs, self._count_pods(key), self._checkpoint_name, self._clock(), claim
        )
        patch = conditions.patch(entry.status, after)
        if patch is None:
            return
        await self._pace.wait()
        path = paths.POLICIES.one(entry.namespace, entry.parsed.name)
        body = patch | {"metadata": {"uid": entry.parsed.uid}}
        try:
            written = await self._api.patch(path, body, subresource="status")
        except (client.NotFound, client.Conflict):
            # It is gone, or another has its name, which kopf brings.
            self.policies.remove(key)
            return
        self._due_policies.hold(key, time.monotonic(), POLICY_PAUSE_S)
        metrics.POLICY_STATUS_WRITES.inc()
        before = entry.status
        self.policies.put(policies.project(written))
        for reason, message, is_warning in _flips(before, after):
            self._post(entry.about, reason, message, warning=is_warning, action="Reconcile")

    def _checkpoint_name(self, job: Job) -> str:
        return mirror.name_of(job.report, job.report.committed_step, self.checkpoints.for_job(job.key))


_OPERATION: Final = {"Create": "create", "SetStatus": "status", "Delete": "delete"}
_GOOD: Final = {
    conditions.READY: checkpoints.TRUE,
    conditions.STORAGE: checkpoints.TRUE,
    conditions.DEGRADED: checkpoints.FALSE,
    conditions.DRAIN: checkpoints.FALSE,
    conditions.MEMORY: checkpoints.FALSE,
    conditions.LOCAL: checkpoints.TRUE,
    conditions.QUOTA: checkpoints.FALSE,
}


def _flips(before: Json, after: Json) -> Sequence[tuple[str, str, bool]]:
    """The events on a policy: one for each condition that turned bad, or good again."""
    flips = []
    for kind, good in _GOOD.items():
        old, new = conditions.condition(before, kind), conditions.condition(after, kind)
        is_bad, was_bad = (each.get("status") not in (None, good, checkpoints.UNKNOWN) for each in (new, old))
        # A policy whose local disk was taken away has no such condition any more.
        if is_bad != was_bad and new.get("status") not in (None, checkpoints.UNKNOWN):
            flips.append((new["reason"], new["message"], is_bad))
    return flips
