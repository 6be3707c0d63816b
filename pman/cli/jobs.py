"""The `pman` commands that talk to a pman over HTTP: run, submit, status, logs, wait, delete."""

import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self
from urllib.parse import quote, urlsplit

import click

from pman.errors import BadRequest, for_people
from pman.job import MAX_NAME_BYTES, RESERVED_JIDS, parse_request

DEFAULT_URL = "http://127.0.0.1:5010"
POLL_SECONDS = 0.5
HTTP_SECONDS = 100  # what pfcon allows
PATIENCE_SECONDS = 60.0  # how long waiting goes on while no pman answers, as during its restart
# Headers of output: some is left out before it; the cursor of what comes next; the job's state
_CUT, _NEXT, _STATE = "Pman-Logs-Cut", "Pman-Logs-Next", "Pman-Job-State"
_NOTE = "pman-run.json"
TIMED_OUT = 124  # as timeout(1)
UNKNOWN = 125  # what became of the job is not known; docker run says so too
INTERRUPTED = 130  # as a shell says for SIGINT
TERMINATED = 143  # and for SIGTERM
EXIT_CODES = """\
Exit codes of `pman run` and `pman wait`:

  0        the job succeeded
  1-255    the job's own exit code
  128+N    signal N ended the job
  1        the job failed and has no exit code of its own
  124      the job reached its time limit
  125      pman is at fault: it does not answer, or it does not take the request
  130      Ctrl-C ended the waiting; the job goes on
  143      SIGTERM ended the waiting; the job goes on

`pman wait` with several jobs ends with the first code that is not 0. The other commands end with 0 if all is
well, with 1 if pman or the request is wrong, and with 2 if the command line, a template or a setting is wrong. When
the reader of a pipe ends first, as `head` does, the exit code is 141."""
_PASSING = (502, 503, 504)  # pman's own, and what a gateway says while pman restarts
_FINAL = ("finishedSuccessfully", "finishedWithError")
COLORS = {"finishedSuccessfully": "green", "finishedWithError": "red", "started": "cyan", "undefined": "magenta"}

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
        ca = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
        if ca and not Path(ca).exists():
            raise click.ClickException(f"there is no file {ca}, which REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE names.")
        self._session.verify = ca or True

    def call(self, method: str, path: str = "", full: bool = False, **kwargs: Any) -> Any:
        """The decoded answer, or with `full` all of it. An error ends the command with the service's own sentence."""
        url, errors = f"{self._base}/{path}", self._requests.exceptions
        try:
            # a POST that is led elsewhere would arrive there as a GET
            answer = self._session.request(method, url, timeout=HTTP_SECONDS, allow_redirects=False, **kwargs)
        except errors.SSLError as error:
            raise self._no_tls(error) from None
        except (errors.ConnectionError, errors.Timeout, errors.ChunkedEncodingError):
            raise NoAnswer(f"no pman answers at PMAN_URL={_without_password(self._base)}.") from None
        except (errors.RequestException, ValueError):  # their words may repeat a password
            raise click.ClickException(
                f"PMAN_URL={_without_password(self._base)} is no address such as {DEFAULT_URL}."
            ) from None
        if not answer.ok:
            sentence = _sentence(answer) or self._no_pman(answer)
            raise (NoAnswer if answer.status_code in _PASSING else click.ClickException)(sentence)
        return answer if full else self.decoded(answer)

    def decoded(self, answer: Any) -> Any:
        try:
            return None if answer.status_code == 204 else answer.json()
        except ValueError:
            raise click.ClickException(self._no_pman(answer)) from None

    def _no_tls(self, error: Exception) -> click.ClickException:
        """An untrusted certificate stays untrusted; a connection that was cut off may be better the next time."""
        place = f"PMAN_URL={_without_password(self._base)}"
        found = re.search(r"\] ([^][]*?)\.? \(_ssl", str(error))
        if not found or "EOF" in found[1]:
            return NoAnswer(f"no pman answers at {place}.")
        reason = found[1].removeprefix("certificate verify failed: ")
        if reason == found[1]:
            return click.ClickException(f"no TLS connection can be made to {place}: {reason}.")
        hint = "Name the file of the CA that signed it in REQUESTS_CA_BUNDLE."
        return click.ClickException(f"the certificate of {place} is not trusted: {reason}. {hint}")

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
@click.option("--jid", callback=_jid, help="What to call the job; a new name if not given.")
@click.option("--keep", is_flag=True, help="Do not delete the job at its end.")
@click.option("--bare", is_flag=True, help="Do not append the directories to COMMAND.")
@as_json
def run(
    image: str, command: tuple[str, ...], incoming: Path | None, outgoing: Path | None, jid: str | None, keep: bool,
    bare: bool, as_json: bool, **fields: Any,
) -> None:  # fmt: skip
    """Run COMMAND in IMAGE, and print its output.

    With --in or --out, the command gets /share/incoming (with --in) and /share/outgoing as its last arguments, and
    STOREBASE must name pman's store as this machine sees it. Directories below the store are used in place; others are
    copied into the store and back. The exit code is the job's own: see `pman help exit-codes`.
    """
    jid = jid or f"run-{secrets.token_hex(6)}"
    request: dict[str, Any] = {key: value for key, value in fields.items() if value is not None}
    request |= {"jid": jid, "image": image, "entrypoint": list(command), "args": [], "env": list(fields["env"])}
    request |= {"type": "ds" if incoming else "fs", "auid": os.environ.get("USER") or "nobody"}
    with _watching():
        service = Service()
        service.call("GET")  # a pman that is not there is noticed before anything is copied
        results = Results.prepare(jid, incoming, outgoing, request)
    with _watching(jid):
        request["append_directories"] = results is not None and not bare
        try:
            service.in_time("POST", json=request)
        except click.ClickException as error:
            if results and not isinstance(error, NoAnswer):  # without an answer, pman may have the job all the same
                results.forget()
            raise
        job = _follow(service, jid, None if as_json else Output(service, jid))
        if as_json:
            job = service.in_time("GET", _path(jid))
        code = _ended(service, jid)
        if results:
            results.fetch()
        if not keep:
            _forget(service, jid, results)
    _show_end(job, as_json)
    sys.exit(code)


