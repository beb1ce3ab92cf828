"""The op table, the router, and what a user sees of them: use_backend, explain, record.

An op is defined once, by :class:`Op`: its schema exists even when nothing is compiled, its shapes are known to the fake
kernel, and its backends are rows of a table. A row says no with a sentence. This is the only file that talks to
torch.library.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.abc
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _context, _native

_DEVICES = {"cpu": "CPU", "cuda": "CUDA"}  # device type -> dispatch key; ROCm devices call themselves "cuda" too
_library = torch.library.Library("segops", "DEF")

OPS: dict[str, Op] = {}


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run the call; the message holds every reason."""


@dataclass(frozen=True)
class Backend:
    """One row of an op's table for one device type.

    Attributes:
        name: What ``use_backend`` calls it.
        run: Takes the op's arguments, returns its outputs; None where the op does without this backend by design.
        available: None, or why this backend can run nothing here (not built, not installed).
        why_not: None, or why it refuses these arguments; looks at shapes, dtypes and devices only.
        by_name_only: Never chosen automatically.
        compiled: What runs it, if that is compiled.
    """

    name: str
    run: Callable[..., Any] | None
    available: Callable[[], str | None] = lambda: None
    why_not: Callable[..., str | None] = lambda *args: None
    by_name_only: bool = False
    compiled: Compiled | None = None


@dataclass(frozen=True)
class Compiled:
    """A function over a compiled op.

    Attributes:
        op: The native op that it calls.
        bind: Namespace of compiled ops -> function of the op's arguments.
    """

    op: str
    bind: Callable[[str], Callable[..., Any]]


class Call(NamedTuple):
    """One entry of :func:`record`: what ran, where, and who refused before it."""

    op: str
    device: str
    backend: str
    refusals: tuple[tuple[str, str], ...]


@dataclass
class _State:
    # A module attribute, not a ContextVar: Dynamo cannot trace a ContextVar under fullgraph=True.
    backend: str | None = None
    log: list[Call] | None = None
    explaining: bool = False
    warned: set[tuple[str, str]] = field(default_factory=set)


_state = _State()


