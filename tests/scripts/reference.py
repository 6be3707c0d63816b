"""The pages of docs/reference: each is made from the code, so that it cannot say anything else.

`python -m tests.scripts.test_docs` writes them, and a test compares them. What changes often is made anew whenever
the site is built (scripts/docs.d/hooks.py).
"""

from __future__ import annotations

import ast
import importlib
import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from prometheus_client import Counter, Histogram

from pman import errors, settings
from pman.backends import BACKENDS
from pman.checking.overlay import Overlay, Template
from pman.cli.jobs import EXIT_CODES
from pman.service import metrics
from pman.status import JobState
from pman.targets import TARGETS
from pman.templating.render import Renderer

ROOT = Path(__file__).resolve().parents[2]  # nothing else of the tests: `scripts/docs` has not what they need
DIRECTORY = ROOT / "docs" / "reference"
# What the keys of a backend's STATES are.
KEYS = {
    "cromwell": "status of the workflow, and of its call",
    "kubernetes": "condition, or counter above 0, of the Job; the first row that holds counts",
    "local": "whether the job has begun, whether a process of it lives, whether its result is written",
    "slurm": "state of the SLURM job",
    "swarm": "state of the task",
    "docker": "state of the container",
}
LICENCES = {  # what the metadata of these says at length, or not at all
    "google-auth-httplib2": "Apache-2.0",
    "cromwell-tools": "BSD-3-Clause",
    "pyasn1-modules": "BSD-2-Clause",
    "python-dateutil": "Apache-2.0 OR BSD-3-Clause",
}


def row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def table(head: tuple[str, ...], rows: Iterator[str] | list[str]) -> str:
    return "\n".join([row(*head), "|" + "---|" * len(head), *rows]) + "\n"


def settings_page() -> str:
    return "All settings are environment variables. `pman settings` prints this table.\n\n" + settings.markdown_table(
        BACKENDS
    )


def _chains() -> Iterator[tuple[str, str, list[Template]]]:
    """Target, template of it, and that template with those that it extends."""
    overlay = Overlay(Renderer(settings.load({}), TARGETS))
    return ((target.name, name, overlay.chain(name)) for target in TARGETS.values() for name in target.templates)


def blocks_page() -> str:
    filters = Renderer(settings.load({}), TARGETS).filters
    text = (
        "A target is a language that jobs are rendered into. [templates.md](../templates.md) says how a site\n"
        "overrides a block. `pman templates show NAME` prints a template. It begins with a comment on its\n"
        "variables and blocks.\n"
    )
    for target in TARGETS.values():
        text += f"\n## {target.name}\n\n"
        text += f"Storage: {', '.join(f'`{kind}`' for kind in target.storage_types)}. "
        text += f"Quoting filters: {', '.join(f'`{name}`' for name in filters[target.language])}.\n"
        if target.need_super:
            kept = " or ".join(f"`{name}`" for name in target.need_super)
            text += f"When you override {kept}, keep the shipped lines with `{{{{ super() }}}}`.\n"
        for _, name, chain in (each for each in _chains() if each[0] == target.name):
            blocks = dict.fromkeys(block for template in reversed(chain) for block in template.blocks)
            text += f"\nBlocks of `{name}`: {', '.join(f'`{block}`' for block in blocks)}\n"
    return text


def comments_page() -> str:
    text = "Each template begins with this comment, which `pman templates show NAME` prints with all the rest.\n"
    for _, name, chain in _chains():
        text += f"\n## {name}\n"
        for template in chain:
            comment = re.search(r"\{#(.*?)#\}", template.source, re.S)
            assert comment, f"{template.name} does not begin with a comment"
            text += f"\n```text\n{comment[1].strip()}\n```\n"
    return text


def filters_page() -> str:
    renderer = Renderer(settings.load({}), TARGETS)
    names = sorted({name for filters in renderer.filters.values() for name in filters})
    rows = []
    for name in names:
        meanings = {lang: filters[name].meaning for lang, filters in renderer.filters.items() if name in filters}
        for meaning in dict.fromkeys(meanings.values()):
            languages = [f"`.{lang}.j2`" for lang, said in sorted(meanings.items()) if said == meaning]
            rows.append(row(f"`{name}`", ", ".join(languages), meaning))
    return (
        "`{{ value }}` writes a value that is quoted for the language of the template. Use a filter where the\n"
        "text is in another language, such as a line that a second program reads.\n"
        "[templates.md](../templates.md#quoting) says when you need one.\n\n"
        + table(("filter", "templates", "writes"), rows)
    )


