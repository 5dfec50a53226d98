"""Documentation: links resolve, the README stays short, features are found by their usual names."""

import json
import re
import tomllib
from pathlib import Path
from urllib.parse import quote

import pytest

import mae_jax

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FEATURES = (  # what a user would search for
    "NaN",
    "atomic",
    "bit-identical",
    "citation",
    "data parallel",
    "dataset",
    "deterministic",
    "fault tolerance",
    "few-shot",
    "FSDP",
    "gradient accumulation",
    "gradient checkpointing",
    "gradient clipping",
    "hyperparameter",
    "label smoothing",
    "learning rate",
    "micro-batch",
    "mixed precision",
    "multi-GPU",
    "non-finite",
    "out of memory",
    "preemption",
    "prefetch",
    "random erasing",
    "reproducible",
    "stochastic depth",
    "symlink",
    "throughput",
    "warm start",
    "watchdog",
)


def headings(path: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path) -> list[str]:
    """Return the relative links of a page to files or headings that do not exist."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        if link.startswith(("http://", "https://")):
            continue
        if not target.exists() or (anchor and anchor not in headings(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page):
    assert broken_links(page) == []


def test_broken_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One two\n[a](#one-two) [b](#three) [c](page.md#one-two) ![d](none.png)")
    assert broken_links(page) == ["#three", "none.png"]


def test_committed_notebook_ran_from_start_to_end():
    """Check the outputs that readers see; `make notebook` executes the cells."""
    path = ROOT / "docs" / "notebooks" / "visualize.ipynb"
    assert path.stat().st_size < 1_000_000
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}  # no error
    assert sum("image/jpeg" in output.get("data", {}) for output in outputs) == 5


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_badges_and_citation_say_what_the_package_says():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    badges = re.findall(r"!\[([^]]*)\]\(\S+/badge/(\S+)-\w+\)", (ROOT / "README.md").read_text())
    expected = {
        f"version {mae_jax.__version__}": f"version-{mae_jax.__version__}",
        "Python 3.11 or newer": f"python-{quote(project['requires-python'].replace('>=', '≥'))}",
        f"license {project['license']}": f"license-{project['license'].replace('-', '--')}",
    }
    assert dict(badges) == expected
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {mae_jax.__version__}\nlicense: {project['license']}\n" in citation


def test_every_page_is_linked_from_the_readme():
    linked = re.findall(r"\]\(([^)#\s]+\.md)\)", (ROOT / "README.md").read_text())
    pages = {str(page.relative_to(ROOT)) for page in PAGES}
    assert pages - {"README.md"} <= set(linked)


@pytest.mark.parametrize("word", FEATURES)
def test_features_are_found_by_their_usual_names(word):
    manual = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert word.lower() in "\n".join(page.read_text() for page in manual).lower()


def test_modules_and_tests_named_in_the_documentation_exist():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        text = page.read_text()
        named = re.findall(r"`((?:mae_jax|configs|tests|scripts)/[\w/.]+\.(?:py|sh))", text)
        named += [
            f"tests/{name}" for name in re.findall(r"`((?:faults/|slow/)?test_\w+\.py)`", text)
        ]
        assert [name for name in named if not (ROOT / name).exists()] == [], page


def test_modules_named_in_the_changelog_exist():
    """Check the second column of the table of renamed modules."""
    rows = re.findall(r"^\| `mae_jax[^|]*\|([^|]*)\|$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    names = {name.removeprefix("mae_jax.") for row in rows for name in re.findall(r"`(.*?)`", row)}
    paths = {name: ROOT / "mae_jax" / (name.replace(".", "/") + ".py") for name in names}
    assert len(names) > 30
    assert [name for name, path in paths.items() if not path.exists()] == []
