"""Formulas of the site as MathML: browsers draw it without a script or a font from another host."""

import html
import re

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\(?:\(|\[)(.*?)\\(?:\)|\])</\1>', re.DOTALL)
"""What ``pymdownx.arithmatex`` with ``generic: true`` makes of ``$…$`` and of ``$$…$$``."""

UNKNOWN = re.compile(r">(\\[A-Za-z]+)<")
"""A LaTeX command that latex2mathml does not know: it passes such a command on as text."""


def on_page_content(content: str, **_: object) -> str:
    """Return the page's HTML with MathML in place of LaTeX."""

    def to_mathml(formula: re.Match[str]) -> str:
        display = "block" if formula[1] == "div" else "inline"
        mathml = convert(html.unescape(formula[2]), display=display)
        if unknown := UNKNOWN.search(mathml):
            raise PluginError(f"{unknown[1]} in a formula is unknown to latex2mathml: {formula[2]}")
        return mathml

    return FORMULA.sub(to_mathml, content)
