"""A device called "pretend", played by the processor: what would fail on an accelerator fails here without one.

Inside ``with Pretending() as device:`` tensors can be made on or moved to "pretend". They lie apart, as on a GPU: an
operation on some of them and on others of the processor is refused, and so are a generator of the other side and numpy.
``device.waits`` counts how often the processor would wait for the device: for a value of it, for a mask's or a list's
length, in torch's decompositions, and in every copy to or from it.
"""

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "pretend"
aten = torch.ops.aten
_REGISTER = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
available = _REGISTER is not None  # from torch 2.10 on

# What takes tensors of both sides: copies, and numbers of rows that lie on the processor.
_CROSSING = {aten._to_copy.default, aten.copy_.default, aten.index.Tensor, aten.index_put_.default}
_WAITING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}
_WAITING |= {aten._linalg_eigh.default, aten.linalg_qr.default, aten._linalg_svd.default, aten.bincount.default}


class _Module:
    """What torch asks of every kind of device."""

    is_initialized = is_available = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    manual_seed_all = set_rng_state = staticmethod(lambda *state: None)  # the processor's generator draws for it
    get_rng_state = staticmethod(lambda device: torch.zeros(1))
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])


if available:
    _REGISTER(NAME, backend_module=_Module())


class There(Tensor):
    """A tensor of the device; ``here`` is the processor's tensor that plays it."""

    @staticmethod
    def __new__(cls, here: Tensor):
        facts = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        there = Tensor._make_wrapper_subclass(cls, here.shape, device=torch.device(NAME, 0), **facts)
        there.here = here
        return there

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self) -> str:
        return f"There({self.here})"

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})


class Generator(torch.Generator):
    """Of either side; torch makes none for a device that is played."""

    def __new__(cls, device="cpu"):
        self = super().__new__(cls)
        self.side = torch.device(device)
        return self

    device = property(lambda self: self.side)


def _run(operation, args: tuple, kwargs: dict):
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    wanted = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
    some_there = any(isinstance(tensor, There) for tensor in tensors)
    to_there = wanted == NAME if wanted else some_there
    if some_there and operation not in _CROSSING and not all(isinstance(t, There) or t.dim() == 0 for t in tensors):
        raise RuntimeError(f"{operation}: expected all tensors to be on the same device")
    if operation is aten.index.Tensor and some_there and not isinstance(args[0], There):
        raise RuntimeError(f"{operation}: indices of the device for a tensor of the processor")
    if operation is aten.index_put_.default and args[2].dim() and len({isinstance(args[n], There) for n in (0, 2)}) > 1:
        raise RuntimeError(f"{operation}: the values are of another device than the tensor")
    for leaf in leaves:
        if isinstance(leaf, torch.Generator) and (leaf.device.type == NAME) != to_there:
            raise RuntimeError(f"{operation}: the generator is of another device than the result")
    kwargs = kwargs | ({"device": torch.device("cpu")} if wanted else {})
    here_args, here_kwargs = tree_map_only(There, lambda tensor: tensor.here, (args, kwargs))
    result = operation(*here_args, **here_kwargs)
    if operation.overloadpacket.__name__.endswith("_"):  # it changed its first argument
        return args[0]
    if not to_there or operation is aten._local_scalar_dense.default:
        return result
    return tree_map_only(Tensor, lambda tensor: tensor if isinstance(tensor, There) else There(tensor), result)


class Pretending(TorchDispatchMode):
    """See the module; ``operations`` counts what was asked of the device, ``waits`` when the processor had to wait."""

    def __init__(self):
        super().__init__()
        self.operations = self.waits = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = _run(operation, args, kwargs or {})
        involved = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        there = [isinstance(tensor, There) for tensor in involved]
        if any(there):
            masked = operation is aten.index.Tensor and any(tensor.dtype == torch.bool for tensor in involved[1:])
            copied = operation in _CROSSING and not all(there)
            self.operations += 1
            self.waits += operation in _WAITING or masked or copied
        return result
