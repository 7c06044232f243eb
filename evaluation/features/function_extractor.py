"""A user's function as an extractor: MODULE:FUNCTION, from uint8 images (N, 3, H, W) to features (N, D).

The sha256 of its module's source stands for its weights. It is called on a few images before any work: its features
must be finite and the same at every call, and those of an image must not depend on the other images of a batch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation.features.networks import Network, Outputs
from raydit.errors import InvalidInput, NotFound

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MODULES_VARIABLE = "RAYDIT_MODULES"
"""Environment variable with a folder in which modules are found as well: jobs start in another folder."""
PROBE_IMAGES = 4
"""Images of the call before any work."""
_ROUNDING = 1e-4
"""Share of the largest feature by which features may differ between batches, or calls on a device that is not a CPU."""
_loaded: dict[str, str] = {}
"""Name of each module that this process has imported here -> sha256 of its source at that time."""


def find_source(name: str) -> Path:
    """Return the file of the module of MODULE:FUNCTION, which is looked for in the working directory too.

    Raises NotFound if there is no such module, InvalidInput if it is not written in Python.
    """
    module = name.partition(":")[0]
    imported = sys.modules.pop(module, None) if module in _loaded else None  # perhaps of another folder
    with _working_directory():
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError):  # a package that is no package, or one that fails
            spec = None
        finally:
            if imported is not None:
                sys.modules[module] = imported
    if spec is None or spec.origin is None:
        raise NotFound(
            f"no module {module!r} for the extractor {name!r}, in {os.getcwd()} or among the installed packages",
            "a Python module with a function from images to features",
            "Correct the name, run in the folder that the module is in, or install it; a cluster's nodes need it as "
            "well, and `raydit submit` sends the working directory to them",
        )
    path = Path(spec.origin)
    if path.suffix != ".py":
        raise InvalidInput(
            f"{name}: found the module {spec.origin}", "a module with Python source", "write a wrapper module in Python"
        )
    return path


def build_function(name: str, device: torch.device, *, image_size: int) -> Network:
    """Import a function, check it on a few random images, and return it as a network.

    image_size: side of the images in pixels. The function gets images on `device` and may return a tensor or an array.
    Raises InvalidInput for one that does not fit, and NotFound for a missing module.
    """
    import torch

    function = _import_function(name)

    def extract(images: Tensor) -> Tensor:
        try:
            found = torch.as_tensor(function(images)).detach()
        except Exception as error:  # whatever the user's function raises
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            images_given = f"{len(images)} uint8 images of {images.shape[3]} px"
            raise _wrong(name, f"a function that fails on {images_given} ({reason})", "features (N, D)") from error
        if found.ndim != 2 or len(found) != len(images) or found.shape[1] == 0:
            raise _wrong(name, f"an output of shape {tuple(found.shape)} for {len(images)} images", "(N, D)")
        return found.float()

    generator = torch.Generator().manual_seed(0)
    shape = (PROBE_IMAGES, 3, image_size, image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
    with torch.inference_mode():
        first, again, alone = (extract(part.clone()).cpu().numpy() for part in (images, images, images[:1]))
    _check(name, first, again, alone, exact=device.type == "cpu")
    return Network(lambda images: Outputs(extract(images)), feature_dim=first.shape[1], num_logits=0)


def _check(name: str, first: np.ndarray, again: np.ndarray, alone: np.ndarray, *, exact: bool) -> None:
    """Check the features of the same images at two calls, and of the first of them alone."""
    if not np.isfinite(first).all():
        raise _wrong(name, "features with NaN or infinity", "finite numbers")
    bound = _ROUNDING * float(np.abs(first).max())
    if first.shape != again.shape or (np.abs(first - again).max() > (0.0 if exact else bound)):
        raise _wrong(
            name,
            "other features at a second call on the same images",
            "a deterministic function",
            "switch a network to eval(), and draw nothing at random, or from a seed that is set in every call",
        )
    if first.shape[1] != alone.shape[1] or np.abs(first[:1] - alone).max() > bound:
        raise _wrong(
            name,
            "features of an image that depend on the other images of its batch",
            "features of each image by itself",
            "switch a network to eval(), and normalise each image by itself",
        )


def _import_function(name: str) -> Any:
    module_name, _, function_name = name.partition(":")
    module = _import_module(module_name, find_source(name))
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        found = f"no function {function_name!r} in {module.__file__}"
        raise _wrong(name, found, f"one of its {', '.join(known[:10]) or 'functions'}", "correct the name")
    return function


def _import_module(name: str, path: Path) -> ModuleType:
    """Import a module, again if this process has imported another state of its source."""
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if name in sys.modules and _loaded.get(name, sha256) != sha256:
        del sys.modules[name]
    importlib.invalidate_caches()
    with _working_directory():
        try:
            module = importlib.import_module(name)
        except Exception as error:  # whatever the user's module raises
            found = f"a module that fails ({type(error).__name__}: {error})"
            raise _wrong(name, found, "one that can be imported") from error
    _loaded[name] = sha256
    return module


@contextmanager
def _working_directory() -> Iterator[None]:
    """Look for modules in the working directory as well, which the command `raydit` itself does not.

    Installed modules come first, so that no file of the same name stands in for one of them.
    """
    folders = [os.getcwd(), *filter(None, [os.environ.get(MODULES_VARIABLE)])]
    added = [folder for folder in folders if folder not in sys.path]
    sys.path.extend(added)
    try:
        yield
    finally:
        for folder in added:
            sys.path.remove(folder)


def _wrong(name: str, found: str, expected: str, do: str = "correct the function") -> InvalidInput:
    return InvalidInput(f"the extractor {name!r}: found {found}", expected, do)
