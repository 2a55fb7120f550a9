"""A device "gpu" without a GPU: it computes on the CPU, refuses to mix with CPU tensors as CUDA does, and counts where the host would have to wait. Importing it registers the device for the whole process, so tests run it in one of their own."""
import collections
import contextlib
import os
import sys

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

KIT = f"{os.sep}spml_kit{os.sep}"
# what makes a CUDA host wait, and how often: the size of the result, or the result itself, has to come over
WAITS = {"nonzero": 1, "_local_scalar_dense": 1, "_unique2": 2, "unique_dim": 2, "unique_consecutive": 2, "bincount": 3, "masked_select": 1, "equal": 1, "is_nonzero": 1, "item": 1}
COPIES = "_to_copy", "copy_", "to", "_copy_from", "_copy_from_and_resize"
INDEXING = "index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"
waits = collections.Counter() # (what, where) to how many, while `counting`
operations = collections.Counter()
_counting = [False]


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self): return [torch.half, torch.bfloat16]
    def _is_in_bad_fork(self): return False


backend_registration._setup_privateuseone_for_python_backend("gpu", backend_module=_Module())


@contextlib.contextmanager
def counting():
    "Count waits and operations within"
    waits.clear()
    operations.clear()
    _counting[0] = True
    try: yield waits
    finally: _counting[0] = False


@contextlib.contextmanager
def _paused():
    was, _counting[0] = _counting[0], False
    try: yield
    finally: _counting[0] = was


def where():
    "The two innermost places of the kit that called, or the library's"
    frame, out, other = sys._getframe(2), [], "?"
    while frame is not None:
        name = frame.f_code.co_filename
        if KIT in name: out.append(f"{os.path.basename(name)}:{frame.f_lineno}")
        elif other == "?" and "/fastai/" in name: other = f"{os.path.basename(name)}:{frame.f_lineno}"
        frame = frame.f_back
    return " < ".join(out[:2]) or other


class Simulated(torch.Tensor):
    "A tensor of the device; `cpu_tensor` holds its numbers"
    @staticmethod
    def __new__(cls, held):
        t = torch.Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=torch.device("gpu:0"), requires_grad=False)
        t.cpu_tensor = held
        return t

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None): return run(func, args, kwargs or {})

    def tolist(self):
        if _counting[0]: waits["tolist", where()] += 1
        return self.cpu_tensor.tolist()

    def numpy(self, *args, **kwargs): raise TypeError(f"can't convert a device tensor to numpy, at {where()}")
    def __array__(self, *args, **kwargs): raise TypeError(f"can't convert a device tensor to numpy, at {where()}")
    def __repr__(self, **kwargs): return f"Simulated({tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            out = Simulated(self.cpu_tensor.detach().clone()).requires_grad_(self.requires_grad)
            memo[id(self)] = torch.nn.Parameter(out, self.requires_grad) if isinstance(self, torch.nn.Parameter) else out
        return memo[id(self)]


def _refuse_mixes(name, args, ours, theirs):
    for t in theirs:
        if name in INDEXING and t is not args[0] and any(t is i for i in args[1]): continue # CUDA copies a CPU index
        if t.dim() == 0: continue # and takes a CPU scalar
        raise RuntimeError(f"{name}: a CPU tensor {tuple(t.shape)} {t.dtype} with device tensors {[tuple(o.shape) for o in ours][:3]}, at {where()}")


def _count(name, args, kwargs, ours):
    operations[name] += 1
    if name in WAITS and ours: waits[name, where()] += WAITS[name]
    masks = name in INDEXING and any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if masks and ours: waits["bool index", where()] += 1
    to = kwargs.get("device")
    if name in COPIES and to is not None and (torch.device(to).type == "cpu") == bool(ours): waits["copy", where()] += 1 # pageable memory


def run(func, args, kwargs):
    "An operation: checked, counted, done on the CPU"
    name = func._schema.name.split("::")[1]
    leaves = tree_leaves((args, kwargs))
    ours = [t for t in leaves if isinstance(t, Simulated)]
    theirs = [t for t in leaves if isinstance(t, torch.Tensor) and not isinstance(t, Simulated)]
    if ours and theirs and name not in COPIES: _refuse_mixes(name, args, ours, theirs)
    if _counting[0]: _count(name, args, kwargs, ours)
    asked = kwargs.get("device") and torch.device(kwargs["device"]).type
    plain = {**kwargs, **({"device": torch.device("cpu")} if asked == "gpu" else {}), **({"pin_memory": False} if kwargs.get("pin_memory") else {})}
    held = lambda t: t.cpu_tensor if isinstance(t, Simulated) else t
    done = func(*tree_map(held, args), **tree_map(held, plain))
    here = isinstance(args[0], Simulated) if name == "copy_" else asked == "gpu" or (asked is None and ours)
    same = {id(t.cpu_tensor): t for t in ours} # in place, or out=: the same object
    wrap = lambda o: (same.get(id(o)) if id(o) in same else Simulated(o)) if here and isinstance(o, torch.Tensor) and not isinstance(o, Simulated) else o
    return tree_map(wrap, done)


_library = torch.library.Library("_", "IMPL")
_library.fallback(lambda op, *args, **kwargs: run(op, args, kwargs), "PrivateUse1")


def _made_here(make): # some factories never ask the dispatcher for a device of ours
    def made(*args, device=None, **kwargs):
        out = make(*args, **kwargs)
        if device is None: return out
        with _paused(): return out.to(device)
    return made


for _name in ("arange", "linspace", "eye", "randperm"): setattr(torch, _name, _made_here(getattr(torch, _name)))


def interpret_kernels():
    "Let the loss's kernels run in Triton's interpreter (TRITON_INTERPRET=1) on the tensors of the device, contiguous ones only"
    from spml_kit.method import fused

    class Kernel:
        def __init__(self, kernel): self.kernel = kernel
        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                for t in args:
                    if not isinstance(t, torch.Tensor): continue
                    if not isinstance(t, Simulated): raise RuntimeError(f"a CPU tensor {tuple(t.shape)} goes to a kernel")
                    if not t.is_contiguous(): raise RuntimeError(f"a tensor {tuple(t.shape)} with strides {t.stride()} goes to a kernel")
                operations["kernel"] += 1
                self.kernel[grid](*(t.cpu_tensor if isinstance(t, torch.Tensor) else t for t in args), **kwargs)
            return launch

    for name in ("_forward", "_by_pixels", "_by_segments"): setattr(fused, name, Kernel(getattr(fused, name)))
