"""Sections "Example:" of docstrings, which griffe would not read as doctests, under the name that it knows."""

import re

import griffe


class ExampleSections(griffe.Extension):
    """Rename "Example:" to "Examples:" before docstrings are parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        """Rename the section in the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
