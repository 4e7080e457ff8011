"""CUDA graphs on a CPU: what a script captures is recorded, and replayed without Python, on the same memory.

Within `emulated_cuda()` there seems to be a GPU, whose tensors are the CPU's. What a real one does, and what is done:
- A capture executes nothing. Here operations have to run to be recorded, so the memory that they wrote to is put back
  afterwards, the random state too, and what they made is filled with 0xFF bytes (NaN, -1): who reads it before the
  first replay finds that.
- A replay repeats the kernels on the addresses of the capture. Here the recorded ATen operations are called again with
  the recorded tensors and numbers, and their results are copied into the recorded ones. Views are addresses already.
- What waits for the device, or reads the host's memory, cannot be captured: `CaptureError`.
- Pinned memory must not be overwritten while a copy from it may be under way, until an event that was recorded after
  the copy, or the device, was waited for: `HazardError`.
Blind to cuDNN, Triton, streams, the allocator's pools and time. torch.compile steps aside while it records.
"""

import contextlib
import math

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class CaptureError(RuntimeError):
    """A GPU would refuse to capture this, or wait for the device in it."""


class HazardError(RuntimeError):
    """Pinned memory is overwritten while a copy from it may be under way."""


WAITS = "_local_scalar_dense nonzero masked_select _unique2 unique_dim unique_consecutive equal is_nonzero bincount"
HOST_DATA = "lift lift_fresh lift_fresh_copy"  # torch.tensor(data) and torch.as_tensor(array) end in these
MASKED = "index index_put index_put_ _index_put_impl_ _unsafe_index"


def tensors(tree) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def contents(memory: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(memory)


def is_mask(x) -> bool:
    return x is not None and x.dtype in (torch.bool, torch.uint8)


class Recorder(TorchDispatchMode):
    """The tape of a capture: the operations below autograd, with what they read and returned."""

    def __init__(self):
        super().__init__()
        self.tape, self.before, self.made = [], {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name.split("::")[1], kwargs or {}
        if name in WAITS.split() or name in MASKED.split() and any(map(is_mask, args[1])):
            raise CaptureError(f"{func} waits for the device")
        if name in HOST_DATA.split():
            raise CaptureError(f"{func} reads the host's memory")
        written = []
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written += tensors(args[i] if i < len(args) else kwargs.get(argument.name))
        for tensor in written:
            if storage(tensor) not in self.made | self.before:
                memory = tensor.untyped_storage()
                self.before[storage(tensor)] = memory, contents(memory).clone()
        args, kwargs = tree_map(lambda x: x, (args, kwargs))  # lists may change after the call
        result = func(*args, **kwargs)
        given = {storage(x) for x in tensors((args, kwargs))}
        new = [x if storage(x) not in given else None for x in tensors(result)]
        self.made |= {storage(x): x.untyped_storage() for x in new if x is not None}
        if written or any(x is not None for x in new):
            self.tape.append((func, args, kwargs, new))
        return result


class Graph:
    """Stands in for torch.cuda.CUDAGraph."""

    replays = 0  # of all graphs
    capturing = False

    def __init__(self):
        self.tape = None

    def replay(self) -> None:
        if self.tape is None or Graph.capturing:
            raise CaptureError("replay of a graph that was not captured, or in a capture")
        Graph.replays += 1
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, new in self.tape:
                for old, result in zip(new, tensors(func(*args, **kwargs)), strict=True):
                    if old is not None:
                        old.copy_(result)


@contextlib.contextmanager
def capture(graph: Graph, stream, capture_error_mode):
    """Stands in for torch.cuda.graph."""
    if stream is None:
        raise CaptureError("a capture on the default stream")
    random, recorder, Graph.capturing = torch.get_rng_state(), Recorder(), True
    try:
        with recorder:
            yield
    finally:
        Graph.capturing = False
    graph.tape = recorder.tape
    for memory, bytes_before in recorder.before.values():
        contents(memory).copy_(bytes_before)
    torch.set_rng_state(random)
    for memory in recorder.made.values():
        contents(memory).fill_(0xFF)


class Pinned:
    """Pinned memory, and the copies from it that may be under way, in their order."""

    def __init__(self):
        self.buffers, self.copies, self.number = {}, {}, 0

    def copy(self, target: torch.Tensor, source: torch.Tensor, asynchronous: bool) -> None:
        if storage(target) in self.copies.values():
            raise HazardError("pinned memory is overwritten while a copy from it may be under way")
        if storage(source) in self.buffers and asynchronous:
            self.number += 1
            self.copies[self.number] = storage(source)

    def wait(self, number: float = math.inf) -> None:
        """Wait for the copies up to this one."""
        if Graph.capturing:
            raise CaptureError("the device is waited for in a capture")
        self.copies = {n: memory for n, memory in self.copies.items() if n > number}


class Emulation(TorchFunctionMode):
    """Gives "cuda" tensors the CPU's memory, and watches what is pinned."""

    def __init__(self, pinned: Pinned):
        super().__init__()
        self.pinned = pinned

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.device:
            return func(*args, **kwargs or {})
        if func is torch.Tensor.device.__get__ and isinstance(args[0], torch.nn.Parameter):
            return torch.device("cuda")  # networks are on the GPU, whatever the memory says
        if func in (torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.item):
            self.pinned.wait()
        if func is torch.Tensor.cpu:
            return args[0].clone()
        args, kwargs = tree_map(self.on_the_cpu, (args, kwargs or {}))
        pin = kwargs.pop("pin_memory", False)
        if func is torch.Tensor.copy_:
            self.pinned.copy(args[0], args[1], kwargs.get("non_blocking", False))
        result = func(*args, **kwargs)
        if pin:
            self.pinned.buffers[storage(result)] = result
        return result

    @staticmethod
    def on_the_cpu(x):
        return torch.device("cpu") if isinstance(x, str | torch.device) and str(x).startswith("cuda") else x


def check_capturable(optimizer: torch.optim.Optimizer) -> None:
    if Graph.capturing and not all(group["capturable"] for group in optimizer.param_groups):
        raise CaptureError("an optimizer steps in a capture without capturable=True")


@contextlib.contextmanager
def emulated_cuda():
    """Within it, torch.cuda is there, with graphs."""
    pinned = Pinned()

    streams = [None]  # the default one, on which nothing can be captured

    class Event:
        number = 0

        def record(self):
            self.number = pinned.number

        def synchronize(self):
            pinned.wait(self.number)

    parts = {"init": lambda: None, "Stream": object, "Event": Event, "CUDAGraph": Graph, "graph": capture}
    parts |= {"set_stream": streams.append, "current_stream": lambda: streams[-1]}
    parts |= {"default_stream": lambda: None, "synchronize": pinned.wait}
    parts |= {"get_rng_state": lambda device: torch.get_rng_state(), "default_generators": ()}
    parts |= {"set_rng_state": lambda state, device: torch.set_rng_state(state), "get_device_name": lambda: "none"}
    parts |= {"mem_get_info": lambda device: (10**10, 10**10), "is_available": lambda: True}
    patches = [(torch.cuda, name, part) for name, part in parts.items()]
    patches += [(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", check_capturable)]
    patches += [(torch, "set_float32_matmul_precision", lambda precision: None)]  # it would change the CPU's
    with contextlib.ExitStack() as stack:
        for owner, name, part in patches:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, part)
        stack.enter_context(Emulation(pinned))
        Graph.replays = 0
        yield
