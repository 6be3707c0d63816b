"""pman behind nginx and Caddy, set up as docs/operators.md says: TLS, a prefix, big bodies, slow clients."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin

import bcrypt
import pytest
import requests

from tests.backends.test_local import local_rig
from tests.rig import ROOT, Rig, Server, running, wait_for
from tests.service.test_http import free_port

pytestmark = pytest.mark.live("proxies")
AUTH = ("chris", "a long password")
# What is around the documented piece where nginx runs for a test, as an ordinary user or root, beside others.
NGINX = """
daemon off;
user root;
pid {home}/pid;
error_log stderr;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {home}/body;
    proxy_temp_path {home}/proxy;
    fastcgi_temp_path {home}/fastcgi;
    uwsgi_temp_path {home}/uwsgi;
    scgi_temp_path {home}/scgi;
    {documented}
    server {{
        listen 127.0.0.1:{plain_port};
        location / {{ proxy_pass http://127.0.0.1:{pman_port}; }}
    }}
}}
"""
CADDY = """{{
    admin off
    auto_https off
}}
{documented}
http://:{plain_port} {{
    reverse_proxy 127.0.0.1:{pman_port} {{
        header_up Host {{upstream_hostport}}
    }}
}}
"""


@dataclass(frozen=True)
class Site:
    """url: with TLS, below a prefix. plain: without either, and with another Host for pman than the client's."""

    url: str
    plain: str
    server: Server
    ca: Path


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with running(local_rig(tmp_path_factory.mktemp("behind"))) as rig:
        yield rig


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with pman.pem, which signs itself, and pman.key."""
    home = tmp_path_factory.mktemp("certificate")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost", "-keyout", "pman.key", "-out", "pman.pem"],
        cwd=home, check=True, capture_output=True,
    )  # fmt: skip
    return home


def documented(language: str, certificate: Path, port: int, pman_port: str) -> str:
    """The piece of configuration in docs/operators.md, for this machine."""
    text = (ROOT / "docs/operators.md").read_text()
    block: str = re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)[0]
    for old, new in {
        "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
        "pman.example.org {": f"https://localhost:{port} {{",
        "pman.example.org": "localhost",
        "/etc/ssl/pman": f"{certificate}/pman",
        "127.0.0.1:5010": f"127.0.0.1:{pman_port}",
    }.items():
        block = block.replace(old, new)
    return block


@pytest.fixture(scope="module", params=["nginx", "caddy"])
def site(
    request: pytest.FixtureRequest, rig: Rig, certificate: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    name: str = request.param
    if not (program := shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")):
        assert os.environ.get("CI") != "true", f"Debian's package {name} is missing"
        pytest.skip(f"{name} is missing")
    home = tmp_path_factory.mktemp(name)
    (home / "users").write_text(f"{AUTH[0]}:{bcrypt.hashpw(AUTH[1].encode(), bcrypt.gensalt(4)).decode()}\n")
    server = rig.start(TRUSTED_PROXIES="127.0.0.1", AUTH_USERS_FILE=str(home / "users"))
    port, plain_port, pman_port = free_port(), free_port(), server.url.rpartition(":")[2]
    piece = documented(name if name == "nginx" else "text", certificate, port, pman_port)
    values = {"home": home, "plain_port": plain_port, "pman_port": pman_port, "documented": piece}
    (home / "conf").write_text((NGINX if name == "nginx" else CADDY).format(**values))
    options = ["-p", str(home), "-c", "conf"] if name == "nginx" else ["run", "--adapter=caddyfile", "--config=conf"]
    with (home / "log").open("wb") as log:
        process = subprocess.Popen([program, *options], cwd=home, stdout=log, stderr=log, env={"HOME": str(home)})
    try:
        plain = f"http://127.0.0.1:{plain_port}"

        def answers() -> bool:
            assert process.poll() is None, (home / "log").read_text()
            with contextlib.suppress(requests.ConnectionError):
                return requests.get(f"{plain}/healthz", timeout=10).status_code == 200
            return False

        wait_for(answers, 30, name)
        yield Site(f"https://localhost:{port}/pman", plain, server, certificate / "pman.pem")
    finally:
        process.terminate()
        process.wait(20)


def test_a_job_by_the_command_line(site: Site, rig: Rig, tmp_path: Path) -> None:
    url = site.url.replace("://", f"://{AUTH[0]}:{AUTH[1].replace(' ', '%20')}@")
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PMAN_URL": url, "REQUESTS_CA_BUNDLE": str(site.ca)}
    (tmp_path / "request.json").write_text(json.dumps(rig.request("by-proxy", "echo done")))

    def pman(*words: str, **changed: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pman", *words]
        return subprocess.run(command, env=env | changed, capture_output=True, text=True, timeout=60, check=False)

    untrusted = pman("wait", "by-proxy", REQUESTS_CA_BUNDLE="")
    assert untrusted.returncode == 125
    assert "is not trusted: self-signed certificate. Name the file of the CA" in untrusted.stderr
    for words in (("submit", str(tmp_path / "request.json")), ("wait", "by-proxy"), ("logs", "by-proxy")):
        done = pman(*words)
        assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
    assert pman("delete", "by-proxy").returncode == 0


def test_redirects_and_links_stay_behind_the_proxy(site: Site) -> None:
    with requests.Session() as http:
        http.auth, http.verify, http.trust_env = AUTH, str(site.ca), False
        answer = http.post(f"{site.url}/api/v1", json={}, timeout=30)
        assert (answer.status_code, answer.url) == (400, f"{site.url}/api/v1/")
        for path in ("/", "/render", "/jobs/gone/"):
            page = http.get(f"{site.url}{path}", timeout=30)
            links = {urljoin(page.url, link) for link in re.findall(r'href="([^"]*)"', page.text)}
            assert links >= {f"{site.url}/", f"{site.url}/render"}
            assert [http.get(link, timeout=30).status_code for link in links] == [200] * len(links)


@pytest.mark.parametrize("way", ["url", "plain"])
def test_the_playground_and_other_websites(site: Site, way: str) -> None:
    """A browser of today says Sec-Fetch-Site over TLS, and over plain HTTP Origin alone."""
    base = getattr(site, way)
    body = {"target": "wdl", "request": json.dumps(json.loads((ROOT / "examples/copy-and-hash.json").read_text()))}
    own = {"Origin": urljoin(base, "/").rstrip("/")} | ({"Sec-Fetch-Site": "same-origin"} if way == "url" else {})
    answer = requests.post(f"{base}/render", json=body, headers=own, auth=AUTH, verify=str(site.ca), timeout=60)
    assert (answer.status_code, answer.json().get("problems")) == (200, []), answer.text
    foreign = {"Origin": "https://elsewhere.example", "Sec-Fetch-Site": "cross-site"}
    answer = requests.post(f"{base}/api/v1/", json={}, headers=foreign, auth=AUTH, verify=str(site.ca), timeout=60)
    assert answer.status_code == 403


def test_bodies_at_and_above_the_limit(site: Site, rig: Rig) -> None:
    request = rig.request("large", "true")
    padding = 4 * 1024 * 1024 - len(json.dumps(request | {"unknown": ""}))
    for size, code in ((padding, 201), (padding + 1, 413), (20_000_000, 413)):
        body = json.dumps(request | {"unknown": "x" * size}).encode()
        answer = requests.post(f"{site.url}/api/v1/", body, auth=AUTH, verify=str(site.ca), timeout=60)
        assert answer.status_code == code
    site.server.call("DELETE", "large/", auth=AUTH)


def test_the_log_names_the_client_not_the_proxy(site: Site) -> None:
    trust = ssl.create_default_context(cafile=str(site.ca))
    address = ("localhost", int(site.url.split(":")[2].split("/")[0]))
    with (
        socket.create_connection(("127.0.0.1", address[1]), source_address=("127.0.0.9", 0), timeout=10) as tcp,
        trust.wrap_socket(tcp, server_hostname="localhost") as tls,
    ):
        tls.sendall(b"GET /pman/api/v1/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert b" 401 " in tls.recv(1000)
    wait_for(lambda: 'client="127.0.0.9"' in site.server.log.read_text(), 10, "the client's address in the log")


def test_slow_clients_leave_others_served(site: Site) -> None:
    host, port = site.plain.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(60)]
        for connection in slow:
            connection.sendall(b"POST /api/v1/ HTTP/1.1\r\nHost: x\r\nContent-Length: 4000000\r\n\r\n{")
        for connection in slow * 2:
            connection.sendall(b" " * 1000)
            if connection is slow[0]:
                for _ in range(10):
                    assert requests.get(f"{site.url}/api/v1/", auth=AUTH, verify=str(site.ca), timeout=10).ok
