"""What an op allocates, tensor by tensor."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Allocations(TorchDispatchMode):
    """The most bytes alive at a time of tensors made in here, and the largest of them; names of all operators."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.largest, self.names, self.places = 0, 0, 0, set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        self.names.add(function.overloadpacket.__name__)
        for x in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(x, torch.Tensor):
                self.made(x.untyped_storage(), x)
        return results

    def made(self, storage, tensor):
        place, size = storage.data_ptr(), storage.nbytes()
        given = {x.untyped_storage().data_ptr() for x in self.given}
        if place in self.places or place in given or not size:
            return
        self.places.add(place)
        self.alive += size
        self.peak, self.largest = max(self.peak, self.alive), max(self.largest, size)
        weakref.finalize(tensor, self.freed, place, size)

    def freed(self, place, size):
        self.places.discard(place)
        self.alive -= size


def allocations(function, *given):
    counted = Allocations()
    counted.given = [x for x in given if isinstance(x, torch.Tensor)]
    with counted:
        results = function()
    return counted, results
