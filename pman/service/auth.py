"""HTTP Basic authentication against an htpasswd file of bcrypt hashes (`htpasswd -B`)."""

import base64
import codecs
import hashlib
import hmac
import logging
import re
import secrets
import threading
from pathlib import Path

import bcrypt

from pman.errors import Misconfigured

# Costs 4 to 31, and a salt whose last character has no bits to spare: bcrypt raises ValueError for any other.
_HASH = r"\$2[aby]\$(?:0[4-9]|[12]\d|3[01])\$[./A-Za-z0-9]{21}[.Oeu][./A-Za-z0-9]{31}"
_LINE = re.compile(rf"(?P<user>[^:\s\udc80-\udcff]+):(?P<hash>{_HASH})", re.ASCII)  # the range: what is not UTF-8
USUAL_COST = 10  # what an unknown user costs where the file is empty
MAX_REMEMBERED = 1000
log = logging.getLogger(__name__)


class Busy(Exception):
    """Too many passwords wait to be compared already."""


class Users:
    """The users of one file, which is read again when it changes; when it is gone, nobody is let in."""

    def __init__(self, path: Path, waiting: int) -> None:
        """waiting: how many passwords may wait to be compared. Raises Misconfigured as `read_users` does."""
        self._path = path
        self._lock = threading.Lock()
        self._key = secrets.token_bytes(32)
        self._stamp = _stamp(path)
        self._hashes = read_users(path)
        self._verified: set[bytes] = set()
        self._room = threading.BoundedSemaphore(waiting)
        self._comparing = threading.Lock()

    def allow(self, user: str, password: str) -> bool:
        """True for a right password. Raises Busy.

        bcrypt is slow on purpose: a verified pair is remembered, as a keyed hash, and others are compared one at a
        time, so that a flood of wrong ones takes one CPU, and never the places of those who are known.
        """
        self._refresh()
        stored = self._hashes.get(user, b"")
        seen = hmac.digest(self._key, stored + b"\0" + user.encode() + b"\0" + password.encode(), hashlib.sha256)
        if seen in self._verified:
            return True
        if not self._room.acquire(blocking=False):
            raise Busy
        try:
            with self._comparing:
                return seen in self._verified or self._compare(stored, password, seen)
        finally:
            self._room.release()

    def _compare(self, stored: bytes, password: str, seen: bytes) -> bool:
        if not (stored and bcrypt.checkpw(password.encode()[:72], stored)):
            _spend(_cost(stored) if stored else 0, max(map(_cost, self._hashes.values()), default=USUAL_COST))
            return False
        if len(self._verified) >= MAX_REMEMBERED:
            self._verified.clear()
        self._verified.add(seen)
        return True

    def _refresh(self) -> None:
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        with self._lock:
            try:
                self._hashes = read_users(self._path)
            except Misconfigured as error:
                log.error("nobody is let in: %s", error)
                self._hashes = {}
            self._stamp = stamp


def _cost(stored: bytes) -> int:
    return int(stored.split(b"$")[2])


def _spend(cost: int, most: int) -> None:
    """Take as long as a comparison with a hash of the cost `most` takes longer than one with a hash of `cost`.

    cost: 0 where there is no hash. So the time of an answer tells neither who exists nor whose hash is weak. Each cost
    takes twice as long as the one below it: a hash of cost c, and one of each cost from c to d - 1, take together as
    long as one of cost d.
    """
    for missing in range(cost, most) if cost else (most,):
        bcrypt.hashpw(b"", bcrypt.gensalt(missing))


def credentials(header: str) -> tuple[str, str] | None:
    """User and password of an Authorization header, in UTF-8 (RFC 7617) or Latin-1, which requests and pfcon send."""
    scheme, _, encoded = header.partition(" ")
    try:
        raw = base64.b64decode(encoded.strip(), validate=True)
    except ValueError:
        return None
    if scheme.lower() != "basic" or b":" not in raw:
        return None
    try:
        user, _, password = raw.decode().partition(":")
    except UnicodeDecodeError:
        user, _, password = raw.decode("latin-1").partition(":")
    return user, password


def read_users(path: Path) -> dict[str, bytes]:
    """User -> bcrypt hash. A line that is wrong keeps only its own user out, and is said in the log.

    Raises Misconfigured where the file cannot be read or every line of it is wrong.
    """
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
    except OSError as error:
        raise Misconfigured(f"AUTH_USERS_FILE={path} cannot be read: {error}.") from None
    users: dict[str, bytes] = {}
    wrong = []
    for number, line in enumerate(map(bytes.strip, lines), 1):
        if match := _LINE.fullmatch(line.decode(errors="surrogateescape")):
            users[match["user"]] = match["hash"].encode()
        elif line and not line.startswith(b"#"):
            wrong.append(f"{path}:{number}: a line must be user:hash with a bcrypt hash; make it with `htpasswd -B`.")
    if wrong and not users:
        raise Misconfigured(wrong[0])
    for sentence in wrong:
        log.error("%s", sentence)
    return users


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ctime_ns, found.st_size, found.st_ino  # not the mtime, which copies keep and chmod leaves
