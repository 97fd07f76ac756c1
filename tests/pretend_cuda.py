"""A CUDA device for machines that have none: real numbers, computed on the CPU, under the rules of CUDA.

A tensor on the GPU is a `Pretended`, which holds the numbers in a CPU tensor. The code under test sees ``cuda:0`` and
takes its CUDA branches; `PretendCuda`, a dispatch mode, sees every operation and holds it to what a GPU demands:

- Operands on two devices are an error.
- What makes the host wait is counted in `waits`: values it asks for, results whose size depends on values, copies from
  and to memory that is not pinned. Copies from pinned memory, which it does not wait for, are counted in `uploads`.
- Capturing a graph computes nothing, and waiting or copying from the host meanwhile is an error. A replay runs the
  recorded operations on the recorded memory, and overwrites what other graphs of its pool left behind.

It knows nothing of speed, of how CUDA rounds, of streams that overtake each other, or of CUDA's own kernels.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda:0")
_COPIES = ("_to_copy", "to", "copy_")
_INDEXED = ("index", "index_put_", "index_put")
_DEPENDS_ON_VALUES = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


class Pretended(torch.Tensor):
    """A tensor on the pretended GPU. PyTorch's own code takes it for one without memory, ``meta``."""

    data_: torch.Tensor
    """Its numbers, on the CPU."""

    @staticmethod
    def __new__(cls, data):
        with torch.inference_mode(False):  # views made in inference mode of tensors made outside have to be possible
            made = torch.Tensor._make_wrapper_subclass(
                cls,
                data.size(),
                strides=data.stride(),
                storage_offset=data.storage_offset(),
                dtype=data.dtype,
                device="meta",
            )
        made.data_ = data
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)

    @property
    def data(self):
        """Of a parameter: what it holds may be replaced."""
        return self.detach()

    @data.setter
    def data(self, other):
        torch.Tensor.data.__set__(self, other)
        self.data_ = other.data_

    def tolist(self):
        """PyTorch has none for subclasses."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} of a tensor of the pretended GPU, outside of PretendCuda")


@dataclass(eq=False)
class Graph:
    """``torch.cuda.CUDAGraph``."""

    cuda: PretendCuda
    pool: object = None
    calls: list = field(default_factory=list)
    """Operation, operands, results, of CPU tensors."""
    memory: dict[int, torch.Tensor] = field(default_factory=dict)
    """Results that have memory of their own, by its address."""
    replays: int = 0

    def owns(self, data):
        """Whether the memory was taken while this graph was captured."""
        return data.untyped_storage().data_ptr() in self.memory

    def add(self, func, args, kwargs):
        """Record an operation; its results hold nothing yet."""
        written = [a for name, a in _named(func, args, kwargs).items() if _writes(func, name)]
        if written and not all(self.owns(a) for a in written):
            found = tuple(written[: len(func._schema.returns)])
            found = found[0] if len(found) == 1 else found or None
        else:
            found = func(*args, **kwargs)
            known = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
            for out in _tensors(found):
                if (address := out.untyped_storage().data_ptr()) not in known:
                    self.memory[address] = out
        self.calls.append((func, args, kwargs, found))
        return found

    def spoil(self):
        """Fill its memory with what nobody may read."""
        for data in self.memory.values():
            data.fill_(torch.nan if data.is_floating_point() else -1)

    def replay(self):
        """Run what was captured."""
        for other in self.cuda.graphs:
            if other is not self and other.pool == self.pool:
                other.spoil()
        for func, args, kwargs, found in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(_tensors(found), _tensors(again), strict=True):
                if old is not new and self.memory.get(old.untyped_storage().data_ptr()) is old:
                    old.copy_(new)
        self.replays += 1


class PretendCuda(TorchDispatchMode):
    """The device, while it is entered: ``model.to(CUDA)`` moves a model there."""

    def __init__(self):
        super().__init__()
        self.waits = Counter()
        """What the host waited for, by operation."""
        self.uploads = 0
        """Copies from pinned memory."""
        self.graphs: list[Graph] = []
        """All that were captured."""
        self.made = Counter()
        """Elements of the largest result of each dtype."""
        self._capturing: Graph | None = None
        self._pinned: dict[int, torch.Tensor] = {}
        self._patches = contextlib.ExitStack()

    def __enter__(self):
        stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: self._wait("synchronize"))
        replaced = {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "get_device_name": lambda: "pretended",
            "empty_cache": lambda: None,
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": lambda stream: contextlib.nullcontext(),
            "synchronize": lambda: self._wait("synchronize"),
            "graph_pool_handle": object,
            "CUDAGraph": lambda: Graph(self),
            "graph": self._capture,
        }
        self._patches.enter_context(mock.patch.multiple(torch.cuda, **replaced))
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        self._patches.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        # torch.tensor(…, device=CUDA) then comes by here as a copy from the host.
        self._patches.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._patches.close()

    @contextlib.contextmanager
    def _capture(self, graph, pool=None, stream=None, capture_error_mode="global"):
        graph.pool, self._capturing = pool, graph
        self.graphs.append(graph)
        try:
            yield
        finally:
            self._capturing = None
            graph.spoil()

    def _wait(self, why):
        if self._capturing:
            raise RuntimeError(f"{why}: operation not permitted when stream is capturing")
        self.waits[why] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func.overloadpacket.__name__
        if name in ("is_pinned", "pin_memory", "_pin_memory"):
            return self._pin(name, args[0])
        if kwargs.get("pin_memory"):
            return self._pin(name, func(*args, **kwargs | {"pin_memory": False}))
        named = _named(func, args, kwargs)
        tensors = _tensors((args, kwargs))
        ours = [t for t in tensors if isinstance(t, Pretended)]
        target = self._target(name, named, ours)
        if not ours and target != CUDA:
            return func(*args, **kwargs)
        self._check(func, name, named, tensors, target)
        plain, plain_kw = _map((args, kwargs), lambda t: t.data_ if isinstance(t, Pretended) else t)
        if target == CUDA:
            plain = [torch.device("cpu") if isinstance(a, torch.device) else a for a in plain]
            plain_kw |= {"device": torch.device("cpu")} if "device" in plain_kw else {}
        if name in _COPIES and target == CUDA and not ours:
            # On one device it would be the same tensor.
            found = torch.ops.aten._to_copy(named["self"], dtype=named.get("dtype"))
        elif self._capturing:
            found = self._capturing.add(func, plain, plain_kw)
        else:
            found = func(*plain, **plain_kw)
        if target != CUDA:
            return found
        for out in _tensors(found):
            self.made[out.dtype] = max(self.made[out.dtype], out.numel())
        known = {id(t.data_): t for t in ours}
        return _map(found, lambda t: known[id(t)] if id(t) in known else Pretended(t))

    def _target(self, name, named, ours):
        """Where the results are."""
        device = named.get("device")
        if device is None:
            return CUDA if ours else None
        device = torch.device(device)
        # PyTorch's own code hands on the device that it takes ours for, also for a number assigned to an element.
        taken = device.type == "meta" and (ours or name == "scalar_tensor")
        return CUDA if device.type == "cuda" or taken else device

    def _pin(self, name, tensor):
        if name == "is_pinned":
            return tensor.data_ptr() in self._pinned
        copied = tensor.clone()
        self._pinned[copied.data_ptr()] = copied  # kept, so that the address stays its own
        return copied

    def _check(self, func, name, named, tensors, target):
        """Count what the host waits for, and refuse what CUDA refuses."""
        host = [t for t in tensors if not isinstance(t, Pretended) and t.dim()]
        if name in _COPIES:
            source = named["src" if name == "copy_" else "self"]
            into = named["self"].device if name == "copy_" else target
            if isinstance(source, Pretended) and into != CUDA:
                self._wait("copy to the host")
            elif not isinstance(source, Pretended) and into == CUDA and source.dim():
                if self._capturing:
                    raise RuntimeError("a graph would read this host memory again in every replay")
                if source.data_ptr() in self._pinned and named.get("non_blocking"):
                    self.uploads += 1
                else:
                    self._wait("copy from memory that is not pinned")
        elif name in _INDEXED:
            if host:
                self._wait("indices on the host")
            if any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(named["indices"])):
                self._wait("indices by a mask")
        elif host and not name.startswith("_has_"):  # a question that moving a module asks of both
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, found cuda:0 and cpu")
        elif _DEPENDS_ON_VALUES & set(func.tags) or name in ("item", "is_nonzero", "equal"):
            self._wait(name)


def _named(func, args, kwargs):
    return {a.name: value for a, value in zip(func._schema.arguments, args)} | kwargs


def _writes(func, name):
    return any(a.name == name and a.alias_info and a.alias_info.is_write for a in func._schema.arguments)


def _map(tree, function):
    """Of every tensor; PyTorch's own pytrees would take half of the time."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: _map(value, function) for key, value in tree.items()}
    return type(tree)(_map(value, function) for value in tree) if isinstance(tree, (tuple, list)) else tree


def _tensors(tree):
    found = []
    _map(tree, found.append)
    return found
