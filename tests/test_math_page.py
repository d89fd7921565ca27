"""Every section of the mathematics that code, tests or docs cite is in `docs/math.md`."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "math.md"
FOLDERS = ("nestedjax", "pallas_kernels", "tests", "experiments", "docs")

# "H 37" is an oracle, "C6.5" or "D4b" a section, "E" a chapter.
LABEL = r"(?:H \d+|[A-I]\d+(?:\.\d+)*[a-z]?|[A-I])(?![\w.]*\w)"
CITATION = re.compile(rf"\bspec\s+({LABEL}(?:(?:,\s+|\s+and\s+){LABEL})*)")
# A label with a dot is a citation without the word, too: "What C6.8 calls ...".
DOTTED = re.compile(r"\b[A-I]\d+\.\d+\b")
HEADING = re.compile(r"^#{2,4} ([A-I](?:\d+(?:\.\d+)*[a-z]?)?)\.? ", re.MULTILINE)
ORACLE = re.compile(r"^(\d+)\. ", re.MULTILINE)
ANCHOR = re.compile(r'<a id="([^"]+)"></a>')
LINK = re.compile(r"\]\((?:([\w/]+\.md))?(?:#([\w.]+))?\)")


def cited(text: str) -> set[str]:
    """The labels that a text cites."""
    found = {
        label
        for chain in CITATION.findall(text)
        for label in re.findall(LABEL, re.sub(r"\s+", " ", chain))
    }
    return found | set(DOTTED.findall(text))


def held(page: str) -> set[str]:
    """The labels that a page has: its headings, and the numbered oracles of section H."""
    oracles = re.search(r"^## H\. .*?(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    numbers = ORACLE.findall(oracles.group()) if oracles else []
    return set(HEADING.findall(page)) | {f"H {number}" for number in numbers}


def files() -> list[Path]:
    """What may cite: all Python and Markdown of the repository but this file and the page."""
    found = [path for name in FOLDERS for path in (ROOT / name).rglob("*.py")]
    found += [path for name in FOLDERS for path in (ROOT / name).rglob("*.md")]
    return [*(set(found) - {Path(__file__).resolve(), PAGE}), ROOT / "README.md"]


def test_every_citation_has_its_section():
    labels = held(PAGE.read_text())
    citations = {path: cited(path.read_text()) for path in files()}
    missing = {
        str(path.relative_to(ROOT)): sorted(found - labels)
        for path, found in citations.items()
        if found - labels
    }
    assert not missing
    # The tree does cite: a pattern that finds nothing would pass the line above.
    assert {"B9", "C2", "C6", "C6.5", "C6.8", "D4b", "E", "H 37"} <= set().union(
        *citations.values()
    )


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("the update (spec C6.5).", {"C6.5"}),
        ("(spec B2, B3)", {"B2", "B3"}),
        ("Toys: spec B8 and B12. Study", {"B8", "B12"}),
        ("an oracle (spec H 37)", {"H 37"}),
        ("lifetimes (spec D4b), of spec\n    E: both", {"D4b", "E"}),
        ("(spec C1, MIRAS table)", {"C1"}),
        ("What C6.8 calls a solve", {"C6.8"}),
        ("spec Every word, spec = [1], a spec of H100", set()),
        ("a made-up one (spec C6.99, spec J1)", {"C6.99"}),
    ],
)
def test_citations_are_found(text, labels):
    assert cited(text) == labels


def test_a_made_up_label_is_not_held():
    labels = held(PAGE.read_text())
    assert {f"H {number}" for number in range(1, 56)} <= labels
    assert not labels & {"C6.99", "B13", "J1", "H 56", "D4c"}
    small = "## C. Memories\n### C6 Titans\n#### C6.5 The rule\ntext C9\n"
    assert held(small) == {"C", "C6", "C6.5"}


def test_every_heading_has_an_anchor_and_every_link_a_target():
    page = PAGE.read_text()
    anchors = ANCHOR.findall(page)
    assert len(anchors) == len(set(anchors))
    assert {label.lower() for label in HEADING.findall(page)} <= set(anchors)
    broken = []
    for path in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]:
        for name, anchor in LINK.findall(path.read_text()):
            target = path.parent / name if name else path
            if not target.exists():
                broken.append((path.name, name))
            elif anchor and anchor not in ANCHOR.findall(target.read_text()):
                broken.append((path.name, f"{name}#{anchor}"))
    assert not broken
