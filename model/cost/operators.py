"""Operators that PyTorch carries out, one by one: what each reads and writes, and of which kind.

`Counting` sees every operator of a real pass, forward and backward. On tensors without memory, of
the device `meta`, a pass costs nothing but its Python, whatever the sizes; `GpuKernels` then puts
those kernels into it that a GPU would choose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._library.custom_ops import custom_op
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

Phase = Literal["forward", "backward", "accumulate"]
INSIDE, PARTIAL = "activated products", "partial sums"
OWN = ("one pass", INSIDE, PARTIAL)
"""Kinds of operators that are kernels of our own, started from Python."""
FREE = {
    "views": (
        *("alias", "as_strided", "chunk", "detach", "expand", "narrow", "permute", "select", "slice"),
        *("split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view"),
        *("_unsafe_view", "_reshape_alias", "lift_fresh", "set_"),
    ),
    "allocations": ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
}
"""Operators that start no kernel: another look at the same memory, or memory without values."""
KINDS = {
    "products": ("addmm", "baddbmm", "bmm", "mm"),
    "attention": tuple(
        f"{name}{backward}"
        for name in (
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
        )
        for backward in ("", "_backward")
    ),
    "norms": (
        *("native_layer_norm", "native_layer_norm_backward"),
        *("_fused_rms_norm", "_fused_rms_norm_backward"),
    ),
    "activations": (
        *("gelu", "gelu_backward", "silu", "silu_backward", "relu", "threshold_backward"),
        *("tanh", "tanh_backward", "softmax", "_safe_softmax", "_softmax", "_softmax_backward_data"),
    ),
    "one pass": tuple(
        f"{name}_{phase}"
        for name in ("join", "activation", "normed", "heads")
        for phase in ("forward", "backward")
    ),
    INSIDE: ("product_forward", "product_backward"),
    PARTIAL: ("sum_parts",),
    "dropout": ("native_dropout", "native_dropout_backward", "bernoulli_", "bernoulli", "random_"),
    "sums": ("add", "add_", "addcmul", "addcdiv", "sub", "sub_", "rsub"),
    "factors": (
        *("mul", "mul_", "div", "div_", "neg", "neg_", "pow", "rsqrt", "reciprocal", "square", "sqrt"),
        *("cos", "sin", "sigmoid", "sigmoid_backward", "exp", "log"),
    ),
    "reductions": ("dot", "mean", "sum", "var_mean", "amax"),
    "copies": ("_to_copy", "cat", "clone", "copy", "copy_", "stack", "repeat"),
    "masks": (
        *("all", "bitwise_and", "bitwise_not", "bitwise_or", "eq", "ge", "gt", "le", "lt", "logical_and"),
        *("logical_not", "logical_or", "masked_fill", "masked_fill_", "ne", "tril", "triu", "where"),
        *("arange", "scalar_tensor"),
    ),
    "fills": (
        *("fill", "fill_", "full", "full_like", "new_zeros", "ones", "ones_like", "slice_backward"),
        *("split_backward", "zero_", "zeros", "zeros_like", "new_full", "new_ones"),
    ),
    "messages": (
        *("allreduce_", "_allgather_base_", "_reduce_scatter_base_", "allgather_", "broadcast_"),
        *("reduce_scatter_", "alltoall_base_", "wait_tensor"),
    ),
}
"""Operators that start a kernel, by what they are for. One that is in neither table is an error.

`one pass`, `activated products` and `partial sums`: kernels of our own, noted by
`model/layers/launching.py`. Those of products with an activation inside are what a plain product
would not read or write.
"""
KERNELS = {
    "native_layer_norm_backward": 2,
    "_fused_rms_norm_backward": 2,
    "_scaled_dot_product_flash_attention_backward": 3,
    "_scaled_dot_product_efficient_attention_backward": 2,
}
"""Kernels that an operator starts on a GPU, where that is not one (derived, not measured).

