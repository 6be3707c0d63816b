"""Every environment variable of pman, once: its name in capitals is the variable, with its default and its help.

`python -m pman settings` prints the table below as Markdown; docs/reference/settings.md is a copy that a test compares.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, SecretStr, ValidationError, model_validator

from pman.errors import Misconfigured

StorageType = Literal["host", "nfs", "docker_local_volume", "kubernetes_pvc"]
LocalRuntime = Literal["none", "bubblewrap", "charliecloud", "apptainer", "podman", "docker"]
SlurmRuntime = Literal["apptainer", "singularity", "charliecloud", "podman", "bubblewrap", "none"]
PullPolicy = Literal["always", "missing", "never"]

# Settings that pman no longer has, and the warning about each.
_NO_LONGER = {
    "SERVER_PROCESSES": "SERVER_PROCESSES has no effect: pman serves in one process. Start more replicas to serve more."
}
_USER = re.compile(r"(?:(\d{1,10})(?:-(\d{1,10}))?)?:(?:(\d{1,10})(?:-(\d{1,10}))?)?")
OWN_LABELS = "org.chrisproject.pman."  # how the labels begin by which backends find pman's jobs
# https://kubernetes.io/docs/reference/labels-annotations-taints/; that it refuses others was seen on 1.35 (422).
SET_BY_KUBERNETES = re.compile(r"(batch\.kubernetes\.io/)?(controller-uid|job-name)")


def _pairs(text: Any) -> Any:
    """`k=v,k2=v2` as a dict."""
    if not isinstance(text, str):
        return text
    items = [item.strip() for item in text.split(",") if item.strip()]
    if any("=" not in item for item in items):
        raise ValueError("must be k=v pairs joined by commas")
    return dict(item.split("=", 1) for item in items)


def _names(text: Any) -> Any:
    return [item.strip() for item in text.split(",") if item.strip()] if isinstance(text, str) else text


def _user(text: str) -> str:
    match = _USER.fullmatch(text)
    if not match:
        raise ValueError("must be UID:GID, each a number, lo-hi, or nothing for the image's own")
    if any(high and int(low) > int(high) for low, high in (match.group(1, 2), match.group(3, 4))):
        raise ValueError("must be UID:GID, each a number or lo-hi with the lower number first")
    return text


def _foreign(labels: dict[str, str]) -> dict[str, str]:
    if own := [name for name in labels if name.startswith(OWN_LABELS)]:
        raise ValueError(f"must not name {own[0]}: pman finds its jobs by the labels that begin with {OWN_LABELS}")
    return labels


def must(holds: Callable[[Any], object], said: str) -> AfterValidator:
    """A validator that refuses with this sentence a value for which `holds` is false."""

    def judged(value: Any) -> Any:
        if not holds(value):
            raise ValueError(said)
        return value

    return AfterValidator(judged)


def _host_name(text: str) -> str:
    """The name alone, of one that may be written as in a URL."""
    try:
        host = urlsplit(text if "//" in text else f"//{text}").hostname or ""
        dot = "." if host.startswith((".", "*.")) else ""
        name = host.removeprefix("*" if dot else "").removeprefix(dot).removesuffix(".")
        name = dot + (name if ":" in name else name.encode("idna").decode())  # as browsers send it
    except ValueError:
        name = ""
    if not re.fullmatch(r"\*|[0-9a-f:.]*:[0-9a-f:.]*|\.?[\w-]+(\.[\w-]+)*", name, re.ASCII):
        raise ValueError(f"{text!r} is no host name such as pman.example.org, .example.org or *")
    return name


def _proxies(names: list[str]) -> list[str]:
    if len(names) == 1 and names[0].isascii() and names[0].isdigit():
        return names if int(names[0]) else []
    for name in names:
        try:
            ipaddress.ip_network(name)
        except ValueError:
            raise ValueError(f"{name!r} is neither an address or network such as 10.0.0.0/8 nor a number") from None
    return names


Pairs = Annotated[dict[str, str], BeforeValidator(_pairs)]
Labels = Annotated[Pairs, AfterValidator(_foreign)]
Names = Annotated[list[str], BeforeValidator(_names)]
HostNames = Annotated[list[Annotated[str, AfterValidator(_host_name)]], BeforeValidator(_names)]
Proxies = Annotated[list[str], BeforeValidator(_names), AfterValidator(_proxies)]
Words = Annotated[list[str], BeforeValidator(lambda text: shlex.split(text) if isinstance(text, str) else text)]
Pair = Annotated[str, must(lambda text: len(_pairs(text)) == 1, "must be one k=v pair")]
User = Annotated[str, AfterValidator(_user)]
AbsolutePath = Annotated[str, must(lambda path: path.startswith("/"), "must be an absolute path")]
HttpUrl = Annotated[str, must(re.compile("https?://[^/]").match, "must begin with http:// or https://")]


class Settings(BaseModel, frozen=True):
    """What `load` has read."""

    # fmt: off
    application_mode: Literal["production", "dev"] = Field("production", description="`dev` reloads code and templates and needs no SECRET_KEY.")
    secret_key: SecretStr | None = Field(None, description="Required in production; at least 16 characters are advised.")
    listen_address: str = Field("127.0.0.1", description="Address to listen on: `0.0.0.0` for all of IPv4, as in the image, `::` for all of IPv6 and IPv4.")  # not HOST, which tcsh exports
    port: int = Field(5010, ge=0, le=65535, description="Port to listen on; 0 takes a free one and says which.")
    max_concurrent_requests: int = Field(40, ge=1, le=1000, description="Requests served at once by one process; more are answered 503 with Retry-After.")
    allowed_hosts: HostNames = Field([], description="Host names that pman answers to, separated by commas. `.example.org` means that name and all names below it, and `*` means all. IP addresses and `localhost` are always allowed. If unset: all names, but none if only this machine can connect and there is no AUTH_USERS_FILE.")
    trusted_proxies: Proxies = Field([], description="Proxies whose X-Forwarded-* headers pman believes: addresses and networks, separated by commas, or the number of proxies that every request passes.")
    auth_users_file: Path | None = Field(None, description="htpasswd file of bcrypt hashes: every call but /healthz then needs a user and a password.")
    log_format: Literal["text", "json"] = Field("text", description="One line of text or of JSON for each log record.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="The least serious level that is logged.")
    container_env: str = Field("local", description="The backend.")  # one of pman.backends.BACKENDS
    templates_dir: Path | None = Field(None, description="Directory with the site's templates and `site.yaml`.")

    storage_type: StorageType = Field("host", description="How a job's container gets the store. On Docker and Podman it is `docker_local_volume` if neither this nor STOREBASE is set.")
    storebase: AbsolutePath | None = Field(None, description="Path of the store on the compute nodes. `input_dir` and `output_dir` are relative to it.")
    nfs_server: str | None = Field(None, description="Server of `nfs` storage.")
    volume_name: str | None = Field(None, description="Name of the Docker volume or of the PersistentVolumeClaim. If unset on Docker and Podman: the volume of pfcon, found by PFCON_SELECTOR.")
    pfcon_selector: Pair | None = Field(None, description="Label (`k=v`) of pfcon. On Kubernetes, jobs run on the node of its pod. On Docker and Podman, its container has the volume; if unset: `org.chrisproject.role=pfcon`.")

    job_logs_tail: int = Field(1000, ge=0, description="The largest number of log lines in an answer, for all workers together.")
    job_logs_max_kib: int = Field(1024, ge=1, le=65536, description="The largest size of logs in an answer, in KiB. The end is kept.")
    job_labels: Labels = Field({}, description="Labels for every job, `k=v,k2=v2`.")
    ignore_limits: bool = Field(False, description="`yes`: do not pass CPU and memory limits on to the backend.")
    remove_jobs: bool = Field(True, description="`no`: DELETE answers 204 and leaves the backend's object, for debugging.")
    container_user: User | None = Field(None, description="`UID:GID` of jobs; each may be a range `lo-hi`, from which a job always draws the same number, or be left out.")
    enable_home_workaround: bool = Field(False, description="Adds `HOME=/tmp` to a job's environment.")
    shm_size: int | None = Field(None, ge=1, description="Size of /dev/shm in MiB.")
    timelimit_minutes: int | None = Field(None, ge=1, le=525_600, description="A job's time limit if the request has none; required for `cromwell`.")
    timelimit_max_minutes: int | None = Field(None, ge=1, le=525_600, description="Upper bound of every time limit.")

    local_runtime: LocalRuntime = Field("none", description="The container runtime of `local` jobs. `none` runs the command on this machine itself.")
    local_state_dir: Path | None = Field(None, description="Directory of the jobs of `local`. If unset: `$XDG_STATE_HOME/pman/jobs`.")

    slurm_state_dir: AbsolutePath | None = Field(None, description="Directory of the jobs of `slurm`, under the same path here and on every compute node, and not below STOREBASE. Required for `slurm`.")
    slurm_runtime: SlurmRuntime = Field("apptainer", description="The container runtime of `slurm` jobs. `none` and `bubblewrap` use the programs of the node.")
    slurm_image_dir: AbsolutePath | None = Field(None, description="Directory of images that all jobs share: for Apptainer its image files, for Charliecloud its storage directory. If unset: `.images` below SLURM_STATE_DIR.")
    slurm_command_prefix: Words = Field([], description="Words in front of sbatch, squeue, sacct and scancel, such as `ssh -o BatchMode=yes login1`.")
    slurm_timeout_seconds: float = Field(20.0, gt=0, le=60, description="Longest wait for the end of one of these commands.")
    slurm_partition: str | None = Field(None, description="Partition of a job if the request has none.")
    slurm_account: str | None = Field(None, description="SLURM account of `slurm` jobs.")
    slurm_qos: str | None = Field(None, description="SLURM quality of service of `slurm` jobs.")

    cromwell_url: HttpUrl | None = Field(None, description="Cromwell's address, with or without `/api/workflows/v1`.")
    cromwell_auth_user: str | None = Field(None, description="User of HTTP Basic authentication at Cromwell.")
    cromwell_auth_password: SecretStr | None = Field(None, description="Its password.")
    cromwell_service_account: Path | None = Field(None, description="Google service account key (JSON file) for an OAuth-protected Cromwell.")
    cromwell_backend: str | None = Field(None, description="Name of the Cromwell backend; Cromwell's own default if unset.")
    cromwell_timeout_seconds: float = Field(10.0, gt=0, le=60, description="Longest wait for a connection to, or an answer of, Cromwell.")
    cromwell_sharedir_only: bool = Field(False, description="`yes`: Cromwell's configuration knows the attribute `sharedir`, and not `incoming` and `outgoing`. A request is then a 400 if its directories are not siblings of these names.")
    cromwell_execution_root_map: str | None = Field(None, description="`/cluster/path=/path/seen/here`: where pman can read Cromwell's execution directories.")

    job_namespace: str = Field("default", description="Kubernetes namespace of jobs.")
    node_selector: Pairs = Field({}, description="Kubernetes node selector, `k=v,k2=v2`.")
    image_pull_secrets: Names = Field([], description="Names of Kubernetes image pull secrets, separated by commas.")
    securitycontext_run_as_user: int | None = Field(None, ge=0, description="runAsUser of Kubernetes pods.")
    securitycontext_run_as_group: int | None = Field(None, ge=0, description="runAsGroup of Kubernetes pods.")
    gpu_resource_name: str | None = Field(None, description="Name of the resource of a GPU. If unset: `nvidia.com/gpu` on Kubernetes and `NVIDIA-GPU` on Swarm.")
    job_ttl_seconds: int = Field(86_400, ge=0, description="How long a Kubernetes Job is kept after its end.")
    ephemeral_storage_mib: int | None = Field(None, ge=1, description="How much a job on Kubernetes may write to its node, in MiB.")
    stuck_job_patience_minutes: float = Field(15, ge=0, description="How long a job on Kubernetes or with CONTAINER_ENV=slurm may wait for something that cannot come. After that it has failed.")

    docker_host: str | None = Field(None, description="Address of the Docker or Podman engine.")
    docker_tls_verify: bool = Field(False, description="Use TLS with the engine and verify it.")
    docker_cert_path: Path | None = Field(None, description="Directory of ca.pem, cert.pem and key.pem.")
    docker_timeout_seconds: float = Field(20.0, gt=0, le=60, description="Longest wait for an answer of the engine.")
    pull_policy: PullPolicy | None = Field(None, description="When a job's image is pulled: `always`, `missing` or `never`. If unset: `missing`, and on Kubernetes its own rule.")

    # fmt: on

    @model_validator(mode="before")
    @classmethod
    def _default_storage(cls, given: dict[str, Any]) -> dict[str, Any]:
        """As pman 4 to 6 had it on one engine."""
        one_engine = given.get("container_env") in ("docker", "podman")
        if one_engine and not given.get("storage_type") and not given.get("storebase"):
            return given | {"storage_type": "docker_local_volume"}
        return given

    @property
    def dev(self) -> bool:
        return self.application_mode == "dev"

    @property
    def listens_locally(self) -> bool:
        """Whether only this machine can connect."""
        try:
            return ipaddress.ip_address(self.listen_address).is_loopback
        except ValueError:
            return self.listen_address == "localhost"


def load(overrides: Mapping[str, str] | None = None) -> Settings:
    """The settings of this process's environment, with `overrides` (NAME -> text) on top.

    Names are read in any case, and an empty value counts as none. Raises Misconfigured with a sentence for every variable that does not hold what it should.
    """
    given = {name.lower(): value for name, value in (overrides or {}).items() if value}
    known = Settings.model_fields
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise Misconfigured("; ".join(f"{name.upper()} is no setting of pman{_did_you_mean(name)}" for name in unknown))
    try:
        around = {name.lower(): value for name, value in os.environ.items() if value and name.lower() in known}
        return Settings.model_validate({**around, **given})
    except ValidationError as error:
        raise Misconfigured("; ".join(_sentence(item) for item in error.errors())) from None


def read_file(path: Path) -> dict[str, str]:
    """NAME=VALUE lines of a file; {} where there is none."""
    from dotenv import dotenv_values  # noqa: PLC0415 - takes longer to import than all of a small render

    return {name: value or "" for name, value in dotenv_values(path).items()} if path.is_file() else {}


def split_known(values: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Those of `values` (NAME -> text) that are settings of pman, and the names of the others."""
    known = {name: value for name, value in values.items() if name.lower() in Settings.model_fields}
    return known, [name + _did_you_mean(name.lower()) for name in values if name not in known]


