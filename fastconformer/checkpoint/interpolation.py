"""OmegaConf's interpolations: `${a.b}` stands for another value of the same document.

Source: OmegaConf 2.3.
"""

import re

MAX_CONFIG_VALUES = 500_000  # aliases and interpolations can grow without bound
MAX_STRING_CHARS = 1 << 20


def resolve(config: dict) -> dict:
    """A copy with every interpolation replaced by what it stands for.

    Raises:
        ValueError: a reference leads nowhere, in a circle or to a function; names the key.
        RecursionError: the document is nested too deeply, or contains itself.
    """
    return _Interpolations(config).resolve()


def escape(value):
    """A literal `${` is `\\${` in OmegaConf, and backslashes right before it are doubled."""
    if isinstance(value, dict):
        return {key: escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [escape(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    return value


class _Interpolations:
    """Resolves OmegaConf interpolations over one document.

    `${a.b}`, `${a[0].b}` from the top; `${.x}` beside the value, `${..x}` one level up; inside a
    string, nested (`${a.${b}}`), through other interpolations. `${name:...}` calls a function of
    the process that wrote the file and is refused. A node is named by its path, a tuple of keys.
    """

    def __init__(self, config: dict):
        self.config = config
        self.values = {}  # path -> resolved value
        self.active = []  # paths being resolved, to find a cycle

    def resolve(self) -> dict:
        self.count = 0
        value = self._value(())
        self.count = 0
        return self._copy(value)

    def _copy(self, value):
        self._count()
        if isinstance(value, dict):
            return {key: self._copy(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._copy(item) for item in value]
        return value

    def _count(self):
        self.count += 1
        if self.count > MAX_CONFIG_VALUES:
            raise ValueError(f"expands to more than {MAX_CONFIG_VALUES} values")

    def _value(self, path: tuple):
        if path in self.values:
            return self.values[path]
        self._enter(path)
        self._count()
        raw = self._node(path)
        if isinstance(raw, dict):
            value = {key: self._value((*path, key)) for key in raw}
        elif isinstance(raw, list):
            value = [self._value((*path, index)) for index in range(len(raw))]
        elif isinstance(raw, str):
            value = self._string(raw, path)
        elif raw is None or isinstance(raw, int | float):
            value = raw
        else:
            raise ValueError(f"{_dotted(path)} is a {type(raw).__name__}, expected plain values")
        self.active.pop()
        self.values[path] = value
        return value

    def _enter(self, path: tuple) -> None:
        if path in self.active:
            circle = [*self.active[self.active.index(path) :], path]
            raise ValueError(f"interpolation cycle {' -> '.join(map(_dotted, circle))}")
        self.active.append(path)

    def _node(self, path: tuple):
        node = self.config
        for key in path:
            node = node[key]
        return node

    def _string(self, text: str, path: tuple):
        if "${" not in text:
            return text
        parts = _split(text, path)
        if len(parts) == 1 and parts[0][1]:
            return self._refer(parts[0][0], path)
        joined = ""
        for part, is_reference in parts:
            value = self._refer(part, path) if is_reference else part
            if isinstance(value, dict | list):
                raise ValueError(f"{_dotted(path)}: {text} puts a mapping or list into a string")
            joined += str(value)
            if len(joined) > MAX_STRING_CHARS:
                raise ValueError(f"{_dotted(path)} expands to over {MAX_STRING_CHARS} characters")
        return joined

    def _refer(self, reference: str, path: tuple):
        target = self._locate(reference, path)
        value = self._value(target)
        if value == "???":
            raise ValueError(f"{_dotted(path)}: ${{{reference}}} refers to a missing value (???)")
        return value

    def _locate(self, reference: str, path: tuple) -> tuple:
        """Path of the node that `${reference}` at path stands for."""
        where = f"{_dotted(path)}: ${{{reference}}}"
        text = self._string(reference, path) if "${" in reference else reference
        if ":" in text:
            raise ValueError(
                f"{where} calls a resolver, which only the program that wrote it has; "
                "replace it by its value"
            )
        match = _REFERENCE.fullmatch(text.strip(" \t"))
        if not match:
            raise ValueError(f"{where} is not an interpolation that OmegaConf knows")
        levels = len(match[1])
        if levels > len(path):
            raise ValueError(f"{where} leads above the top of the config")
        target = path[: len(path) - levels] if levels else ()
        for name in re.findall(_KEY, match[2]):
            node = self._node(target := self._follow(target))
            keys = [name, int(name)] if re.fullmatch(r"-?[0-9]+", name) else [name]
            if isinstance(node, list):
                keys = [key % len(node) for key in keys[1:] if -len(node) <= key < len(node)]
            elif isinstance(node, dict):
                keys = [key for key in keys if key in node]
            else:
                keys = []
            if not keys:
                raise ValueError(f"{where} does not exist: no {name} in {_dotted(target)}")
            target = (*target, keys[0])
        return target

    def _follow(self, path: tuple) -> tuple:
        """path, or, where an interpolation stands there alone, the path that it stands for."""
        node = self._node(path)
        parts = _split(node, path) if isinstance(node, str) and "${" in node else []
        if len(parts) != 1 or not parts[0][1]:
            return path
        self._enter(path)
        target = self._follow(self._locate(parts[0][0], path))
        self.active.pop()
        return target


_KEY = r"[^\\{}()\[\]:. \t'\"]+"
_REFERENCE = re.compile(rf"(\.*)((?:{_KEY}|\[{_KEY}\])(?:\.{_KEY}|\[{_KEY}\])*)")


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path)) or "the top level"


def _split(text: str, path: tuple) -> list[tuple[str, bool]]:
    """Text with `${...}` -> [(text, False) or (inside of the braces, True)], empty texts left out.
    `\\${` is a literal; of other backslashes before `${`, two stand for one."""
    parts, literal, position = [], "", 0
    while match := re.compile(r"(\\*)\$\{").search(text, position):
        literal += text[position : match.start()] + "\\" * (len(match[1]) // 2)
        position = match.end()
        if len(match[1]) % 2:
            literal += "${"
            continue
        depth = 1
        for brace in re.compile(r"\$?\{|\}").finditer(text, position):
            depth += -1 if brace[0] == "}" else 1
            if depth == 0:
                break
        if depth:
            raise ValueError(f"{_dotted(path)}: {text!r} has a ${{ without its }}")
        parts += [(literal, False), (text[position : brace.start()], True)]
        literal, position = "", brace.end()
    parts.append((literal + text[position:], False))
    return [part for part in parts if part[0] or part[1]]
