"""What pman's own work costs, beside the bare thing it stands on, in turns.

    python bench/engine.py [ROUNDS]

Renders a job per target, the Kubernetes one beside building the same Job with the client's model classes; one offline
call of scripts/render_job.py; and POST, GET, DELETE over the embedded backend beside the backend's own calls.
Prints medians over the rounds.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import requests
import yaml
from kubernetes import client

from pman import settings
from pman.backends import local
from pman.backends.logs import of_job
from pman.job import Job, make_job, validate
from pman.targets import TARGETS
from pman.templating import decide, rules
from pman.templating.render import Renderer

ROOT = Path(__file__).resolve().parent.parent
REQUEST = json.loads((ROOT / "examples/copy-and-hash.json").read_text())
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def main(rounds: int) -> None:
    figures: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, value in {**rendering(), **offline(), **service()}.items():
            figures.setdefault(name, []).append(value)
    for name, values in figures.items():
        print(f"{name:58} {statistics.median(values):9.3f}   ({min(values):.3f} to {max(values):.3f})")


def rendering() -> dict[str, float]:
    config = settings.load({"STOREBASE": "/data/store", "TIMELIMIT_MINUTES": "60"})
    renderer, job = Renderer(config, TARGETS), make_job(validate(REQUEST), config)
    figures = {}
    for target in (name for name, t in TARGETS.items() if (ROOT / "templates" / t.template).exists()):
        figures[f"render {target}, ms"] = per_call(lambda target=target: renderer.render(job, target))  # type: ignore[misc]
    figures["render k8s and parse, ms"] = per_call(lambda: yaml.load(renderer.render(job, "k8s").text, LOADER))
    figures["render swarm and parse, ms"] = per_call(lambda: yaml.load(renderer.render(job, "swarm").text, LOADER))
    conditions = {"user": ["a*", "bob"], "image": "docker.io/fnndsc/pl-*", "memory_mib": ">= 500", "gpus": "0 to 4"}
    many = [{"when": conditions, "set": {"qos": f"q{n}", "memory_mib": {"at_least": n}}} for n in range(1, 201)]
    named = [{"name": f"rule {n}"} | rule for n, rule in enumerate(many)]
    site = rules.read({"rules": named}, lambda _: 1, "site.yaml", TARGETS)
    figures["decide by 200 rules, ms"] = per_call(lambda: decide.decide(job, site, None))
    api = client.ApiClient()
    figures["the same Job by kubernetes' models, serialised, ms"] = per_call(
        lambda: api.sanitize_for_serialization(model(job))
    )
    return figures


def model(job: Job) -> client.V1Job:
    """The Job that the template renders, by the client's classes."""
    limits = {"cpu": f"{job.cpu_millicores}m", "memory": f"{job.memory_mib}Mi"}
    index = client.V1ObjectFieldSelector(field_path="metadata.annotations['batch.kubernetes.io/job-completion-index']")
    env = [
        client.V1EnvVar("PMAN_WORKER_COUNT", str(job.workers)),
        client.V1EnvVar("PMAN_WORKER_INDEX", value_from=client.V1EnvVarSource(field_ref=index)),
        *(client.V1EnvVar(name, value.replace("$", "$$")) for name, value in job.env),
    ]
    context = client.V1SecurityContext(
        allow_privilege_escalation=False, capabilities=client.V1Capabilities(drop=["ALL"])
    )
    names = ("incoming", "outgoing")
    container = client.V1Container(
        name="job", image=job.image, command=[job.argv[0]], args=[a.replace("$", "$$") for a in job.argv[1:]], env=env,
        resources=client.V1ResourceRequirements(limits=limits, requests=limits), security_context=context,
        volume_mounts=[client.V1VolumeMount(mount_path=f"/share/{n}", name=n, read_only=n == names[0]) for n in names],
    )  # fmt: skip
    volumes = [
        client.V1Volume(name=n, host_path=client.V1HostPathVolumeSource(path=f"/data/{n}", type="Directory"))
        for n in names
    ]
    pod = client.V1PodSpec(
        restart_policy="Never", automount_service_account_token=False, active_deadline_seconds=3600,
        containers=[container],
        security_context=client.V1PodSecurityContext(seccomp_profile=client.V1SeccompProfile(type="RuntimeDefault")),
        volumes=volumes,
    )  # fmt: skip
    labels = {"app.kubernetes.io/managed-by": "pman", "org.chrisproject.pman.name": job.name}
    spec = client.V1JobSpec(
        backoff_limit=0, parallelism=job.workers, completions=job.workers, completion_mode="Indexed",
        ttl_seconds_after_finished=86400,
        template=client.V1PodTemplateSpec(metadata=client.V1ObjectMeta(labels=labels), spec=pod),
    )  # fmt: skip
    notes = {"org.chrisproject.pman.jid": job.jid, "org.chrisproject.pman.digest": job.digest}
    return client.V1Job("batch/v1", "Job", client.V1ObjectMeta(name=job.name, labels=labels, annotations=notes), spec)


