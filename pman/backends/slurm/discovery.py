"""What SLURM says of itself: partitions, nodes, and for `pman templates new --from-cluster` accounts and QOS."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pman.backends.discovery import Asked, Found, Overview, Place
from pman.backends.slurm.commands import Commands
from pman.settings import Settings

_ACCOUNTS = ("sacctmgr", "--readonly", "--noheader", "--parsable2", "show")


@dataclass(frozen=True, slots=True)
class _Partition:
    """A partition. minutes: its time limit. memory_mib, cpus, gpus: of its largest node. open: pman may choose it."""

    name: str
    is_default: bool
    open: bool
    state: str
    minutes: int | None
    memory_mib: int
    cpus: int
    gpus: int
    gpu_types: Sequence[str]

    def __str__(self) -> str:
        limit = "no time limit" if self.minutes is None else f"at most {self.minutes} min"
        kinds = f" ({', '.join(self.gpu_types)})" if self.gpu_types else ""
        notes = (", the default" if self.is_default else "") + ("" if self.open else ", not open to all of pman's jobs")
        size = f"MiB: {self.memory_mib}, CPUs: {self.cpus}, GPUs: {self.gpus}{kinds}"
        return f"partition {self.name} ({self.state}{notes}): {limit}; its largest node has {size}"


def discover(settings: Settings) -> Found:
    """Partitions with their limits and GPUs, accounts and QOS. Changes nothing."""
    commands, found = Commands(settings.slurm_command_prefix, settings.slurm_timeout_seconds), Found("slurm")
    account = _account(settings, commands, found)
    partitions = _partitions(commands, found, account)
    found.facts += map(str, partitions)
    for partition in partitions:
        if partition.is_default:
            _choice(found, partition, [other for other in partitions if other.open and other is not partition])
    for partition in partitions:
        if partition.state == "UP":
            _limits(found, partition)
    return found


def overview(commands: Commands) -> Overview:
    """Partitions with the largest node of each, and how many of their nodes are idle."""
    seen = Overview()
    said = seen.ask("its version", lambda: commands.run("sinfo", "--version")) or ""
    found = re.search(r"(?m)^slurm\S* (\d\S*)$", said)  # `slurm-wlm` is Debian's word
    seen.version = f"SLURM {found[1]}" if found else ""
    words = ("sinfo", "--all", "--noheader", "--format=%R|%F")  # man sinfo: allocated/idle/other/total
    rows = re.findall(r"(?m)^(.+)\|\d+/(\d+)/\d+/(\d+)$", seen.ask("idle nodes", lambda: commands.run(*words)) or "")
    idle = {name: f"{free} of {total} nodes are idle" for name, free, total in rows}
    seen.places += [_place(each, idle.get(each.name, "")) for each in _partitions(commands, seen, "")]
    return seen


def _place(found: _Partition, idle: str) -> Place:
    """Where sinfo shows no node of a partition, nothing is known of sizes."""
    kinds = f"types of GPUs: {', '.join(found.gpu_types)}" if found.gpu_types else ""
    return Place(
        found.name, "partition", found.state, found.cpus or None, found.memory_mib or None,
        found.gpus if found.cpus else None, found.minutes,
        "; ".join(filter(None, ("the default" if found.is_default else "", idle, kinds))),
    )  # fmt: skip


def _account(settings: Settings, commands: Commands, found: Found) -> str:
    """SLURM_ACCOUNT, else the account that SLURM charges by default; "" where SLURM does not say."""
    who = (found.ask("who runs SLURM's commands", lambda: commands.run("id", "-un")) or "").strip().rpartition("\n")[2]
    fields = "format=DefaultAccount,Account,QOS"
    said = found.ask("accounts", lambda: commands.run(*_ACCOUNTS, "user", who, "withassoc", fields)) if who else None
    rows = [line.split("|") for line in (said or "").splitlines() if line.count("|") == 2]
    if said is not None and not rows:
        found.facts.append(f"no account for the user {who}")
    walls = found.ask("time limits of QOS", lambda: commands.run(*_ACCOUNTS, "qos", "format=Name,MaxWall")) or ""
    limits = dict(line.split("|") for line in walls.splitlines() if line.count("|") == 1)
    for _, account, qos in rows:
        named = [f"{name} (at most {limits[name]})" if limits.get(name) else name for name in qos.split(",") if name]
        found.facts.append(f"account {account} of the user {who}, with QOS {', '.join(named) or 'of its own only'}")
    default = settings.slurm_account or (rows[0][0] if rows else "")
    if default:
        why = "The default. docs/rules.md says how a table gives each user an account; `qos` can be set, too."
        found.add(why, "account", set={"account": default})
    return default


def _partitions(commands: Commands, found: Asked, account: str) -> list[_Partition]:
    said = found.ask("partitions", lambda: commands.run("scontrol", "show", "partition", "--all", "--oneliner"))
    words = ("sinfo", "--all", "--exact", "--noheader", "--format=%R|%m|%c|%G")
    nodes = [line.split("|") for line in (found.ask("nodes", lambda: commands.run(*words)) or "").splitlines()]
    lines = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in (said or "").splitlines()]
    return [_partition(fields, nodes, account) for fields in lines if "PartitionName" in fields]


def _partition(fields: dict[str, str], nodes: list[list[str]], account: str) -> _Partition:
    name = fields["PartitionName"]
    own = [row for row in nodes if len(row) == 4 and row[0] == name]
    gpus = [re.findall(r"gpu:(?:([^:,()]+):)?([0-9]+)", row[3]) for row in own]
    most = {key: int(value) for key, value in fields.items() if value.isdecimal()}
    memory = max((_number(row[1]) for row in own), default=0)
    cpus = max((_number(row[2]) for row in own), default=0)
    allowed = fields.get("AllowAccounts", "ALL").split(",")
    plain = {"State": "UP", "Hidden": "NO", "RootOnly": "NO", "ReqResv": "NO", "AllowGroups": "ALL", "AllowQos": "ALL"}
    is_open = all(fields.get(key, value) == value for key, value in plain.items()) and "DenyQos" not in fields
    denied = fields.get("DenyAccounts", "").split(",") if account else []
    is_open &= bool({"ALL", account} & set(allowed)) and account not in denied
    return _Partition(
        name, fields.get("Default") == "YES", is_open, fields.get("State", "?"), _minutes(fields.get("MaxTime", "")),
        min(memory, most.get("MaxMemPerNode") or memory), min(cpus, most.get("MaxCPUsPerNode") or cpus),
        max((sum(int(count) for _, count in node) for node in gpus), default=0),
        sorted({kind for node in gpus for kind, _ in node if kind}),
    )  # fmt: skip


def _number(text: str) -> int:
    return int(text.rstrip("+")) if text.rstrip("+").isdecimal() else 0


def _minutes(text: str) -> int | None:
    """Of [DAYS-]HOURS:MINUTES:SECONDS; None for UNLIMITED."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):\d+", text)
    return int(found[1] or 0) * 1440 + int(found[2]) * 60 + int(found[3]) if found else None


