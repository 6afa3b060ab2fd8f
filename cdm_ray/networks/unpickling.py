"""Reads EDM's checkpoint pickles without running anything that is in them.

Such a pickle asks for functions by name, and its network classes come as Python source that the
original `torch_utils.persistence._reconstruct_persistent_obj` executes. Here a small stack machine
interprets the instructions that data needs, and no others; of names it knows those in `_NAMES`,
each standing for a function of this module that only rearranges data. The pickle can thus call
nothing else, and a name that is not there is refused with its full name.
"""

from __future__ import annotations

import io
import itertools
import pickletools
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cdm_ray.errors import ConfigError


@dataclass(eq=False)
class PickledObject:
    """An object whose class is not at hand: the name of the class, and the object's attributes."""

    class_name: str
    state: dict[Any, Any] = field(default_factory=dict)


def load_edm_pickle(path: Path) -> object:
    """The pickled value, of builtin containers and numbers, CPU tensors and `PickledObject`.

    Raises ConfigError, naming what was refused, for a pickle with anything else in it, and for a
    file that is damaged or no pickle.
    """
    try:
        with path.open("rb") as file:
            if file.read(1) != b"\x80":
                raise _NoPickle
            file.seek(0)
            return _StackMachine().run(file)
    except _NoPickle:
        raise ConfigError(f"{path}: not a pickle; give EDM's .pkl, or a .safetensors") from None
    except _Refused as refused:
        raise ConfigError(
            f"{path}: refused, nothing in it was run: it contains {refused}, which an EDM "
            "checkpoint does not; use the published file, or convert this one to .safetensors"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, LookupError, OverflowError, MemoryError) as error:
        raise ConfigError(f"{path}: truncated or damaged ({one_line(str(error))})") from None


class _NoPickle(Exception):
    """The file does not begin as pickles of protocol 2 and above do."""


class _Refused(Exception):
    """Says what is refused, to follow `it contains`."""


@dataclass(frozen=True, eq=False)
class _Name:
    """A name that the pickle asks for, and what it gets to call instead."""

    full: str
    function: Callable[..., object]


class _StackMachine:
    """Interpreter of the pickle instructions for data; see the module `pickletools`."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self, file: io.BufferedReader) -> object:
        for instruction, argument, _ in pickletools.genops(file):
            self._execute(instruction.name, argument)
        return self._stack.pop()

    def _execute(self, name: str, argument: Any) -> None:
        stack = self._stack
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "SHORT_BINUNICODE" | "BINUNICODE" | "SHORT_BINBYTES" | "BINBYTES" | "BINBYTES8":
                stack.append(argument)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_SET" | "EMPTY_TUPLE":
                empty: Any = {"DICT": dict, "LIST": list, "SET": set, "TUPLE": tuple}[name[6:]]()
                stack.append(empty)
            case "MARK":
                self._outer.append(stack)
                self._stack = []
            case "TUPLE":
                items = self._marked()
                self._stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(reversed([stack.pop() for _ in range(int(name[-1]))])))
            case "APPEND" | "SETITEM":
                count = 1 if name == "APPEND" else 2
                self._fill(name, list(reversed([stack.pop() for _ in range(count)])))
            case "APPENDS" | "SETITEMS" | "ADDITEMS":
                self._fill(name, self._marked())
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "GLOBAL":
                stack.append(_resolve(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(_resolve(module, attribute))
            case "REDUCE" | "NEWOBJ":
                arguments, called = stack.pop(), stack.pop()
                stack.append(_call(called, arguments))
            case "BUILD":
                state = stack.pop()
                _build(stack[-1], state)
            case _:
                raise _Refused(f"the pickle instruction {name}")

    def _marked(self) -> list[Any]:
        """Everything pushed since the last MARK."""
        items, self._stack = self._stack, self._outer.pop()
        return items

    def _fill(self, name: str, items: list[Any]) -> None:
        """Put items into the container on top of the stack, which must be of the builtin type."""
        target = self._stack[-1]
        kind = {"A": list, "S": dict}[name[0]] if name != "ADDITEMS" else set
        if type(target) is not kind:
            raise _Refused(f"{name} on {_kind_of(target)}")
        keys = items if kind is set else items[::2] if kind is dict else []
        # Tuples hash recursively, without a limit of their own.
        if any(type(key) not in (str, int) for key in keys):
            raise _Refused("a dictionary or set with keys that are neither str nor int")
        if isinstance(target, dict):
            target.update(zip(keys, items[1::2], strict=True))
        elif isinstance(target, set):
            target.update(items)
        else:
            target.extend(items)


def _resolve(module: object, attribute: object) -> _Name:
    if type(module) is not str or type(attribute) is not str:
        raise _Refused("a name that is not a string")
    full = f"{module}.{attribute}"
    if full not in _NAMES:
        raise _Refused(one_line(full))
    return _Name(full, _NAMES[full])


def _call(called: object, arguments: object) -> object:
    if type(called) is not _Name or type(arguments) is not tuple:
        raise _Refused(f"a call of {_kind_of(called)}")
    try:
        return called.function(*arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _Refused(
            f"{called.full} with arguments that do not fit ({one_line(str(error))})"
        ) from None


def _build(target: object, state: object) -> None:
    """The BUILD instruction: an object's attributes, after the object."""
    if type(target) is PickledObject and type(state) is dict:
        target.state = state
    elif type(target) is _DType and type(state) is tuple and len(state) > 1:
        target.set_byte_order(state[1])
    elif type(target) is not dict or state:  # EasyDict has no attributes, but may say so
        raise _Refused(f"a state for {_kind_of(target)}")