def warnings(settings: Settings) -> Iterator[str]:
    """What of the environment has no effect, or makes a server less safe."""
    yield from (text for name, text in _NO_LONGER.items() if os.environ.get(name))
    strange = [name for name in os.environ if name.isupper() and name.lower() not in Settings.model_fields]
    near = [name for name in strange if difflib.get_close_matches(name.lower(), Settings.model_fields, 1, 0.9)]
    yield from (f"{name} is no setting of pman{_did_you_mean(name.lower())}" for name in near)
    key = settings.secret_key.get_secret_value() if settings.secret_key else ""
    if not settings.listens_locally and settings.auth_users_file is None:
        yield "Whoever reaches LISTEN_ADDRESS can run jobs: keep it to pfcon, or set AUTH_USERS_FILE."
    if not settings.dev and len(key) < 16:
        yield "SECRET_KEY is short: use at least 16 random characters."


def problems(s: Settings) -> Iterator[str]:
    """Why a server cannot start with these settings, whatever its backend is."""
    volume = s.storage_type in ("docker_local_volume", "kubernetes_pvc")
    if not s.dev and s.secret_key is None:
        yield "SECRET_KEY is required in production: set it to a long random text."
    if not volume and s.storebase is None:
        yield f"STOREBASE is required with STORAGE_TYPE={s.storage_type}: set it to the store's directory."
    if s.storage_type == "kubernetes_pvc" and s.volume_name is None:
        yield "VOLUME_NAME is required with STORAGE_TYPE=kubernetes_pvc."
    if s.storage_type == "nfs" and s.nfs_server is None:
        yield "NFS_SERVER is required with STORAGE_TYPE=nfs."
    if s.templates_dir is not None and not os.path.isdir(s.templates_dir):
        yield f"TEMPLATES_DIR={s.templates_dir} is no directory."


