"""A dual encoder and its AdamW under DeepSpeed's ZeRO (arXiv:1910.02054). The only place that knows DeepSpeed.

Precision: the model stays fp32, and bf16 and fp16 runs compute under autocast. DeepSpeed's own modes would round the parameters
that the model sees, the logarithm of the logit scale among them (a scale near 100 then moves in steps of 3 %), and save no
memory once gradients accumulate in fp32. tests/test_engine.py holds the two against each other.

Nothing here reads from the device, unless the optimizer's state is the host's (`train.offload_optimizer`): the norm of the
gradients, the clip, the decision to skip a step that is not finite and fp16's loss scale stay there, as arguments of the fused
AdamW. DeepSpeed's own norm and overflow checks, which read them on the host at every step, are switched off.
"""

import contextlib
import inspect
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from scaleclip.checkpoint.shard import Fragment, Shard
from scaleclip.config import ModelConfig, RunConfig
from scaleclip.deepspeed_config import deepspeed_config
from scaleclip.distributed import World, all_or_none
from scaleclip.errors import ConfigError
from scaleclip.exchange.initial_weights import start_from
from scaleclip.models.dual_encoder import DualEncoder, Features, Inputs
from scaleclip.optim import build_optimizer, set_learning_rate
from scaleclip.traffic import Traffic

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import safe_get_full_grad

deepspeed.logger.setLevel("WARNING")
# of names that DeepSpeed calls at every gather
warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
# A C++ all-reduce for ranks that share a CPU: gloo does the same without compiling for minutes at the first start.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

_DEEPSPEED = f"DeepSpeed {deepspeed.__version__}"
_FIRST_LOSS_SCALE, _LOSS_SCALE_GROWTH_STEPS = 2.0**16, 2000
_NORM_BLOCK = 2**16
_MOMENTS = ("exp_avg", "exp_avg_sq")


class StepOutcome(NamedTuple):
    """What an optimizer step did. Tensors without dimensions, on the device, alike on every rank."""

    grad_norm: Tensor
    """Global L2 norm of the gradients before clipping, fp32."""
    bad: Tensor
    """Whether loss or gradients were not finite, bool: nothing was updated. fp16's overflows, from which the loss scale learns,
    do not count."""


