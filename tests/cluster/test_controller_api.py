"""
The story: what the controller takes for granted about an API server is so: tokens, annotations' times, watches, and writes that
are refused.

Called from: pytest. The product's own controller runs on the same cluster: what is tested here is what it does not touch.
"""

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from cluster.conftest import Api
from pillion_operator.cluster import client, paths, reflector
from pillion_operator.controller import checkpoints, endpoint, handlers, mirror, policies, reconcile
from pillion_operator.home import authenticate, injected, times
from pillion_operator.home.refusal import Refused
from pillion_operator.home.registry import JobKey, Registry
from pillion_operator.injection import annotations
from pillion_operator.settings import Settings
from support import reports
from support.deadlines import Deadline

AUDIENCE = "pillion.dev"
Scenario = Callable[[client.Client, str], Awaitable[None]]


def run(api: Api, scenario: Scenario) -> None:
    async def within() -> None:
        async with await client.Client.connect(str(api.kubeconfig)) as found, asyncio.timeout(Deadline.API.s):
            await scenario(found, api.namespace)

    asyncio.run(within())


async def until(predicate: Callable[[], object]) -> None:
    """The scenario's deadline bounds it."""
    while not predicate():
        await asyncio.sleep(0.02)


async def make_pod(api: client.Client, namespace: str, *, save_now: str = "") -> reports.Json:
    """A pod that looks injected, and that no node runs."""
    pod = reports.pod("run-0")
    metadata = {"name": "run-0", "labels": pod["metadata"]["labels"], "annotations": pod["metadata"]["annotations"]}
    if save_now:
        metadata["annotations"] |= {annotations.SAVE_NOW: save_now}
    await make_account(api, namespace)
    spec = {
        "serviceAccountName": "trainer",
        "automountServiceAccountToken": False,
        # What the chart's validation asks of a pod that says it is injected.
        "initContainers": [{"name": "pillion-sidecar", "image": "none", "restartPolicy": "Always"}],
        "containers": [{"name": "trainer", "image": "none"}],
        # Nobody is to pull an image that is none.
        "schedulerName": "nobody",
    }
    return await api.create(f"/api/v1/namespaces/{namespace}/pods", {"metadata": metadata, "spec": spec})


async def make_account(api: client.Client, namespace: str) -> None:
    await api.create(f"/api/v1/namespaces/{namespace}/serviceaccounts", {"metadata": {"name": "trainer"}})


