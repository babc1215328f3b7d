"""Parameters and buffers of every split, and how they are saved, loaded, copied and reset.

S splits, C features. The layer itself holds those of split 0, `aux_bn[i - 1]` those of split i.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_module_registration_hook

from ._collectives import check_group
from ._moments import check_eps, check_num_splits, check_storage

PARAMETERS = ("weight", "bias")
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class Auxiliary(nn.Module):
    """A container, without a `forward`, for the parameters and buffers of one auxiliary split.

    It is no `_BatchNorm`: tools that shard, freeze or convert batch norms must not treat it as a
    layer of its own.
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
        """Copy a batch norm's state; `memo` has the copies made so far, by id of the original."""
        names = BUFFERS if share_affine else PARAMETERS + BUFFERS
        return cls({name: _copy(getattr(norm, name), memo) for name in names})


def _copy(tensor: Tensor | None, memo: dict[int, Any]) -> Tensor | None:
    """Copy a parameter or buffer with its attributes, or return the copy in `memo`."""
    if tensor is None or id(tensor) in memo:
        return memo.get(id(tensor))
    # copy.deepcopy fails on fake tensors, and drops the attributes of parameters.
    twin = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        twin = nn.Parameter(twin, tensor.requires_grad)
    for name, value in vars(tensor).items():
        vars(twin).setdefault(name, value)
    memo[id(tensor)] = twin
    return twin


def _read(stats: nn.Module, name: str) -> Tensor | None:
    """Return a parameter or buffer, as getattr does in ten times the time."""
    held = stats._parameters if name in PARAMETERS else stats._buffers
    tensor: Tensor | None = held[name] if name in held else getattr(stats, name)
    return tensor


def _all_or_none(name: str, tensors: list[Tensor | None]) -> list[Tensor]:
    """Return the tensors of all splits, or an empty list if all are None, or raise."""
    found = [tensor for tensor in tensors if tensor is not None]
    if found and len(found) < len(tensors):
        raise RuntimeError(
            f"{name} must be a tensor in every split or None in all, "
            f"got None in {len(tensors) - len(found)} of {len(tensors)}"
        )
    return found


class AuxiliaryList(nn.ModuleList):
    """The auxiliaries of one layer, its `aux_bn`."""


