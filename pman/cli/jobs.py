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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, urlsplit

import click

from pman.errors import BadRequest, for_people
from pman.job import RESERVED_JIDS, parse_request

DEFAULT_URL = "http://127.0.0.1:5010"
POLL_SECONDS = 0.5
HTTP_SECONDS = 100  # what pfcon allows
PATIENCE_SECONDS = 60.0  # how long waiting goes on while no pman answers, as during its restart
TIMED_OUT = 124  # as timeout(1)
UNKNOWN = 125  # what became of the job is not known; docker run says so too
INTERRUPTED = 130  # as a shell says for SIGINT
_PASSING = (502, 503, 504)  # pman's own, and what a gateway says while pman restarts
_FINAL = ("finishedSuccessfully", "finishedWithError")
_COLORS = {"finishedSuccessfully": "green", "finishedWithError": "red", "started": "cyan", "undefined": "magenta"}

as_json = click.option("--json", "as_json", is_flag=True, help="Print the service's own JSON.")


class NoAnswer(click.ClickException):
    """No pman, or one that cannot answer now."""


class Service:
    """A pman at PMAN_URL, with or without user info and /api/v1/."""

    def __init__(self) -> None:
        import requests

        self._requests = requests
        base = (os.environ.get("PMAN_URL") or DEFAULT_URL).rstrip("/")
        self._base = base if base.endswith("/api/v1") else f"{base}/api/v1"
        self._session = requests.Session()
        self._session.trust_env = not re.search(r"//([^/]*@)?(localhost|127\.|\[::1])", base)  # no proxy leads there

    def call(self, method: str, path: str = "", **kwargs: Any) -> Any:
        """The decoded answer. Ends the command with the service's own sentence when it is an error."""
        url, errors = f"{self._base}/{path}", self._requests.exceptions
        try:
            # a POST that is led elsewhere would arrive there as a GET
            answer = self._session.request(method, url, timeout=HTTP_SECONDS, allow_redirects=False, **kwargs)
        except (errors.ConnectionError, errors.Timeout, errors.ChunkedEncodingError):
            raise NoAnswer(f"no pman answers at PMAN_URL={_without_password(self._base)}.") from None
        except (errors.RequestException, ValueError):  # their words may repeat a password
            raise click.ClickException(
                f"PMAN_URL={_without_password(self._base)} is no address such as {DEFAULT_URL}."
            ) from None
        if not answer.ok:
            sentence = _sentence(answer) or self._no_pman(answer)
            raise (NoAnswer if answer.status_code in _PASSING else click.ClickException)(sentence)
        try:
            return None if answer.status_code == 204 else answer.json()
        except ValueError:
            raise click.ClickException(self._no_pman(answer)) from None

    def _no_pman(self, answer: Any) -> str:
        what = f"{answer.status_code} {answer.headers.get('Location') or answer.reason}"
        return f"what answers at PMAN_URL={_without_password(self._base)} is no pman ({what})."

    def in_time(self, method: str, path: str = "", **kwargs: Any) -> Any:
        """As `call`, also when pman answers only after a while. For what may be repeated: pman's POST may, too."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return self.call(method, path, **kwargs)
            except NoAnswer:
                if time.monotonic() > deadline:
                    raise
                time.sleep(POLL_SECONDS)


def _path(jid: str) -> str:
    return f"{quote(jid.lstrip('/'), safe='')}/"


def _without_password(url: str) -> str:
    """Whatever stands before the last @ may be a secret, also where the whole is no URL."""
    head, at, host = url.rpartition("@")
    return url if not at else f"{urlsplit(head).scheme or 'http'}://{host}" if "//" in head else host


def _jid(_context: click.Context, _parameter: click.Parameter, value: Any) -> Any:
    for jid in value if isinstance(value, tuple) else (value,):
        if jid is not None and (not jid.strip("/") or jid in RESERVED_JIDS):
            raise click.BadParameter(f"{jid!r} is no job.")
    return value


def _sentence(answer: Any) -> str:
    """What pman says is wrong; "" where it is not pman that says it."""
    try:
        message = answer.json()["message"]
    except (ValueError, KeyError, TypeError):
        return ""
    return for_people(message if isinstance(message, dict) else str(message))


@click.command()
@click.argument("image")
@click.argument("command", metavar="-- COMMAND...", nargs=-1, required=True, type=click.UNPROCESSED)
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
    """Run COMMAND in IMAGE, wait, and print its output.

    The command gets /share/incoming (with --in) and /share/outgoing as its last arguments. The directories are used
    in place where they are below STOREBASE; others are copied into the store and back, and the copies are removed.
    The job's exit code is passed on: 128 and a signal's number, 124 at its time limit, 1 when there is none, and 125
    when it cannot be known.
    """
    service, store = Service(), _store()
    jid = jid or f"run-{secrets.token_hex(6)}"
    copies = store / f"run-{secrets.token_hex(8)}"
    request: dict[str, Any] = {key: value for key, value in fields.items() if value is not None}
    request |= {"jid": jid, "image": image, "entrypoint": list(command), "args": [], "auid": _user()}
    request |= {"type": "ds" if incoming else "fs", "env": list(fields["env"])}
    service.call("GET")  # a pman that is not there is noticed before anything is copied
    try:
        request["input_dir"] = _into_store(store, incoming, copies / "incoming")
        request["output_dir"] = _in_place(store, outgoing, copies / "outgoing")
    except (click.ClickException, KeyboardInterrupt):
        shutil.rmtree(copies, ignore_errors=True)
        raise
    with _watching(jid):
        _post(service, request, copies)
        job = _follow(service, jid, with_logs=True)
        if outgoing and not _below(store, outgoing):
            _copy(copies / "outgoing", outgoing)
        if not keep:
            _forget(service, jid, copies)
    _finish(job, as_json)


def _post(service: Service, request: dict[str, Any], copies: Path) -> None:
    try:
        service.in_time("POST", json=request)
    except NoAnswer:
        raise  # pman may have the job all the same
    except click.ClickException as error:
        shutil.rmtree(copies, ignore_errors=True)
        error.show()
        sys.exit(error.exit_code)


def _forget(service: Service, jid: str, copies: Path) -> None:
    try:
        service.in_time("DELETE", _path(jid))
        shutil.rmtree(copies, ignore_errors=True)
    except click.ClickException as error:  # the job's own end counts for more
        error.show()


def _store() -> Path:
    store = os.environ.get("STOREBASE")
    if not store or not Path(store).is_dir():  # made here, it would be another one than pman's
        raise click.ClickException("set STOREBASE to pman's store, a directory of this machine, or use `pman submit`.")
    return Path(store).resolve()


def _user() -> str:
    return os.environ.get("USER") or "nobody"


def _below(store: Path, directory: Path) -> bool:
    path = directory.resolve()
    return path != store and path.is_relative_to(store)


def _in_place(store: Path, directory: Path | None, copy: Path) -> str:
    """`directory`, or its copy where it is not below the store, relative to the store; made where it is missing."""
    used = directory.resolve() if directory and _below(store, directory) else copy
    try:
        used.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.ClickException(f"{used} cannot be made: {error.strerror}.") from None
    return str(used.relative_to(store))


def _into_store(store: Path, directory: Path | None, copy: Path) -> str:
    if directory and store.is_relative_to(directory.resolve()):
        raise click.ClickException(f"the store {store} is in {directory}, which cannot be copied into it.")
    place = _in_place(store, directory, copy)
    if directory and not _below(store, directory):
        _copy(directory, copy)
    return place


def _copy(source: Path, target: Path) -> None:
    """Links stay links: what a job points one at is not for the eyes of whoever copies."""
    try:
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
    except (OSError, shutil.Error) as error:
        raise click.ClickException(f"{source} cannot be copied to {target}: {error}") from None


def _finish(job: dict[str, str], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(job))
    else:
        sys.stdout.write(job["logs"] if job["logs"].endswith("\n") or not job["logs"] else job["logs"] + "\n")
        _state_line(job)
    sys.exit(exit_code(job))


def exit_code(job: dict[str, str]) -> int:
    """0 for success, 124 at the time limit, the job's own exit code or signal where its message names one, else 1."""
    if job["status"] == "finishedSuccessfully":
        return 0
    if re.search(r"\b(ended by|ran into|reached) (its|the) time limit\b", job["message"]):
        return TIMED_OUT
    if found := re.search(r"\bexit code (\d+)", job["message"]):
        return int(found[1]) % 256 or 1
    found = re.search(r"\bended by signal (\d+)", job["message"])
    return 128 + int(found[1]) if found else 1


