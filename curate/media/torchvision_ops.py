"""Make `import torchvision` work beside a CPU-only torch. Call it before open_clip's import.

The default torchvision wheel is built against the CUDA torch: next to a CPU-only
torch its C++ library fails to load (a CUDA symbol or shared object is missing). torchvision itself
forgives that, but its Python half then attaches fake kernels to `torchvision::nms` and
`torchvision::qnms`, two operators that only the C++ library would have declared, and the import
dies with "operator torchvision::nms does not exist".

Declaring the two schemas is enough for the import. The operators still have no kernel, and calling
one raises torchvision's own "Couldn't load custom C++ ops" error; image transforms, all that
open_clip uses, need none of them.

Source: torchvision 0.28.0, extension.py (_load_library) and _meta_registrations.py (register_fake).
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

# As declared in torchvision's csrc/ops/nms.cpp and csrc/ops/quantized/cpu/qnms_kernel.cpp.
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_lock = Lock()
_declared: list[Any] = []  # a Library takes its schemas back when it is collected


def ensure_torchvision_importable() -> None:
    """Declare torchvision's two missing operators, but only if its C++ library cannot.

    Idempotent and thread-safe; does nothing when torchvision is absent or whole.
    """
    with _lock:
        missing = _missing_operators()
        if missing and _is_installed() and not _loads_cpp_library():
            _declare(missing)


def _missing_operators() -> list[str]:
    torch: Any = import_module("torch")  # its operator registry has no type annotations
    return [name for name in _SCHEMAS if not hasattr(torch.ops.torchvision, name)]


def _is_installed() -> bool:
    return find_spec("torchvision") is not None


def _loads_cpp_library() -> bool:
    """Whether torchvision's `_C` library loads into this torch (and so declares its operators)."""
    torch: Any = import_module("torch")  # its operator registry has no type annotations
    libraries = _cpp_libraries()
    try:
        for library in libraries:
            torch.ops.load_library(library)
    except OSError:
        return False
    return bool(libraries)


def _cpp_libraries() -> list[Path]:
    spec = find_spec("torchvision")  # finds the package without running its __init__
    folders = spec.submodule_search_locations if spec else None
    found = [path for folder in folders or [] for path in sorted(Path(folder).glob("_C*"))]
    return [path for path in found if path.suffix in {".so", ".pyd", ".dylib"}]


def _declare(names: list[str]) -> None:
    library = import_module("torch.library").Library("torchvision", "FRAGMENT")
    for name in names:
        library.define(_SCHEMAS[name])
    _declared.append(library)
