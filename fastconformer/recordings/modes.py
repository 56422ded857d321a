"""Modes of a model that hold for a while."""

import contextlib

from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """The whole model in eval mode inside; after it each module is as it was."""
    trained = [module for module in model.modules() if module.training]
    for module in trained:
        module.training = False
    try:
        yield
    finally:
        for module in trained:
            module.training = True
