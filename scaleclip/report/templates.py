"""Pages from their templates, *.html.jinja. All share base.html.jinja: what they look like, and that they load nothing."""

import base64
from typing import Any

import jinja2

from scaleclip.report.drawings import shorten


def render(template: str, **values: Any) -> str:
    """A page; all that it shows is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("scaleclip.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": _percent,
        "data_uri": lambda content, kind: f"data:image/{kind};base64,{base64.b64encode(content).decode()}",
        "shorten": shorten,
    }
    return environment.get_template(template).render(**values)


def _percent(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2%}" if 0 < value < 0.001 else f"{value:.1%}"
