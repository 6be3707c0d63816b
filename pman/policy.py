"""What the rules of a site decide about a job beside its limits and its partition, as templates read it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Bind:
    """A directory of the node that a job sees beside its own two."""

    source: str  # on the node
    target: str  # in the container
    read_only: bool = True


@dataclass(frozen=True, slots=True)
class Policy:
    """Each value as the last rule left it; None or empty where no rule sets it."""

    image: str | None = None  # image that runs in place of job.image
    account: str | None = None  # account of the scheduler, else SLURM_ACCOUNT
    qos: str | None = None  # quality of service, else SLURM_QOS
    constraint: str | None = None  # features that a node must have, as sbatch writes them
    reservation: str | None = None  # reservation of the scheduler
    licenses: str | None = None  # licenses that the job takes, as sbatch writes them
    gpu_type: str | None = None  # type of GPUs, such as a100, else site.gpu_type
    nice: int | None = None  # how far the job steps back in the queue
    exclusive: bool | None = None  # whether the job has its nodes to itself
    requeue: bool | None = None  # whether the scheduler may start the job anew after its node was lost or taken
    modules: tuple[str, ...] = ()  # environment modules of the node, loaded before the command
    binds: tuple[Bind, ...] = ()  # more directories: source, target, read_only
    environment: Mapping[str, str] = field(default_factory=dict)  # variables, which are in job.env, too
    node_selector: Mapping[str, str] = field(default_factory=dict)  # labels that a node must have
    tolerations: tuple[Mapping[str, Any], ...] = ()  # tolerations of Kubernetes
    priority_class: str | None = None  # PriorityClass of Kubernetes
    runtime_class: str | None = None  # RuntimeClass of Kubernetes
    service_account: str | None = None  # ServiceAccount of Kubernetes
    annotations: Mapping[str, str] = field(default_factory=dict)  # annotations of the job's object
    labels: Mapping[str, str] = field(default_factory=dict)  # labels of the job's object, beside JOB_LABELS
    placement: tuple[str, ...] = ()  # placement constraints of Swarm
    networks: tuple[str, ...] = ()  # networks that the job's containers are attached to
