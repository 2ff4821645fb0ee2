"""Trees of plain values and tensors as JSON and named tensors, and back."""

from __future__ import annotations

import base64
import math
import sys
from collections import Counter, OrderedDict, deque, namedtuple
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from mlodeco.errors import CheckpointError
from mlodeco.runtime.fsdp import whole

_SEQUENCES: Mapping[str, Callable[[list[Any]], Any]] = {
    kind.__name__: kind for kind in (tuple, set, frozenset, deque)
}
_MAPPINGS: Mapping[str, Callable[[list[Any]], Any]] = {
    kind.__name__: kind for kind in (dict, OrderedDict)
}

_COMPRESSED: Mapping[torch.layout, tuple[str, str]] = {
    torch.sparse_csr: ("crow_indices", "col_indices"),
    torch.sparse_bsr: ("crow_indices", "col_indices"),
    torch.sparse_csc: ("ccol_indices", "row_indices"),
    torch.sparse_bsc: ("ccol_indices", "row_indices"),
}
"""For each layout the methods that give the indices of a sparse tensor."""


def storable(tensor: Tensor, where: str) -> Tensor:
    """A tensor of a dtype that files have; complex numbers that they lack are pairs.

    Raises:
        CheckpointError: there is none for it.
    """
    if tensor.is_meta:
        raise _refusal(f"{where} is a tensor on the meta device")
    if tensor.layout != torch.strided:
        raise _refusal(f"{where} is a tensor of the layout {tensor.layout}")
    if not tensor.is_quantized and _is_stored(tensor.dtype):
        return tensor
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj())
    raise _refusal(f"{where} is a tensor of {tensor.dtype}")


@cache
def _is_stored(dtype: torch.dtype) -> bool:
    """Whether safetensors has a dtype."""
    try:
        save({"": torch.empty(0, dtype=dtype)})
    except KeyError:
        return False
    return True


def distinct(tensor: Tensor, storages: set[int]) -> Tensor:
    """A contiguous tensor on the CPU that shares its memory with none before, for a file."""
    found = tensor.to("cpu").contiguous()
    storage = found.untyped_storage().data_ptr()
    if storage in storages:
        return found.clone()
    storages.add(storage)
    return found


def encode(value: Any, where: str) -> tuple[Any, dict[str, Tensor]]:
    """JSON for a tree, and the tensors in it by names that the JSON refers to.

    Numbers are exact, and one tensor in two places is one. A tensor keeps the order of its
    dimensions in memory.

    Args:
        value: nested dictionaries, lists, tuples, namedtuples, sets and deques of tensors, NumPy
            arrays, numbers, strings, bytes and None.
        where: what it belongs to, for messages.

    Raises:
        CheckpointError: something else is in it; the message names its place.
    """
    encoder = _Encoder()
    try:
        return encoder.encode(value, where), encoder.tensors
    except RecursionError:
        raise CheckpointError(
            f"{where} is nested too deeply, or holds itself.",
            remedy="save a plain tree of values.",
        ) from None


def decode(found: Any, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    """The tree of some JSON; tensors that were on another device than the CPU are put on this."""
    return _Decoder(tensors, device).decode(found)


class _Encoder:
    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._known: dict[int, tuple[Any, dict[str, Any]]] = {}
        self._storages: set[int] = set()

    def encode(self, value: Any, path: str) -> Any:
        kind = type(value)
        if value is None or kind in (bool, str):
            return value
        if kind is int:
            return value if abs(value) < 2**63 else {"int": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {"float": repr(value)}
        if kind is complex:
            return {"complex": [self.encode(x, path) for x in (value.real, value.imag)]}
        if kind is bytes:
            return {"bytes": base64.b64encode(value).decode()}
        if kind is list:
            return self._items(value, path)
        if kind is torch.Size:
            return {"tuple": list(value)}
        if kind.__name__ in _SEQUENCES and kind is _SEQUENCES[kind.__name__]:
            return {kind.__name__: self._items(value, path)}
        if kind in (dict, OrderedDict, Counter):
            return self._mapping(value, path)
        if kind in (torch.dtype, torch.device):
            return {kind.__name__: str(value).removeprefix("torch.")}
        if isinstance(value, Tensor):
            return {"tensor": self._tensor(value, path)}
        if isinstance(value, tuple) and hasattr(kind, "_fields"):
            names = [kind.__module__, kind.__qualname__, list(kind._fields)]
            return {"namedtuple": [*names, self._items(value, path)]}
        return self._of_numpy(value, path)

    def _items(self, values: Any, path: str) -> list[Any]:
        return [self.encode(item, f"{path}[{n}]") for n, item in enumerate(values)]

    def _mapping(self, value: Mapping[Any, Any], path: str) -> Any:
        if type(value) is dict and all(type(key) is str for key in value):
            return {"map": {k: self.encode(v, f"{path}[{k!r}]") for k, v in value.items()}}
        pairs = [
            [self.encode(k, f"a key of {path}"), self.encode(v, f"{path}[{k!r}]")]
            for k, v in value.items()
        ]
        return {type(value).__name__: pairs}

    def _tensor(self, tensor: Tensor, path: str) -> dict[str, Any]:
        if id(tensor) not in self._known:
            self._known[id(tensor)] = tensor, self._described(tensor, path)
        return self._known[id(tensor)][1]

    def _described(self, tensor: Tensor, path: str) -> dict[str, Any]:
        if tensor.layout == torch.sparse_coo or tensor.layout in _COMPRESSED:
            parts = self.encode(_parts(tensor.detach()), path)
            return {"name": f"sparse {len(self._known)}", "sparse": parts}
        name = str(len(self.tensors))
        found: dict[str, Any] = {"name": name}
        value = whole(tensor).detach()
        if value.device.type != "cpu":
            found["placed"] = True
        if value.is_complex():
            found["complex"] = True
            value = torch.view_as_real(value.resolve_conj())
        value = storable(value, path).resolve_neg()
        order = sorted(range(value.dim()), key=value.stride, reverse=True)
        if not value.is_contiguous() and value.permute(order).is_contiguous():
            found["order"] = order
            value = value.permute(order)
        self.tensors[name] = distinct(value, self._storages)
        return found

    def _of_numpy(self, value: Any, path: str) -> Any:
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, numpy.ndarray | numpy.generic):
            kind = "scalar" if isinstance(value, numpy.generic) else "array"
            if kind == "array" and type(value) not in (numpy.ndarray, numpy.memmap):
                raise _refusal(f"{path} is a NumPy {type(value).__name__}")
            try:
                tensor = torch.from_numpy(numpy.array(value))
            except (TypeError, ValueError):  # objects, strings, dates, another order of bytes
                raise _refusal(f"{path} is a NumPy array of {value.dtype}") from None
            return {kind: self._tensor(tensor, path)}
        raise _refusal(f"{path} is a {type(value).__module__}.{type(value).__qualname__}")


def _parts(tensor: Tensor) -> list[Any]:
    """What makes a sparse tensor: its layout, shape, indices and values."""
    if tensor.layout == torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]
        return ["sparse_coo", list(tensor.shape), *parts, tensor.is_coalesced()]
    indices = [getattr(tensor, name)() for name in _COMPRESSED[tensor.layout]]
    layout = str(tensor.layout).removeprefix("torch.")
    return [layout, list(tensor.shape), *indices, tensor.values()]


