"""What the API server says of the cluster: nodes, and for `pman templates new --from-cluster` its classes."""

import re
from collections import defaultdict
from collections.abc import Iterator

from pman.backends.discovery import Found, Overview, Place
from pman.backends.kubernetes.api import Api, Object, connect
from pman.backends.kubernetes.objects import quantity
from pman.settings import Settings

GPU = "nvidia.com/gpu"
MAX_NODES = 500  # that are asked for, for a page
_MANY = 20  # labels with more values tell nodes apart rather than kinds of nodes
_CLASSES = {
    "priority_class": "/apis/scheduling.k8s.io/v1/priorityclasses",
    "runtime_class": "/apis/node.k8s.io/v1/runtimeclasses",
}


def discover(settings: Settings) -> Found:
    """Sizes, GPUs, taints and labels of nodes, and classes, as far as pman's rights go. Changes nothing."""
    api, found = Api(connect), Found("k8s")

    def items(what: str, path: str) -> list[Object]:
        return (found.ask(what, lambda: api.call("GET", path)[1]) or {}).get("items") or []

    if nodes := items("nodes", "/api/v1/nodes"):
        _nodes(found, nodes, settings.gpu_resource_name or GPU)
    for name, path in _CLASSES.items():
        for each in items(name, path):
            default = " (the default)" if each.get("globalDefault") else ""
            found.facts.append(f"{name} {each['metadata']['name']}{default}")
    return found


def overview(api: Api, gpu: str) -> Overview:
    """The nodes with what pods can have on them, as far as pman's rights go. gpu: what a GPU is called."""
    seen = Overview()
    version = seen.ask("its version", lambda: api.call("GET", "/version")[1]) or {}
    seen.version = f"Kubernetes {version['gitVersion']}" if "gitVersion" in version else ""
    found = seen.ask("nodes", lambda: api.call("GET", "/api/v1/nodes", {"limit": str(MAX_NODES)})[1]) or {}
    seen.places += [_place(node, gpu) for node in found.get("items") or []]
    if (found.get("metadata") or {}).get("continue"):
        seen.unasked.append(f"all nodes but the first {MAX_NODES}, since there are so many")
    return seen


def _place(node: Object, gpu: str) -> Place:
    sizes = node["status"].get("allocatable") or {}
    conditions = {each["type"]: each["status"] for each in node["status"].get("conditions") or []}
    state = "Ready" if conditions.get("Ready") == "True" else "not ready"
    taints = [f"{taint['key']}:{taint['effect']}" for taint in node["spec"].get("taints") or []]
    return Place(
        node["metadata"]["name"], "node", state, _most([sizes], "cpu", 1000) / 1000, _most([sizes], "memory") >> 20,
        _most([sizes], gpu), note=f"taints: {', '.join(taints)}" if taints else "",
    )  # fmt: skip


def _nodes(found: Found, nodes: list[Object], gpu: str) -> None:
    sizes = [node["status"].get("allocatable") or {} for node in nodes]
    gpus = {name for size in sizes for name in size if re.search(r"/(.*[.-])?gpu|/mig-", name)}
    found.facts.append(f"{len(nodes)} nodes. Those that are added on demand later were not seen")
    found.facts += [f"GPUs called {name}: start pman with GPU_RESOURCE_NAME={name}" for name in sorted(gpus - {gpu})]
    found.facts += [f"label {name}: {', '.join(values)}" for name, values in _labels(nodes)]
    taints = {
        (taint["key"], taint.get("value", ""), taint["effect"]): taint
        for node in nodes for taint in node["spec"].get("taints") or []
    }  # fmt: skip
    found.facts += [f"taint {key}={value}:{effect}" for key, value, effect in sorted(taints)]
    with_gpus = [node for node, size in zip(nodes, sizes, strict=True) if _most([size], gpu)]
    keys = sorted({taint["key"] for node in with_gpus for taint in node["spec"].get("taints") or []
                   if not taint["key"].startswith("node.kubernetes.io/")})  # fmt: skip
    if keys:
        tolerations = [{"key": key, "operator": "Exists"} for key in keys]
        why = "Nodes with GPUs have taints, which jobs without GPUs do not tolerate."
        found.add(why, "GPUs", when={"gpus": ">= 1"}, set={"tolerations": tolerations})
    memory_mib, cpu = _most(sizes, "memory") >> 20, _most(sizes, "cpu", 1000)
    rows = ("memory_mib", memory_mib, "MiB of memory"), ("cpu_millicores", cpu, "millicores")
    for name, most, unit in (*rows, ("gpus", _most(sizes, gpu), "GPUs")):
        found.limit("a node", name, most, f"A node of this cluster has {most} {unit} at most.")


def _most(sizes: list[Object], name: str, times: int = 1) -> int:
    return max(int(quantity(size.get(name, "0")) * times) for size in sizes)


def _labels(nodes: list[Object]) -> Iterator[tuple[str, list[str]]]:
    """Labels that tell kinds of nodes apart, with their values."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for node in nodes:
        for name, value in (node["metadata"].get("labels") or {}).items():
            if name != "kubernetes.io/hostname" and not name.startswith("beta.kubernetes.io/"):
                found[name].add(value)
    yield from ((name, sorted(values)) for name, values in sorted(found.items()) if len(values) <= _MANY)
