"""A Job of Kubernetes' batch/v1, judged by the API's own schema."""

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from pman.job import INCOMING, OUTGOING, Job
from pman.settings import SET_BY_KUBERNETES
from pman.targets.documents import Identity, expanded, line, need, said, yaml_document
from pman.targets.record import CANARY, MARK, Delivered, Flaw, Judging, Problem, Starter, Target
from pman.templating import quote

JID, DIGEST = "org.chrisproject.pman.jid", "org.chrisproject.pman.digest"  # annotations
IDENTITY = Identity(
    {
        ("metadata", "name"): "job.name",
        ("metadata", "annotations", JID): "job.jid",
        ("metadata", "annotations", DIGEST): "job.digest",
    }
)
KUBERNETES_VERSION = "1.35"  # what pman's live suite runs


def k8s(value: Any) -> str:
    """YAML for a string in command, args or env of a Kubernetes container, or a list of such strings.

    Kubernetes turns $$ into $ and expands $(NAME) there (measured on 1.35), so every $ is doubled.
    """
    if isinstance(value, list | tuple):
        return "[" + ", ".join(k8s(item) for item in value) + "]"
    return quote.yaml(quote.text_of(value).replace("$", "$$"))


def _judge(text: str, how: Judging) -> Iterator[Problem]:
    data = yield from yaml_document(text)
    if data is None:
        return
    if not isinstance(data, dict) or not {"apiVersion", "kind"} <= set(data):
        yield Problem("this is no Kubernetes object: apiVersion or kind is missing", 1)
        return
    library = need("kubernetes_validate")
    try:
        library.validate(data, how.kubernetes or KUBERNETES_VERSION, strict=True)
        yield from _labels(data, text)
    except library.ValidationError as error:
        yield Problem(f"{said(error)} (Kubernetes {error.version})", line(text, error))
    except (library.utils.SchemaNotFoundError, library.utils.VersionNotSupportedError) as error:
        yield Problem(error.message)


def _labels(data: Mapping[str, Any], text: str) -> Iterator[Problem]:
    """Labels that the API refuses though its schema allows them."""
    of_pods = ((data.get("spec") or {}).get("template") or {}).get("metadata") or {}
    for metadata in (data.get("metadata") or {}, of_pods):
        for name, value in (metadata.get("labels") or {}).items():
            refusal = ""
            if metadata is of_pods and SET_BY_KUBERNETES.fullmatch(name):
                refusal = f"the label {name} of the pods is set by Kubernetes, which refuses a Job with another"
            elif len(value) > 63 or not re.fullmatch(r"(?:[A-Za-z0-9](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?)?", value):
                refusal = f"the label {name} cannot be {value!r}: an annotation can"
            if refusal:
                lines = [n for n, row in enumerate(text.splitlines(), 1) if row.strip().startswith(f"{name}:")]
                yield Problem(refusal, lines[-1] if lines else None)


def _read(job: Job, text: str) -> Delivered:
    document = yaml.safe_load(text)
    pod = document["spec"]["template"]["spec"]
    container = next((c for c in pod["containers"] if MARK in _words(c)), None)
    if container is None:
        raise ValueError("no container has it in command and args, word by word")
    entries = [entry for entry in container.get("env") or [] if "value" in entry]
    env: dict[str, str] = {}
    for entry in entries:
        env[entry["name"]] = _expand(entry["value"], env)
    volumes = {volume["name"]: volume for volume in pod.get("volumes") or []}
    mounts = container.get("volumeMounts") or []
    lost = [Flaw("volumes", f"the mount {m['name']} has no volume") for m in mounts if m["name"] not in volumes]
    sources = {m["mountPath"]: _volume_source(volumes[m["name"]], m) for m in mounts if m["name"] in volumes}
    words = [_expand(word, env) for word in _words(container)]
    texts = [text for each in _containers(pod) for text in _expandable(each)]
    own = IDENTITY.flaws(job, document, text)
    others = (*own, *lost, *_in_scripts(pod), *expanded(texts, r"(?<!\$)(?:\$\$)*\$\(", "Kubernetes", "k8s"))
    places = sources.get(INCOMING, ""), sources.get(OUTGOING, "")
    return Delivered(words, env, *places, image=container["image"], others=others)


def _containers(pod: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*(pod.get("initContainers") or []), *pod["containers"]]


def _expandable(container: Mapping[str, Any]) -> Iterator[str]:
    yield from _words(container)
    yield from (entry["value"] for entry in container.get("env") or [] if "value" in entry)
    yield from (mount.get("subPathExpr", "") for mount in container.get("volumeMounts") or [])


def _words(container: Mapping[str, Any]) -> list[str]:
    return [*(container.get("command") or []), *(container.get("args") or [])]


def _in_scripts(pod: Mapping[str, Any]) -> Iterator[Flaw]:
    """Values in what a shell gets with -c, in front of the job's own command line."""
    for container in _containers(pod):
        words = list(itertools.takewhile(lambda word: word != MARK, _words(container)))
        scripts = [script for flag, script in itertools.pairwise(words) if re.fullmatch(r"-[a-z]*c", flag)]
        if words and words[0].endswith("sh") and any(CANARY in script for script in scripts):
            yield Flaw("script", "a value of the request is part of a shell's script: pass it as a variable (env)")


def _volume_source(volume: Mapping[str, Any], mount: Mapping[str, Any]) -> str:
    path = (volume.get("hostPath") or volume.get("nfs") or {}).get("path", "")
    return "/".join(part for part in (path, mount.get("subPath", "")) if part)


def _expand(text: str, env: Mapping[str, str]) -> str:
    """$$ is $, $(NAME) a variable defined so far, any other $ itself (measured on Kubernetes 1.35)."""
    return re.sub(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_]*)\)", lambda m: "$" if m[0] == "$$" else env.get(m[1], m[0]), text)


TARGET = Target(
    name="k8s",
    template="k8s/job.yaml.j2",
    filters={"k8s": quote.Filter(k8s, "YAML for command, args and env of a Kubernetes container: `$` is doubled")},
    storage_types=("host", "nfs", "kubernetes_pvc"),
    starter=Starter(
        "pod_spec_extra",
        "{% if site.priority_class %}\n      priorityClassName: {{ site.priority_class }}\n{% endif %}\n",
        "# PriorityClass of every job's pods; null: none\npriority_class: null\n",
    ),
    need_super=("environment",),
    judge=_judge,
    read=_read,
    causes={
        **dict.fromkeys(("argv", "env"), ("environment",)),
        "injected": ("environment", "volume_mounts", "pod_spec_extra"),
        "script": ("pod_spec_extra",),
        "volumes": ("volume_mounts", "volumes"),
        **dict.fromkeys(("incoming", "outgoing"), ("volume_mounts", "volumes", "environment")),
    },
)