class Op:
    """An operator of the ``segops`` namespace.

    Args:
        name: Its name in every layer.
        schema: The part of the schema after the name.
        reference: Its meaning, with the arguments of the schema; runs where no backend does.
        fake: Outputs of the right shape, dtype and strides, from the arguments of the schema.
        backends: Device type to rows, the preferred one first.
        autocast: Arguments that autocast casts to its dtype on the way in.
        flops: What FlopCounterMode counts, from the op's arguments with shapes in place of tensors; None: nothing, as
            for interpolation and labels.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        backends: Mapping[str, Sequence[Backend]],
        autocast: Sequence[str] = (),
        flops: Callable[..., int] | None = None,
    ) -> None:
        self.name = name
        self.reference = reference
        self.backends = {device: list(backends.get(device, ())) for device in _DEVICES}
        _library.define(name + schema)
        torch.library.register_fake(f"segops::{name}", fake, lib=_library)
        for device, key in _DEVICES.items():
            _library.impl(name, self._router(device), key)
            if autocast:
                _library.impl(name, self._autocaster(device), f"Autocast{key}")
        self.overload = getattr(torch.ops.segops, name).default
        self.arguments = [argument.name for argument in self.overload._schema.arguments]
        self.autocast = tuple(autocast)
        self.flops = flops
        self.differentiates = False  # a backward op: its reference is a gradient, which forward-mode AD does not enter
        OPS[name] = self
        if _FLOP_COUNTER in sys.modules:
            self._register_flops()

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
        torch.library.register_autograd(f"segops::{self.name}", backward, setup_context=setup_context, lib=_library)

    def register_no_gradient(self) -> None:
        """Says that no output has one, instead of the silence that torch would fill with zeros."""

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))

        self.register_autograd(lambda ctx, *grads: (None,) * len(self.arguments), setup)

    def _register_flops(self) -> None:
        if self.flops is not None:
            formula = self.flops
            register = sys.modules[_FLOP_COUNTER].register_flop_formula(getattr(torch.ops.segops, self.name))
            register(lambda *args, out_shape=None, **kwargs: formula(*args, **kwargs))

    def __call__(self, *args: Any) -> Any:
        """Runs the op if a backend accepts the call, else the reference: eager, differentiable, compiles."""
        device = _device_of(args)
        if _state.explaining:
            raise _Explained(self, device, args)
        if self.differentiates:
            self._refuse_tangents(args)
        backend, refusals = self.choose(device, args, _context.only_reference(args))
        if backend is not None:
            return self.overload(*args)
        if not torch.compiler.is_compiling():
            self._note(device, "reference", refusals, args)
        if _context.autocasts(device):
            with torch.autocast(device, enabled=False):
                return self.reference(*self._lowered(device, args))
        return self.reference(*args)

    def choose(
        self, device: str, args: Sequence[Any], only_reference: str | None = None
    ) -> tuple[Backend | None, list[tuple[str, str]]]:
        """The row that runs the call (None: the reference), and the refusals before it.

        ``only_reference`` is why every row refuses, if it does.

        Raises:
            BackendError: the backend asked for by name refuses.
        """
        wanted = _state.backend
        refusals: list[tuple[str, str]] = []
        if wanted == "reference":
            return None, refusals
        for row in self.backends.get(device, ()):
            if row.name == wanted or (wanted is None and not row.by_name_only):
                reason = row.available() or row.why_not(*args) or only_reference
                if reason is None:
                    return row, refusals
                refusals.append((row.name, reason))
        if wanted is not None:
            have = ", ".join(row.name for row in self.backends.get(device, ())) or "none"
            why = "; ".join(reason for _, reason in refusals)
            why = why or f"{self.name} has no such backend for device {device} (it has: {have}, reference)"
            raise BackendError(f"segops.{self.name}: backend {wanted!r} was asked for and cannot run: {why}")
        return None, refusals

    def _refuse_tangents(self, args: Sequence[Any]) -> None:
        """Raises where tangents would be lost in silence: below autograd, and in a backward op."""
        if _context.has_tangent(args):
            raise NotImplementedError(
                f"segops.{self.name}: no forward-mode derivative here: call the public function, and let its "
                "arguments carry the tangents, not the gradient that backward starts from"
            )

    def _router(self, device: str) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self._refuse_tangents(args)
            backend, refusals = self.choose(device, args)
            self._note(device, "reference" if backend is None else backend.name, refusals, args)
            if backend is not None and backend.run is not None:
                return backend.run(*args)
            # The reference of a backward op differentiates.
            with _autograd_restored(), torch.autocast(device, enabled=False):
                return self.reference(*args)

        return run

    def _autocaster(self, device: str) -> Callable[..., Any]:
        # torch.library.register_autocast takes one fixed dtype; the user's choice is read at every call instead.
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{_DEVICES[device]}"))

        def run(*args: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return self.overload(*self._lowered(device, args))

        return run

    def _lowered(self, device: str, args: Sequence[Any]) -> list[Any]:
        dtype, names = torch.get_autocast_dtype(device), zip(args, self.arguments, strict=True)
        return [_cast(arg, dtype) if name in self.autocast else arg for arg, name in names]

    def _note(self, device: str, backend: str, refusals: list[tuple[str, str]], args: Sequence[Any]) -> None:
        if _state.log is not None:
            _state.log.append(Call(self.name, device, backend, tuple(refusals)))
        if _state.backend is not None:
            return
        for row in self.backends.get(device, ()):
            reason = dict(refusals).get(row.name)
            if reason is None or row.available() is not None or (self.name, reason) in _state.warned:
                continue
            _state.warned.add((self.name, reason))
            warnings.warn(
                f"segops.{self.name} runs on {backend!r}: backend {row.name!r} refused, {reason}", stacklevel=4
            )


_FLOP_COUNTER = "torch.utils.flop_counter"


class _FlopCounterFinder(importlib.abc.MetaPathFinder):
    """Registers the FLOP formulas when somebody imports the counter: it imports triton, which segops must not."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != _FLOP_COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                for op in OPS.values():
                    op._register_flops()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _FLOP_COUNTER not in sys.modules:
    sys.meta_path.insert(0, _FlopCounterFinder())


class _Explained(Exception):
    """Carries a public function's normalised call out of it, before anything runs."""

    def __init__(self, op: Op, device: str, args: Sequence[Any]) -> None:
        super().__init__(op.name)
        self.op, self.device, self.args_of_op = op, device, args


def _device_of(args: Sequence[Any]) -> str:
    for arg in args:
        if isinstance(arg, Tensor):
            return arg.device.type
        if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], Tensor):
            return arg[0].device.type
    raise TypeError("an op needs at least one tensor")


