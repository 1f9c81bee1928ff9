"""Our samplers in a pipeline of diffusers, as one of its schedulers."""

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from encdiff import ops
from encdiff.diffusion import menu, samplers, schedules, solvers
from encdiff.diffusion.loop import Stage, Walk
from encdiff.errors import InputError

try:
    import diffusers
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin, SchedulerOutput
except ModuleNotFoundError as error:
    raise ImportError("EncDiffScheduler needs the package diffusers: pip install encdiff[diffusers]") from error

PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
BETA_SCHEDULES = {"squaredcos_cap_v2": "cosine"}  # the others have our names
SPACINGS = (None, "leading", "trailing", "linspace")
KINDS = {
    "dpm-solver++": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler", "heun": "HeunDiscreteScheduler",
    "ddim": "DDIMScheduler", "ddpm": "DDPMScheduler",
}  # fmt: skip
DEFAULTS = {  # of what None is taken from the class of the kind, where that class has no such key
    "beta_start": 0.0001, "beta_end": 0.02, "timestep_spacing": "linspace", "set_alpha_to_one": True,
    "clip_sample": False,
}  # fmt: skip
ALIKE = {  # taken for the default
    "solver_type": ("midpoint", "logrho", "bh2"), "algorithm_type": ("dpmsolver++", "deis"),
    "variance_type": (None, "fixed_small"),
}  # fmt: skip
ADDITIONS = ("dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type")  # nothing by themselves


class EncDiffScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # both say what config_name is
    """One of our samplers as a scheduler of diffusers: a step is one pass of `ops.step`, for "unipc" two.

        pipe.scheduler = EncDiffScheduler.from_config(pipe.scheduler.config, sampler="unipc")

    Args:
        sampler: dpm-solver++, unipc, euler, heun, ddim or ddpm; its kind in diffusers is DPMSolverMultistepScheduler,
            UniPCMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, DDIMScheduler or DDPMScheduler.
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: the schedule
            that the model was trained on, with the names of diffusers.
        prediction_type: what the model gives: epsilon, v_prediction or sample.
        timestep_spacing: leading, trailing or linspace, as in the class of the kind.
        steps_offset: added to the timesteps of leading.
        use_karras_sigmas: EDM's noise levels, for the first four.
        eta: of ddim, the share of DDPM's noise, 0 to 1.
        set_alpha_to_one: of ddim, whether its last step goes to the data or to the schedule's first level.
        clip_sample, clip_sample_range: bound the predicted data to [-range, range].

    None is the default of the class of the kind: `beta_start` 0.0001 and `beta_end` 0.02, for heun 0.00085 and 0.012;
    `timestep_spacing` leading for ddim and ddpm, linspace for the others; `set_alpha_to_one` True; `clip_sample` True
    for ddim and ddpm, False for the others. `EncDiff.sample` is without bounds, and its "ddim" has steps_offset 1 and
    set_alpha_to_one False. `config` has the values taken.

    x keeps the scale of the schedule in every sampler, and `scale_model_input` changes nothing. A pipeline begins with
    noise times `init_noise_sigma`: 1, but for euler and heun with linspace or trailing sqrt(1 - alpha_bar) of the first
    timestep, where their classes begin. `EncDiff.sample` begins with the noise itself, as it does by a sampler's name.

    Equal to the class of the kind but for rounding, except ddim with linspace, and with trailing where the steps do not
    divide the schedule: `DDIMScheduler` then steps by T/steps, past or short of its next timestep; ours to the next.

    Raises InputError for an unknown name, an option of another sampler or a schedule that is none.
    """

    _compatibles = [kind.name for kind in KarrasDiffusionSchedulers]  # noqa: RUF012  # as in every class of diffusers
    keeps_scale = True  # `EncDiff.sample` begins with the noise as it is

    @register_to_config
    def __init__(
        self, sampler: str = "dpm-solver++", num_train_timesteps: int = 1000, beta_start: float | None = None,
        beta_end: float | None = None, beta_schedule: str = "linear", trained_betas: Sequence[float] | None = None,
        prediction_type: str = "epsilon", timestep_spacing: str | None = None, steps_offset: int = 0,
        use_karras_sigmas: bool = False, eta: float = 0.0, set_alpha_to_one: bool | None = None,
        clip_sample: bool | None = None, clip_sample_range: float = 1.0, rescale_betas_zero_snr: bool = False,
    ):  # fmt: skip
        _check("sampler", sampler, menu.SAMPLERS)
        _check("prediction_type", prediction_type, tuple(PREDICTIONS))
        _check("timestep_spacing", timestep_spacing, SPACINGS)
        defaults = _defaults(sampler)
        self.register_to_config(**{key: defaults[key] for key in DEFAULTS if self.config[key] is None})
        if trained_betas is None:
            kind, c = BETA_SCHEDULES.get(beta_schedule, beta_schedule), self.config
            betas = schedules.make_betas(kind, num_train_timesteps, c["beta_start"], c["beta_end"])
        else:
            betas = torch.as_tensor(trained_betas, dtype=torch.float64)
        if rescale_betas_zero_snr:
            betas = schedules.zero_terminal_snr(betas)
        self.alphas_cumprod = schedules.alphas_cumprod(betas)
        self.timesteps = torch.arange(len(betas)).flip(0)
        self.num_inference_steps: int | None = None
        self.order = 2 if sampler == "heun" else 1  # calls of the model for each step
        self._begin_index: int | None = None
        self._walk: Walk | None = None
        self._stages(min(2, len(self)))  # names an option that does not fit

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The scheduler of the configuration of another class, or of ours; options given by name go first.

        As in diffusers, what was a default there is the default here, and keys that the class of the kind does not know
        are ignored. One warning names the keys that it follows and ours does not. Raises InputError for a class without
        betas, such as those of flows and of EDM.
        """
        if isinstance(config, Mapping) and "sampler" not in config:  # not ours
            config = _taken(config, kwargs.get("sampler", "dpm-solver++"), kwargs)
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def init_noise_sigma(self) -> float:
        """What a pipeline multiplies its noise by at the start, for the class of the kind to begin at the same x."""
        c = self.config
        if c["sampler"] not in ("euler", "heun") or c["timestep_spacing"] == "leading":
            return 1.0
        first = self.timesteps[:1] if self.num_inference_steps else torch.tensor([len(self) - 1])
        return solvers.vp_levels(self.alphas_cumprod, first)[0, 1].item()

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Begin anew, with so many steps: `timesteps`, int64 or float32, says when to call the model."""
        times = [stage.time for stage in self._stages(num_inference_steps) if stage.time is not None]
        whole = all(float(time).is_integer() for time in times)
        timesteps = torch.tensor(times, dtype=torch.int64 if whole else torch.float32)
        self._times, self.timesteps = timesteps.tolist(), timesteps.to(device)
        self.num_inference_steps, self._begin_index, self._walk = num_inference_steps, None, None

    @property
    def begin_index(self) -> int | None:
        """Of `timesteps`, where the first step begins, if it was set."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin there, not at the first of `timesteps`: image to image."""
        self._begin_index = begin_index

    @property
    def step_index(self) -> int | None:
        """Of `timesteps`, the next one; None before the first step."""
        return None if self._walk is None else self._first + self._walk.calls

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample itself: x keeps the schedule's scale."""
        return sample

    @torch.no_grad()
    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """From sample (B, ...) at the next of `timesteps` and the model's output of its shape to the sample after it.

        The noise of "ddim" with eta and of "ddpm" comes from `generator`, or one for each sample; without it is keyed
        by a seed that torch's own gives (`ops.normal`). Without gradients. Raises InputError for another timestep than
        the next, which on a GPU is read at the first step alone, and where none is left.
        """
        if self._walk is None:
            self._walk = self._begin(float(timestep), sample, generator)
        walk, index = self._walk, self._first + self._walk.calls
        if walk.time is None:
            raise InputError(f"step was called {walk.calls} times, which were all; call set_timesteps before the next")
        if not (isinstance(timestep, Tensor) and timestep.is_cuda) and timestep != self._times[index]:
            raise InputError(f"timestep is {float(timestep):g}, must be {self._times[index]:g}, the next of timesteps")
        walk.x, walk.generator = sample, generator or walk.generator
        walk.advance(model_output)
        return SchedulerOutput(prev_sample=walk.x) if return_dict else (walk.x,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t of samples (B, ...) and noise of their shape at timesteps (B,), whole or between whole ones."""
        return self._noised(original_samples, noise, timesteps, "epsilon")[0]

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a model of v_prediction learns: sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) sample; as `add_noise`."""
        return self._noised(sample, noise, timesteps, "v")[1]

    def _noised(self, x0: Tensor, noise: Tensor, timesteps: Tensor, prediction: str) -> tuple[Tensor, ...]:
        t, table = timesteps.to(x0.device).reshape(-1).expand(len(x0)), self.alphas_cumprod
        if t.is_floating_point():  # a row for each sample
            t, table = torch.arange(len(x0), device=x0.device), solvers.vp_levels(table, t)
        return ops.q_sample(x0, noise.to(x0.device), t, table.to(x0.device), prediction)

    def _stages(self, steps: int, begin: int = 0) -> list[Stage]:
        c = self.config
        stages = menu.stages(
            c["sampler"], self.alphas_cumprod, steps, prediction=PREDICTIONS[c["prediction_type"]], eta=c["eta"],
            spacing=c["timestep_spacing"], offset=c["steps_offset"], karras=c["use_karras_sigmas"],
            final=1.0 if c["set_alpha_to_one"] else None, begin=begin,
        )  # fmt: skip
        bounded = c["sampler"] == "ddim" and c["clip_sample"]
        return samplers.keep_direction(stages, self.alphas_cumprod) if bounded else stages

    def _begin(self, timestep: float, sample: Tensor, generator: Any) -> Walk:
        if self.num_inference_steps is None:
            raise InputError("step is called before set_timesteps, must come after it")
        first = self._begin_index
        if first is None:
            found = (i for i, t in enumerate(self._times) if t == timestep and i % self.order == 0)
            first = next(found, -1)
        if not 0 <= first < len(self._times) or first % self.order:
            raise InputError(f"timestep is {timestep:g}, begin_index {self._begin_index}; must be where a step begins")
        self._first = first
        clip = self.config["clip_sample_range"] if self.config["clip_sample"] else None
        stages = self._stages(self.num_inference_steps, first // self.order)
        return Walk(sample, stages, fresh=True, clip=clip, generator=generator)


def _check(name: str, value: str | None, known: tuple[str | None, ...]) -> None:
    if value not in known:
        raise InputError(f"{name} is {value!r}, must be one of {', '.join(map(str, known))}")


def _defaults(sampler: str) -> dict[str, Any]:
    """Those of the class of the kind."""
    parameters = inspect.signature(getattr(diffusers, KINDS[sampler]).__init__).parameters
    return DEFAULTS | {name: p.default for name, p in parameters.items() if name != "self"}


def _taken(config: Mapping[str, Any], sampler: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What of another class's configuration `from_config` takes; warns of what it does not follow."""
    _check("sampler", sampler, menu.SAMPLERS)
    _check_betas(config)
    if unfollowed := _unfollowed(config, sampler):
        listed = ", ".join(f"{key}={value!r}" for key, value in unfollowed.items())
        warnings.warn(f"EncDiffScheduler does not follow {listed}, which {KINDS[sampler]} does", stacklevel=3)
    if config.get("clip_sample") and sampler in ("dpm-solver++", "unipc", "euler"):  # their classes bound nothing
        return {key: value for key, value in config.items() if key != "clip_sample"}
    return dict(config)


def _unfollowed(config: Mapping[str, Any], sampler: str) -> dict[str, Any]:
    """The keys by which the class of the kind would do something else than by its defaults, which ours has."""
    defaults, ours = _defaults(sampler), inspect.signature(EncDiffScheduler.__init__).parameters
    known = defaults.keys() - ours.keys() - {*ADDITIONS, *config.get("_use_default_values", ())}
    changed = {key: config[key] for key in sorted(known & config.keys()) if config[key] != defaults[key]}
    return {key: value for key, value in changed.items() if value not in ALIKE.get(key, ())}


def _check_betas(config: Mapping[str, Any]) -> None:
    name = str(config.get("_class_name", ""))
    theirs = getattr(diffusers, name, None) if name else None
    without = theirs is not None and "beta_start" not in inspect.signature(theirs.__init__).parameters
    betas = {"beta_start", "beta_end", "beta_schedule", "trained_betas"} & config.keys()
    found = [key for key in ("shift", "sigma_data", "sigma_max") if key in config and not betas]
    if without or found:
        what = f"of {name}" if name else f"with {found[0]} and without betas"
        raise InputError(f"config is {what}, must be of a scheduler with betas: ours are samplers of a DDPM schedule")