def _state_line(job: dict[str, str]) -> None:
    state = click.style(job["status"], fg=_COLORS.get(job["status"], "yellow"))
    click.echo(f"{job['jid']}  {state}  {job['message']}".rstrip(), err=True)


@contextmanager
def _watching(jid: str) -> Iterator[None]:
    """What ends the watching (Ctrl-C, an error) does not end the job."""
    what_goes_on = f"{jid} is not ended by this: `pman wait {jid}` waits for it, `pman delete {jid}` removes it."
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"\n{what_goes_on}", err=True)
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        click.echo(f"Error: {error.message}", err=True)
        if isinstance(error, NoAnswer):
            click.echo(what_goes_on, err=True)
        sys.exit(UNKNOWN)


def _follow(service: Service, jid: str, with_logs: bool) -> dict[str, str]:
    """Poll until the job has ended; on a terminal, say how it goes. Logs, which cost the backend more, once."""
    began = time.monotonic()
    while True:
        job: dict[str, str] = service.in_time("GET", _path(jid), params={"tail": 0})
        if job["status"] in _FINAL:
            break
        if sys.stderr.isatty():
            seconds = int(time.monotonic() - began)
            line = " ".join(f"{jid}  {job['status']}  {seconds} s  {job['message']}".split())
            columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
            click.echo(f"\r\033[K{line[: columns - 1]}", nl=False, err=True)  # only one row can be cleared
        time.sleep(POLL_SECONDS)
    if sys.stderr.isatty():
        click.echo("\r\033[K", nl=False, err=True)
    return service.in_time("GET", _path(jid)) if with_logs else job