Gradients of a norm's input, and of its gain and offset; fused attention sums its gradient over rows
first and rounds the one of queries last.
"""
NAMED = {name: kind for kind, names in (FREE | KINDS).items() for name in names}


@dataclass(frozen=True)
class Operator:
    """One operator of a pass."""

    name: str
    """Without its library, such as `addmm`."""
    kind: str
    """One of `KINDS`."""
    phase: Phase
    read: int
    """Bytes."""
    written: int
    flops: int
    """Of matrix products and attention, as PyTorch's own counter has them."""

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written

    @property
    def kernels(self) -> int:
        """Kernels that it starts on a GPU."""
        return KERNELS.get(self.name, 1)


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside it every operator with a kernel is noted, in the order in which they run.

    phase: of what runs from now on.
    device: operators that touch no tensor of it are the host's own, and not noted.
    Operators that write to one of the tensors of `sums` are `accumulate` in any phase, but for
    products.
    Raises LookupError for an operator that has no kind.
    """

    def __init__(self, device: str = "meta", sums: Sequence[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.phase: Phase = "forward"
        self.operators: list[Operator] = []
        self.sums = {_storage(tensor) for tensor in sums}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carries the operator out and notes it."""
        out = func(*args, **(kwargs or {}))
        name = func._opname
        if all(tensor.device.type != self.device for tensor in _tensors((args, kwargs, out))):
            return out
        if name not in NAMED:
            raise LookupError(f"operator {func} has no kind: give it one in FREE or KINDS of {__name__}")
        if NAMED[name] not in FREE:
            self._note(func, name, args, kwargs or {}, out)
        return out

    def _note(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        read = _tensors((args, kwargs))
        changed = [tensor for tensor in _changed(func, args, kwargs) if isinstance(tensor, Tensor)]
        own = {id(tensor) for tensor in changed}
        if NAMED[name] in OWN:
            read = args[-2]  # the operator's last argument is what it writes
        if NAMED[name] == INSIDE:
            changed = changed[1:]
        written = changed + [tensor for tensor in _tensors(out) if id(tensor) not in own]
        if NAMED[name] in ("fills", "dropout") and changed:
            read = [tensor for tensor in read if id(tensor) not in own]  # written without a look
        phase = self.phase
        # A product that adds onto a sum takes the place of one that does not.
        if NAMED[name] != "products" and any(_storage(tensor) in self.sums for tensor in changed):
            phase = "accumulate"
        registered = flop_registry.get(func._overloadpacket)
        # PyTorch's counter does not know the format that a product may be asked for.
        sizes = [argument for argument in args if not isinstance(argument, torch.dtype)]
        flops = 0 if registered is None else registered(*sizes, **kwargs, out_val=out)
        self.operators.append(
            Operator(name, NAMED[name], phase, _bytes(read), _bytes(written), int(flops or 0))
        )


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Inside it, what autograd keeps for the backward pass is noted: distinct memory, in bytes.

    without: tensors that do not count, such as parameters.
    """

    def __init__(self, without: Iterator[Tensor] | Sequence[Tensor] = ()) -> None:
        self.without = {_storage(tensor) for tensor in without}
        # Kept alive, so that no address is used twice.
        self.storages: dict[int, torch.UntypedStorage] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        address = _storage(tensor)
        if address not in self.without:
            self.storages.setdefault(address, tensor.untyped_storage())
        return tensor

    @property
    def bytes(self) -> int:
        """Of all that is kept."""
        return sum(storage.nbytes() for storage in self.storages.values())


class GpuKernels(TorchFunctionMode):
    """Inside it tensors of the device `meta` are computed by the kernels that a GPU has for them.

    PyTorch decides by the device, and takes attention, dropout and RMSNorm apart on `meta`.
    Attention is the flash kernel, or with a mask the memory-efficient one, as PyTorch chooses.
    What is made on a named device is made on `meta` too.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function, or what stands for it."""
        kwargs = kwargs or {}
        if func in _STAND_INS and any(tensor.is_meta for tensor in _tensors((args, kwargs))):
            return _STAND_INS[func](*args, **kwargs)
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Of q [b, heads, s, d] and k, v [b, groups, t, d]. Arguments as PyTorch's function."""
    if attn_mask is None:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        result: Tensor = flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
        return result
    if enable_gqa:  # which this kernel has not: PyTorch copies keys and values
        copies = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(copies, 1) for part in (key, value))
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, float("-inf")).to(query.dtype)
    mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    seen = efficient(query, key, value, mask, query.requires_grad, dropout_p, is_causal, scale=scale)
    masked: Tensor = seen[0]
    return masked


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or not p:
        return input
    dropped: Tensor = torch.native_dropout(input, p, training)[0]
    return dropped


def _rms_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The result, and what the kernel keeps of each row."""
    return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _rms_backward(gradient: Tensor, x: Tensor, statistics: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _on_meta(name: str, function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    """An operator of this name, which gives tensors without memory."""
    operator = custom_op(f"fathom_meta::{name}", function, mutates_args=())
    operator.register_fake(function)
    return operator


_FORWARD = _on_meta("_fused_rms_norm", _rms_forward)
_BACKWARD = _on_meta("_fused_rms_norm_backward", _rms_backward)


class _FusedRmsNorm(torch.autograd.Function):
    """PyTorch's kernel, which has no form on `meta`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed: Tensor
        normed, statistics = _FORWARD(x, weight, eps)
        ctx.save_for_backward(x, statistics, weight)
        return normed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (*_BACKWARD(gradient, *ctx.saved_tensors), None)


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    result: Tensor = _FusedRmsNorm.apply(input, weight, eps)  # type: ignore[no-untyped-call]
    return result


_STAND_INS: dict[Any, Callable[..., Tensor]] = {
    F.scaled_dot_product_attention: _attention,
    F.dropout: _dropout,
    F.rms_norm: _rms_norm,
}


def backward(outs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """As `torch.autograd.backward`, which would put modes like `GpuKernels` out of force."""
    run = torch.autograd.graph._engine_run_backward
    run(tuple(outs), tuple(gradients), False, False, (), allow_unreachable=True, accumulate_grad=True)


def table(operators: Sequence[Operator]) -> dict[str, dict[str, int]]:
    """By kind, the largest number of bytes first: operators of each phase, kernels, and bytes."""
    kinds: dict[str, Counter[str]] = {}
    for one in operators:
        row = kinds.setdefault(one.kind, Counter())
        row.update({one.phase: 1, "kernels": one.kernels, "read": one.read, "written": one.written})
    columns = ("forward", "backward", "accumulate", "kernels", "read", "written")
    ordered = sorted(kinds.items(), key=lambda item: -(item[1]["read"] + item[1]["written"]))
    return {kind: {column: row[column] for column in columns} for kind, row in ordered}


def _storage(tensor: Tensor) -> int:
    """Which memory a tensor lies in; on `meta` there are no addresses."""
    return int(tensor.untyped_storage()._cdata)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _changed(func: Any, args: Any, kwargs: Any) -> Iterator[object]:
    """What an operator writes to, by its schema."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from tree_leaves(given)


def _bytes(tensors: Sequence[Tensor]) -> int:
    """Of distinct tensors; what is only repeated along a dimension counts once."""
    total = 0
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        size = tensor.element_size()
        for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
            size *= length if stride or length < 2 else 1
        total += size
    return total
