"""Hooks of mkdocs: give every page the path that it has in the repository.

Relative links then are the same on the site and in a view of the repository: the home page is
README.md, and pages may link to source files. Notebooks become pages, with their outputs.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

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
        if path.suffix == ".ipynb":
            for file in notebook_files(path, config):
                files.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return the text of a page with links to the pages of notebooks, instead of their files."""
    del page, config, files
    return re.sub(r"\]\(((?!\w+:)\S+)\.ipynb\)", r"](\1.md)", markdown)


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


def notebook_files(path: Path, config: MkDocsConfig) -> list[File]:
    """Return the page of a notebook, and the pictures in its outputs."""
    folder = path.relative_to(ROOT).parent
    text, resources = MarkdownExporter().from_filename(str(path))
    page = File.generated(config, (folder / f"{path.stem}.md").as_posix(), content=text)
    pictures = resources["outputs"].items()
    return [page, *(File.generated(config, f"{folder}/{name}", content=x) for name, x in pictures)]
