"""The `pman` commands that talk to a pman over HTTP: run, submit, status, logs, wait, delete, list."""

from __future__ import annotations

import difflib
import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import click

DEFAULT_URL = "http://127.0.0.1:5010"
POLL_SECONDS = 0.5
HTTP_SECONDS = 100  # what pfcon allows
TIMED_OUT = 124  # as timeout(1)
INTERRUPTED = 130  # as a shell says for SIGINT
_FINAL = ("finishedSuccessfully", "finishedWithError")
_COLORS = {"finishedSuccessfully": "green", "finishedWithError": "red", "started": "cyan", "undefined": "magenta"}

as_json = click.option("--json", "as_json", is_flag=True, help="Print the service's own JSON.")


class Service:
    """A pman at PMAN_URL, with or without user info and /api/v1/."""

    def __init__(self) -> None:
        import requests

        self._requests = requests
        base = os.environ.get("PMAN_URL", DEFAULT_URL).rstrip("/")
        self._base = base if base.endswith("/api/v1") else f"{base}/api/v1"

    def call(self, method: str, path: str = "", **kwargs: Any) -> Any:
        """The decoded answer. Ends the command with the service's own sentence when it is an error."""
        url = f"{self._base}/{path}"
        try:
            answer = self._requests.request(method, url, timeout=HTTP_SECONDS, **kwargs)
        except self._requests.RequestException as error:
            raise click.ClickException(
                f"no pman answers at PMAN_URL={_without_password(self._base)}: {error}"
            ) from None
        if answer.ok:
            return answer.json() if answer.content else None
        raise click.ClickException(_sentence(answer))

    def job(self, jid: str, **params: Any) -> dict[str, str]:
        job: dict[str, str] = self.call("GET", f"{jid}/", params=params)
        return job


