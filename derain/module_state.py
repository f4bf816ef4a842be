"""Changes of the state of modules in a pass, which forbid passes on several threads."""

from torch import Tensor, nn


class StateWatch:
    """Detects whether a module changes attributes, containers or buffers of itself or its parts.

    Args:
        module: The module, before a pass.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.before = self._attributes()

    def _attributes(self) -> dict[tuple[int, str], tuple[object, int | None]]:
        """Return each attribute of each module, with the version of a tensor or the length of a container."""
        attributes = {}
        for number, part in enumerate(self.module.modules()):
            for name, value in {**vars(part), **part._parameters, **part._buffers}.items():
                size = None
                if isinstance(value, Tensor):
                    size = None if value.is_inference() else value._version
                elif isinstance(value, list | dict | set):
                    size = len(value)
                attributes[number, name] = (value, size)
        return attributes

    def has_changed(self) -> bool:
        """Return whether anything has changed since the start."""
        after = self._attributes()
        if after.keys() != self.before.keys():
            return True
        return any(value is not after[key][0] or size != after[key][1] for key, (value, size) in self.before.items())