def per_call(function: Callable[[], object], seconds: float = 0.4) -> float:
    """Milliseconds a call, over as many calls as fit."""
    function()
    calls, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        function()
        calls += 1
    return spent / calls * 1000


def offline() -> dict[str, float]:
    command = [
        sys.executable,
        "scripts/render_job.py",
        "examples/copy-and-hash.json",
        "--to",
        "wdl",
        "--set",
        "STOREBASE=/data",
    ]
    began = time.perf_counter()
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    return {"one call of render_job.py, s": time.perf_counter() - began}


def service() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        (home / "store").mkdir()
        config = {
            "STOREBASE": str(home / "store"),
            "LOCAL_STATE_DIR": str(home / "state"),
            "SECRET_KEY": "x" * 20,
            "PORT": "0",
        }
        began = time.perf_counter()
        with (home / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "pman", "serve"], cwd=ROOT, env={**os.environ, **config}, stderr=log
            )
        try:
            url = address(home / "log")
            requests.get(f"{url}/healthz", timeout=10).raise_for_status()
            figures = {"start to first 200, s": time.perf_counter() - began}
            figures |= latencies(url, settings.load(config))
            return figures | {"resident memory, MiB": psutil.Process(process.pid).memory_info().rss / 2**20}
        finally:
            process.terminate()
            process.wait(20)


def address(log: Path) -> str:
    while not (found := re.search(r"listening on (http://[\w.:]+)", log.read_text())):
        time.sleep(0.002)
    return found[1]


def latencies(url: str, config: settings.Settings, jobs: int = 25) -> dict[str, float]:
    """Medians of POST, GET, DELETE over HTTP, and of the same work in the backend alone, alternating."""
    backend, renderer, http = local.create(config), Renderer(config, TARGETS), requests.Session()
    spent: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[[], object]) -> None:
        began = time.perf_counter()
        call()
        spent.setdefault(name, []).append((time.perf_counter() - began) * 1000)

    for number in range(jobs):
        body = REQUEST | {"jid": f"http-{number}", "type": "fs"}
        job = make_job(validate(REQUEST | {"jid": f"direct-{number}", "type": "fs"}), config)
        spec = renderer.render(job, "local")
        for path in (job.input_dir, job.output_dir):
            (config_store(config) / path).mkdir(parents=True, exist_ok=True)
        timed("POST", lambda body=body: http.post(f"{url}/api/v1/", json=body).raise_for_status())  # type: ignore[misc]
        timed("POST, backend alone", lambda job=job, spec=spec: backend.submit(job, spec))  # type: ignore[misc]
        while (
            not backend.status(job.jid).state.final or "finished" not in http.get(f"{url}/api/v1/http-{number}/").text
        ):
            time.sleep(0.01)
        timed("GET", lambda number=number: http.get(f"{url}/api/v1/http-{number}/"))  # type: ignore[misc]
        timed("GET, backend alone", lambda job=job: of_job(backend, backend.status(job.jid), 1000, 1 << 20))  # type: ignore[misc]
        timed("DELETE", lambda number=number: http.delete(f"{url}/api/v1/http-{number}/"))  # type: ignore[misc]
        timed("DELETE, backend alone", lambda job=job: backend.delete(job.jid))  # type: ignore[misc]
    return {f"{name}, ms": statistics.median(values) for name, values in spent.items()}


def config_store(config: settings.Settings) -> Path:
    assert config.storebase
    return Path(config.storebase)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
