"""`index.html`: the page of a run in one file that needs neither a network nor a server.

The data stand in the page as JSON inside a `<script>` that is not code; `<` is escaped, so that no text can end it, and the
scripts set texts, never HTML. A content security policy allows this one script, by its SHA-256, and nothing from outside.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

SCRIPTS = ("charts.js", "maps.js", "page.js")
REFRESH_SECONDS = 30  # while the run is in progress
METHOD = (
    "Intervals are 95 % intervals of the difference from the float model on the same samples. The search split selects the "
    "front, the confirm split only measures it, except where a sentence says otherwise. On the search split scores are "
    "simulated. On the confirm split the models ran on packed weights, where kernels exist."
)


@cache
def packaged(name: str) -> str:
    """A file of this package as text."""
    return resources.files("mpsearch.reporting.page").joinpath(name).read_text(encoding="utf-8")


def document(content: Mapping[str, Any]) -> str:
    """The page of `content` (`page.content.content`)."""
    script = "\n" + "\n".join(packaged(name) for name in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    refresh = f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">\n' if content["running"] else ""
    values = {
        "title": html.escape(f"{content['model']} on {content['task']}"),
        "answer": html.escape(content["answer"]),
        "method": METHOD,
        "refresh": refresh,
        "style": packaged("page.css"),
        "script": script,
        "script_hash": f"sha256-{digest}",
        "content": as_json(content),
    }
    # In one pass: a value is not searched for names of others.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], packaged("template.html"))


def as_json(content: Mapping[str, Any]) -> str:
    """JSON that can stand in an HTML element: no `<`, `>` or `&`, and no line ends that JavaScript knows and JSON does not."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
