"""Emulates CUDA graphs on a CPU: operations are recorded, and replayed without the script's Python code.

Within `emulated_cuda()` torch.cuda reports a GPU, whose tensors are in the CPU's memory. A GPU is emulated as follows:
- A capture executes nothing. Here operations must run to be recorded, so the memory that they wrote to and the random
  state are restored afterwards. New tensors are filled with 0xFF bytes (NaN, -1), to expose reads before the replay.
- A replay repeats the kernels on the addresses of the capture. Here the recorded ATen operations are called again with
  the recorded tensors and numbers, and their results are copied into the recorded ones. Views need no copy.
- A capture fails if an operation waits for the device or reads the host's memory. Here this raises `CaptureError`.
- Pinned memory must not be overwritten while a copy from it may be running. A copy has ended once the device was
  waited for, or an event that was recorded after the copy. An earlier write raises `HazardError`.
cuDNN, Triton, streams, memory pools and timing are not emulated. torch.compile has no effect in a capture.
"""

import contextlib
import math

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class CaptureError(RuntimeError):
    """Raised by code that a CUDA graph cannot capture, such as a wait for the device."""


class HazardError(RuntimeError):
    """Raised if pinned memory is overwritten while a copy from it may be running."""


WAITS = "_local_scalar_dense nonzero masked_select _unique2 unique_dim unique_consecutive equal is_nonzero bincount"
HOST_DATA = "lift lift_fresh lift_fresh_copy"  # torch.tensor(data) and torch.as_tensor(array) end in these
MASKED = "index index_put index_put_ _index_put_impl_ _unsafe_index"  # wait for the device if an index is a mask


def tensors(tree) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def contents(memory: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(memory)


def is_mask(x) -> bool:
    return x is not None and x.dtype in (torch.bool, torch.uint8)


class Recorder(TorchDispatchMode):
    """Records the operations of a capture, below autograd, with their arguments and results."""

    def __init__(self):
        super().__init__()
        self.tape, self.overwritten, self.allocated = [], {}, {}

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
            if storage(tensor) not in self.allocated | self.overwritten:
                memory = tensor.untyped_storage()
                self.overwritten[storage(tensor)] = memory, contents(memory).clone()
        args, kwargs = tree_map(lambda x: x, (args, kwargs))  # copies lists, which may change after the call
        result = func(*args, **kwargs)
        inputs = {storage(x) for x in tensors((args, kwargs))}
        new = [x if storage(x) not in inputs else None for x in tensors(result)]
        self.allocated |= {storage(x): x.untyped_storage() for x in new if x is not None}
        if written or any(x is not None for x in new):
            self.tape.append((func, args, kwargs, new))
        return result


class Graph:
    """Stands in for torch.cuda.CUDAGraph."""

    replays = 0  # by all graphs
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
    for memory, bytes_before in recorder.overwritten.values():
        contents(memory).copy_(bytes_before)
    torch.set_rng_state(random)
    for memory in recorder.allocated.values():
        contents(memory).fill_(0xFF)


class Pinned:
    """Keeps the pinned buffers, and the copies from them that may be running, numbered in order."""

    def __init__(self):
        self.buffers, self.copies, self.number = {}, {}, 0

    def copy(self, target: torch.Tensor, source: torch.Tensor, asynchronous: bool) -> None:
        if storage(target) in self.copies.values():
            raise HazardError("pinned memory is overwritten while a copy from it may be under way")
        if storage(source) in self.buffers and asynchronous:
            self.number += 1
            self.copies[self.number] = storage(source)

    def wait(self, number: float = math.inf) -> None:
        """Wait for all copies up to this number."""
        if Graph.capturing:
            raise CaptureError("the device is waited for in a capture")
        self.copies = {n: memory for n, memory in self.copies.items() if n > number}


class Emulation(TorchFunctionMode):
    """Puts "cuda" tensors into the CPU's memory, and tracks pinned memory."""

    def __init__(self, pinned: Pinned):
        super().__init__()
        self.pinned = pinned

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.device:
            return func(*args, **kwargs or {})
        if func == torch.Tensor.device.__get__ and isinstance(args[0], torch.nn.Parameter):
            return torch.device("cuda")  # parameters are in the CPU's memory, but report the GPU
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
    """Make torch.cuda report a GPU, with emulated graphs, within this context."""
    pinned = Pinned()

    streams = [None]  # the default stream, on which nothing can be captured

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
    patches += [(torch, "set_float32_matmul_precision", lambda precision: None)]  # it would change the CPU's precision
    with contextlib.ExitStack() as stack:
        for owner, name, part in patches:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, part)
        stack.enter_context(Emulation(pinned))
        Graph.replays = 0
        yield