class Engine:
    """The model on this rank and how it takes a step. Every rank calls every method.

    Args:
        config: the run's configuration, validated.
        world: this rank; the process group must be up (scaleclip.distributed.init).

    Raises:
        ConfigError: a tower cannot be built as configured, or `train.deepspeed` sets what another key decides or what DeepSpeed
            does not take.
    """

    def __init__(self, config: RunConfig, world: World) -> None:
        self._config, self._model_config, self._device = config.train, config.model, world.device
        self._step_device = torch.device("cpu") if config.train.offload_optimizer else world.device
        self._clip_norm = config.optim.clip_norm
        settings = _Settings(deepspeed_config(config, world.size))
        with _explain_settings():
            self.model = _build_model(config, settings, world)
            """The dual encoder; under stage 3 its parameters are empty outside of a forward pass."""
            self._adamw = build_optimizer(self.model, config.optim)
            self._ds, *_ = deepspeed.initialize(
                model=self.model, optimizer=self._adamw, config=settings, dist_init_required=False
            )
        settings.check_all_read()
        # of DeepSpeed's types only what is used here is known, in this file
        self._zero: Any = self._ds.optimizer if self._config.zero_stage else None
        _leave_out_host_reads(self._ds)
        if self._config.compile:
            self.model.image.body.compile()
            self.model.text.body.compile()
        self.traffic = Traffic(deepspeed.comm.comm.cdb)
        """What DeepSpeed sent."""
        fp16 = self._config.precision == "fp16"
        self.loss_scale = torch.full((), _FIRST_LOSS_SCALE if fp16 else 1.0, device=self._device)
        """What fp16's loss is multiplied by for the backward pass, fp32 (), on the device; 1 otherwise."""
        self._good_steps = torch.zeros((), dtype=torch.int32, device=self._device)
        self._make_moments()

    def __call__(self, inputs: Inputs) -> Features:
        """The model's forward pass under the run's autocast; see DualEncoder.forward."""
        features: Features = self._ds(*inputs)
        return features

    @contextlib.contextmanager
    def one_step(self, num_backwards: int) -> Iterator[None]:
        """Around the backward passes of an optimizer step, of which there are `num_backwards`."""
        once = num_backwards > 1 and self._config.zero_stage >= 2 and self._config.reduce_gradients == "step"
        with self._ds.coalesce_grad_reduction() if once else contextlib.nullcontext():
            yield

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of `loss`; the `last` call of a step makes them the mean over all ranks."""
        self._ds.set_gradient_accumulation_boundary(last)
        self._ds.backward(loss * self.loss_scale if self._config.precision == "fp16" else loss, scale_wrt_gas=False)

    def step(self, loss: Tensor, lr: float) -> StepOutcome:
        """Clip and update, unless `loss` (mean over the global batch, alike on all ranks) or a gradient is not finite."""
        fp16 = self._config.precision == "fp16"
        norm = self._gradient_norm() / self.loss_scale
        skip = ~(norm.isfinite() & loss.isfinite())
        scale, found_inf = self.loss_scale, skip.float()
        if self._clip_norm:
            scale = scale * ((norm + 1e-6) / self._clip_norm).clamp(min=1.0)
        overflow = skip & loss.isfinite() & fp16
        bad = skip & ~(overflow & (self.loss_scale > 1))
        # the fused AdamW divides gradients by the one and does nothing where the other is 1; on the host it reads them at once
        vars(self._adamw).update(grad_scale=scale.to(self._step_device), found_inf=found_inf.to(self._step_device))
        set_learning_rate(self._adamw, lr)
        self._ds.step()
        if fp16:
            growth = (2.0, 0.5, _LOSS_SCALE_GROWTH_STEPS)
            torch._amp_update_scale_(self.loss_scale, self._good_steps, overflow.float(), *growth)
            self.loss_scale.clamp_(min=1.0)
        return StepOutcome(norm, bad)

    def gradients(self) -> dict[str, Tensor]:
        """Whole gradients by parameter, fp32, the mean over all ranks; between the last backward and the step. For checks."""
        found = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                gradient = parameter.grad if self._zero is None else safe_get_full_grad(parameter)
                assert gradient is not None, name
                found[name] = gradient.detach().float().clone() / self.loss_scale
        return found

    def parameters(self) -> dict[str, Tensor]:
        """Whole parameters by name, fp32, copied. For checks."""
        found = {}
        for name, parameter in self.model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self._config.zero_stage == 3):
                found[name] = parameter.detach().clone()
        return found

    @torch.no_grad()
    def whole_model(self) -> DualEncoder:
        """The model for evaluation: itself, or under stage 3 a copy with whole parameters on this rank's device."""
        if self._config.zero_stage < 3:
            return self.model
        # what only learns takes no part in evaluations
        parts = {"projector": None, "caption_decoder": None}
        copy = DualEncoder(self._model_config.without_pretrained().model_copy(update=parts)).to(self._device)
        parameters = dict(self.model.named_parameters())
        for name, whole in copy.named_parameters():
            with deepspeed.zero.GatheredParameters([parameters[name]]):
                whole.copy_(parameters[name])
        return copy

    def close(self) -> None:
        """Let go of what the engine holds, so that another one can be made. Not after an error: it waits for the device."""
        self._ds.destroy()
        self._adamw.state.clear()
        _forget_modules(self.model)

    def shard(self) -> Shard:
        """What this rank holds of parameters and optimizer state, as views: what is written there is loaded (`refresh`)."""
        parameters = dict(self.model.named_parameters())
        learning = [name for name, parameter in parameters.items() if parameter.requires_grad]
        fragments = [fragment for name in learning if (fragment := self._fragment(name, parameters[name])) is not None]
        fragments += [self._frozen(name, parameters[name]) for name in parameters if name not in set(learning)]
        steps = [state["step"] for state in self._adamw.state.values()]
        scalars = {"adam_step": steps[0]}
        if self._config.precision == "fp16":
            scalars |= {"loss_scale": self.loss_scale, "good_steps": self._good_steps}
        return Shard(fragments, scalars)

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the model up to the shard that was loaded."""
        steps = [state["step"] for state in self._adamw.state.values()]
        for step in steps[1:]:
            step.copy_(steps[0])
        if self._config.zero_stage in (1, 2):
            self._zero.update_lp_params()
        if self._config.zero_stage == 3:
            for group in range(len(self._zero.fp16_groups)):
                self._zero._reassign_or_swap_out_partitioned_parameters(group)
            if self._zero.persistent_parameters:
                self._zero.persistent_parameters[0].partition(self._zero.persistent_parameters, has_been_updated=False)
                self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)

    def _gradient_norm(self) -> Tensor:
        """Global L2 norm of the averaged gradients, loss scale included, fp32 ()."""
        if self._zero is None:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        elif self._config.offload_optimizer:
            if self._device.type == "cuda":
                # for DeepSpeed's copies of gradients to the host, which are on their way
                torch.cuda.synchronize(self._device)
            # sums of squares over a block each: over millions of elements the CPU's would lose digits
            whole = [master.grad for master in self._masters() if master.grad is not None]
            gradients = [block for gradient in whole for block in torch.split(gradient, _NORM_BLOCK)]
        else:
            gradients = [g for group in self._zero.averaged_gradients.values() for g in group]
        squares = torch.stack(torch._foreach_norm(gradients)).square().sum().to(self._device)
        if self._zero is not None:
            dist.all_reduce(squares)
        return squares.sqrt()

    def _masters(self) -> list[Tensor]:
        """The flat fp32 tensors that AdamW updates under ZeRO."""
        stage3 = self._config.zero_stage == 3
        masters: list[Tensor] = (
            self._zero.fp32_partitioned_groups_flat if stage3 else self._zero.single_partition_of_fp32_groups
        )
        return masters

    def _make_moments(self) -> None:
        """AdamW's state, which it would make in its first step: a checkpoint is loaded before."""
        for master in self._masters() if self._zero else [p for p in self.model.parameters() if p.requires_grad]:
            state = self._adamw.state[master]
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            for moment in _MOMENTS:
                state[moment] = torch.zeros_like(master, memory_format=torch.preserve_format)
        if self._config.zero_stage in (1, 2):
            self._zero._lazy_init_hp_params_optimizer_state()

    def _fragment(self, name: str, parameter: Any) -> Fragment | None:
        """This rank's part of a parameter that learns; None if it holds nothing of it."""
        if self._zero is None:
            state = self._adamw.state[parameter]
            tensors = {"weight": parameter.data, **{moment: state[moment] for moment in _MOMENTS}}
            flat = {key: tensor.view(-1) for key, tensor in tensors.items()}
            return Fragment(name, tuple(parameter.shape), 0, flat, replicated=True)
        if self._config.zero_stage < 3:
            mapping = parameter._hp_mapping
            if mapping is None:
                return None
            flat = {"weight": mapping.hp_fragment, **{moment: mapping.optim_fragment[moment] for moment in _MOMENTS}}
            flat = {key: tensor.data for key, tensor in flat.items()}
            return Fragment(name, tuple(parameter.shape), mapping.lp_fragment_address.start, flat, replicated=False)
        group, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
        master = self._zero.fp32_partitioned_groups_flat[group]
        start = parameter.partition_numel() * dist.get_rank()
        length = min(parameter.partition_numel(), parameter.ds_numel - start)
        if length <= 0:
            return None
        state = self._adamw.state[master]
        tensors = {"weight": master, **{moment: state[moment] for moment in _MOMENTS}}
        flat = {key: tensor.data[offset : offset + length] for key, tensor in tensors.items()}
        return Fragment(name, tuple(parameter.ds_shape), start, flat, replicated=False)

    def _frozen(self, name: str, parameter: Any) -> Fragment:
        if self._config.zero_stage < 3:
            return Fragment(name, tuple(parameter.shape), 0, {"weight": parameter.data.view(-1)}, replicated=True)
        start = parameter.partition_numel() * dist.get_rank()
        length = max(0, min(parameter.partition_numel(), parameter.ds_numel - start))
        return Fragment(name, tuple(parameter.ds_shape), start, {"weight": parameter.ds_tensor.data[:length]}, replicated=False)