@dataclass(frozen=True, slots=True)
class Results:
    """Where a job's directories are in the store, and where its output goes at the end.

    A file in the store holds that second place, so that `pman wait` can fetch what an interrupted `pman run` did not.
    """

    copies: Path  # a directory of the store that this command made
    outgoing: Path | None  # where the output is copied at the end; None where it is in place, or not wanted

    @classmethod
    def prepare(cls, jid: str, incoming: Path | None, outgoing: Path | None, request: dict[str, Any]) -> Self | None:
        """The directories of a new job, made and named in its request; None without any."""
        if not incoming and not outgoing:
            return None
        base = os.environ.get("STOREBASE")
        if not base or not Path(base).is_dir():  # made here, it would be another one than pman's
            raise click.ClickException(
                "set STOREBASE to pman's store, a directory of this machine: --in and --out need it."
            )
        store = Path(base).resolve()
        copied = None if outgoing is None or _below(store, outgoing) else outgoing.resolve()
        results = cls(_copies(store, jid), copied)
        try:
            results.copies.mkdir()
        except FileExistsError:
            raise click.ClickException(f"{results.copies} is left of another `pman run --jid {jid}`.") from None
        except OSError as error:
            raise click.ClickException(f"{results.copies} cannot be made: {error.strerror}.") from None
        try:
            if incoming and store.is_relative_to(incoming.resolve()):
                raise click.ClickException(f"the store {store} is in {incoming}, which cannot be copied into it.")
            request["input_dir"] = _in_place(store, incoming, results.copies / "incoming")
            if incoming and not _below(store, incoming):
                _copy(incoming, results.copies / "incoming")
            request["output_dir"] = _in_place(store, outgoing, results.copies / "outgoing")
            (results.copies / _NOTE).write_text(json.dumps({"outgoing": str(copied or "")}), encoding="utf-8")
        except (click.ClickException, KeyboardInterrupt):
            results.forget()
            raise
        return results

    @classmethod
    def of(cls, jid: str) -> Self | None:
        """Those of a job that `pman run` has started from this machine's store."""
        base = os.environ.get("STOREBASE")
        copies = _copies(Path(base).resolve(), jid) if base else None
        try:
            noted = json.loads((copies / _NOTE).read_bytes())["outgoing"] if copies else None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return cls(copies, Path(noted) if noted else None) if copies else None

    def fetch(self) -> None:
        if self.outgoing:
            _copy(self.copies / "outgoing", self.outgoing)

    def forget(self) -> None:
        shutil.rmtree(self.copies, ignore_errors=True)


