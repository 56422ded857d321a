"""A recipe's sections as dataclasses: a field's limits beside it, and YAML values checked by them.

`key` declares a field with its limits, `convert` makes a section of a plain mapping and says what
is wrong with it; what the keys of a section mean together its `__post_init__` checks. `flat` and
`put` name the values of nested mappings by dotted keys.
"""

import dataclasses
import difflib
import math
import types
import typing
from pathlib import Path

STRICTNESS = (bool, int, float, str, dict)  # 3 stays an int where float | int is allowed


def key(default, **limits):
    """A field of a section.

    Args:
        default: its default value.
        limits: one_of (the values it may have), at_least, above (a number that it must exceed),
            share (True: 0 to 1), in_order (True: a pair (low, high)). None is always within them.
    """
    known = {"one_of", "at_least", "above", "share", "in_order"}
    assert limits.keys() <= known, limits.keys() - known
    return dataclasses.field(default=default, metadata=limits)


def check_limits(name: str, value, limits) -> None:
    """ValueError, naming the key, where a value is not within a field's limits."""
    if "one_of" in limits and value not in limits["one_of"]:
        listed = ", ".join("null" if choice is None else choice for choice in limits["one_of"])
        raise ValueError(f"{name} is {value!r}, expected one of {listed}")
    if value is None:
        return
    if "at_least" in limits and value < limits["at_least"]:
        raise ValueError(f"{name} is {value}, expected at least {limits['at_least']}")
    if "above" in limits and value <= limits["above"]:
        raise ValueError(f"{name} is {value}, expected more than {limits['above']}")
    if "share" in limits and not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}, expected 0 to 1")
    if "in_order" in limits and value[0] > value[1]:
        raise ValueError(f"{name} is {list(value)}, expected [low, high]")


# --- dotted keys ----------------------------------------------------------------------------------


def flat(tree: dict, prefix: str = "") -> dict:
    """{dotted key: value} of nested mappings; lists stay whole, empty mappings are left out."""
    values = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            values |= flat(value, f"{prefix}{name}.")
        else:
            values[f"{prefix}{name}"] = value
    return values


def put(tree: dict, key: str, value) -> None:
    """Sets the value of a dotted key, in mappings that are made where there are none."""
    *sections, last = key.split(".")
    for name in sections:
        if not isinstance(tree.get(name), dict):
            tree[name] = {}
        tree = tree[name]
    tree[last] = value


# --- plain values to sections ---------------------------------------------------------------------


def convert(kind, value, where: str, name: str = "", root: type | None = None):
    """A plain value as `kind`, a type hint of a section or a section itself.

    Args:
        where: the source, for errors.
        name: dotted key of the value; empty: the whole recipe.
        root: the class of the whole recipe, in which a wrong key's nearest is looked for.
    Raises:
        ValueError: an unknown key, or a value of the wrong kind or beyond its limits.
    """
    if dataclasses.is_dataclass(kind):
        return _section(kind, value, where, name, root or kind)
    wrong = ValueError(f"{where}: {name} must be {_kind_name(kind)}, not {value!r}")
    if isinstance(kind, types.UnionType):
        if value is None and type(None) in kind.__args__:
            return None
        section = next((t for t in kind.__args__ if dataclasses.is_dataclass(t)), None)
        if section is not None and isinstance(value, dict):  # so that its own errors are told
            return convert(section, value, where, name, root)
        for option in sorted(kind.__args__, key=_strictness):
            try:
                return convert(option, value, where, name, root)
            except ValueError:
                continue
        raise wrong
    origin = typing.get_origin(kind)
    if origin is tuple:
        items = [value] if isinstance(value, str | dict) else value
        if not isinstance(items, list | tuple):
            raise wrong
        args = typing.get_args(kind)
        if args[-1] is not Ellipsis and len(items) != len(args):
            raise wrong
        return tuple(
            convert(args[0], item, where, f"{name}[{i}]", root) for i, item in enumerate(items)
        )
    if origin is dict:
        item_kind = typing.get_args(kind)[1]
        names_files = str in (item_kind, *typing.get_args(item_kind))
        value = named_files(value, where, name) if names_files else value
        if not isinstance(value, dict):
            raise wrong
        return {str(k): convert(item_kind, v, where, f"{name}.{k}") for k, v in value.items()}
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and is_number and _is_finite(value):
        return float(value)
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind in (dict, bool, str) and isinstance(value, kind):
        return value
    raise wrong


