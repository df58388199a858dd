"""The packages with the kernels of one kind of device. Each is loaded when it is first used, as compilers load slowly:
who has no GPU never waits for Triton, and who has one never waits for numba.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from charonia_kernels import cpu, gpu
else:

    class _Lazy(ModuleType):
        """Stands in for a package until that is imported, and has the package's attributes, which it never keeps.

        It must not enter `sys.modules`, as `importlib.util.LazyLoader` would have it: asked for a module below a
        package that is listed there but not loaded, the import system loads the package, which imports the module, and
        then executes the module again. As it is, importing the package puts the package itself in the place of the
        stand-in in `charonia_kernels`.
        """

        def __getattr__(self, name: str) -> Any:
            return getattr(import_module(self.__name__), name)

        def __setattr__(self, name: str, value: Any) -> None:
            setattr(import_module(self.__name__), name, value)

        def __delattr__(self, name: str) -> None:
            delattr(import_module(self.__name__), name)

    cpu = _Lazy("charonia_kernels.cpu")
    gpu = _Lazy("charonia_kernels.gpu")

__all__ = ["cpu", "gpu"]
