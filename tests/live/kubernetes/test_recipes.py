"""The recipes of docs/kubernetes.md."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pman import settings
from pman.job import make_job, validate
from pman.targets import TARGETS
from pman.templating.render import Renderer
from tests.conftest import development
from tests.live.kubernetes.cluster import EXAMPLES, PAGE, Cluster, claim, evict, kubernetes_rig, namespace, wait_message
from tests.rig import COUNTED, running, wait_for

pytestmark = pytest.mark.live("kubernetes")
RECIPES = dict(re.findall(r"^### ([^\n]*)\n(?:(?!^#).)*?^```jinja\n(.*?)^```$", PAGE.read_text(), re.S | re.M))


def recipe(directory: Path, name: str, **values: str) -> str:
    """TEMPLATES_DIR with the recipe of docs/kubernetes.md whose heading begins with `name`."""
    (text,) = [text for heading, text in RECIPES.items() if heading.startswith(name)]
    (directory / "recipe/k8s").mkdir(parents=True)
    (directory / "recipe/k8s/job.yaml.j2").write_text(text)
    (directory / "recipe/site.yaml").write_text(json.dumps(values))
    return str(directory / "recipe")


OPENSHIFT_USER = "1000650000"


@pytest.mark.parametrize(
    ("name", "user", "uid"), [("A `restricted` namespace", "1234:1234", "1234"), ("OpenShift", "", OPENSHIFT_USER)]
)
def test_a_restricted_namespace(tmp_path: Path, name: str, user: str, uid: str) -> None:
    """Of OpenShift's restricted-v2: pman names no user; the namespace's is put in here, as OpenShift puts it in."""
    given = {"STORAGE_TYPE": "kubernetes_pvc", "VOLUME_NAME": "store", "TEMPLATES_DIR": recipe(tmp_path, name)}
    template = tmp_path / "recipe/k8s/job.yaml.j2"
    if not user:
        config = settings.load({"CONTAINER_ENV": "kubernetes", **given})
        sample = make_job(validate(json.loads(EXAMPLES[0].read_text())), config)
        assert "runAsUser" not in Renderer(config, TARGETS).render(sample, "k8s").text
        named = f"runAsNonRoot: true\n        runAsUser: {uid}"
        template.write_text(template.read_text().replace("runAsNonRoot: true", named))
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    with (
        namespace(labels) as cluster,
        running(kubernetes_rig(cluster, tmp_path, **given)) as rig,
        claim(cluster, rig.store, "store"),
    ):
        server = rig.start(CONTAINER_USER=user)
        request = rig.request(
            "one", 'id -u; echo x >"$1/x"; touch /tmp/x && echo temporary; touch /x || echo read-only'
        )
        rig.outgoing("one").chmod(0o777)
        assert server.post(request).status_code == 201
        job = server.wait_final("one")
        assert job["status"] == "finishedSuccessfully", job
        assert uid in job["logs"].splitlines()  # standard error may come first
        assert "temporary" in job["logs"]
        assert (rig.outgoing("one") / "x").stat().st_uid == int(uid)


def test_a_job_that_runs_again_after_an_eviction(tmp_path: Path) -> None:
    with namespace() as cluster, running(kubernetes_rig(cluster, tmp_path)) as rig:
        server = rig.start(TEMPLATES_DIR=recipe(tmp_path, "Jobs that run again"))
        server.post(rig.request("again", COUNTED + '[ "$(wc -l <"$out/runs")" = 2 ] || sleep 600'))
        wait_for(lambda: rig.executions("again") == 1, 60, "the first run")
        evict(cluster, "again")
        job = server.wait_final("again", 90)
        assert (job["status"], rig.executions("again")) == ("finishedSuccessfully", 2), job


def kueue_queue(cluster: Cluster) -> list[dict[str, Any]]:
    """A queue with room for one job of 100m, in Kueue's newest API."""
    group, name, here = {"apiVersion": "kueue.x-k8s.io/v1beta2"}, cluster.namespace, {"namespace": cluster.namespace}
    resources = [{"name": "cpu", "nominalQuota": "150m"}, {"name": "memory", "nominalQuota": "1Gi"}]
    flavors = [{"name": name, "resources": resources}]
    groups = [{"coveredResources": ["cpu", "memory"], "flavors": flavors}]
    selected = {"matchLabels": {"kubernetes.io/metadata.name": name}}
    return [
        group | {"kind": "ResourceFlavor", "metadata": {"name": name}},
        group | {"kind": "ClusterQueue", "metadata": {"name": name},
                 "spec": {"namespaceSelector": selected, "resourceGroups": groups}},
        group | {"kind": "LocalQueue", "metadata": {"name": "imaging"} | here, "spec": {"clusterQueue": name}},
    ]  # fmt: skip


@pytest.fixture
def kueue() -> Iterator[None]:
    """Kueue 0.17 while a test needs it; a cluster that is given has its own."""
    given = development("kubernetes")["PMAN_DEV_KUBERNETES_MADE_BY"] == "context"
    if not given:
        development("kubernetes", command=("start", "kueue"))
    yield
    if not given:
        development("kubernetes", command=("stop", "kueue"))


@pytest.mark.usefixtures("kueue")
def test_a_queue_of_kueue(tmp_path: Path) -> None:
    """A job waits until the one before it has ended, and is explained."""
    with namespace() as cluster, running(kubernetes_rig(cluster, tmp_path)) as rig:
        queue = kueue_queue(cluster)
        try:
            server = rig.start(TEMPLATES_DIR=recipe(tmp_path, "Kueue", queue="imaging"))
            server.post(rig.request("first", COUNTED + 'until [ -e "$out/go" ]; do sleep 0.2; done'))
            wait_message(server, "first", "The job waits until Kueue admits it from the queue imaging.")
            cluster.apply(*queue)
            server.wait_state("first", "started")
            server.post(rig.request("second", COUNTED))
            job = wait_message(server, "second", "from the queue imaging: ")
            assert (job["status"], "insufficient unused quota for cpu" in job["message"]) == ("notstarted", True), job
            server.post(rig.request("deleted", COUNTED))
            assert server.delete("deleted").status_code == 204  # a suspended job ends by no deadline
            wait_for(lambda: cluster.attempt("get", "job", "deleted").returncode, 30, "the suspended job to be gone")
            (rig.outgoing("first") / "go").touch()
            assert server.wait_final("second")["status"] == "finishedSuccessfully"
            assert [rig.executions(jid) for jid in ("first", "second", "deleted")] == [1, 1, 0]
        finally:
            for document in queue:
                cluster.attempt("delete", document["kind"], document["metadata"]["name"], "--wait=false")


def test_a_side_car(tmp_path: Path) -> None:
    """It neither hides how the job ended nor keeps it from ending."""
    with namespace() as cluster, running(kubernetes_rig(cluster, tmp_path)) as rig:
        server = rig.start(TEMPLATES_DIR=recipe(tmp_path, "Side-cars"))
        server.post(rig.request("three", "echo mine; exit 3"))
        job = server.wait_final("three", 90)
        assert (job["message"], job["logs"]) == ("The job ended with exit code 3.", "mine\n"), job
