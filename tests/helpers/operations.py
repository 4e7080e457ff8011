"""What runs below PyTorch's functions."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Operations(TorchDispatchMode):
    """Names of the operations that run, the sizes of the largest tensors that each is given, and that any makes."""

    def __init__(self):
        super().__init__()
        self.names, self.given, self.largest = [], {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        self.names.append(name)
        self.given[name] = max(self.given.get(name, 0), largest((args, kwargs)))
        self.largest = max(self.largest, largest(result))
        return result


def largest(tree) -> int:
    return max([x.numel() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)], default=0)


def operations_of(function, *args) -> Operations:
    with Operations() as operations:
        function(*args)
    return operations
