"""Relative links and anchors of the Markdown documents lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\(([^()\s]+)\)")


def without_code(text: str) -> str:
    """Return ``text`` without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(document: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", without_code(document.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(document: Path) -> list[str]:
    """Return the relative links of a document that lead nowhere."""
    dead = []
    for link in LINK.findall(without_code(document.read_text(encoding="utf-8"))):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    return dead


def documents() -> list[Path]:
    """Return the project's Markdown files, without those of environments and runs."""
    folders = ("adaptive_inference", "benchmarks", "docs", "results", "tests", "weights")
    return [ROOT / "README.md", *(path for name in folders for path in sorted((ROOT / name).rglob("*.md")))]


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    assert dead_links(document) == []


def test_dead_links_are_found(tmp_path):
    (tmp_path / "other.md").write_text("# Two words: `code`\n", encoding="utf-8")
    text = "[a](other.md#two-words-code) [b](other.md#three) [c](none.md) [d](#title) [e](#none) [f](https://x.y)"
    document = tmp_path / "document.md"
    document.write_text(f"# Title\n{text}\n```\n[g](in_code.md)\n```\n", encoding="utf-8")
    assert dead_links(document) == ["other.md#three", "none.md", "#none"]