async def make_token(api: client.Client, namespace: str, audience: str, pod: reports.Json | None) -> str:
    spec: dict[str, Any] = {"audiences": [audience]}
    if pod is not None:
        bound = {"apiVersion": "v1", "kind": "Pod", "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]}
        spec["boundObjectRef"] = bound
    path = f"/api/v1/namespaces/{namespace}/serviceaccounts/trainer/token"
    return str((await api.create(path, {"spec": spec}))["status"]["token"])


class AnyPod:
    """Every pod counts as injected: whose a token is, the API server says."""

    async def find(self, namespace: str, name: str, uid: str) -> object | None:
        """As `injected.Pods` does it."""
        return object()


async def refused(authenticator: authenticate.Authenticator, token: str) -> int:
    with pytest.raises(Refused) as caught:
        await authenticator.authenticate(f"Bearer {token}")
    return caught.value.status


def test_a_projected_token_is_its_pod_and_no_other_token_is(api: Api) -> None:
    """The API server says which pod; another audience, a token of no pod, a forged one and one of a deleted pod are refused."""

    async def scenario(found: client.Client, namespace: str) -> None:
        pod = await make_pod(found, namespace)
        token = await make_token(found, namespace, AUDIENCE, pod)
        authenticator = authenticate.Authenticator(found, AUDIENCE, AnyPod())
        identity = await authenticator.authenticate(f"Bearer {token}")
        assert identity == authenticate.Identity(
            namespace=namespace, pod="run-0", pod_uid=pod["metadata"]["uid"], service_account="trainer"
        )
        other = await make_token(found, namespace, "other", pod)
        assert await refused(authenticator, other) == 401
        assert await refused(authenticator, await make_token(found, namespace, AUDIENCE, None)) == 403
        head, body, signature = token.split(".")
        assert await refused(authenticator, f"{head}.{body}.{signature[::-1]}") == 401
        # What our own look at the audience would refuse is refused by the API server as well.
        review = {"spec": {"token": other, "audiences": [AUDIENCE]}}
        answer = await found.create(paths.TOKEN_REVIEWS.everywhere, review)
        assert isinstance(authenticate.judge(answer["status"], AUDIENCE), Refused)
        await found.delete(f"/api/v1/namespaces/{namespace}/pods/run-0")
        gone = authenticate.Authenticator(found, AUDIENCE, AnyPod())

        async def is_refused() -> bool:
            try:
                await gone.authenticate(f"Bearer {token}")
            except Refused as err:
                return err.status == 401
            # What was good a moment ago is remembered.
            gone._identities.clear()
            return False

        # The API server remembers for ten seconds, too.
        while not await is_refused():
            await asyncio.sleep(0.1)

    run(api, scenario)


def test_an_annotation_carries_the_time_at_which_it_was_set(api: Api) -> None:
    """In what a watch of metadata brings; a pod that was made with it asks for nothing."""

    async def scenario(found: client.Client, namespace: str) -> None:
        pods = reflector.Reflector(
            found,
            f"/api/v1/namespaces/{namespace}/pods",
            injected.project,
            label_selector=injected.LABEL_SELECTOR,
            field_selector=injected.FIELD_SELECTOR,
            metadata_only=True,
        )
        watching = asyncio.create_task(pods.run())
        await make_pod(found, namespace, save_now="from the template")
        await until(lambda: pods.get(namespace, "run-0"))
        made = pods.get(namespace, "run-0")
        assert made is not None
        assert (made.save_now, made.save_now_time) == ("", "")
        # Times are to the second, and the second in which a pod is made is its template's.
        begun = times.canonical(made.created)
        await until(lambda: times.text(time.time()) > begun)
        value = {"metadata": {"annotations": {annotations.SAVE_NOW: "1"}}}
        await found.patch(f"/api/v1/namespaces/{namespace}/pods/run-0", value)
        await until(lambda: (each := pods.get(namespace, "run-0")) is not None and each.save_now == "1")
        asked = pods.get(namespace, "run-0")
        assert asked is not None
        assert asked.save_now_time > begun
        # The one question about a pod that the cache lacks gives the same.
        assert await injected.Pods(_Empty(), found).find(namespace, "run-0", made.uid) == asked
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)

    run(api, scenario)


class _Empty:
    def get(self, namespace: str, name: str) -> injected.Pod | None:
        del namespace, name
        return None