class _Settings(dict[str, Any]):
    """DeepSpeed's configuration, which notes which of its sections DeepSpeed reads: those that it does not know it passes over
    in silence."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        self._read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._read.add(str(key))
        return super().__contains__(key)

    def check_all_read(self) -> None:
        """Raise ConfigError if a key was never asked for."""
        if unknown := sorted(self.keys() - self._read):
            raise ConfigError(f"train.deepspeed has what {_DEEPSPEED} does not know: {', '.join(unknown)}")


@contextlib.contextmanager
def _explain_settings() -> Iterator[None]:
    """What DeepSpeed says of a section of its configuration as ConfigError."""
    try:
        yield
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, each['loc']))}={each['input']!r}: {each['msg'].lower()}" for each in error.errors()]
        raise ConfigError(f"train.deepspeed: {error.title} of {_DEEPSPEED}: {'; '.join(faults)}") from error


def _build_model(config: RunConfig, settings: dict[str, Any], world: World) -> DualEncoder:
    """The model with its first weights, the same for every stage and number of ranks.

    Under stage 3 no rank's device holds more meanwhile than its shard and one whole parameter: rank 0 makes the towers in the
    host's memory, the others only their shapes, and the parameters are handed out one by one.
    """
    torch.manual_seed(config.run.seed)
    if config.train.zero_stage < 3:
        with all_or_none():
            model = _with_first_weights(config.model)
        return model.to(world.device)
    with all_or_none(), contextlib.nullcontext() if world.is_main else torch.device("meta"):
        model = _with_first_weights(config.model)
    init = deepspeed.zero.Init(config_dict_or_path=settings, dtype=torch.float32)
    done: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in done:
                there = _on_device(parameter, world.device)
                done[id(parameter)] = nn.Parameter(there, requires_grad=parameter.requires_grad)
                init._zero_init_param(done[id(parameter)])
            setattr(module, name, done[id(parameter)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            there = _on_device(buffer, world.device)
            dist.broadcast(there, 0)
            module._buffers[name] = there
    return model


def _with_first_weights(config: ModelConfig) -> DualEncoder:
    model = DualEncoder(config)
    if config.pretrained is not None and not model.logit_scale.is_meta:
        start_from(model, config)
    return model


def _on_device(tensor: Tensor, device: torch.device) -> Tensor:
    return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.data.to(device)


def _forget_modules(model: nn.Module) -> None:
    """Take a model out of what stage 3 keeps as long as the process lives: a list of running modules, and a method's answers by
    module."""
    own = set(model.modules())
    FWD_MODULE_STACK[:] = [module for module in FWD_MODULE_STACK if module not in own]
    method = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    inspect.getclosurevars(method).nonlocals["func"].cache_clear()


def _leave_out_host_reads(ds: Any) -> None:
    """Switch off what Engine.step does on the device: DeepSpeed's norms, and its scalers for fp16 under autocast."""
    ds.torch_autocast_z0_gradscaler = None
    if ds.zero_optimization_stage():
        ds.optimizer.torch_autocast_gradscaler = None
        ds.optimizer.scaled_global_norm = lambda norm_type=2: torch.zeros(())
        ds.optimizer._get_norm_groups = lambda: [0.0]
