"""How a value of an untrusted config is refused: with a ValueError that names it."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def config_errors() -> Iterator[None]:
    """What Python and torch say to a value of a kind or size that nothing here expects, as a
    ValueError; around all that is built from a config, which is untrusted."""
    try:
        yield
    except (TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the config holds a value that fits nothing: {reason}") from error


def require(ok: bool, message: str):
    if not ok:
        raise ValueError(message)
