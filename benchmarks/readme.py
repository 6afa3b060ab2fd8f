"""Puts measured tables where the README shows them."""

from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def put_into_readme(marker: str, text: str) -> None:
    """Replace what stands between `<!-- MARKER: begin -->` and `<!-- MARKER: end -->`."""
    begin, end = f"<!-- {marker}: begin -->", f"<!-- {marker}: end -->"
    before, rest = README.read_text().split(begin)
    README.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")
