"""What pman is called from outside: the names it answers to, proxies in front of it, links that hold behind them."""

import ipaddress
import re
from collections.abc import Iterable
from itertools import takewhile
from urllib.parse import SplitResult, urlsplit
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from werkzeug.middleware.proxy_fix import ProxyFix


def believing(trusted: Iterable[str], application: WSGIApplication) -> WSGIApplication:
    """`application`, told what the X-Forwarded-* headers of trusted proxies say of the client, host and prefix.

    trusted: addresses and networks of proxies, or one number: of proxies that every request comes through.
    """
    trusted = list(trusted)
    number = int(trusted[0]) if trusted[0].isdigit() else None
    networks = [] if number is not None else [ipaddress.ip_network(each) for each in trusted]

    def is_trusted(address: str) -> bool:
        found = _address(address)
        return any(found in network for network in networks) if found else False

    def proxies(environ: WSGIEnvironment) -> int:
        if number is not None:
            return number
        if not is_trusted(environ.get("REMOTE_ADDR", "")):
            return 0
        nearest_first = reversed(environ.get("HTTP_X_FORWARDED_FOR", "").split(","))
        return 1 + sum(1 for _ in takewhile(is_trusted, nearest_first))

    def run(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        passed = proxies(environ)
        # Each proxy adds to X-Forwarded-For. Of the other headers, only what the nearest one says is believed.
        believed = ProxyFix(application, x_for=passed, x_host=1, x_prefix=1) if passed else application
        return believed(environ, start_response)

    return run


def merging_slashes(application: WSGIApplication) -> WSGIApplication:
    """`application`, for which `//api//v1/` is `/api/v1/`: a redirect would lose some clients' POST."""

    def run(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        environ["PATH_INFO"] = re.sub("//+", "/", environ.get("PATH_INFO", "/"))
        return application(environ, start_response)

    return run


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address in a text; 192.0.2.1 for `::ffff:192.0.2.1`, which a listener for IPv6 and IPv4 sees."""
    try:
        found = ipaddress.ip_address(text.strip())
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


def is_called_by(host: str, allowed: Iterable[str]) -> bool:
    """Whether a Host header names an address, localhost or one of the names as ALLOWED_HOSTS has them."""
    name = (_split(f"//{host}").hostname or "").removesuffix(".")
    if name in ("", "localhost") or _address(name):
        return True
    return any(each in ("*", name) or (each.startswith(".") and f".{name}".endswith(each)) for each in allowed)


def place(url: str) -> str:
    """Host and port of a URL, "" for what is none."""
    return _split(url).netloc


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def root(path: str) -> str:
    """The way from the page at `path` to the one at /, whatever prefix a proxy has put before both."""
    return "../" * (path.count("/") - 1) or "./"


def relative(environ: WSGIEnvironment, location: str) -> str:
    """A location on this host, seen from the request's path."""
    target = _split(location)
    path = target.path.removeprefix(environ.get("SCRIPT_NAME", "")).lstrip("/")
    return root(environ.get("PATH_INFO", "/")) + path + (f"?{target.query}" if target.query else "")
