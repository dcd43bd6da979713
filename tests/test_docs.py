"""Links of the pages lead somewhere, messages name pages that are there."""

import importlib
import re
import sys

import pytest

from benchmarks import tpu_compile
from tests import runs
from ulsad_jax.methods.ulsad import losses

PAGES = (
    runs.REPOSITORY / "README.md",
    runs.REPOSITORY / "benchmarks" / "README.md",
    *sorted((runs.REPOSITORY / "docs").glob("*.md")),
)
FENCED = re.compile(r"^```.*?^```$", re.S | re.M)
PROGRAMS = ("*.py", "configs/*.py", "benchmarks/*.py", "ulsad_jax/**/*.py")


def find_anchors(path):
    """What GitHub calls the headings."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", path.read_text()), re.M)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize(
    "page", PAGES, ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_links(page):
    links = re.findall(r"\]\((?!https?:)([^)]*)\)", FENCED.sub("", page.read_text()))
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in find_anchors(target), link


def test_every_page_is_found_from_the_readme():
    text = PAGES[0].read_text()
    for page in PAGES[1:]:
        assert f"({page.relative_to(runs.REPOSITORY)})" in text


def test_pages_that_programs_name():
    programs = {path for glob in PROGRAMS for path in runs.REPOSITORY.glob(glob)}
    texts = [path.read_text() for path in programs]
    named = {name for text in texts for name in re.findall(r"docs/\w+\.md", text)}
    assert named
    for name in named:
        assert (runs.REPOSITORY / name).is_file(), name


def test_term_of_the_readme(tmp_path, monkeypatch):
    (text,) = re.findall(
        r"```python\n# mine/smooth.py\n(.*?)```", PAGES[0].read_text(), re.S
    )
    (tmp_path / "smooth.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "smooth", raising=False)
    config = importlib.import_module("smooth").get_config()
    losses.make_loss_fn(config.losses)


def test_table_of_what_was_compiled_for_tpus():
    table = tpu_compile.make_table(tpu_compile.read_results())
    assert table in (runs.REPOSITORY / "docs" / "devices.md").read_text()
