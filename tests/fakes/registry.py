"""A registry of one image that takes its time, as one far away does.

It speaks what https://github.com/opencontainers/distribution-spec/blob/v1.1.1/spec.md asks of a pull.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import shutil
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def busybox_layer(*commands: str) -> bytes:
    """A layer with these commands of this machine's static busybox."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as layer:
        layer.add(str(shutil.which("busybox")), "bin/busybox")
        for command in commands:
            link = tarfile.TarInfo(f"bin/{command}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            layer.addfile(link)
    return written.getvalue()


def digest(blob: bytes) -> str:
    return f"sha256:{hashlib.sha256(blob).hexdigest()}"


@contextmanager
def slow_registry(seconds: float) -> Iterator[str]:
    """The name of an image whose manifest comes after this many seconds."""
    layer = busybox_layer("sh", "sleep", "echo")
    machine = ARCHITECTURES.get(platform.machine(), platform.machine())
    rootfs = {"type": "layers", "diff_ids": [digest(layer)]}
    config = json.dumps({"architecture": machine, "os": "linux", "config": {}, "rootfs": rootfs}).encode()
    kinds = {"config": config, "layer.v1.tar": layer}
    described = [
        {"mediaType": f"application/vnd.oci.image.{kind}" + ".v1+json" * (kind == "config"), "digest": digest(blob),
         "size": len(blob)}
        for kind, blob in kinds.items()
    ]  # fmt: skip
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": described[0], "layers": described[1:]}
    blobs = {digest(blob): blob for blob in (config, layer, json.dumps(manifest).encode())}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            blob = blobs.get(self.path.rpartition("/")[2]) or blobs[digest(json.dumps(manifest).encode())]
            if "/manifests/" in self.path and "sha256:" not in self.path:
                time.sleep(seconds)
            self.send_response(200)
            kind = MANIFEST if "/manifests/" in self.path else "application/octet-stream"
            headers = {"Content-Type": kind, "Content-Length": str(len(blob)), "Docker-Content-Digest": digest(blob)}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(blob)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield f"127.0.0.1:{server.server_port}/far/away:1"
        finally:
            server.shutdown()
