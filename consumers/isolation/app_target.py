"""Finds the import name of an app, with which the fork server imports the app."""

from __future__ import annotations

import sys
from pathlib import Path

from jobledger.definitions.task_registry import TaskRegistry
from jobledger.errors import ConfigError

_module_of, _name_of, _parents_of = (type.__dict__[name].__get__ for name in ("__module__", "__qualname__", "__mro__"))


def find_target(registry: TaskRegistry) -> str:
    """Return the name with which another process imports a registry's app: ``module:attribute``, or for a script
    ``path.py:attribute``.

    Raises `ConfigError` if no loaded module holds the app at its top level.
    """
    homes = {task.fn.__module__ for task in registry.tasks.values() if getattr(task.fn, "__module__", None)}
    others = [name for name in list(sys.modules) if name not in homes and not name.startswith("jobledger")]
    for name in [*sorted(homes), *others]:
        module = sys.modules.get(name)
        for attribute, value in list(vars(module).items()) if module is not None else ():
            if _is_app(value) and value.registry is registry:
                if name != "__main__":
                    return f"{name}:{attribute}"
                spec, path = getattr(module, "__spec__", None), getattr(module, "__file__", None)
                if spec is not None:
                    return f"{spec.name}:{attribute}"
                if path is not None:
                    return f"{Path(path).absolute()}:{attribute}"
    raise ConfigError(
        f"app {registry.names.namespace!r} is not a variable of a module, so a child process cannot import it: put the "
        "app and its tasks at the top level of a module"
    )


def _is_app(value: object) -> bool:
    # Compare the class by name, because this package may not import jobledger.app. Do not look at attributes of the
    # value, because a lazy object may have any attribute. Read the names through `type`, because a metaclass may
    # override them and raise.
    return any(_module_of(kind) == "jobledger.app" and _name_of(kind) == "App" for kind in _parents_of(type(value)))
