"""Parameters and buffers of every split, and how they are saved, loaded, copied and reset.

S splits, C features. Split 0 is the module's own state, split i that of `aux_bn[i - 1]`.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ._collectives import check_group
from .functional import check_num_splits

PARAMETERS = ("weight", "bias")
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class Auxiliary(nn.Module):
    """Parameters and buffers of one further split; the layer reads them, nothing calls this.

    It is no `_BatchNorm`, so that tools which shard, freeze or convert batch norms see the layer
    as one unit and leave its parts alone.
    """

    def __init__(self, state: dict[str, Tensor | None]) -> None:
        super().__init__()
        for name, value in state.items():
            if name in PARAMETERS:
                self.register_parameter(name, value)  # type: ignore[arg-type]
            else:
                self.register_buffer(name, value)

    @classmethod
    def copy_of(cls, norm: nn.Module, share_affine: bool, memo: dict[int, Any]) -> "Auxiliary":
        """Copy the state of a batch norm; one memo a split keeps tensors that are shared so."""
        names = BUFFERS if share_affine else PARAMETERS + BUFFERS
        return cls({name: copy.deepcopy(getattr(norm, name), memo) for name in names})


class SplitState(_BatchNorm):
    """A batch norm with the state of S splits, under timm's names."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        num_splits: int = 2,
        process_group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        share_affine: bool = False,
        bias: bool = True,
    ) -> None:
        check_num_splits(num_splits)
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        if not bias:
            self.register_parameter("bias", None)
        auxiliaries = [Auxiliary.copy_of(self, share_affine, {}) for _ in range(num_splits - 1)]
        self._split(auxiliaries, process_group, share_affine)

    def _split(self, auxiliaries: list[Auxiliary], process_group: Any, share_affine: bool) -> None:
        """Become a split layer, from a plain one whose state is that of split 0."""
        check_group(process_group)
        self.num_splits = 1 + len(auxiliaries)
        self.process_group = process_group
        self.share_affine = share_affine
        self.aux_bn = nn.ModuleList(auxiliaries).train(self.training)

    def _splits(self) -> Iterator[Any]:
        """Yield what holds the statistics of each split."""
        yield self
        yield from self.aux_bn

    def _all(self, name: str) -> list[Tensor] | None:
        """Return a parameter of each split, [C], one for all where they share it."""
        own: Tensor | None = getattr(self, name)
        if own is None:
            return None
        if self.share_affine:
            return [own] * self.num_splits
        return [getattr(stats, name) for stats in self._splits()]

    def _one(self, name: str, split: int) -> Tensor | None:
        """Return a parameter of one split, [C]."""
        own: Tensor | None = getattr(self, name)
        if own is None or self.share_affine:
            return own
        if torch.is_grad_enabled():
            # Taken from all, so that the others get zero gradients and DDP misses none.
            every = self._all(name)
            return None if every is None else torch.stack(every)[split]
        return own if split == 0 else getattr(self.aux_bn[split - 1], name)

    def reset_running_stats(self) -> None:
        """Set the running statistics of every split to mean 0, variance 1 and no batch seen."""
        super().reset_running_stats()
        # The base class calls this before there are auxiliaries.
        for stats in getattr(self, "aux_bn", ()) if self.track_running_stats else ():
            stats.running_mean.zero_()
            stats.running_var.fill_(1)
            stats.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Reset the running statistics, and every split's scale to 1 and offset to 0."""
        super().reset_parameters()
        for stats in getattr(self, "aux_bn", ()):
            for name, value in (("weight", 1.0), ("bias", 0.0)):
                parameter = getattr(stats, name, None)
                if parameter is not None:
                    nn.init.constant_(parameter, value)

    def extra_repr(self) -> str:
        """Describe the layer in a model's printout."""
        plain = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{plain}, num_splits={self.num_splits}, share_affine={self.share_affine}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load split 0, and have a plain batch norm's state fill the auxiliaries too."""
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if any(key.startswith(f"{prefix}aux_bn.") for key in state_dict):
            return
        for i, stats in enumerate(self.aux_bn):
            for name in stats.state_dict():
                if prefix + name in state_dict:
                    # A clone: load_state_dict(assign=True) makes parameters of what it is given.
                    state_dict[f"{prefix}aux_bn.{i}.{name}"] = state_dict[prefix + name].clone()

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what belongs to this process or this moment: group and contexts."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        state["process_group"] = None
        for name in ("_assignment", "_stats_frozen"):
            state.pop(name, None)
        return state

    def __copy__(self) -> "SplitState":
        """Copy shallowly, the process group too."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> "SplitState":
        """Copy all but the process group, which the copy shares."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        twin.process_group = self.process_group
        return twin