def test_objects_of_checkpoints_come_and_go_with_them(api: Api) -> None:
    """The API server takes what the writer writes, its watch brings it back as it is known, and nothing is left to write."""

    async def scenario(found: client.Client, namespace: str) -> None:
        jobs = Registry()
        writer = reconcile.Reconciler(found, jobs, lambda _: 0, lambda *_, **__: None)
        watched = checkpoints.Checkpoints(lambda _: None)
        watch = reflector.Reflector(
            found,
            f"/apis/pillion.dev/v1alpha1/namespaces/{namespace}/checkpoints",
            checkpoints.project,
            on_change=watched.changed,
        )
        tasks = [asyncio.create_task(each) for each in (watch.run(), writer.run())]
        key = JobKey(namespace, "Some_Job")

        def report(*steps: int) -> None:
            stored = tuple(
                dataclasses.replace(reports.stored(step), started="2027-01-15T08:00:00.25+01:00") for step in steps
            )
            made = reports.report(namespace=namespace, job_id="Some_Job", checkpoints=stored, policy="p" * 100)
            jobs.receive(made, created="t", now_s=time.monotonic())
            writer.mark_job(key)

        def there(*steps: int) -> bool:
            ready = {each.status.step for each in watched.for_job(key) if each.status.ready == "True"}
            return ready == {*steps} and len(watched.for_job(key)) == len(steps)

        report(30, 20, 10)
        await until(lambda: there(10, 20, 30))
        job = jobs.get(key)
        assert job is not None
        assert reconcile.operations(list(watched.for_job(key)), job, time.time() + 1) == []
        (one,) = [each for each in watched.for_job(key) if each.status.step == 10]
        assert one.is_ours
        assert one.name.endswith("-000000010")
        assert (one.status.size, one.status.started) == ("1Gi", "2027-01-15T07:00:00Z")
        report(40, 30)
        await until(lambda: there(30, 40))
        # An object of the same name that is another one is neither written to nor deleted.
        stranger = dataclasses.replace(next(iter(watched.for_job(key))), uid="00000000-0000-4000-8000-000000000000")
        for operation in (
            mirror.SetStatus(checkpoint=stranger, status=dataclasses.replace(stranger.status, message="x")),
            mirror.Delete(checkpoint=stranger),
        ):
            await writer._write(operation)
        assert there(30, 40)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(api, scenario)


def test_kopf_brings_policies_and_writes_nothing_to_them(api: Api) -> None:
    """One that is made, changed and deleted is followed; no annotation and no finalizer is on it afterwards."""

    async def scenario(found: client.Client, namespace: str) -> None:
        known = policies.Policies(lambda _: None)
        watcher = handlers.Watcher(found, known)
        mended: list[bool] = []
        watching = asyncio.create_task(watcher.run(lambda: mended.append(True)))
        collection = f"/apis/pillion.dev/v1alpha1/namespaces/{namespace}/checkpointpolicies"
        spec = {
            "trigger": {"periodSteps": 10},
            "staging": {"sizeLimit": "1Gi"},
            "storage": {"persistentVolumeClaim": {"claimName": "c"}},
        }
        metadata = {"name": "llm"}
        body = {"apiVersion": "pillion.dev/v1alpha1", "kind": "CheckpointPolicy", "metadata": metadata, "spec": spec}
        await found.create(collection, body)
        await until(lambda: known.now(namespace, "llm").spec)
        await found.patch(f"{collection}/llm", {"spec": {"retention": {"keepLast": 2}}})
        await until(lambda: (known.now(namespace, "llm").spec or {}).get("retention") == {"keepLast": 2})
        assert known.now(namespace, "llm").generation == 2
        written = (await found.get(f"{collection}/llm"))["metadata"]
        assert ("finalizers" in written, written.get("annotations")) == (False, None)
        await found.delete(f"{collection}/llm")
        await until(lambda: known.get(namespace, "llm") is None)
        assert mended == [True]
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)

    run(api, scenario)


def test_the_leaders_endpoint_is_made_kept_and_emptied(api: Api) -> None:
    """By one patch that makes the object where there is none, and takes the other family of addresses, too."""

    async def scenario(found: client.Client, namespace: str) -> None:
        settings = Settings(namespace=namespace, pod_name="c-0", pod_ip="192.0.2.7", home_service="home")
        path = f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices/home"

        async def addresses() -> list[str]:
            try:
                slices = await found.get(path)
            except client.NotFound:
                return []
            return [address for each in slices.get("endpoints") or [] for address in each["addresses"]]

        for address in ("192.0.2.7", "2001:db8::7"):
            own = endpoint.Endpoint(found, dataclasses.replace(settings, pod_ip=address), 8444)
            keeping = asyncio.create_task(own.run())
            while await addresses() != [address]:
                await asyncio.sleep(0.02)
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
            await own.remove()
            assert await addresses() == []

    run(api, scenario)
