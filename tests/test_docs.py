"""Every Python block of the README and of the docs runs as it stands."""

import doctest
import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[tuple[int, str]]:
    """The Python blocks of a page, each with its first line's number.

    Raises:
      ValueError: a block that would not be run: one with prompts that is not marked as Python, or
        one that is indented.
    """
    found = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start(2)) + 1
        if match[1] == "python":
            found.append((line, match[2]))
        elif ">>> " in match[2]:
            raise ValueError(f"line {line}: a block with prompts must be marked ```python")
    if len(found) != text.count("```python"):
        raise ValueError(f"{text.count('```python')} blocks of Python, {len(found)} of them found")
    return found


def run_page(path: Path) -> int:
    """Run a page's blocks in one namespace, in order: with prompts as doctests, the rest as code.

    Returns:
      How many blocks were run.

    Raises:
      doctest.DocTestFailure, doctest.UnexpectedException: an example with another output.
      Exception: what a block without prompts raises, at the page's own line.
    """
    namespace: dict = {"__name__": path.stem}
    parser, runner = doctest.DocTestParser(), doctest.DebugRunner()
    found = blocks(path.read_text())
    for line, code in found:
        if ">>> " not in code:
            exec(compile("\n" * (line - 1) + code, str(path), "exec"), namespace)
            continue
        test = parser.get_doctest(code, namespace, path.name, str(path), line - 1)
        runner.run(test, clear_globs=False)
        namespace.update(test.globs)
    return len(found)


@pytest.fixture(autouse=True)
def as_a_user(tmp_path, monkeypatch):
    """Jax's own defaults, not the suite's strict ones, in a folder that may be written to."""
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def has_python(page: Path) -> bool:
    text = page.read_text()
    return "```python" in text or ">>> " in text


@pytest.mark.parametrize("page", [*filter(has_python, PAGES)], ids=lambda page: page.name)
def test_page(page):
    assert run_page(page) >= 1


def test_the_readme_has_examples():
    assert sum(code.count(">>> ") for _, code in blocks(PAGES[0].read_text())) >= 12


def written(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    return page


def test_blocks_share_their_page_and_no_other(tmp_path):
    first = "```python\nshared = 1\n```\n\n```python\n>>> shared + 1\n2\n>>> more = 3\n\n```\n"
    assert run_page(written(tmp_path, f"{first}```python\nassert more == 3\n```\n")) == 3
    with pytest.raises(NameError, match="shared"):
        run_page(written(tmp_path, "text\n```python\nshared\n```\n"))


def test_what_is_wrong_is_found(tmp_path):
    with pytest.raises(doctest.DocTestFailure):
        run_page(written(tmp_path, "```python\n>>> 1 + 1\n3\n\n```\n"))
    with pytest.raises(doctest.UnexpectedException):
        run_page(written(tmp_path, "```python\n>>> 1 / 0\n\n```\n"))
    with pytest.raises(ZeroDivisionError) as raised:
        run_page(written(tmp_path, "# Title\n\n```python\n1 / 0\n```\n"))
    assert raised.traceback[-1].lineno + 1 == 4
    with pytest.raises(ValueError, match="line 2: a block with prompts"):
        run_page(written(tmp_path, "```\n>>> 1\n```\n"))
    with pytest.raises(ValueError, match="1 blocks of Python, 0 of them found"):
        run_page(written(tmp_path, "* item\n  ```python\n  1 / 0\n  ```\n"))