def _persistent(meta: dict[str, Any]) -> PickledObject:
    """An object of EDM's `persistent_class`; its source, `module_src`, is left alone."""
    if type(meta) is not dict or meta.get("type") != "class" or meta.get("version") != 6:
        raise ValueError("not a persistent class of version 6")
    name, state = meta.get("class_name"), meta.get("state")
    if type(name) is not str or type(state) is not dict:
        raise ValueError("no class_name or state")
    return PickledObject(name, state)


HEADER = 5
"""Pickles that torch.save puts before the numbers of a storage, in the format that pickle uses."""
HEADER_INSTRUCTIONS = 1000
"""Most instructions in each of them; the longest has about 25."""


def _storage(data: bytes) -> torch.Tensor:
    """All elements of a pickled storage [n]: a file of torch.save's inside of the pickle."""
    if type(data) is not bytes:
        raise TypeError("bytes expected")
    header = io.BytesIO(data)
    for _ in range(HEADER):
        instructions = itertools.islice(pickletools.genops(header), HEADER_INSTRUCTIONS)
        if sum(1 for _ in instructions) == HEADER_INSTRUCTIONS:
            # torch.load refuses calls by itself, but nesting without end crashes it.
            raise ValueError("a header that is too long")
    try:
        with warnings.catch_warnings(action="ignore"):
            loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # what torch.load raises for a damaged file is not a closed set
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = str(error).rpartition("WeightsUnpickler error:")[2].partition("Check the")[0]
        raise ValueError(found[1] if found else reason) from None
    if not isinstance(loaded, torch.storage.TypedStorage):
        raise TypeError(f"{_kind_of(loaded)}, not a storage")
    with warnings.catch_warnings(action="ignore"):  # that TypedStorage will go
        return torch.empty(0, dtype=loaded.dtype).set_(loaded.untyped())


def _tensor(
    storage: torch.Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> torch.Tensor:
    """A view of a storage; raises RuntimeError outside of its bounds. The other arguments are
    requires_grad, hooks and metadata."""
    if not isinstance(storage, torch.Tensor):
        raise TypeError("a storage expected")
    return storage.as_strided(size, stride, offset)


def _parameter(data: torch.Tensor, *_: object) -> torch.Tensor:
    """The parameter's tensor. The other arguments are requires_grad and hooks."""
    if not isinstance(data, torch.Tensor):
        raise TypeError("a tensor expected")
    return data


class _DType:
    """numpy.dtype of a number."""

    CODES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")

    def __init__(self, code: str, *_: object) -> None:
        if type(code) is not str or code not in self.CODES:
            raise ValueError(f"{code if type(code) is str else _kind_of(code)} is no number")
        self._code, self._order = code, "="

    def set_byte_order(self, order: object) -> None:
        if type(order) is not str or order not in ("<", ">", "|"):
            raise _Refused("a numpy.dtype of unknown byte order")
        self._order = order

    def number(self, data: bytes) -> int | float | bool:
        (value,) = np.frombuffer(data, np.dtype(self._order + self._code))
        return value.item()


def _scalar(dtype: _DType, data: bytes) -> int | float | bool:
    """A numpy scalar, as a Python number."""
    if type(dtype) is not _DType or type(data) is not bytes:
        raise TypeError("a dtype and bytes expected")
    return dtype.number(data)


def _empty_dict() -> dict[Any, Any]:
    return {}


def _container(class_name: str) -> Callable[[], PickledObject]:
    return lambda: PickledObject(class_name)


_TORCH_CONTAINERS: dict[str, Callable[..., object]] = {
    f"torch.nn.modules.container.{name}": _container(name)
    for name in ("ModuleDict", "ModuleList", "Sequential")
}
_NAMES: dict[str, Callable[..., object]] = {
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "dnnlib.util.EasyDict": _empty_dict,
    "collections.OrderedDict": _empty_dict,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.storage._load_from_bytes": _storage,
    "numpy.dtype": _DType,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    **_TORCH_CONTAINERS,
}


def _kind_of(value: object) -> str:
    return value.full if type(value) is _Name else f"a {type(value).__name__}"


def one_line(text: str) -> str:
    """Printable and short, whatever a file put into it."""
    printable = " ".join(text.split()).encode("unicode_escape").decode()
    return printable if len(printable) <= 200 else f"{printable[:200]}..."
