"""The only look-up in the project: a dict with a name becomes the part it names."""

import dataclasses
import difflib
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Mapping

from ml_collections import ConfigDict


def build(spec):
    """dict(name="quantizers.fsq.FSQ", levels=(8, 8)) -> FSQ(levels=(8, 8)), whatever stands inside built first.

    `name` is an import path below jaxtok, or a full one ("mypackage.parts.FSQ"). A class is instantiated with the other
    keys; a function becomes functools.partial(function, **others). Lists become tuples, dicts without a name stay.

    Raises ValueError for a name that does not exist and TypeError for a key that the part does not have or lacks; both
    say the nearest right one.
    """
    if isinstance(spec, ConfigDict):
        spec = spec.to_dict()
    if isinstance(spec, (list, tuple)):
        return tuple(build(item) for item in spec)
    if not isinstance(spec, Mapping):
        return spec
    fields = {key: build(value) for key, value in spec.items() if key != "name"}
    if "name" not in spec:
        return fields
    part = resolve(spec["name"])
    check_keys(fields, parameters(part), spec["name"])
    missing = [name for name, p in parameters(part).items() if p.default is p.empty and name not in fields]
    if inspect.isclass(part):
        if missing:
            raise TypeError(f"{spec['name']} needs {', '.join(missing)}: give it beside `name` in the config.")
        return part(**fields)
    return functools.partial(part, **fields)


def resolve(name):
    """The object at an import path, below jaxtok first."""
    for path in (f"jaxtok.{name}", name):
        module, _, attribute = path.rpartition(".")
        try:
            if module:
                return getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # the part is there, something it needs is not
        except AttributeError:
            pass
    hint = nearest(name, _names_near(name))
    raise ValueError(f'There is no part "{name}".{hint} Names are import paths below jaxtok.')


def parameters(part):
    """The keyword arguments of a part, by name."""
    parameters = inspect.signature(part).parameters
    if dataclasses.is_dataclass(part):  # of a Flax module, without what Flax adds
        parameters = {k: v for k, v in parameters.items() if k not in ("parent", "name")}
    return {k: v for k, v in parameters.items() if v.kind not in (v.VAR_KEYWORD, v.VAR_POSITIONAL)}


def check_keys(given, known, where):
    """Raises TypeError for the first given key that is not known, naming the nearest."""
    for key in given:
        if key not in known:
            raise TypeError(f'{where} has no key "{key}".{nearest(key, known)} Known: {", ".join(known) or "none"}.')


def call(function, *args, where, options):
    """function(*args, **options), after check_keys(options): for the sections of a config that are one call."""
    check_keys(options, parameters(function), where)
    return function(*args, **options)


def nearest(name, known):
    """' Did you mean "x"?', or nothing where nothing is near."""
    close = difflib.get_close_matches(name, list(known), 1, 0.5)
    return f' Did you mean "{close[0]}"?' if close else ""


def _names_near(name):
    """All public names of the modules in the same room, and of the rooms."""
    import jaxtok

    room = name.split(".")[0]
    names = []
    for info in pkgutil.walk_packages(jaxtok.__path__):
        names.append(info.name)
    rooms = difflib.get_close_matches(room, names, 1, 0.5)
    if not rooms:
        return names
    package = importlib.import_module(f"jaxtok.{rooms[0]}")
    modules = [f"{rooms[0]}.{m.name}" for m in pkgutil.iter_modules(getattr(package, "__path__", []))] or rooms
    for module in modules:
        members = vars(importlib.import_module(f"jaxtok.{module}"))
        names += [f"{module}.{k}" for k, v in members.items() if getattr(v, "__module__", "") == f"jaxtok.{module}"]
    return names