def _choice(found: Found, default: _Partition, others: Sequence[_Partition]) -> None:
    """Rules that choose a partition where none is asked for."""
    gpus = max(others, key=lambda other: other.gpus, default=default)
    if gpus.gpus and not default.gpus:
        why = f"The partition {default.name} has no GPUs."
        found.add(why, "GPUs", when={"partition": None, "gpus": ">= 1"}, set={"partition": gpus.name})
    large = max(others, key=lambda other: other.memory_mib, default=default)
    if large.memory_mib > default.memory_mib > 0:
        why = f"No node of the partition {default.name} has so much memory."
        when = {"partition": None, "memory_mib": f"> {default.memory_mib}"}
        found.add(why, "much memory", when=when, set={"partition": large.name})
    why = "SLURM's own default, said here so that the limits below hold for it."
    found.add(why, "default partition", set={"partition": {"default": default.name}})


def _limits(found: Found, partition: _Partition) -> None:
    """Rules about what a partition cannot give: refused at once, in place of waiting for ever."""
    name = partition.name
    if len(partition.gpu_types) == 1:
        found.add("", f"GPU type of {name}", when={"partition": name, "gpus": ">= 1"},
                  set={"gpu_type": partition.gpu_types[0]})  # fmt: skip
    cores = partition.cpus * 1000
    sizes = ("memory_mib", partition.memory_mib, "MiB of memory"), ("cpu_millicores", cores, "millicores")
    for field, most, unit in (*sizes, ("gpus", partition.gpus, "GPUs")) if partition.cpus else ():
        said = f"A node of the partition {name} has {most} {unit} at most."
        found.limit(name, field, most, said, partition=name)
    if partition.minutes is not None:
        said = f"The partition {name} ends jobs after {partition.minutes} min."
        found.limit(name, "time_limit_minutes", partition.minutes, said, partition=name)
