"""Shows a docstring's first line as text and its aligned table of shapes, units and errors as it was written."""

import griffe


class PlainDocstrings(griffe.Extension):
    """Everything after a docstring's first paragraph becomes a block of preformatted text."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is None:
            return
        first, _, rest = obj.docstring.value.partition("\n\n")
        if rest.strip():
            obj.docstring.value = f"{first}\n\n```text\n{rest}\n```"
