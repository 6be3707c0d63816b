"""What was submitted, without the values of the job's environment, which may be secrets."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from pman.errors import Refused

HIDDEN = "***"
_WORD = re.compile(r""" (?:'[^']*'|"\$\(printf '[^']*'\)"|"[^"]*"|\$'(?:[^'\\]|\\.)*'|\\.|[^\s'"\\])+""", re.DOTALL)
# How pman.templating.quote.sh and pman.targets.wdl begin a word that is a variable with its value.
_ENTRY = re.compile(r""" (?:'|"\$\(printf ')?([A-Za-z_][A-Za-z0-9_]*)=""")
_ENV = re.compile(r"\benv(?= )")


def in_document(value: Any) -> Any:
    """A document of Kubernetes or an engine with HIDDEN for each value in a list `env` or `Env`."""
    if isinstance(value, dict):
        return {
            k: [_entry(one) for one in v or []] if k in ("env", "Env") else in_document(v) for k, v in value.items()
        }
    return [in_document(item) for item in value] if isinstance(value, list) else value


def _entry(one: Any) -> Any:
    if isinstance(one, str):
        return f"{one.partition('=')[0]}={HIDDEN}"
    return one | {"value": HIDDEN} if "value" in one else one


def in_script(text: str, count: int | None, names: Iterable[str] = ()) -> str:
    """A script with HIDDEN for the value of each variable that env(1) gets.

    count: how many the job has, None where that is not known. names: theirs, where known. Raises Refused unless so many
    are found, and these: a site's template may write them in a way of its own.
    """
    spans = [span for env in _ENV.finditer(text) for span in _entries(text, env.end())]
    found = {text[start:end]: name for start, end, name in spans}
    if count is None or len(found) < count or not set(names) <= set(found.values()):
        raise Refused(
            "The values of the job's environment cannot be told from the rest of what was submitted. So nothing is "
            "shown unless you ask for all with environment=1."
        )
    shown, position = "", 0
    for start, end, name in sorted(spans):  # an argument or a value may itself hold a command line with env
        shown += text[position:start] + (f" {name}={HIDDEN}" if start >= position else "")
        position = max(position, end)
    return shown + text[position:]


def _entries(text: str, position: int) -> Iterator[tuple[int, int, str]]:
    while (entry := _ENTRY.match(text, position)) and (word := _WORD.match(text, position)):
        yield position, word.end(), entry[1]
        position = word.end()
