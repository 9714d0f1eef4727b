"""Lets `AutoConfig` and `AutoModelForCausalLM` know our models as soon as somebody imports them, and not before.

transformers takes seconds to import, and may not be installed: `import rat` must neither wait for it nor need it.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def register_with_transformers() -> None:
    """Register now what is imported of transformers' automatic classes, and the rest at the end of its import."""
    later = {}
    for name, register in _REGISTER.items():
        if name in sys.modules:
            register()
        else:
            later[name] = register
    if later and not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(later))


def _register_config() -> None:
    from transformers import AutoConfig

    from rat.interop.huggingface.configuration import RATConfig

    AutoConfig.register(RATConfig.model_type, RATConfig, exist_ok=True)


def _register_model() -> None:
    from transformers import AutoModelForCausalLM

    from rat.interop.huggingface.configuration import RATConfig
    from rat.interop.huggingface.modeling import RATForCausalLM

    AutoModelForCausalLM.register(RATConfig, RATForCausalLM, exist_ok=True)


# The config alone does not need what the model does.
_REGISTER: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_model,
}


class _AfterImport(MetaPathFinder):
    """Finds some modules as they would be found anyway, and calls each one's function once it is imported."""

    def __init__(self, then: dict[str, Callable[[], None]]) -> None:
        self.then = then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `MetaPathFinder`; None for every other module."""
        then = self.then.pop(fullname, None)
        if then is None:
            return None
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, then)
        return spec


class _Then(Loader):
    """A loader that calls a function after it has loaded."""

    def __init__(self, loader: Loader, then: Callable[[], None]) -> None:
        self.loader = loader
        self.then = then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """See `Loader`."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """See `Loader`."""
        self.loader.exec_module(module)
        self.then()
