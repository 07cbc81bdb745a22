"""Pages as one file of HTML that loads nothing: templates, styles and scripts put together."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2

HERE = Path(__file__).parent


@cache
def environment() -> jinja2.Environment:
    """The templates of this folder; text that they are given is escaped."""
    import jinja2  # here, because a training run's start needs it in no hurry

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def static(name: str) -> str:
    """A style sheet or a script."""
    return (HERE / "static" / name).read_text(encoding="utf-8")


def charts_page(template: str, **content: Any) -> str:
    """A page with charts, from one of the templates."""
    body = environment().get_template(template).render(content)
    script = static("uPlot.iife.min.js") + static("charts.js")
    return page(content["title"], body, static("uPlot.min.css"), script)


def page(title: str, body: str, style: str = "", script: str = "", connect: str = "'none'") -> str:
    """A whole page; no other style and script than these would run, as it names their hashes.

    Args:
        style: CSS, in addition to that of all pages.
        connect: where the script may connect to, as a content security policy spells it.
    """
    style = static("style.css") + style
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
        f"connect-src {connect}; base-uri 'none'; form-action 'none'"
    )
    base = environment().get_template("base.html")
    return base.render(title=title, policy=policy, style=style, body=body, script=script) + "\n"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
