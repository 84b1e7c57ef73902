"""Reads a pickle without calling anything in it.

A pickle is a program: it can import any function and call it. Here, a name that is not in a short
table of constants and plain containers becomes a new, empty class, so every object in the file
comes back as an `Inert` that records how it was made. Nothing is imported, and no code runs but
this module and those containers. The base class is Python's own unpickler and not the C one, which
allocates as much memory as a number in the file says and cannot leave opcodes out. It takes about
twice as long.
"""

from __future__ import annotations

import collections
import io
import pickle
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

# What a damaged or hostile file can raise while it is read.
READ_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.PickleError,
    struct.error,
    zipfile.BadZipFile,
)

# Calling a container with any arguments only fills it. A torch.Size is a tuple of integers.
_CONTAINERS: dict[tuple[str, str], Any] = {
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    # Their names in protocol 2, which torch.save uses.
    ("__builtin__", "set"): set,
    ("__builtin__", "frozenset"): frozenset,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): tuple,
}
# Opcodes that no file we read needs. The first three look objects up in a registry that other code
# in this process fills; the others take buffers from outside or allocate sizes that were not read.
_LEFT_OUT = (
    pickle.EXT1,
    pickle.EXT2,
    pickle.EXT4,
    pickle.NEXT_BUFFER,
    pickle.READONLY_BUFFER,
    pickle.BYTEARRAY8,
)


class Inert:
    """Stands for an object of an unknown class, and records how it was made.

    Each name in a file gets its own subclass, so one file cannot change how another is read.

    Attributes:
        qualified_name: Module and name in the file.
        args: Arguments of the class or function.
        state: State that the file sets on the object, or None.
    """

    qualified_name = ""
    args: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:  # noqa: D102
        made = super().__new__(cls)
        made.args = args
        return made

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        """Stand for the result of calling what this stands for, such as a partial function."""
        return Inert(*args)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Ignore an item of a mapping."""

    def append(self, value: Any) -> None:
        """Ignore an item of a list."""

    def extend(self, values: Any) -> None:
        """Ignore items of a list."""

    def __repr__(self) -> str:
        return f"<{self.qualified_name}>"


class _Unpickler(pickle._Unpickler):
    dispatch = {  # noqa: RUF012
        key: value
        for key, value in pickle._Unpickler.dispatch.items()
        if key not in {code[0] for code in _LEFT_OUT}
    }

    def __init__(self, file: io.BytesIO, constants: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(file)
        self._constants = {**_CONTAINERS, **constants}
        self._classes: dict[tuple[str, str], type[Inert]] = {}

    def find_class(self, module: str, name: str) -> Any:
        key = (module, name)
        if key in self._constants:
            return self._constants[key]
        if key not in self._classes:
            fields = {"qualified_name": f"{module}.{name}"}
            self._classes[key] = type("Inert", (Inert,), fields)
        return self._classes[key]

    def persistent_load(self, key: Any) -> Any:
        """Stand for the storage of a tensor, which is elsewhere in the file and never read."""
        return Inert(key)


def read_pickle(content: bytes, constants: Mapping[tuple[str, str], Any] | None = None) -> Any:
    """Read a pickle without running it.

    Args:
        content: The pickle.
        constants: Values for further (module, name) pairs; they must be immutable and not callable.

    Returns:
        Numbers, strings, bytes, plain containers, `constants`, and `Inert` for everything else.

    Raises:
        Exception: One of `READ_ERRORS`, if it cannot be read.
    """
    return _Unpickler(io.BytesIO(content), constants or {}).load()


def read_saved(content: bytes, constants: Mapping[tuple[str, str], Any] | None = None) -> Any:
    """Read a file of `torch.save` without running it. Otherwise as `read_pickle`.

    Returns:
        As `read_pickle`; tensors are `Inert`.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        [entry] = [one for one in archive.infolist() if one.filename.endswith("/data.pkl")]
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > len(content):
            raise ValueError("its pickle is compressed, which torch.save never does")
        return read_pickle(archive.read(entry), constants)
