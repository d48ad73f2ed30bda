"""Loads the app that a command line names: ``pkg.module:app``, ``pkg.module`` or ``path/to/file.py:app``.

This module imports users' modules and explains failed imports. It opens no connection.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from jobledger import errors
from jobledger.cli.commands import Wrong, judged
from jobledger.definitions.origins import short
from jobledger.errors import ConfigError, text_of

if TYPE_CHECKING:
    from jobledger.app import App

DEFAULT_ATTRIBUTE = "app"


def load_app(target: str, *, bootstrap: str | None = None, status_url: str | None = None) -> App:
    """Import the app that ``target`` names, with the command line's ``bootstrap`` and ``status_url`` if given.

    Modules in the working directory can be imported, as with ``python -m``. Raises the errors of `App.check`, and
    `ConfigError` if the app cannot be loaded. The message of the latter distinguishes a missing module from an error
    inside the module, and lists the module's apps if the attribute is missing.
    """
    name, _, attribute = target.partition(":")
    if not name or (":" in target and not attribute):
        raise ConfigError(f"{target!r} does not name an app: write MODULE:APP, for example shop.jobs:app")
    module = _import(name)
    app = _attribute(module, name, attribute or DEFAULT_ATTRIBUTE)
    app.settings = app.settings.with_bootstrap(bootstrap).with_status_url(status_url)
    app.check()
    return app


def module_name(target: str) -> tuple[str, Path]:
    """Return the dotted name of the module that ``target`` names, and the folder from which it is imported.

    For a path to a file, this is the name under which the file's package imports the module, so that the module is
    imported only once. Raises `ConfigError` if there is no such file.
    """
    text = target.partition(":")[0]
    if not text.endswith(".py") and os.sep not in text:
        return text, Path.cwd()
    path = Path(text).absolute()
    if not path.is_file():
        raise ConfigError(f"{text!r} is not a file (looked at {path}); write MODULE:APP or path/to/file.py:APP")
    parts = [] if path.name == "__init__.py" else [path.stem]
    folder = path.parent
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    return ".".join(parts), folder


def _import(text: str) -> ModuleType:
    name, folder = module_name(text)
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        if isinstance(exc.name, str) and (name == exc.name or name.startswith(exc.name + ".")):
            raise ConfigError(
                f"module {name!r} does not exist: there is no {exc.name!r} in {folder} or among the installed packages; "
                f"run the command in the folder that contains the module, or give a path{_looks_like(name, folder)}"
            ) from None
        raise ConfigError(_inside(name, exc)) from exc
    except ConfigError as exc:  # the app's declarations are wrong: keep the error's class, add file and line
        kind = type(exc) if vars(errors).get(type(exc).__name__) is type(exc) else ConfigError
        raise kind(f"{_file_and_line(exc)}{text_of(exc)}") from exc
    except KeyboardInterrupt:
        raise
    except BaseException as exc:  # a module may raise anything, also SystemExit
        raise ConfigError(_inside(name, exc)) from exc


def _inside(name: str, exc: BaseException) -> str:
    message = text_of(exc)
    what = f"{type(exc).__name__}: {message}" if message else type(exc).__name__
    return f"module {name!r} was found, but importing it failed: {_file_and_line(exc)}{what}"


def _file_and_line(exc: BaseException) -> str:
    """Return ``file:line: `` of the last frame that belongs to neither Jobledger nor the import system; "" if there is
    none."""
    if isinstance(exc, SyntaxError) and exc.filename:
        return f"{short(exc.filename)}:{exc.lineno}: "
    package = Path(__file__).absolute().parents[1]
    ours = [(package / part).resolve() for part in (".", "consumers", "streams", "schemas")]  # symlinks in a checkout
    frames = [
        frame
        for frame in traceback.extract_tb(exc.__traceback__)
        if not frame.filename.startswith("<")
        and f"{os.sep}importlib{os.sep}" not in frame.filename
        and not any(Path(frame.filename).resolve().is_relative_to(folder) for folder in ours)
    ]
    return f"{short(frames[-1].filename)}:{frames[-1].lineno}: " if frames else ""


def _looks_like(name: str, folder: Path) -> str:
    """Return a hint if ``folder`` has a module with a similar name, else ""."""
    modules = [p.stem for p in folder.glob("*.py")] + [p.parent.name for p in folder.glob("*/__init__.py")]
    near = difflib.get_close_matches(name.partition(".")[0], sorted(modules), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _attribute(module: ModuleType, name: str, attribute: str) -> App:
    from jobledger.app import App

    # `type` instead of `isinstance`, which would read an object's own ``__class__``: that may raise.
    apps = sorted(key for key, value in vars(module).items() if issubclass(type(value), App))
    has = f"the module's apps are {', '.join(map(repr, apps))}" if apps else "the module has no App"
    try:
        candidate = getattr(module, attribute)
    except AttributeError:
        near = difflib.get_close_matches(attribute, apps or sorted(vars(module)), n=1)
        hint = f"; did you mean {name}:{near[0]}?" if near else (f": write {name}:{apps[0]}" if apps else "")
        raise ConfigError(f"module {name!r} has no attribute {attribute!r}; {has}{hint}") from None
    if not issubclass(type(candidate), App):
        raise ConfigError(f"{name}:{attribute} is a {type(candidate).__name__}, not a jobledger.App; {has}")
    app: App = candidate
    return app


def find_app(
    target: str | None, namespace: str | None, bootstrap: str | None = None, status_url: str | None = None
) -> App:
    """Return the app to query: the app that ``MODULE:APP`` or ``--app`` names, or an app without tasks for
    ``--namespace``. Without both, return an app without tasks for the namespace of the only status table on this
    machine.

    Raises `Wrong` if an app and a namespace are given, or if no app is found.
    """
    from jobledger.app import App
    from jobledger.config import Settings
    from jobledger.kafka.topic_names import check_name
    from jobledger.streams.status.store import namespaces_in

    if target is not None and namespace is not None:
        raise Wrong(f"both {target} and --namespace {namespace} are given: give only one of them")
    if target is not None:
        return load_app(target, bootstrap=bootstrap, status_url=status_url)
    settings = Settings.from_env().with_bootstrap(bootstrap).with_status_url(status_url)
    if namespace is None:
        namespaces = namespaces_in(settings.home / "status") if settings.status_url is None else []
        if len(namespaces) != 1:
            known = f" (namespaces on this machine: {', '.join(namespaces)})" if namespaces else ""
            raise Wrong(f"which app? Give MODULE:APP, --app MODULE:APP or --namespace NAME{known}")
        namespace = namespaces[0]
    with judged("--namespace"):
        check_name("namespace", namespace)
    return App(namespace, settings=settings)
