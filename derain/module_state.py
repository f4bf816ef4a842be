"""Detection of modules that change their state in a forward pass, and so cannot run on several threads."""

from torch import Tensor, nn


class StateWatch:
    """Detects whether a forward pass changes attributes, parameters or buffers of a module or its submodules.

    Changes in place are detected for tensors that are not inference tensors, and for the length of lists, dictionaries
    and sets.

    Args:
        module: The module, before the pass.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.before = self._attributes()

    def _attributes(self) -> dict[tuple[int, str], tuple[object, int | None]]:
        """Return the value of each attribute, with the version of a tensor or the length of a container.

        Keys are the index of the submodule and the name of the attribute.
        """
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
        """Return whether anything has changed since this object was created."""
        after = self._attributes()
        if after.keys() != self.before.keys():
            return True
        return any(value is not after[key][0] or size != after[key][1] for key, (value, size) in self.before.items())