@click.command()
@click.argument("request_file", metavar="FILE", type=click.File("rb"))
@as_json
def submit(request_file: IO[bytes], as_json: bool) -> None:
    """Submit the job request in FILE (JSON; - for standard input)."""
    body = request_file.read()
    with suppress(BadRequest):  # the service says it better
        parse_request(body)  # warns of fields that the service does not know either
    job = Service().call("POST", data=body, headers={"Content-Type": "application/json"})
    _show(job, as_json)


@click.command()
@click.argument("jid", callback=_jid)
@as_json
def status(jid: str, as_json: bool) -> None:
    """Show what became of a job."""
    _show(Service().call("GET", _path(jid), params={"tail": 0}), as_json)


def _show(job: dict[str, str], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(job))
        return
    for name in ("jid", "status", "message", "timestamp", "image", "cmd"):
        color = _COLORS.get(job[name]) if name == "status" else None
        if job[name]:
            click.echo(f"{name:<10} {click.style(job[name], fg=color)}")


@click.command()
@click.argument("jid", callback=_jid)
@click.option("-f", "--follow", is_flag=True, help="Go on until the job has ended.")
@click.option("-n", "--tail", type=click.IntRange(0), help="At most so many lines.")
def logs(jid: str, follow: bool, tail: int | None) -> None:
    """Print the end of a job's output; with -f, follow it."""
    service, shown = Service(), list[str]()
    job = service.call("GET", _path(jid), params={} if tail is None else {"tail": tail})
    with _watching(jid):
        while True:
            over = not follow or job["status"] in _FINAL
            lines = re.findall(r"[^\n]*\n|[^\n]+", job["logs"])
            if not over and lines and not lines[-1].endswith("\n"):
                lines.pop()  # until the rest of it is there
            for line in _new_lines(shown, lines):
                sys.stdout.write(line)
            sys.stdout.flush()
            if over:
                return
            shown = lines
            time.sleep(POLL_SECONDS)
            job = service.in_time("GET", _path(jid))


def _new_lines(old: list[str], new: list[str]) -> list[str]:
    """What is in `new` and not in `old`; stdout grows in the middle of the text where stderr follows it."""
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    return [
        line for tag, _, _, low, high in matcher.get_opcodes() if tag in ("insert", "replace") for line in new[low:high]
    ]


@click.command()
@click.argument("jid", callback=_jid)
@as_json
def wait(jid: str, as_json: bool) -> None:
    """Wait until a job has ended, and pass its exit code on."""
    service = Service()
    with _watching(jid):
        job = _follow(service, jid, with_logs=as_json)
    if as_json:
        click.echo(json.dumps(job))
    else:
        _state_line(job)
    sys.exit(exit_code(job))


@click.command()
@click.argument("jids", metavar="JID...", nargs=-1, required=True, callback=_jid)
def delete(jids: tuple[str, ...]) -> None:
    """End jobs where they run, and forget them."""
    service, failed = Service(), False
    for jid in jids:
        try:
            service.call("DELETE", _path(jid))
        except click.ClickException as error:
            failed = True
            error.show()
    if failed:
        sys.exit(1)


@click.command("list")
@click.option("--state", help="Only jobs in this state.")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1, 1000), help="At most so many.")
@click.option("--after", metavar="JID", help="Only jobs that come behind this one.")
@as_json
def list_jobs(as_json: bool, **params: Any) -> None:
    """List pman's jobs, newest first."""
    page = Service().call("GET", "jobs/", params={name: value for name, value in params.items() if value is not None})
    if as_json:
        click.echo(json.dumps(page))
        return
    click.echo(f"{'JID':<28} {'STATUS':<21} {'ENDED':<20} {'IMAGE':<40} MESSAGE")
    for job in page["jobs"]:
        shown = click.style(f"{job['status']:<21}", fg=_COLORS.get(job["status"], "yellow"))
        click.echo(f"{job['jid']:<28} {shown} {job['timestamp'][:19]:<20} {job['image']:<40} {job['message']}".rstrip())
    if page["next"]:
        click.echo(f"there are more: --after {page['next']}", err=True)
    elif page["truncated"]:
        click.echo("there are older jobs, which are not listed", err=True)
