"""A recorder of the ATen operations that PyTorch's functions run."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Operations(TorchDispatchMode):
    """Records the names of operations, the size of each one's largest input, and the size of the largest output."""

    def __init__(self):
        super().__init__()
        self.names, self.largest_input, self.largest_output = [], {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        self.names.append(name)
        self.largest_input[name] = max(self.largest_input.get(name, 0), largest_size((args, kwargs)))
        self.largest_output = max(self.largest_output, largest_size(result))
        return result


def largest_size(tree) -> int:
    return max([x.numel() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)], default=0)


def record_operations(function, *args) -> Operations:
    with Operations() as operations:
        function(*args)
    return operations
