"""YAML as NeMo's configs have it, read safely: OmegaConf's dialect, without omegaconf (a training
dependency). It is YAML 1.1 where 1e-5 is a number and a date is a string.

Source: OmegaConf 2.3.
"""

import re

import yaml

from .interpolation import MAX_CONFIG_VALUES, escape, resolve

CONFIG_MEMBER = "model_config.yaml"
MAX_YAML_DEPTH = 100


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """SafeLoader with OmegaConf's scalars; a key that appears twice is an error."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in getattr(node, "value", ()):
            key = (key_node.tag, key_node.value) if isinstance(key_node, yaml.ScalarNode) else None
            if key in seen and key and key[0] != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key[1]!r} appears twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes every string which _Loader would read as something else."""

    def ignore_aliases(self, data):
        return True

    def represent_text(self, text):
        # PyYAML's single quotes turn Unicode's other line breaks into blanks.
        style = '"' if re.search("[\x85\u2028\u2029]", text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _Dumper.represent_text)


# OmegaConf's floats: unlike YAML 1.1's they need no dot or sign in 1e5, and allow no sign in .5
_FLOAT = re.compile(
    r"""(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
    |\.[0-9_]+(?:[eE][-+][0-9]+)?
    |[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+\.[0-9_]*
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))\Z""",
    re.VERBOSE,
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if not tag.endswith((":timestamp", ":float"))]
    for first, forms in _Loader.yaml_implicit_resolvers.items()
}
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def check_yaml_depth(text: bytes) -> None:
    """Raises YAMLError where the text is none, is nested so deeply that loading it, which takes
    the C stack, could end the process, or has more values than memory is for."""
    depth = 0
    for n_events, event in enumerate(yaml.parse(text, _Loader)):  # takes no stack and no memory
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_YAML_DEPTH:
            raise yaml.YAMLError(f"nested too deeply, in more than {MAX_YAML_DEPTH} levels")
        if n_events > 2 * MAX_CONFIG_VALUES:  # a mapping has an event for a key, too
            raise yaml.YAMLError(f"too long, with more than {MAX_CONFIG_VALUES} values")


def load_config(text: bytes, name: str = CONFIG_MEMBER) -> dict:
    """model_config.yaml -> dict of plain values, every interpolation resolved; `name` is what
    messages call the file.

    Raises ValueError naming the line, or the key and the interpolation.
    """
    try:
        check_yaml_depth(text)
        config = yaml.load(text, _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{name} is not a mapping")
    try:
        config = resolve(config)
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply or contains itself") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    # A training script's whole config: NeMo's restore_from takes its `model` section too.
    return config["model"] if isinstance(config.get("model"), dict) else config


def dump_config(config: dict) -> bytes:
    """dict of plain values -> YAML that load_config and OmegaConf read as the same values."""
    return yaml.dump(
        escape(config), Dumper=_Dumper, allow_unicode=True, sort_keys=False, encoding="utf-8"
    )
