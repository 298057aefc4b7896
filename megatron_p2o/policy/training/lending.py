"""Lends the engines what a rank's GPU holds for updates alone, from one update to the next (`optimizer.lend`).

    update  ->  gradients freed, copies to the host begin  ->  weights handed over  ->  the rest freed
            ->  engines sample  ->  all allocated again, optimizer state arrives while the device computes  ->  update

The storages of the tensors are emptied and filled in place: a tensor, and every view of one, stays the object it is.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, UntypedStorage

from megatron_p2o.config.tree import OptimizerConfig

FindTensors = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Loan:
    """One storage of the device."""

    storage: UntypedStorage
    whole: Tensor
    """All of it, one-dimensional."""
    views: tuple[tuple[Tensor, Tensor], ...]
    """Tensors that lie in it, and an alias of each."""
    num_bytes: int
    host: Tensor | None
    """What `whole` holds, in host memory; None where it need not be kept."""

    def on_host(self, tensor: Tensor) -> Tensor:
        """Return what `tensor`, which lies in the storage, holds."""
        assert self.host is not None and self.host.dtype == tensor.dtype
        return self.host.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class LentPart:
    """Storages of one kind, which go and come together."""

    def __init__(self, find_tensors: FindTensors, *, is_kept: bool) -> None:
        """Args:
        find_tensors: gives the tensors that are to go; asked each time, because a load may replace some.
        is_kept: whether their content is copied to the host; else it is lost.
        """
        self._find_tensors = find_tensors
        self._is_kept = is_kept
        self._hosts: list[Tensor] = []
        self.loans: tuple[Loan, ...] = ()
        self.is_lent = False

    def begin(self) -> None:
        """Begin to copy to the host, in the order of the current stream; the memory stays until `free`."""
        if self.is_lent:
            return
        found = _by_storage(self._find_tensors())
        wholes = [_whole(views[0]) for views in found]
        if self._is_kept:
            self._match_hosts(wholes)
            for host, whole in zip(self._hosts, wholes, strict=True):
                host.copy_(whole, non_blocking=True)
        hosts = self._hosts if self._is_kept else [None] * len(found)
        self.loans = tuple(
            Loan(
                storage=views[0].untyped_storage(),
                whole=whole,
                views=tuple((view, view.detach()) for view in views),
                num_bytes=whole.nbytes,
                host=host,
            )
            for views, whole, host in zip(found, wholes, hosts, strict=True)
        )

    def free(self) -> None:
        """Free the device's memory; the copies must be there."""
        for loan in self.loans:
            loan.storage.resize_(0)
        self.is_lent = True

    def allocate(self) -> None:
        """Allocate the memory again; its content is undefined."""
        if self.is_lent:
            for loan in self.loans:
                loan.storage.resize_(loan.num_bytes)

    def fill(self) -> None:
        """Begin to copy from the host, in the order of the current stream."""
        if self.is_lent and self._is_kept:
            for loan in self.loans:
                assert loan.host is not None
                loan.whole.copy_(loan.host, non_blocking=True)
        self.loans, self.is_lent = (), False

    def _match_hosts(self, wholes: Sequence[Tensor]) -> None:
        """Have host memory for each; it stays from one update to the next, because pinning it takes long."""
        if [(host.shape, host.dtype) for host in self._hosts] != [(whole.shape, whole.dtype) for whole in wholes]:
            self._hosts.clear()
            self._hosts += [
                torch.empty(whole.shape, dtype=whole.dtype, device="cpu", pin_memory=whole.is_cuda) for whole in wholes
            ]