def markdown_table(backends: Iterable[str]) -> str:
    """Every setting as a row of a Markdown table: variable, default, meaning; `backends` are those of CONTAINER_ENV."""
    values = {name: get_args(field.annotation) for name, field in Settings.model_fields.items()}
    values["container_env"] = tuple(backends)
    rows = [
        f"| `{name.upper()}` | {_shown(field.default)} | {field.description}{_one_of(values[name])} |"
        for name, field in Settings.model_fields.items()
    ]
    return "\n".join(["| variable | default | meaning |", "|---|---|---|", *rows]) + "\n"


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "`yes`" if default else "`no`"
    return f"`{default}`" if default not in (None, {}, []) else ""


def _one_of(values: Iterable[object]) -> str:
    words = [f"`{value}`" for value in values if isinstance(value, str)]
    return f" One of {', '.join(words)}." if words else ""


def _sentence(error: Any) -> str:
    name = str(error["loc"][0]).upper()
    said = "must be yes or no" if error["type"] == "bool_parsing" else error["msg"].removeprefix("Value error, ")
    return f"{name}: {said}"


def _did_you_mean(name: str) -> str:
    near = difflib.get_close_matches(name, Settings.model_fields, n=1, cutoff=0.7)
    return f"; did you mean {near[0].upper()}?" if near else ""
