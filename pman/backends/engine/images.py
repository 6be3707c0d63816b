"""Images of one Docker or Podman engine: when they are pulled, and what is said when they cannot be had."""

import json
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TookTooLong

import docker.utils
import urllib3

from pman.backends.engine.api import Engine
from pman.errors import BackendError, BadRequest, NotFound, PmanError, Unreachable
from pman.settings import PullPolicy

log = logging.getLogger(__name__)

WAIT_SECONDS = 75.0  # pfcon gives up on a POST after 100
SILENCE_SECONDS = 300.0  # a registry that sends nothing for so long is given up
PROGRESS_SECONDS = 5.0  # between two lines of the log about one pull
# How Podman refuses, with 500, a reference that it reads as a place of images on its machine (dir:x) or as an id.
_ODD_NAME = "The container engine says: normalizing image"


class Images:
    """Pulls each image at most once at a time. An engine ends a pull when its client goes, so a thread stays on it."""

    def __init__(self, engine: Engine, policy: PullPolicy) -> None:
        self._engine = engine
        self._policy = policy
        self._running: dict[str, Future[None]] = {}
        self._lock = threading.Lock()

    def with_image(self, image: str, create: Callable[[], str], exists: Callable[[], bool], first: bool) -> str:
        """`create()`, with the image pulled before or after as the policy says; "" where it `exists()` already.

        Raises BadRequest, which names the image, where it cannot be had. An image that may be there already is pulled
        for the `first` container of a job alone.
        """
        if self._policy == "always" and first:
            if exists():
                return ""
            self._pull(image)
        try:
            return create()
        except NotFound as error:
            if "image" not in str(error).lower():
                raise BadRequest(str(error), detail=error.detail) from error
            if self._policy == "never":
                raise BadRequest(f"The engine does not have the image {image}, and PULL_POLICY=never.") from error
        except BackendError as error:
            if not str(error).startswith(_ODD_NAME):
                raise
            raise BadRequest(f"The image {image} cannot be had: {error}", detail=error.detail) from error
        self._pull(image)
        return create()

    def _pull(self, image: str) -> None:
        with self._lock:
            future = self._running.get(image)
            if future is None:
                future = self._running[image] = Future()
                threading.Thread(target=self._work, args=(image, future), daemon=True).start()
        try:
            future.result(WAIT_SECONDS)
        except TookTooLong:
            raise Unreachable(f"The image {image} is still being pulled; post the job again in a moment.") from None

    def _work(self, image: str, future: Future[None]) -> None:
        error: BaseException | None = None
        try:
            self._pull_now(image)
        except PmanError as caught:
            error = caught
        except Exception as caught:
            error = Unreachable(f"The pull of the image {image} was cut off.", detail=str(caught))
        with self._lock:
            del self._running[image]
        future.set_exception(error) if error else future.set_result(None)

    def _pull_now(self, image: str) -> None:
        name, tag = docker.utils.parse_repository_tag(image)
        headers = self._engine.registry_auth(image)
        log.info("pulling the image %s", image)
        try:
            answer = self._engine.call(
                "POST", "/images/create", fromImage=name, tag=tag or "latest", headers=headers,
                stream=True, timeout_seconds=SILENCE_SECONDS,
            )  # fmt: skip
            with answer:
                _follow(image, answer)
        except PmanError as error:
            if error.transient:
                raise
            raise BadRequest(f"The image {image} cannot be had: {error}", detail=error.detail) from error
        log.info("pulled the image %s", image)


def _follow(image: str, answer: urllib3.BaseHTTPResponse) -> None:
    """Read the engine's progress to its end: one JSON object a line. Raises BadRequest for an error among them."""
    said_at = time.monotonic()
    for line in answer:
        item = json.loads(line) if line.strip() else {}
        if "error" in item:
            raise BadRequest(str(item["error"]))
        if time.monotonic() - said_at > PROGRESS_SECONDS:
            said_at = time.monotonic()
            log.info(
                "pulling %s: %s %s %s", image, item.get("id", ""), item.get("status", ""), item.get("progress", "")
            )