def _refuse_other_batch_norm(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    """Raise if a batch norm that is not ours is given the auxiliaries of one of our layers.

    This is how `nn.SyncBatchNorm.convert_sync_batchnorm` and those of timm and apex convert a
    layer: they make another batch norm and move the children over, which loses the splits.
    """
    is_other = isinstance(module, _BatchNorm) and not isinstance(module, SplitState)
    if is_other and isinstance(submodule, AuxiliaryList):
        raise RuntimeError(
            "SyncSplitBatchNorm must not be converted by another converter, got its auxiliaries "
            f"moved to a {type(module).__name__}; it is synchronized already, so remove that call"
        )


# torch calls it whenever any module gets a child: there is no such hook for one class.
register_module_module_registration_hook(_refuse_other_batch_norm)


class SplitState(_BatchNorm):
    """A batch norm with the state of S splits, in the state-dict layout of timm."""

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
        check_eps(eps)
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        if not bias:
            self.register_parameter("bias", None)
        auxiliaries = [Auxiliary.copy_of(self, share_affine, {}) for _ in range(num_splits - 1)]
        self._add_auxiliaries(auxiliaries, process_group, share_affine)

    def _add_auxiliaries(
        self, auxiliaries: list[Auxiliary], process_group: Any, share_affine: bool
    ) -> None:
        """Complete a batch norm that has the state of split 0 alone."""
        check_group(process_group)
        self.num_splits = 1 + len(auxiliaries)
        self.process_group = process_group
        self.share_affine = share_affine
        self.aux_bn = AuxiliaryList(auxiliaries).train(self.training)

    def _splits(self) -> list[Any]:
        """Return the modules that hold the splits' buffers: the layer, then its auxiliaries."""
        # Asked twice a step: nn.Module and nn.ModuleList take ten times as long to tell.
        auxiliaries: Any = self._modules.get("aux_bn")
        # The constructor of the base class asks before there are any.
        return [self] if auxiliaries is None else [self, *auxiliaries._modules.values()]

    def _by_split(self, *names: str) -> list[list[Tensor]]:
        """Return the parameters or buffers of each name, one a split, or none where all lack it."""
        splits = self._splits()
        return [_all_or_none(name, [_read(stats, name) for stats in splits]) for name in names]

    def _parameters_by_split(self) -> list[Any]:
        """Return the weight and the bias: S tensors [C], or one that is shared, or None."""
        if self.share_affine:
            return [_read(self, name) for name in PARAMETERS]
        return [tensors or None for tensors in self._by_split(*PARAMETERS)]

    def _parameter_of_split(self, name: str, split: int) -> Tensor | None:
        """Return the parameter `name` of one split, [C], or None without it."""
        own: Tensor | None = getattr(self, name)
        if own is None or self.share_affine:
            return own
        if torch.is_grad_enabled():
            # Other splits get zero gradients, not None: DDP waits for every parameter.
            (every,) = self._by_split(name)
            for each in every:
                check_storage(name, each)
            return torch.stack(every)[split]
        return own if split == 0 else getattr(self.aux_bn[split - 1], name)

    def reset_running_stats(self) -> None:
        """Set every split's running mean to 0, variance to 1 and counter to 0."""
        if not self.track_running_stats:
            return
        for stats in self._splits():
            stats.running_mean.zero_()
            stats.running_var.fill_(1)
            if stats.num_batches_tracked is not None:
                stats.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Reset the running statistics; set every split's weight to 1 and bias to 0."""
        super().reset_parameters()
        for stats in self._splits()[1:]:
            for name, value in (("weight", 1.0), ("bias", 0.0)):
                parameter = getattr(stats, name, None)
                if parameter is not None:
                    nn.init.constant_(parameter, value)

    def extra_repr(self) -> str:
        """Describe the layer in a model's printout."""
        plain = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{plain}, num_splits={self.num_splits}, share_affine={self.share_affine}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        """Load split 0; the whole state of a plain batch norm fills every split."""
        # What is given, before torch adds the counter that version 1 of batch norm had not.
        own = {n: state_dict[prefix + n] for n in PARAMETERS + BUFFERS if prefix + n in state_dict}
        is_whole = all(n in own or getattr(self, n) is None for n in PARAMETERS + BUFFERS[:2])
        start = f"{prefix}aux_bn."
        keys = [key.removeprefix(start) for key in state_dict if key.startswith(start)]
        if is_whole and keys:
            self._check_number_of_splits(prefix, {key.partition(".")[0] for key in keys})
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        is_version_1 = (local_metadata.get("version") or 1) < 2
        for i, stats in enumerate(self.aux_bn):
            for name, kept in stats.state_dict().items():
                value = own.get(name) if is_whole and not keys else None
                if value is None and is_version_1 and name == "num_batches_tracked":
                    value = kept
                if isinstance(value, Tensor):
                    # A clone: load_state_dict(assign=True) keeps the tensor that it is given.
                    state_dict.setdefault(f"{start}{i}.{name}", value.clone())

    def _check_number_of_splits(self, prefix: str, auxiliaries: set[str]) -> None:
        """Raise if a state has the auxiliaries 0, 1 and so on of another number of splits."""
        given = len(auxiliaries)
        # With strict=False too, as torch does for other shapes: it is not told apart here.
        if given != len(self.aux_bn) and auxiliaries == {str(i) for i in range(given)}:
            raise RuntimeError(
                f"state_dict must hold num_splits={self.num_splits} splits of module "
                f"{prefix.rstrip('.')!r}, got {1 + given}; convert the model with "
                f"num_splits={1 + given}"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what cannot be pickled or is temporary: process group, active contexts."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        state["process_group"] = None
        for name in ("_assignment", "_stats_frozen"):
            state.pop(name, None)
        return state

    def __copy__(self) -> "SplitState":
        """Copy shallowly; the copy has the same process group."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(SplitState.__getstate__(self), process_group=self.process_group)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> "SplitState":
        """Copy deeply; the copy has the same process group, which cannot be copied."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        # Not by self: a parametrized layer refuses to be pickled there, and may be copied.
        twin.__dict__.update(copy.deepcopy(SplitState.__getstate__(self), memo))
        twin.process_group = self.process_group
        return twin
