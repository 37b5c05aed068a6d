"""A page of text, tables and figures as one HTML file that needs nothing else: no network, no script, no other file.

A page is data: `Page` holds `Section`s, a section parts of the kinds below. What they hold is text and is escaped; the template
is templates/report.html. Figures go in as data, so a page can be mailed, kept beside a paper or printed. `run_pages` makes the
pages of runs.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote

import jinja2
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

from jax_async_grpo.records import write_text

__all__ = ["Folded", "Items", "Markdown", "Page", "Picture", "Section", "Table", "Text", "render", "write_page"]

_MEDIA_TYPES = {".svg": "image/svg+xml", ".png": "image/png"}


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: ClassVar[str] = "text"


@dataclasses.dataclass(frozen=True)
class Items:
    """A list of (name, note)."""

    items: Sequence[tuple[str, str]]
    kind: ClassVar[str] = "items"


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells, each as long as `columns`; a column's name carries its unit."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    kind: ClassVar[str] = "table"


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG or SVG file; the caption says what is seen and how to read it, and is also read aloud in its place."""

    path: Path
    caption: str
    kind: ClassVar[str] = "picture"


@dataclasses.dataclass(frozen=True)
class Markdown:
    """CommonMark with tables. Images are files of `folder`; a link becomes its words and, in brackets, its target."""

    text: str
    folder: Path
    kind: ClassVar[str] = "markdown"


@dataclasses.dataclass(frozen=True)
class Folded:
    """Parts behind a line that opens on a click; open in print."""

    label: str
    parts: Sequence[Part]
    kind: ClassVar[str] = "folded"


Part = Text | Items | Table | Picture | Markdown | Folded


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    heading: str
    parts: Sequence[Part]


@dataclasses.dataclass(frozen=True)
class Page:
    """A page: what it is about in one paragraph, what a reader must know first, and its sections.

    Attributes:
      title: of the page and of the window.
      lead: the paragraph below it.
      sections: in order.
      warnings: what a reader must know before any number, e.g. that the run is unfinished.
    """

    title: str
    lead: str
    sections: Sequence[Section]
    warnings: Sequence[str] = ()


def render(page: Page) -> str:
    """The page as HTML.

    Raises:
      ValueError: a row of a table is not as long as its columns, or a picture is no PNG or SVG.
      OSError: a picture cannot be read.
    """
    return _template().render(page=page) + "\n"


def write_page(page: Page, path: str | os.PathLike) -> None:
    """Replaces `path` by the rendered page, atomically."""
    write_text(path, render(page))


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jax_async_grpo"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"data_uri": _data_uri, "markdown": _markdown, "checked_rows": _checked_rows}
    environment.tests["numeric"] = lambda cell: bool(re.match(r"[-+−<>≤≥\[]? ?\.?\d", cell))
    return environment.get_template("report.html")


def _checked_rows(table: Table) -> Sequence[Sequence[str]]:
    for index, row in enumerate(table.rows):
        if len(row) != len(table.columns):
            raise ValueError(f"rows[{index}] has {len(row)} cells; the table has {len(table.columns)} columns")
    return table.rows


def _data_uri(path: Path) -> str:
    """As an image and not inline: ids of two SVGs would clash, and an image can neither run nor load anything."""
    if path.suffix not in _MEDIA_TYPES:
        raise ValueError(f"picture {path} is no {' or '.join(_MEDIA_TYPES)} file")
    return f"data:{_MEDIA_TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _markdown(part: Markdown) -> Markup:
    """HTML of the part; raw HTML in it is shown as text, so that the result is as safe as what is escaped."""
    parser = MarkdownIt("commonmark", {"html": False, "xhtmlOut": False}).enable("table")
    tokens = parser.parse(part.text)
    for token in tokens:
        if token.children:
            token.children = _without_targets(token.children, part.folder)
        if token.type in ("heading_open", "heading_close"):  # the page and its sections have the first two levels
            token.tag = f"h{min(int(token.tag[1]) + 2, 6)}"
    return Markup(parser.renderer.render(tokens, parser.options, {}))


def _without_targets(tokens: Sequence[Token], folder: Path) -> list[Token]:
    """Links as words and target, since clone and network may be missing; images as data, or their words without a file."""
    result, targets = [], []
    for token in tokens:
        if token.type == "link_open":
            targets.append(str(token.attrs["href"]))
        elif token.type == "link_close":
            result.append(Token("text", "", 0, content=f" ({targets.pop()})"))
        elif token.type == "image":
            path = folder / unquote(str(token.attrs["src"]))
            if path.suffix in _MEDIA_TYPES and path.is_file():
                token.attrs["src"] = _data_uri(path)
                result.append(token)
            else:
                result.append(Token("text", "", 0, content=f"[figure not found: {token.content}]"))
        else:
            result.append(token)
    return result