def _without_password(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//", url)


def _sentence(answer: Any) -> str:
    try:
        message = answer.json()["message"]
    except (ValueError, KeyError, TypeError):
        return f"{answer.status_code} {answer.text[:300]}"
    return "; ".join(f"{k}: {v}" for k, v in message.items()) if isinstance(message, dict) else str(message)


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("image")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option(
    "--in", "incoming", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Input directory."
)
@click.option("--out", "outgoing", type=click.Path(file_okay=False, path_type=Path), help="Output directory.")
@click.option("--cpu", "cpu_limit", default=1000, show_default=True, help="CPU limit in millicores.")
@click.option("--memory", "memory_limit", default=1024, show_default=True, help="Memory limit in MiB.")
@click.option("--gpu", "gpu_limit", default=0, show_default=True, help="GPUs.")
@click.option("--workers", "number_of_workers", default=1, show_default=True, help="Copies that run in parallel.")
@click.option("--minutes", "time_limit_minutes", type=int, help="Time limit.")
@click.option("--partition", help="SLURM partition.")
@click.option("--env", multiple=True, metavar="NAME=VALUE", help="Environment variable of the job.")
@click.option("--jid", help="What to call the job; a new name if not given.")
@click.option("--keep", is_flag=True, help="Do not delete the job at its end.")
@as_json
def run(
    image: str, command: tuple[str, ...], incoming: Path | None, outgoing: Path | None, jid: str | None, keep: bool,
    as_json: bool, **fields: Any,
) -> None:  # fmt: skip
    """Run COMMAND in IMAGE and wait: `pman run IMAGE --in DIR --out DIR -- COMMAND...`.

    The command gets /share/incoming (with --in) and /share/outgoing as its last arguments. The directories are used
    in place where they are below STOREBASE; others are copied into the store and back. The job's exit code is passed
    on: 124 at its time limit, 1 when there is none.
    """
    service, store = Service(), _store()
    jid = jid or f"run-{secrets.token_hex(6)}"
    request: dict[str, Any] = {key: value for key, value in fields.items() if value is not None}
    request |= {"jid": jid, "image": image, "entrypoint": list(command), "args": [], "auid": _user()}
    request |= {"type": "ds" if incoming else "fs", "env": list(fields["env"])}
    request["input_dir"] = _into_store(store, incoming, f"key-{jid}/incoming")
    request["output_dir"] = _below(store, outgoing) or f"key-{jid}/outgoing"
    (store / request["output_dir"]).mkdir(parents=True, exist_ok=True)
    with _interruptible(jid):
        service.call("POST", json=request)
        job = _follow(service, jid)
    if outgoing and not _below(store, outgoing):
        shutil.copytree(store / request["output_dir"], outgoing, dirs_exist_ok=True)
    _finish(service, job, as_json, delete=not keep)


def _store() -> Path:
    if "STOREBASE" not in os.environ:
        raise click.ClickException("set STOREBASE to pman's store as this machine sees it, or use `pman submit`.")
    return Path(os.environ["STOREBASE"]).resolve()


def _user() -> str:
    return os.environ.get("USER") or "nobody"


def _below(store: Path, directory: Path | None) -> str | None:
    path = directory.resolve() if directory else store
    return str(path.relative_to(store)) if path != store and path.is_relative_to(store) else None


def _into_store(store: Path, directory: Path | None, place: str) -> str:
    if found := _below(store, directory):
        return found
    if directory:
        shutil.copytree(directory, store / place, dirs_exist_ok=True)
    (store / place).mkdir(parents=True, exist_ok=True)
    return place


def _finish(service: Service, job: dict[str, str], as_json: bool, delete: bool) -> None:
    if as_json:
        click.echo(json.dumps(job))
    else:
        click.echo(job["logs"], nl=bool(job["logs"]) and not job["logs"].endswith("\n"))
        _state_line(job)
    if delete:
        service.call("DELETE", f"{job['jid']}/")
    sys.exit(exit_code(job))


def exit_code(job: dict[str, str]) -> int:
    """0 for success, the job's own exit code where its message names one, 124 at the time limit, else 1."""
    if job["status"] == "finishedSuccessfully":
        return 0
    if "time limit" in job["message"]:
        return TIMED_OUT
    found = re.search(r"exit code (\d+)", job["message"])
    return int(found[1]) % 256 or 1 if found else 1


def _state_line(job: dict[str, str]) -> None:
    state = click.style(job["status"], fg=_COLORS.get(job["status"], "yellow"))
    click.echo(f"{job['jid']}  {state}  {job['message']}".rstrip(), err=True)


@contextmanager
def _interruptible(jid: str) -> Iterator[None]:
    """Ctrl-C ends the waiting, not the job."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"\n{jid} goes on: `pman wait {jid}` waits for it, `pman delete {jid}` ends it.", err=True)
        sys.exit(INTERRUPTED)


def _follow(service: Service, jid: str) -> dict[str, str]:
    """Poll until the job has ended; on a terminal, say how it goes."""
    began = time.monotonic()
    while (job := service.job(jid))["status"] not in _FINAL:
        if sys.stderr.isatty():
            seconds = int(time.monotonic() - began)
            click.echo(f"\r\033[K{jid}  {job['status']}  {seconds} s  {job['message'][:80]}", nl=False, err=True)
        time.sleep(POLL_SECONDS)
    if sys.stderr.isatty():
        click.echo("\r\033[K", nl=False, err=True)
    return job


@click.command()
@click.argument("request_file", metavar="FILE", type=click.File("rb"))
@as_json
def submit(request_file: IO[bytes], as_json: bool) -> None:
    """Submit the job request in FILE (JSON; - for standard input)."""
    headers = {"Content-Type": "application/json"}
    job = Service().call("POST", data=request_file.read(), headers=headers)
    _show(job, as_json)


@click.command()
@click.argument("jid")
@as_json
def status(jid: str, as_json: bool) -> None:
    """Show what became of a job."""
    _show(Service().job(jid, tail=0), as_json)


def _show(job: dict[str, str], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(job))
        return
    for name in ("jid", "status", "message", "timestamp", "image", "cmd"):
        color = _COLORS.get(job[name]) if name == "status" else None
        if job[name]:
            click.echo(f"{name:<10} {click.style(job[name], fg=color)}")


@click.command()
@click.argument("jid")
@click.option("-f", "--follow", is_flag=True, help="Go on until the job has ended.")
@click.option("-n", "--tail", type=click.IntRange(0), help="At most so many lines.")
def logs(jid: str, follow: bool, tail: int | None) -> None:
    """Print the end of a job's output."""
    service, shown = Service(), list[str]()
    params = {} if tail is None else {"tail": tail}
    while True:
        job = service.job(jid, **params)
        lines = job["logs"].splitlines(keepends=True)
        for line in _new_lines(shown, lines):
            click.echo(line, nl=not line.endswith("\n"))
        if not follow or job["status"] in _FINAL:
            return
        shown = lines
        time.sleep(POLL_SECONDS)


def _new_lines(old: list[str], new: list[str]) -> list[str]:
    """What is in `new` and not in `old`; stdout grows in the middle of the text where stderr follows it."""
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    return [
        line for tag, _, _, low, high in matcher.get_opcodes() if tag in ("insert", "replace") for line in new[low:high]
    ]


@click.command()
@click.argument("jid")
@as_json
def wait(jid: str, as_json: bool) -> None:
    """Wait until a job has ended, and pass its exit code on."""
    service = Service()
    with _interruptible(jid):
        job = _follow(service, jid)
    if as_json:
        click.echo(json.dumps(job))
    else:
        _state_line(job)
    sys.exit(exit_code(job))


@click.command()
@click.argument("jids", metavar="JID...", nargs=-1, required=True)
def delete(jids: tuple[str, ...]) -> None:
    """End jobs where they run, and forget them."""
    service = Service()
    for jid in jids:
        service.call("DELETE", f"{jid}/")


@click.command("list")
@click.option("--state", help="Only jobs in this state.")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1, 1000), help="At most so many.")
@as_json
def list_jobs(state: str | None, limit: int, as_json: bool) -> None:
    """List pman's jobs, newest first."""
    page = Service().call("GET", "jobs/", params={"limit": limit} | ({"state": state} if state else {}))
    if as_json:
        click.echo(json.dumps(page))
        return
    for job in page["jobs"]:
        shown = click.style(f"{job['status']:<21}", fg=_COLORS.get(job["status"], "yellow"))
        click.echo(f"{job['jid']:<28} {shown} {job['timestamp'][:19]:<20} {job['image']:<40} {job['message']}".rstrip())
    if page["next"]:
        click.echo("there are more: raise --limit", err=True)
