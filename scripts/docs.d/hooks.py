"""What MkDocs is told beside mkdocs.yml, so that the pages stay good to read as files of the repository, too."""

import re
import sys
from pathlib import Path

from mkdocs.structure.files import File

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def on_config(config):
    """Pages of docs/ that the navigation does not name come below "Backends": a new backend needs no line there."""
    named = set(re.findall(r"[\w/-]+\.md", repr(config.nav)))
    others = sorted({path.name for path in Path(config.docs_dir).glob("*.md")} - named)
    how_to = next(section["How to"] for section in config.nav if "How to" in section)
    next(section for section in how_to if "Backends" in section)["Backends"] = others
    return config


def on_files(files, config):
    """Adds the pages that are made from the code whenever the site is built."""
    from tests.scripts import reference  # noqa: PLC0415

    for name in reference.BUILT:
        files.append(File.generated(config, f"reference/{name}", content=reference.page(name)))
    return files


def on_page_markdown(markdown, page, config, **_):
    """The file name behind the language of a block becomes its title; a link out of docs/ becomes the file's name."""

    def shown(link):
        docs = Path(config.docs_dir)
        target = (docs / page.file.src_uri).parent.joinpath(link[1]).resolve()
        return link[0] if target.is_relative_to(docs) else f"`{target.relative_to(docs.parent)}`"

    markdown = re.sub(r"(?m)^(```\w+) (\S+)$", r'\1 title="\2"', markdown)
    return re.sub(r"\[[^\]]*\]\((\.\./[^)#]+)[^)]*\)", shown, markdown)