def exit_codes_page() -> str:
    return f"`pman help exit-codes` prints this.\n\n```text\n{EXIT_CODES}\n```\n"


def _states_module(name: str) -> tuple[Path, str]:
    """The file with a backend's STATES, and the module's name."""
    module = importlib.import_module(BACKENDS[name].module)
    path = Path(str(module.__file__))
    for file in [path, *sorted(path.parent.glob("*.py"))] if path.name == "__init__.py" else [path]:
        if re.search(r"^STATES\b", file.read_text(), re.M):
            return file, BACKENDS[name].module + ("" if file == path else f".{file.stem}")
    raise AssertionError(f"the backend {name} has no STATES")


def _comments(file: Path) -> list[str]:
    """The comment beside each row of STATES, "" where there is none."""
    text = file.read_text()
    nodes = (node for node in ast.parse(text).body if isinstance(node, ast.AnnAssign))
    states = next(node.value for node in nodes if ast.unparse(node.target) == "STATES")
    assert isinstance(states, ast.Dict)
    lines = text.splitlines()
    return [lines[value.end_lineno - 1].partition("  # ")[2] for value in states.values if value.end_lineno]


def _state_rows(name: str) -> Iterator[str]:
    file, module = _states_module(name)
    states = importlib.import_module(module).STATES
    for (key, value), comment in zip(states.items(), _comments(file), strict=True):
        parts = key if isinstance(key, tuple) else (key,)
        words = [
            "yes" if part is True else "no" if part is False else f"`{part}`" if part else "none" for part in parts
        ]
        state, message = value if isinstance(value, tuple) else (value, "")
        shown = f"`{state.value}`" if isinstance(state, JobState) else "what its pods say"
        yield row(", ".join(words), shown, " ".join(filter(None, [message, _note(comment)])))


def _note(comment: str) -> str:
    """The comment as a sentence, with the states' own words."""
    for state in JobState:
        comment = re.sub(rf"\b{state.name}\b", f"`{state.value}`", comment)
    return f"{comment[0].upper()}{comment[1:]}." if comment else ""


def states_page() -> str:
    text = (
        "A job has one of five states: `notstarted`, `started`, `finishedSuccessfully`, `finishedWithError` and\n"
        "`undefined`. The two that begin with `finished` are final, and nothing writes output any more. If a\n"
        "scheduler names a state that is not in its table, the job is `undefined`.\n"
    )
    places: dict[str, list[str]] = {}
    for name in BACKENDS:
        places.setdefault(BACKENDS[name].module, []).append(name)
    for names in places.values():
        head = (KEYS.get(names[0], "its state"), "state", "note")
        text += f"\n## {' and '.join(names)}\n\n" + table(head, _state_rows(names[0]))
    return text


def metrics_page() -> str:
    rows = []
    for metric in vars(metrics).values():
        if isinstance(metric, Counter | Histogram):
            described = next(iter(metric.describe()))
            labels = ", ".join(f"`{label}`" for label in metric._labelnames)
            name = described.name + ("_total" if described.type == "counter" else "")
            rows.append(row(f"`{name}`", described.type, labels, described.documentation))
    return (
        "`/metrics` answers in the text format of Prometheus. Each process counts for itself, so add up the\n"
        "replicas in Prometheus. Times are in seconds. There are also the usual metrics of the process and of\n"
        "Python.\n\n" + table(("metric", "type", "labels", "meaning"), rows)
    )


