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

        A key is the index of the submodule and the name of the attribute.
        """
        attributes = {}
        for index, submodule in enumerate(self.module.modules()):
            for name, value in {**vars(submodule), **submodule._parameters, **submodule._buffers}.items():
                version_or_length = None
                if isinstance(value, Tensor):
                    version_or_length = None if value.is_inference() else value._version
                elif isinstance(value, list | dict | set):
                    version_or_length = len(value)
                attributes[index, name] = (value, version_or_length)
        return attributes

    def has_changed(self) -> bool:
        """Return whether anything has changed since this object was created."""
        after = self._attributes()
        if after.keys() != self.before.keys():
            return True
        return any(
            value is not after[key][0] or version_or_length != after[key][1]
            for key, (value, version_or_length) in self.before.items()
        )
