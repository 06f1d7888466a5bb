"""Hook of mkdocs: the site shows pages of the repository that are not in docs/, and links work there as in a checkout.

A page outside of docs/ that the navigation names, as ``repository/PATH``, is taken from the repository, README.md as
``index.md``. Links are written as they work in a checkout; here each is turned into one to the page, or, where the
site has no page for the file, to a copy of the file. A link to what does not exist stays, and ``--strict`` refuses it.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PREFIX = "repository/"
HOME = "README.md", "index.md"
_LINK = re.compile(r"(\]\()([^)\s:#]+)(#[^)\s]*)?(\))")


def site_path(path: str) -> str:
    """Where the site has a file of the repository."""
    if path == HOME[0]:
        return HOME[1]
    return path.removeprefix("docs/") if path.startswith("docs/") else PREFIX + path


def repository_path(uri: str) -> str:
    """The file of the repository that a page of the site is."""
    if uri == HOME[1]:
        return HOME[0]
    return uri.removeprefix(PREFIX) if uri.startswith(PREFIX) else f"docs/{uri}"


def links(markdown: str, path: str) -> list[str]:
    """Files of the repository that a page of it links to, relative links alone."""
    return [posixpath.normpath(posixpath.join(posixpath.dirname(path), found[2])) for found in _LINK.finditer(markdown)]


def on_files(files: Files, config: Any) -> Files:
    """Add pages that the navigation names, and files that pages link to."""
    outside = [HOME[0], *(repository_path(uri) for uri in _leaves(config.nav) if uri.startswith(PREFIX))]
    pages = [*outside, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    linked = {link for page in pages for link in links((ROOT / page).read_text(encoding="utf-8"), page)}
    for path in dict.fromkeys((*outside, *sorted(linked))):
        uri = site_path(path)
        if (ROOT / path).is_file() and files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links of the repository into those of the site."""
    path = repository_path(page.file.src_uri)

    def turned(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), found[2]))
        if not (ROOT / target).is_file():
            return found[0]
        here = posixpath.dirname(page.file.src_uri) or "."
        return f"{found[1]}{os.path.relpath(site_path(target), here)}{found[3] or ''}{found[4]}"

    return _LINK.sub(turned, markdown)


def _leaves(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    children = nav.values() if isinstance(nav, dict) else nav
    return [leaf for child in children for leaf in _leaves(child)]