def _copies(store: Path, jid: str) -> Path:
    name = f"run-{quote(jid.lstrip('/'), safe='')}"
    return store / (name if len(name) <= MAX_NAME_BYTES else f"run-{hashlib.sha256(jid.encode()).hexdigest()}")


def _forget(service: Service, jid: str, results: Results | None) -> None:
    try:
        service.in_time("DELETE", _path(jid))
        if results:
            results.forget()
    except click.ClickException as error:  # the job's own end counts for more
        error.show()


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


def _copy(source: Path, target: Path) -> None:
    """Links stay links: what a job points one at is not for the eyes of whoever copies."""
    try:
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
    except (OSError, shutil.Error) as error:
        raise click.ClickException(f"{source} cannot be copied to {target}: {error}") from None


def _ended(service: Service, jid: str) -> int:
    """The exit code with which a command ends for a job that has ended."""
    return exit_code(service.in_time("GET", f"jobs/{_path(jid)}"))


def exit_code(job: dict[str, Any]) -> int:
    """Of a job's resource: 0 for success, 124 at the time limit, its own code (128 + N for signal N), else 1."""
    if job["state"] == "finishedSuccessfully":
        return 0
    return TIMED_OUT if job["reason"] == "time_limit" else (job["exit_code"] or 1) % 256 or 1


def _show_end(job: dict[str, str], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(job))
        return
    state = click.style(job["status"], fg=COLORS.get(job["status"], "yellow"))
    click.echo(f"{job['jid']}  {state}  {job['message']}".rstrip(), err=True)


