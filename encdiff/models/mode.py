"""Eval mode for the time of a call, whatever other threads do with the same model meanwhile."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from weakref import WeakKeyDictionary

import torch
from torch import nn

_lock = Lock()
_inside: WeakKeyDictionary[nn.Module, tuple[int, bool]] = WeakKeyDictionary()  # how many, and the mode before them


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside the block; the mode before it once the last of all threads has left."""
    with _lock:
        count, training = _inside.get(module, (0, module.training))
        _inside[module] = count + 1, training
        if count == 0:
            module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        with _lock:
            count, training = _inside.pop(module)
            if count > 1:
                _inside[module] = count - 1, training
            else:
                module.train(training)
