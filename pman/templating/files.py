"""Where templates are read from: the shipped directory, and a site's, all of which must be readable.

A policy that cannot be read must not count as no policy: whatever stands in a site's directory and cannot be read is an
error before the first job is rendered.
"""

import functools
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jinja2

from pman.errors import Misconfigured, TemplateError


@functools.cache
def shipped_templates() -> Path:
    """The directory of the shipped templates."""
    return own_directory("templates", "wdl")


def own_directory(name: str, part: str) -> Path:
    """The directory of pman's that has this part: inside the wheel, or beside `pman/` in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for directory in (package / name, package.parent / name):
        if (directory / part).is_dir():
            return directory
    raise Misconfigured(f"pman's own {name} are missing: the installation is incomplete.")


def loader(overlay: Path | None) -> jinja2.BaseLoader:
    """Finds a template in the overlay, then among the shipped ones, which `shipped/NAME` always names."""
    shipped = jinja2.FileSystemLoader(shipped_templates())
    site = [_Confined(overlay)] if overlay else []
    return jinja2.ChoiceLoader([jinja2.PrefixLoader({"shipped": shipped}), *site, shipped])


class _Confined(jinja2.FileSystemLoader):
    """Reads no file that a symbolic link puts outside its directory."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, encoding="utf-8-sig")  # without the mark that some editors put in front

    def get_source(self, environment: jinja2.Environment, template: str) -> Any:
        try:
            found = super().get_source(environment, template)
        except jinja2.TemplateNotFound:
            require_readable(Path(self.searchpath[0]))
            raise
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise TemplateError(f"{self.searchpath[0]}/{template}:{line}: this is no UTF-8") from None
        root = os.path.realpath(self.searchpath[0])
        if not os.path.realpath(found[1]).startswith(root + os.sep):
            raise TemplateError(f"{found[1]}:1: a symbolic link leads out of the template directory")
        return found


def files(directory: Path, onerror: Callable[[OSError], None] | None = None) -> Iterator[Path]:
    """The files of an overlay, through symbolic links (a ConfigMap's are), without those that begin with a dot.

    onerror: gets what hinders a directory from being read.
    """
    seen = set()
    for place, directories, names in os.walk(directory, onerror=onerror, followlinks=True):
        real = os.path.realpath(place)
        directories[:] = [] if real in seen else [name for name in directories if not name.startswith(".")]
        seen.add(real)
        misnamed = [name for name in directories if _is_read_by_pman(name)]
        yield from (Path(place, name) for name in [*names, *misnamed] if not name.startswith("."))


def _is_read_by_pman(name: str) -> bool:
    return name.endswith(".j2") or name == "site.yaml"


def unreadable(directory: Path) -> list[tuple[str, str]]:
    """What stands in an overlay and cannot be read: its path, and a sentence that says why."""
    errors: list[OSError] = []
    found = []
    for path in files(directory, errors.append):
        try:
            if stat.S_ISREG(mode := path.stat().st_mode):
                path.open("rb").close()
            elif _is_read_by_pman(path.name):
                said = "a directory" if stat.S_ISDIR(mode) else "no file"
                found.append((str(path), f"this is {said}: put a file here"))
        except OSError as error:
            link = f" (a symbolic link to {path.readlink()})" if path.is_symlink() else ""
            found.append((str(path), f"this cannot be read{link}: {error.strerror}"))
    return [*((str(error.filename), f"this cannot be read: {error.strerror}") for error in errors), *found]


def require_readable(overlay: Path | None) -> None:
    """Raises TemplateError for what stands in the overlay and cannot be read."""
    for path, said in unreadable(overlay) if overlay else ():
        raise TemplateError(f"{path}:1: {said}")
