"""Proves that a spec delivers its job: the command line and environment byte for byte, and the right directories.

What a spec would run is read back by its target (`Target.read`).
"""

import re
from collections.abc import Iterator
from dataclasses import replace

from pman.job import INCOMING, OUTGOING, Job, image_reference
from pman.storage import Storage
from pman.targets import TARGETS
from pman.targets.record import MARK, Delivered, Flaw
from pman.templating.render import Spec


def marked(job: Job) -> Job:
    """The job to render for `flaws`: its command line is an argument list of MARK."""
    return replace(job, argv=(MARK, *job.argv))


def flaws(job: Job, storage: Storage, spec: Spec) -> Iterator[Flaw]:
    """What does not arrive of `job` (not marked) in `spec`, which was rendered from marked(job) and judged good.

    Raises Stuck.
    """
    try:
        found = TARGETS[spec.target].read(job, spec.text)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        yield Flaw("argv", f"the job's command cannot be found in the result: {error or type(error).__name__}")
        return
    yield from found.others
    for number in found.injected:
        yield Flaw("injected", "a value of the request runs as a command here", number)
    if MARK not in found.words:
        left = f": the script leaves with status {found.status} before" if not found.words and found.status else ""
        yield Flaw("argv", f"the command line of the job is never run{left}")
        return
    yield from _argv(job, storage, found.words)
    yield from _environment(job, found)
    yield from _directories(job, storage, spec, found)
    try:
        image_reference(found.image or job.image)
    except ValueError as error:
        yield Flaw("image", f"the image {found.image!r} {error}")


def _argv(job: Job, storage: Storage, words: list[str]) -> Iterator[Flaw]:
    arrived, expected = words[words.index(MARK) + 1 :], list(job.argv)
    if len(arrived) < len(expected):
        yield Flaw("argv", f"only {len(arrived)} of the {len(expected)} words of the command line arrive")
    elif len(arrived) > len(expected):
        yield Flaw("argv", f"the command line gains words: {arrived[len(expected) :][:3]!r}")
    for number, (got, wanted) in enumerate(zip(arrived, expected, strict=False)):
        if got not in (wanted, storage.on_host(wanted)):
            yield Flaw("argv", f"word {number} of the command line is {got!r} instead of {wanted!r}")
            return


def _directories(job: Job, storage: Storage, spec: Spec, found: Delivered) -> Iterator[Flaw]:
    own = {f"{name}={value}" for name, value in job.env}
    wrapper = [word for word in found.words[: found.words.index(MARK)] if word not in own]
    bound = dict(_bound(wrapper))
    for what, mount in (("incoming", storage.incoming), ("outgoing", storage.outgoing)):
        for source in (getattr(found, what), bound.get(mount.target)):
            if source is not None and source != mount.source:
                line = None if found.wraps else _line(spec.text, what)
                yield Flaw(what, f"{mount.target} is {source!r} instead of {mount.source!r}", line)
    if found.wraps and OUTGOING in found.words and not any(OUTGOING in word for word in wrapper):
        said = f"nothing in front of the command mounts {OUTGOING}, which it is given"
        yield Flaw("outgoing", said, level="warning")


def _bound(words: list[str]) -> Iterator[tuple[str, str]]:
    """Directory in the container and where it comes from, as SRC:DST[:OPTIONS] or `SRC DST` say."""
    for before, word in zip(["", *words], words, strict=False):
        if pair := re.fullmatch(rf"(?s)(?:--?[\w-]+=)?(.*):({INCOMING}|{OUTGOING})(?::[a-zA-Z,]+)?", word):
            yield pair[2], pair[1]
        elif word in (INCOMING, OUTGOING):
            yield word, before


def _environment(job: Job, found: Delivered) -> Iterator[Flaw]:
    before = found.words[: found.words.index(MARK)]
    given = dict(found.env) | dict(word.split("=", 1) for word in before if "=" in word)
    for name, value in job.env:
        if name not in given:
            yield Flaw("env", f"the job's variable {name} is not set")
            return
        if given[name] != value:
            yield Flaw("env", f"the job's variable {name} is {given[name]!r} instead of {value!r}")
            return


def _line(text: str, what: str) -> int | None:
    """The line that names the directory: `incoming:` or /share/incoming."""
    found = re.search(rf"(?m)^.*(?:^\s*{what}\s*:|/share/{what}\b).*$", text)
    return text.count("\n", 0, found.start()) + 1 if found else None
