"""Every error that pman raises on purpose: its HTTP status, the sentence its user reads, whether to retry."""

from collections.abc import Mapping


class PmanError(Exception):
    """Base of pman's errors.

    message: one sentence for the user, or a mapping of request field -> sentence.
    detail: what the backend itself said (body, stderr), for the log only.
    transient: True when the same call may succeed a moment later.
    """

    http_status = 500
    transient = False

    def __init__(self, message: str | Mapping[str, str], *, detail: str = "") -> None:
        super().__init__(message if isinstance(message, str) else "; ".join(_fields(message)))
        self.message: str | dict[str, str] = message if isinstance(message, str) else dict(message)
        self.detail = detail


def for_people(message: str | Mapping[str, str]) -> str:
    """A message as the command line shows it: a line for each field where several are wrong."""
    if isinstance(message, str):
        return message
    return ("several fields are wrong:\n  " if len(message) > 1 else "") + "\n  ".join(_fields(message))


def _fields(message: Mapping[str, str]) -> list[str]:
    return [f"{name}: {sentence}" for name, sentence in message.items()]


class BadRequest(PmanError):
    """The request is wrong and will stay wrong."""

    http_status = 400


class Refused(PmanError):
    """The site's template refuses this job (`refuse("...")`)."""

    http_status = 403


class NotFound(PmanError):
    """No job of pman's has that jid."""

    http_status = 404


class Conflict(PmanError):
    """Another job already has that jid, or the old one is still being taken away."""

    http_status = 409


class TooLarge(PmanError):
    """The request or what it renders to is larger than somebody on the way accepts."""

    http_status = 413


class TemplateError(PmanError):
    """A template or site.yaml is broken. The message begins with `file:line:`."""


class Misconfigured(PmanError):
    """A setting is missing, wrong or contradicts another one; raised at start."""


class BackendError(PmanError):
    """The backend answered with something that pman cannot use, or denied pman a right."""


class Unreachable(PmanError):
    """The backend does not answer. Retried, then 503."""

    http_status = 503
    transient = True
    retry_after_seconds = 0.0  # what the backend asked for (Retry-After)


def no_such_job(jid: str) -> NotFound:
    return NotFound(f"There is no job with jid {jid}.")


def jid_taken(jid: str) -> Conflict:
    """Same jid, other request."""
    return Conflict(f"There is another job with jid {jid}; delete it first, or use another jid.")