@contextmanager
def _watching(*jids: str) -> Iterator[None]:
    """What ends the watching (Ctrl-C, SIGTERM, an error) does not end the jobs. Errors are pman's, so they exit 125."""

    def what_goes_on() -> str:
        words = " ".join(jids)
        verb = "is" if len(jids) == 1 else "are"
        said = f"{words} {verb} not ended by this: `pman wait {words}` waits, `pman delete {words}` removes."
        kept = [results for jid in jids if (results := Results.of(jid)) and results.outgoing]
        places = (f"The output is in {one.copies}/outgoing; `pman wait` copies it to {one.outgoing}." for one in kept)
        return "\n".join([said, *places])

    def stop(*_: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        click.echo(f"\n{what_goes_on()}" if jids else "", err=True)
        sys.exit(TERMINATED if isinstance(interrupt, _Terminated) else INTERRUPTED)
    except click.ClickException as error:
        error.show()
        if jids and isinstance(error, NoAnswer):
            click.echo(what_goes_on(), err=True)
        sys.exit(UNKNOWN)
    finally:
        signal.signal(signal.SIGTERM, before)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends the watching as Ctrl-C does."""


def _follow(service: Service, jid: str, output: "Output | None" = None) -> dict[str, str]:
    """Poll until the job has ended, and say how it goes: its `output` as it comes, or one line on a terminal."""
    began, drawn = time.monotonic(), False
    while True:
        job: dict[str, str] = service.in_time("GET", _path(jid), params={"tail": 0})
        over = job["status"] in _FINAL
        if drawn:
            click.echo("\r\033[K", nl=False, err=True)
        if output and job["status"] != "notstarted":
            output.show()
        if over:
            return job
        if drawn := sys.stderr.isatty() and not (output and output.shown is not None):
            seconds = int(time.monotonic() - began)
            line = " ".join(f"{jid}  {job['status']}  {seconds} s  {job['message']}".split())
            columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
            click.echo(f"\r\033[K{line[: columns - 1]}", nl=False, err=True)  # only one row can be cleared
        time.sleep(POLL_SECONDS)


class Output:
    """A job's output as it comes, of each of its workers: the service says what is new since the look before.

    tail: at most so many lines of each worker at the first look.
    """

    def __init__(self, service: Service, jid: str, tail: int | None = None) -> None:
        self._service, self._place, self._tail = service, f"jobs/{_path(jid)}", tail
        self._cursors: dict[int, str | None] = {}  # by worker; None: all has been said
        self.shown: int | None = None  # the worker whose output was printed last

    def show(self) -> None:
        if not self._cursors:
            workers = self._service.in_time("GET", self._place).get("workers") or [{}]
            self._cursors = dict.fromkeys(range(len(workers)), "")
        for worker, cursor in self._cursors.items():
            if cursor is not None:
                params = {"worker": worker, "since": cursor}
                answer = self._service.in_time("GET", f"{self._place}logs", full=True, params=params)
                over = answer.headers.get(_STATE) in _FINAL  # not by a missing cursor: proxies leave out headers
                self._cursors[worker] = None if over else answer.headers.get(_NEXT, cursor)
                self._print(worker, answer.text, _CUT in answer.headers, later=bool(cursor))

    def _print(self, worker: int, text: str, cut: bool, later: bool) -> None:
        if self._tail is not None and not later:
            lines = re.findall(r"[^\n]*\n|[^\n]+", text)
            cut |= len(lines) > self._tail
            text = "".join(lines[max(0, len(lines) - self._tail) :])
        if text and len(self._cursors) > 1 and self.shown != worker:
            click.echo(f"=== worker {worker} ===")
        _print_log(text, cut, later)
        self.shown = worker if text else self.shown


def _print_log(text: str, cut: bool, later: bool = False) -> None:
    """cut: output is left out before the text. later: other output of the job was printed before."""
    if cut:
        what = "Some output is left out here" if later else "Earlier output is not shown"
        click.echo(f"pman: {what}: the service returns only the end of a log (JOB_LOGS_TAIL).", err=True)
    sys.stdout.write(text)
    sys.stdout.flush()


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


JIDS = click.argument("jids", metavar="JID...", nargs=-1, required=True, callback=_jid)


@click.command()
@JIDS
@as_json
def status(jids: tuple[str, ...], as_json: bool) -> None:
    """Show what became of jobs."""
    service = Service()

    def show(jid: str) -> None:
        _show(service.call("GET", _path(jid), params={"tail": 0}), as_json)

    _each(jids, show)


def _each(jids: tuple[str, ...], act: Callable[[str], None]) -> None:
    """`act` on each jid, also when one of them fails; the exit status is then 1."""
    failed = False
    for jid in jids:
        try:
            act(jid)
        except click.ClickException as error:
            failed = True
            error.show()
    if failed:
        sys.exit(1)


def _show(job: dict[str, str], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(job))
        return
    for name in ("jid", "status", "message", "timestamp", "image", "cmd"):
        color = COLORS.get(job[name]) if name == "status" else None
        if job[name]:
            click.echo(f"{name:<10} {click.style(job[name], fg=color)}")


@click.command()
@JIDS
@click.option("-f", "--follow", is_flag=True, help="Go on until the jobs have ended, one after another.")
@click.option("-n", "--tail", type=click.IntRange(0), help="At most so many lines of each.")
def logs(jids: tuple[str, ...], follow: bool, tail: int | None) -> None:
    """Print the end of jobs' output; with -f, follow it. Says so where earlier output is left out."""
    service = Service()

    def show(jid: str) -> None:
        answer = service.call("GET", _path(jid), full=True, params={} if tail is None else {"tail": tail})
        text = service.decoded(answer)["logs"]
        _head(jid, jids)
        _print_log(text, bool(text) and _CUT in answer.headers)

    if not follow:
        _each(jids, show)
        return
    with _watching(*jids):
        for jid in jids:
            _head(jid, jids)
            _follow(service, jid, Output(service, jid, tail))


def _head(jid: str, jids: tuple[str, ...]) -> None:
    if len(jids) > 1:
        click.echo(f"==> {jid} <==")


@click.command()
@JIDS
@as_json
def wait(jids: tuple[str, ...], as_json: bool) -> None:
    """Wait until jobs have ended, and pass on their exit code.

    It is the first one that is not 0. Output that `pman run` has not fetched is fetched now.
    """
    service, codes = Service(), list[int]()
    with _watching(*jids):
        for jid in jids:
            job = _follow(service, jid)
            if results := Results.of(jid):
                results.fetch()
            _show_end(service.in_time("GET", _path(jid)) if as_json else job, as_json)
            codes.append(_ended(service, jid))
    sys.exit(next((code for code in codes if code), 0))


@click.command()
@JIDS
def delete(jids: tuple[str, ...]) -> None:
    """End jobs and forget them.

    The copies that `pman run` made of their directories are removed, too.
    """
    service = Service()

    def end(jid: str) -> None:
        service.call("DELETE", _path(jid))
        if results := Results.of(jid):
            results.forget()

    _each(jids, end)