def _sentence(node: ast.expr) -> str:
    """A text of the code, with `…` for what differs from case to case; "" where it is put together elsewhere."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_sentence(part) or "…" for part in node.values)
    return ""


def _raised(node: ast.AST) -> Iterator[tuple[type[errors.PmanError], str]]:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or not node.args:
        return
    kind = getattr(errors, node.func.id, None)
    if not isinstance(kind, type) or not issubclass(kind, errors.PmanError):
        return
    given = node.args[0]
    if isinstance(given, ast.Dict):
        for name, value in zip(given.keys, given.values, strict=True):
            if name and _sentence(name) and _sentence(value):
                yield kind, f"{_sentence(name)}: {_sentence(value)}"
    elif sentence := _sentence(given):
        yield kind, sentence


def errors_page() -> str:
    found = {
        raised
        for path in (ROOT / "pman").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for raised in _raised(node)
        if re.search("[A-Za-z]{3}", raised[1].replace("…", ""))
    }
    text = (
        "When a request fails, `message` in the answer is one of these sentences, or the words of a scheduler.\n"
        "`…` stands for what differs from case to case. A sentence about a wrong field of a request begins with\n"
        "the name of the field. The service says the same when it does not start, and so do the `pman` commands.\n"
    )
    for kind in sorted({kind for kind, _ in found}, key=lambda kind: (kind.http_status, kind.__name__)):
        text += f"\n## {kind.http_status}: {kind.__name__}\n\n{' '.join((kind.__doc__ or '').split())}\n\n"
        text += "".join(f"- {_literal(sentence)}\n" for sentence in sorted(s for k, s in found if k is kind))
    return text


def _literal(sentence: str) -> str:
    """As code of Markdown, on one line, whatever marks it has."""
    line = " ".join(sentence.split())
    return f"`` {line} ``" if "`" in line else f"`{line}`"


def _needed(names: list[str]) -> Iterator[Distribution]:
    """These distributions and all that they need, as far as they are installed, in the order in which they are met."""
    seen: set[str] = set()
    while names:
        asked = Requirement(names.pop())
        name = canonicalize_name(asked.name)
        if name in seen or name == "pman" or (asked.marker and not asked.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        yield found
        names += found.requires or []


def _licence(found: Distribution) -> str:
    about = found.metadata
    name = str(about["Name"]).lower().replace("_", "-")
    named = [*(about.get_all("License-Expression") or []), *(about.get_all("License") or []), ""]
    given = LICENCES.get(name) or str(named[0])
    classes = [
        line.rpartition(" :: ")[2] for line in about.get_all("Classifier") or [] if line.startswith("License ::")
    ]
    short = given if given and len(given) < 60 and given != "UNKNOWN" else ", ".join(classes)
    assert short, f"the metadata of {name} names no licence: look it up, and add it to LICENCES"
    return short


def licences() -> dict[str, dict[str, str]]:
    """What pman is installed with, and what its extras add -> distribution -> licence."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {"pman": project["dependencies"]}
    asked |= {extra: project["optional-dependencies"][extra] for extra in ("check", "gunicorn", "dev")}
    found: dict[str, dict[str, str]] = {}
    for group, names in asked.items():
        known = {name for others in found.values() for name in others}
        needed = {str(each.metadata["Name"]): _licence(each) for each in _needed(list(names))}
        found[group] = {name: needed[name] for name in sorted(needed, key=str.lower) if name not in known}
    return found


def licences_page() -> str:
    text = (
        "pman has the MIT licence. pip installs these distributions with it. The licence of each is the one that\n"
        "its own metadata names. `constraints.txt` has the versions that pman is tested with.\n"
    )
    for group, names in licences().items():
        head = "Always" if group == "pman" else f"With the extra `{group}`"
        text += f"\n## {head}\n\n" + table(("distribution", "licence"), [row(*each) for each in names.items()])
    return text


PAGES = {  # file -> its heading, what its reader will have done, and what makes the rest
    "settings.md": ("Settings", "found the environment variable that you need, with its default", settings_page),
    "blocks.md": ("Templates and blocks", "found the block to override for a change of your site", blocks_page),
    "filters.md": ("Filters that quote", "chosen the right filter for a value in a template", filters_page),
    "exit-codes.md": ("Exit codes", "found out how a `pman` command ended", exit_codes_page),
    "states.md": ("States", "found out which state of a job each state of your scheduler becomes", states_page),
    "metrics.md": ("Metrics", "found the figures by which to watch pman", metrics_page),
    "licences.md": ("Licences", "found the licences of pman and of its dependencies", licences_page),
}


BUILT = {
    "errors.md": ("Error sentences", "found the HTTP status of an error sentence", errors_page),
    "comments.md": ("What each block holds", "read what a block holds before you override it", comments_page),
}


def page(name: str) -> str:
    heading, done, make = (PAGES | BUILT)[name]
    made = "<!-- Made by `python -m tests.scripts.test_docs`: change the code, not this page. -->"
    return f"# {heading}\n\n{made}\n\nAt the end of this page you will have {done}.\n\n{make()}"


def record() -> None:
    DIRECTORY.mkdir(exist_ok=True)
    for name in PAGES:
        (DIRECTORY / name).write_text(page(name))