def _section(cls, value, where: str, name: str, root: type):
    prefix = f"{name}." if name else ""
    check_keys(cls, value or {}, where, prefix, root)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = {}
    for item, given in (value or {}).items():
        values[item] = convert(fields[item].type, given, where, prefix + item, root)
        try:
            check_limits(prefix + item, values[item], fields[item].metadata)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    try:
        return cls(**values)
    except ValueError as error:  # of the section's own rules
        raise ValueError(f"{where}: {error}") from None


def _strictness(kind) -> int:
    return STRICTNESS.index(kind) if kind in STRICTNESS else len(STRICTNESS)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond every float
        return False


def named_files(value, where: str, name: str):
    """A single file, or a list of them, gets its names from the files."""
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        return value
    named = {Path(str(item)).stem: item for item in value}
    if len(named) < len(value):  # .../fsdd/test.jsonl and .../an4/test.jsonl
        named = {f"{Path(str(i)).parent.name}_{Path(str(i)).stem}": i for i in value}
    if len(named) < len(value):
        raise ValueError(f"{where}: {name} has files of one name; write {{name: file}}")
    return named


def _kind_name(kind) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    names |= {type(None): "null", dict: "a mapping"}
    if dataclasses.is_dataclass(kind):
        return f"a mapping with {dataclasses.fields(kind)[0].name}"
    if isinstance(kind, types.UnionType):
        return " or ".join(_kind_name(option) for option in kind.__args__)
    if typing.get_origin(kind) is tuple:
        args = typing.get_args(kind)
        count = "" if args[-1] is Ellipsis else f"{len(args)} values, "
        return f"a list ({count}each {_kind_name(args[0])})"
    if typing.get_origin(kind) is dict:
        item = typing.get_args(kind)[1]
        is_file = str in (item, *typing.get_args(item))
        return f"a mapping from names to {'files' if is_file else _kind_name(item)}"
    return names.get(kind, str(kind))


# --- names of keys --------------------------------------------------------------------------------


def check_keys(cls, tree, where: str, prefix: str = "", root: type | None = None) -> None:
    """ValueError for a key that a section, or one inside it, does not have; names the nearest."""
    root = root or cls
    if not isinstance(tree, dict):
        name = prefix.rstrip(".")
        raise ValueError(f"{where}: {name} must be a section of keys, not {tree!r}")
    kinds = {field.name: field.type for field in dataclasses.fields(cls)}
    for name, value in tree.items():
        if name not in kinds:
            nearest = _nearest(str(name), prefix, sorted(kinds), root)
            raise ValueError(f"{where}: unknown key {prefix}{name}; {nearest}")
        if dataclasses.is_dataclass(kinds[name]) and value is not None:
            check_keys(kinds[name], value, where, f"{prefix}{name}.", root)


def _nearest(name: str, prefix: str, here: list[str], root: type) -> str:
    """What an unknown key was probably meant to be: here first, then in any other section."""
    close = difflib.get_close_matches(name, here, n=1)
    if close:
        return f"did you mean {prefix}{close[0]}?"
    last_parts = {key.split(".")[-1]: key for key in reversed(_all_keys(root))}
    close = difflib.get_close_matches(name, list(last_parts), n=1)
    if close:
        return f"did you mean {last_parts[close[0]]}?"
    return f"known keys: {', '.join(prefix + key for key in here)}"


def _all_keys(cls, prefix: str = "") -> list[str]:
    keys = []
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            keys += _all_keys(field.type, f"{prefix}{field.name}.")
        keys.append(f"{prefix}{field.name}")
    return keys
