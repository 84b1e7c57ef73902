"""Reading a pickle that a stranger may have written: nothing in it is called.

A pickle is a program: it names any function of any module and says what to call it with. Here a
name that is not in a short table of constants and plain containers becomes a new, empty class, so
every object of the file comes back as an `Inert` that holds what it was made with. Nothing is
imported and no code outside of this module and those containers runs. Built on Python's own
unpickler and not on the C one, which allocates as much memory as a number in the file says and
offers no way to leave operations out; it takes about twice as long. What was given up: real objects
of any class but those in the table.
"""

from __future__ import annotations

import collections
import io
import pickle
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

# What a file that is damaged, or made to do damage, raises while it is read.
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

# Containers only: calling one of them with anything does nothing but fill it. A torch.Size is a
# tuple of integers.
_CONTAINERS: dict[tuple[str, str], Any] = {
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    # As protocol 2 calls them, which torch.save uses.
    ("__builtin__", "set"): set,
    ("__builtin__", "frozenset"): frozenset,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): tuple,
}
# Operations that nothing we read makes use of. The first three look objects up in a registry that
# other code of this process fills; the others take buffers from outside or allocate unread sizes.
_LEFT_OUT = (
    pickle.EXT1,
    pickle.EXT2,
    pickle.EXT4,
    pickle.NEXT_BUFFER,
    pickle.READONLY_BUFFER,
    pickle.BYTEARRAY8,
)


class Inert:
    """An object of a class that is not known: what it was made with, and nothing else.

    Each name in a file gets a subclass of its own, so that nothing in one file can change what
    another one reads.

    Attributes:
        qualified_name: Module and name, as the file has them.
        args: What the class or function was called with.
        state: What the file sets on the object; None: nothing.
    """

    qualified_name = ""
    args: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:  # noqa: D102
        made = super().__new__(cls)
        made.args = args
        return made

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        """Stand for the result of what this stands for, such as a partial function."""
        return Inert(*args)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Pass over an item of a mapping's kind."""

    def append(self, value: Any) -> None:
        """Pass over an item of a list's kind."""

    def extend(self, values: Any) -> None:
        """Pass over items of a list's kind."""

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
        """Storages of tensors lie elsewhere in the file; nobody asks for them."""
        return Inert(key)


def read_pickle(content: bytes, constants: Mapping[tuple[str, str], Any] | None = None) -> Any:
    """Read a pickle without running it.

    Args:
        content: The pickle.
        constants: What stands for a (module, name): values that cannot be called or changed.

    Returns:
        Numbers, texts, bytes, plain containers, `constants`, and `Inert` for everything else.

    Raises:
        Exception: One of `READ_ERRORS`, when it cannot be read.
    """
    return _Unpickler(io.BytesIO(content), constants or {}).load()


def read_saved(content: bytes, constants: Mapping[tuple[str, str], Any] | None = None) -> Any:
    """Read what `torch.save` wrote, without running it and without its tensors.

    Args:
        content: The file.
        constants: As in `read_pickle`.

    Returns:
        As `read_pickle`; tensors are `Inert`.

    Raises:
        Exception: One of `READ_ERRORS`, when it cannot be read.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        [entry] = [one for one in archive.infolist() if one.filename.endswith("/data.pkl")]
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > len(content):
            raise ValueError("its pickle is compressed, which torch.save never does")
        return read_pickle(archive.read(entry), constants)