def _autograd_restored() -> Any:
    """Undoes, for the thread, the exclusion of the autograd keys under which a kernel runs."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        exclude = exclude.remove(getattr(torch._C.DispatchKey, key))
    return torch._C._ForceDispatchKeyGuard(include, exclude)


def _cast(arg: Any, dtype: torch.dtype) -> Any:
    # float64 stays, as in torch's own autocast
    return arg.to(dtype) if isinstance(arg, Tensor) and arg.dtype != torch.float64 else arg


def backends(
    *,
    native: Compiled,
    triton: Callable[..., Any],
    why_not: Callable[..., str | None],
    cuda: Compiled | str | None = None,
    cuda_first: bool = False,
) -> dict[str, list[Backend]]:
    """The table of an op.

    Args:
        native: What runs the compiled op.
        triton: Function of the op's arguments that runs the kernel.
        why_not: Why the arguments are refused, by any.
        cuda: What runs the CUDA row, where that is not ``native``; or why there is none.
        cuda_first: CUDA before Triton on a GPU; until a GPU has measured the order, where Triton needs more memory.
    """
    gpu = [
        Backend("triton", triton, _triton_missing, why_not),
        Backend("cuda", None, lambda: cuda)
        if isinstance(cuda, str)
        else compiled_row("cuda", cuda or native, "segops_C", _native.why_not("_C_cuda"), why_not),
    ]
    return {
        "cpu": [
            compiled_row("cpu", native, "segops_C", _native.why_not("_C"), why_not),
            Backend("triton-interpret", triton, _interpreter_missing, why_not, by_name_only=True),
        ],
        "cuda": gpu[::-1] if cuda_first else gpu,
    }


def compiled_row(
    name: str,
    compiled: Compiled,
    namespace: str,
    missing: str | None,
    why_not: Callable[..., str | None],
    *,
    key: str | None = None,
    by_name_only: bool = False,
) -> Backend:
    """A row that runs ``compiled``, unless its module is ``missing`` or was built before the op was written."""
    if missing is None and not _native.has(f"{namespace}::{compiled.op}", key or _DEVICES[name]):
        missing = f"{namespace} has no {compiled.op}: build again"
    return Backend(name, compiled.bind(namespace), lambda: missing, why_not, by_name_only, compiled)


# Looked up at import, and without importing triton: Dynamo traces the router and cannot trace an import.
_TRITON_MISSING = None if importlib.util.find_spec("triton") else "triton is not installed"


def _triton_missing() -> str | None:
    return _TRITON_MISSING


def _interpreter_missing() -> str | None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "the Triton interpreter is off (set TRITON_INTERPRET=1 before the first import of triton)"
    return _triton_missing()


@functools.cache
def kernels(name: str) -> ModuleType:
    """The Triton module of an op, imported on first use so that importing segops does not import triton."""
    return importlib.import_module(f"segops.kernels.{name}")


def backend_names() -> list[str]:
    """Every name that ``use_backend`` takes."""
    names = {row.name for op in OPS.values() for rows in op.backends.values() for row in rows}
    return [*sorted(names), "reference"]


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Runs every op inside the ``with`` block, backward included, on the named backend, or raises.

    Args:
        name: A backend (``segops.info()`` lists them), ``"reference"``, or None for the automatic choice. The
            environment variable ``SEGOPS_BACKEND`` sets the choice outside every block.

    Raises:
        ValueError: there is no backend of that name.
        BackendError: (from the op) the backend refuses the call; the message says why.
    """
    if name is not None and name not in backend_names():
        raise ValueError(f"use_backend: expected one of {', '.join(backend_names())} or None, got {name!r}")
    before, _state.backend = _state.backend, name
    try:
        yield
    finally:
        _state.backend = before


@contextlib.contextmanager
def record() -> Iterator[list[Call]]:
    """Yields a list that receives a :class:`Call` (op, device, backend, refusals) for every op that runs inside."""
    before, _state.log = _state.log, []
    try:
        yield _state.log
    finally:
        _state.log = before


@dataclass(frozen=True)
class Explanation:
    """Which backend takes a call, and why the others do not. ``str()`` of it is meant to be read."""

    op: str
    device: str
    chosen: str
    rows: tuple[tuple[str, str | None], ...]

    def __str__(self) -> str:
        lines = [f"segops.{self.op} on {self.device} runs on: {self.chosen}"]
        lines += [f"  {name:18} {reason or 'accepts'}" for name, reason in self.rows]
        return "\n".join(lines)


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which backend would run ``function(*args, **kwargs)``, and the reason of each that would not. Runs nothing.

    Args:
        function: A public function, such as ``segops.local_attention``.

    Raises:
        TypeError: the function is not an operator of segops.
        ValueError, TypeError: the call itself is wrong.
    """
    _state.explaining = True
    try:
        function(*args, **kwargs)
    except _Explained as call:
        op, device, op_args = call.op, call.device, call.args_of_op
    else:
        raise TypeError(f"explain: expected a segops operator, got {function!r}")
    finally:
        _state.explaining = False
    rows, only_reference = [], _context.only_reference(op_args)
    for row in op.backends.get(device, ()):
        reason = row.available() or row.why_not(*op_args) or only_reference
        rows.append((row.name, "only by name" if reason is None and row.by_name_only else reason))
    rows.append(("reference", None))
    try:
        backend, _ = op.choose(device, op_args, only_reference)
        chosen = "reference" if backend is None else backend.name
    except BackendError as error:
        chosen = f"nothing: {error}"
    return Explanation(op.name, device, chosen, tuple(rows))


def explaining() -> bool:
    """Whether :func:`explain` asks, and nothing is to run before the op that it asks about."""
    return _state.explaining


def apply_environment() -> None:
    """Takes ``SEGOPS_BACKEND``; called once the op table is complete."""
    name = os.environ.get("SEGOPS_BACKEND") or None
    if name is not None and name not in backend_names():
        raise ValueError(f"SEGOPS_BACKEND: expected one of {', '.join(backend_names())}, got {name!r}")
    _state.backend = name
