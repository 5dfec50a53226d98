"""Hooks of mkdocs: give every page the path that it has in the repository.

Relative links then are the same on the site and in a view of the repository: the home page is
README.md, and pages may link to source files.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\]\((?!\w+:)([^)\s#]+)")  # relative, without the anchor


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace the files of docs/ by those of the repository that belong to the site."""
    for file in list(files):
        if file.src_dir == config.docs_dir:  # not those of the theme
            files.remove(file)
    docs = [path for path in (ROOT / "docs").rglob("*") if path.is_file()]
    pages = [*ROOT.glob("*.md"), *(path for path in docs if path.suffix == ".md")]
    paths = {*docs, *pages, *linked_files(pages)}
    for path in sorted(paths):
        files.append(repository_file(path, config))
    return files


def linked_files(pages: list[Path]) -> set[Path]:
    """Return the existing files that pages link to."""
    targets = {
        (page.parent / link).resolve() for page in pages for link in LINK.findall(page.read_text())
    }
    return {path for path in targets if path.is_file() and path.is_relative_to(ROOT)}


def repository_file(path: Path, config: MkDocsConfig) -> File:
    """Return a file of the site at its path in the repository."""
    name = path.relative_to(ROOT).as_posix()
    return File.generated(config, name, abs_src_path=str(path))
