"""DeepSpeed's ZeRO-1, -2 and -3 (arXiv:1910.02054), with the optimizer in main memory on request.

Its checkpoints are not used: they are pickles, and fit one number of ranks. Master weights are read from its flat fp32 buffers
by parameter, as every engine's are.

In bf16 runs its weights are bf16, its master weights and the sum of gradients fp32. Parameters without a dimension, and those
that do not learn, are kept from it: it would round a temperature to bf16. Its flat buffers are updated parameter by parameter
(`Handover`): as a whole, they would decay what has no gradient in a step, or never.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.engine import StepResult
from train.engines.deepspeed_settings import import_deepspeed, settings_of
from train.engines.sharded import Shard, ShardedEngine, blocks_of, must_be_torch
from train.optimizers import EPS, forget_gradients, global_norm


class DeepSpeedEngine(ShardedEngine):
    """ZeRO by `zero_stage`."""

    kind = "deepspeed"

    def build(self) -> None:
        config, model = self.config, self.model
        must_be_torch(config.optim.kind, self.kind)
        self.deepspeed = import_deepspeed(self.device)
        groups = self.name_parameters()
        parameters = dict(model.named_parameters())
        self._apart = {name: p for name, p in parameters.items() if p.ndim == 0 or not p.requires_grad}
        self.replicated = frozenset(self._apart)
        apart = {id(p) for p in self._apart.values()}
        for p in self._apart.values():
            p.data = p.data.to(self.device)
        hide(model, apart)
        self._parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        exact = {name: p.detach().view(-1) for name, p in self._parameters.items()}
        theirs = [{**group, "params": [p for p in group["params"] if id(p) not in apart]} for group in groups]
        self.engine = self.deepspeed.initialize(
            model=model,
            optimizer=Handover([group for group in theirs if group["params"]], config.optim.lr, self._update),
            config=settings_of(config, self.ranks.size, self.precision.autocast is not None, self.device),
            dist_init_required=False,
        )[0]
        self.module, self.zero = self.engine, self.engine.optimizer
        if config.zero_stage == 3:
            self._tell_what_is_used()
        self._add_scalars_to_the_norm()
        found = {name: self._shard(name) for name in parameters}
        self.shards = {name: shard for name, shard in found.items() if shard is not None}
        self.build_sharded_optimizer(groups)
        self._place_shards()
        self._used: set[str] = set()
        for name, p in self._parameters.items():
            p.register_hook(partial(self._note, name))
        # DeepSpeed makes its master weights of bf16 ones. Those lie on bf16's grid, where small steps are lost for long.
        self.set_weights(
            {name: exact[name][s.start : s.stop] for name, s in self.shards.items() if name in exact}
        )
        self.publish()
        self.start_average()

    def _tell_what_is_used(self) -> None:
        """ZeRO-3 gathers a module's own parameters when it is called. Blocks use their children's directly, and the model
        those of modules that it does not call: both are told beforehand."""
        blocks = blocks_of(self.model)
        inside = {id(p) for block in blocks for p in block.parameters()}
        outside = [p for p in self.model.parameters() if id(p) not in inside]
        for module, parameters in [
            (self.model, outside),
            *((block, list(block.parameters())) for block in blocks),
        ]:
            own = {id(p) for p in module.parameters(recurse=False)}
            for p in parameters:
                if id(p) not in own:
                    self.deepspeed.zero.register_external_parameter(module, p)

    def _shard(self, name: str) -> Shard | None:
        """What this rank holds of a parameter; None where that is nothing."""
        if name in self._apart:
            return Shard(self._apart[name].detach().view(-1), 0, self.shapes[name])
        p: Any = self._parameters[name]
        if self.config.zero_stage == 3:
            shape, each = self.shapes[name], p.partition_numel()
            start = min(each * self.ranks.rank, math.prod(shape))
            values = self._flat(name)[: min(each, math.prod(shape) - start)]
            return Shard(values, start, shape) if values.numel() else None
        place = p._hp_mapping
        return (
            None
            if place is None
            else Shard(place.hp_fragment, place.lp_fragment_address.start, self.shapes[name])
        )

    def _flat(self, name: str) -> Tensor:
        """ZeRO-3's run of the flat buffer that belongs to a parameter on this rank, padding included."""
        group, offset, length = self.zero.grad_position[self.zero.get_param_id(self._parameters[name])]
        flat: Tensor = self.zero.fp32_partitioned_groups_flat[group]
        return flat.narrow(0, offset, length)

    def _place_shards(self) -> None:
        """Where the shards lie in DeepSpeed's flat buffers, which its gradients come in."""
        names = (
            "fp32_partitioned_groups_flat",
            "single_partition_of_fp32_groups",
            "fp32_groups_flat_partition",
        )
        flats = next(getattr(self.zero, name) for name in names if hasattr(self.zero, name))
        storages = {flat.untyped_storage().data_ptr(): flat for flat in flats}
        self._places: dict[int, list[tuple[str, int]]] = {id(flat): [] for flat in flats}
        for name, shard in self.shards.items():
            if name not in self.replicated:
                flat = storages[shard.values.untyped_storage().data_ptr()]
                self._places[id(flat)].append((name, shard.values.storage_offset() - flat.storage_offset()))

    def _note(self, name: str, gradient: Tensor) -> None:
        self._used.add(name)

    def _update(self, flat: Tensor) -> None:
        """The optimizer's step for what DeepSpeed keeps in one flat buffer. Its gradient has zeros for parameters that no rank
        has used: for torch's optimizers these have none, and stay as they are."""
        assert flat.grad is not None
        for name, start in self._places[id(flat)]:
            own = self.own_parameters[name]
            own.grad = flat.grad.narrow(0, start, own.numel()) if name in self._used else None
        self.optimizer.step()
        forget_gradients(self.optimizer)

    def _add_scalars_to_the_norm(self) -> None:
        """The parameters that DeepSpeed does not have count in the norm that it clips by."""
        names = ("_get_norm_groups", "scaled_global_norm", "get_grads_for_norm")
        name = next(name for name in names if hasattr(self.zero, name))
        theirs = getattr(self.zero, name)

        def with_scalars(*args: Any, **options: Any) -> Any:
            found, ours = theirs(*args, **options), self._scalar_norm.to(self.device)
            match name:
                case "_get_norm_groups":  # ZeRO-3: norms, to be combined
                    return [*found, ours]
                case "scaled_global_norm":  # ZeRO-1 and -2: the norm; -1 means that it is not finite
                    return torch.where(found >= 0, torch.hypot(found, ours.to(found)), found)
            if options.get("for_clipping"):  # ZeRO-1 in bf16: gradients, whose squares are summed over ranks
                return found
            return [*found[0], ours[None] / self.ranks.size**0.5], found[1]

        setattr(self.zero, name, with_scalars)

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        """ZeRO-2 and -3 reduce in every micro-step, ZeRO-1 in the last."""
        yield

    def micro_batches(self, batches: Any) -> Any:
        """ZeRO-3 computes embeddings outside of `forward` with everything gathered."""
        if self.config.zero_stage == 3 and self.config.itc_negatives == "global":
            with self.deepspeed.zero.GatheredParameters(list(self.model.parameters())):
                return super().micro_batches(batches)
        return super().micro_batches(batches)

    def backward(self, losses: Mapping[str, Tensor]) -> None:
        total = torch.stack([self.weights[name] * loss for name, loss in losses.items()]).sum()
        # A loss that is not finite must reach every gradient: DeepSpeed looks at those alone.
        self.engine.backward(total * torch.where(torch.isfinite(total), 1.0, torch.nan), scale_wrt_gas=False)
        for name, loss in losses.items():
            self._sums[name] = self._sums.get(name, 0) + loss.detach()

    def step(self, lr: float) -> StepResult:
        totals = self.totals()
        clip = self.config.optim.clip
        scalars = {name: p for name, p in self._apart.items() if p.grad is not None}
        gradients = [p.grad for p in scalars.values() if p.grad is not None]
        self.mean_over_ranks(gradients)
        self._scalar_norm = global_norm(gradients)
        self._used = self.used_anywhere(self._used)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        if self.zero.overflow:
            norm = torch.full((), torch.nan)
        else:
            norm = torch.as_tensor(self.engine.get_global_grad_norm()).float()
            if clip and gradients:
                torch._foreach_div_(gradients, ((norm + EPS) / clip).clamp(min=1.0).to(self.device))
            for name, p in scalars.items():
                self.own_parameters[name].grad = p.grad.view(-1)
            self.optimizer.step()
        return self.concluded(totals, norm)

    def used_anywhere(self, mine: set[str]) -> set[str]:
        """The parameters that had a gradient on some rank, of those that had one on this."""
        flags = torch.tensor(
            [name in mine for name in self._parameters], dtype=torch.uint8, device=self.device
        )
        if self.ranks.size > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        return {name for name, flag in zip(self._parameters, flags.tolist(), strict=True) if flag}

    def discard(self) -> None:
        """An unfinished step's gradients are dropped as DeepSpeed drops those of one that it skips."""
        super().discard()
        self.zero.zero_grad(set_to_none=True)
        for p in self._apart.values():
            p.grad = None
        if self.config.zero_stage == 3:
            # The first backward of a step copies gradients into it and later ones add: what the first does not use would keep
            # those of the step before.
            self.zero.grad_partitions_flat_buffer.zero_()
        self._used.clear()

    @torch.no_grad()
    def publish(self) -> None:
        if self.config.zero_stage < 3:
            self.zero.update_lp_params()
            return
        for name, p in self._parameters.items():
            whole = self.collect(name, self.masters())
            with self.deepspeed.zero.GatheredParameters([p], modifier_rank=0):
                if whole is not None:
                    p.copy_(whole)


class Handover(torch.optim.Optimizer):
    """The optimizer that DeepSpeed gets: it hands each flat buffer, gradient included, to a function."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, update: Callable[[Tensor], None]) -> None:
        super().__init__(groups, {"lr": lr})
        self.update = update

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for flat in group["params"]:
                self.update(flat)


def hide(model: nn.Module, parameters: set[int]) -> None:
    """Parameters (by id) become ordinary attributes: the model computes with them as before, but they are not listed as its
    parameters any more."""
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if id(p) in parameters:
                del module._parameters[name]
                module.__dict__[name] = p
