"""What the configuration of a Cromwell (HOCON, read by pyhocon) says of the jobs that a WDL sends it."""

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pman.errors import Misconfigured
from pman.targets.documents import need

# Attributes that every Cromwell backend knows.
_ALWAYS = {"docker": "String", "maxRetries": "Int", "continueOnReturnCode": "", "failOnStderr": "Boolean"}
_ALWAYS |= {"preemptible": "Int"}
# pyhocon knows no class path. What lies there are Cromwell's own defaults, which declare no attribute of a site.
_OF_CLASS_PATH = re.compile(r"(?m)^\s*include\s+(required\()?\s*classpath\(.*$")
_DECLARATION = re.compile(r"(?m)^\s*(Int|Float|Boolean|String|[A-Z]\w*(?:\[[^\]]*\])?)[?+]*\s+(\w+)")
_VALUES = {  # of a type, as Cromwell reads them: also from text
    "Int": re.compile(r"[+-]?\d+"),
    "Float": re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"),
    "Boolean": re.compile(r"true|false", re.IGNORECASE),
}


@dataclass(frozen=True, slots=True)
class Provider:
    """A backend of the configuration. attributes: name -> WDL type, "" where any will do."""

    name: str
    attributes: Mapping[str, str]

    def complaints(self, runtime: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
        """What is wrong with a task's runtime attributes: name, rule, sentence."""
        for name, value in runtime.items():
            kind = self.attributes.get(name)
            if kind is None:
                said = f"Cromwell ignores the runtime attribute {name}: its backend {self.name} does not declare it"
                yield name, "undeclared-attribute", said
            elif name != "memory" and kind in _VALUES and not _VALUES[kind].fullmatch(str(value)):
                said = f"Cromwell's backend {self.name} declares {name} as {kind}, which {value!r} is not"
                yield name, "invalid", f"{said}: a job would wait for 16 minutes and fail"
        if "sharedir" in self.attributes and not {"incoming", "outgoing"} & set(self.attributes):
            said = f"Cromwell's backend {self.name} knows the attribute sharedir only, so jobs whose directories are "
            said += "unrelated trees cannot run: declare incoming and outgoing, or set CROMWELL_SHAREDIR_ONLY=yes"
            yield "sharedir", "undeclared-attribute", said


@functools.lru_cache(maxsize=4)
def provider(conf: Path, name: str = "") -> Provider:
    """The backend of that name, else the default one. Raises Misconfigured where the file does not say it."""
    hocon = need("pyhocon")
    try:
        text = _OF_CLASS_PATH.sub("", conf.read_text(encoding="utf-8"))
        tree = hocon.ConfigFactory.parse_string(text, basedir=str(conf.parent))
        name = name or tree.get_string("backend.default")
        found = tree.get_config("backend.providers").get(name, None)
    except Exception as error:  # pyhocon and pyparsing raise a dozen kinds
        raise Misconfigured(f"{conf} cannot be read as a configuration of Cromwell: {error}") from error
    if found is None:
        raise Misconfigured(f"{conf} has no backend.providers.{name}.")
    declared = _DECLARATION.findall(found.get_string("config.runtime-attributes", ""))
    # Cromwell hands `memory` to memory_mb and the like, in that unit.
    own = {"memory" if word.startswith("memory_") else word: kind for kind, word in declared}
    return Provider(name, {**_ALWAYS, **own})