class Lending:
    """What of this rank is lent, and what is here."""

    def __init__(
        self, modules: Sequence[DistributedDataParallel], optimizers: Sequence[Any], settings: OptimizerConfig
    ) -> None:
        """Args:
        modules: the model's stages under data parallelism.
        optimizers: Megatron's, one for each kind of parameters; where state is lent, Adam has made it.
        """
        self._optimizers = optimizers
        self._lends = settings.lends_gradients
        self._gradients = LentPart(lambda: _gradients(modules) if settings.lends_gradients else [], is_kept=False)
        self._state = LentPart(lambda: _state(modules, optimizers) if settings.lends_state else [], is_kept=True)
        self._parameters = LentPart(
            lambda: _weights(modules, optimizers) if settings.lends_parameters else [], is_kept=True
        )
        self._copies = torch.cuda.Stream()

    @property
    def has_parameters(self) -> bool:
        """Whether the weights are on the device."""
        return not self._parameters.is_lent

    def begin(self) -> None:
        """Free the gradients, and begin to copy what else goes. No weight may change until `finish`."""
        if not self._lends:
            return
        for optimizer in self._optimizers:
            optimizer.zero_grad()  # its gradients are views of the buffers, or copies
        self._gradients.begin()
        self._gradients.free()
        self._copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copies):
            self._state.begin()
            self._parameters.begin()

    def finish(self) -> None:
        """Free what `begin` has copied."""
        if not self._lends:
            return
        self._copies.synchronize()
        self._state.free()
        self._parameters.free()

    def take_back_parameters(self) -> None:
        """Have the weights on the device."""
        torch.cuda.current_stream().wait_stream(self._copies)
        self._parameters.allocate()
        self._parameters.fill()

    def take_back(self) -> None:
        """Have the weights and gradient buffers, whose content is undefined; optimizer state comes until `arrive`."""
        self.take_back_parameters()
        self._gradients.allocate()
        self._gradients.fill()
        self._state.allocate()
        self._copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copies):
            self._state.fill()

    def arrive(self) -> None:
        """Have what follows on the device wait until the optimizer state is there."""
        torch.cuda.current_stream().wait_stream(self._copies)

    @contextmanager
    def read_on_host(self) -> Iterator[None]:
        """Have the optimizer's tensors hold their content in host memory where the device's is lent.

        Parameters of the model are left alone, because Megatron's hooks on their gradients depend on where they are:
        see `on_host`.
        """
        moved = [
            (loan, view, alias) for loan in self._kept() for view, alias in loan.views if not hasattr(view, "main_grad")
        ]
        for loan, view, _ in moved:
            view.data = loan.on_host(view)
        try:
            yield
        finally:
            for _, view, alias in moved:
                view.data = alias

    def on_host(self, tensor: Tensor) -> Tensor:
        """Return the tensor, or, where its memory is lent, its content in host memory."""
        of_storage = {loan.storage._cdata: loan for loan in self._kept()}
        loan = of_storage.get(tensor.untyped_storage()._cdata)
        return tensor if loan is None else loan.on_host(tensor)

    def _kept(self) -> list[Loan]:
        return [loan for part in (self._state, self._parameters) if part.is_lent for loan in part.loans]


def _by_storage(tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Return the tensors of each storage, in the order of their first."""
    found: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
    return [tuple(views) for views in found.values()]


def _whole(tensor: Tensor) -> Tensor:
    """Return the tensor's whole storage."""
    length = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.detach().as_strided((length,), (1,), 0)


def _gradients(modules: Sequence[DistributedDataParallel]) -> list[Tensor]:
    return [
        buffer.grad_data
        for module in modules
        # Megatron's wrapper has a list of this name where torch's modules have a method.
        for buffer in [*vars(module)["buffers"], *module.expert_parallel_buffers]
    ]


def _parameters(modules: Sequence[DistributedDataParallel]) -> list[Tensor]:
    return [parameter for module in modules for parameter in module.parameters()]


def _storages(tensors: Sequence[Tensor]) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def _updated(optimizers: Sequence[Any]) -> list[Tensor]:
    """Return what Adam updates: float32 copies, or views of the model where it is float32."""
    return [each for optimizer in optimizers for group in optimizer.param_groups for each in group["params"]]


def _weights(modules: Sequence[DistributedDataParallel], optimizers: Sequence[Any]) -> list[Tensor]:
    """Return the parameters, and those views of them that Adam updates."""
    parameters = _parameters(modules)
    of_model = _storages(parameters)
    return [*parameters, *(each for each in _updated(optimizers) if each.untyped_storage()._cdata in of_model)]


def _state(modules: Sequence[DistributedDataParallel], optimizers: Sequence[Any]) -> list[Tensor]:
    """Return the float32 copies of the parameters and Adam's moments, where they are on the model's device."""
    parameters = _parameters(modules)
    of_model = _storages(parameters)
    states = [value for each in optimizers for state in each.optimizer.state.values() for value in state.values()]
    moments = [value for value in states if isinstance(value, Tensor) and value.dim()]
    return [
        each
        for each in (*_updated(optimizers), *moments)
        if each.device == parameters[0].device and each.untyped_storage()._cdata not in of_model
    ]