class _Decoder:
    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self._tensors = tensors
        self._device = device
        self._known: dict[str, Tensor] = {}

    def decode(self, found: Any) -> Any:
        if isinstance(found, list):
            return [self.decode(item) for item in found]
        if not isinstance(found, dict):
            return found
        ((kind, part),) = found.items()
        if kind == "map":
            return {key: self.decode(value) for key, value in part.items()}
        if kind in _SEQUENCES:
            return _SEQUENCES[kind](self.decode(part))
        if kind in _MAPPINGS:
            return _MAPPINGS[kind]([self.decode(pair) for pair in part])
        if kind == "namedtuple":
            module, name, fields, items = part
            return tuple.__new__(_type_of(module, name, fields), self.decode(items))
        return self._leaf(kind, part)

    def _leaf(self, kind: str, part: Any) -> Any:
        match kind:
            case "tensor":
                return self._tensor(part)
            case "array":
                return self._tensor(part).numpy()
            case "scalar":
                return self._tensor(part).numpy()[()]
            case "int":
                return int(part, 16)
            case "float":
                return float(part)
            case "complex":
                return complex(*self.decode(part))
            case "bytes":
                return base64.b64decode(part, validate=True)
            case "Counter":
                return Counter(dict(self.decode(pair) for pair in part))
            case "dtype":
                return _dtype(part)
            case "device":
                return torch.device(part)
        raise ValueError(f"an unknown kind of value, {kind!r}")

    def _tensor(self, part: Mapping[str, Any]) -> Tensor:
        name = part["name"]
        if name not in self._known:
            is_sparse = "sparse" in part
            self._known[name] = self._sparse(part["sparse"]) if is_sparse else self._dense(part)
        return self._known[name]

    def _dense(self, part: Mapping[str, Any]) -> Tensor:
        # a copy: the file is mapped to memory
        value = self._tensors[part["name"]].clone()
        if "order" in part:
            order = part["order"]
            value = value.permute([order.index(n) for n in range(len(order))])
        if "complex" in part:
            value = torch.view_as_complex(value)
        return value.to(self._device) if "placed" in part else value

    def _sparse(self, part: Any) -> Tensor:
        layout, shape, *parts = self.decode(part)
        if layout == "sparse_coo":
            indices, values, is_coalesced = parts
            return torch.sparse_coo_tensor(
                indices, values, shape, is_coalesced=is_coalesced, check_invariants=True
            )
        rows, columns, values = parts
        return torch.sparse_compressed_tensor(
            rows, columns, values, shape, layout=getattr(torch, layout), check_invariants=True
        )


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return found


def _type_of(module: str, name: str, fields: list[str]) -> type[tuple[Any, ...]]:
    """A type of namedtuples: that of the program, else one with the same names."""
    known, make = sys.modules.get(module), namedtuple
    found = vars(known).get(name) if known is not None else None
    is_like = list(getattr(found, "_fields", ())) == fields
    if is_like and isinstance(found, type) and issubclass(found, tuple):
        return found
    return make(name.rpartition(".")[2], fields)


def _refusal(found: str) -> CheckpointError:
    return CheckpointError(
        f"{found}, which a checkpoint cannot hold.",
        expected="numbers, strings, bytes, tensors, NumPy arrays, and lists, tuples, sets and "
        "dictionaries of these.",
        remedy="if it is a batch, let the data give tuples or dictionaries of tensors; else let "
        "its owner have state_dict() and load_state_dict() that use the above alone; "
        "program.track('name', object) adds an object to the checkpoints.",
    )
