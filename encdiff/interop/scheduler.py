"""Our samplers in a pipeline of diffusers, as one of its schedulers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from encdiff import ops
from encdiff.diffusion import menu, schedules, solvers
from encdiff.diffusion.loop import Stage, Walk
from encdiff.errors import InputError

try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin, SchedulerOutput
except ModuleNotFoundError as error:
    raise ImportError("EncDiffScheduler needs the package diffusers: pip install encdiff[diffusers]") from error

PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
BETA_SCHEDULES = {"squaredcos_cap_v2": "cosine"}  # the others have our names
SPACINGS = (None, "leading", "trailing", "linspace")


class EncDiffScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # both say what config_name is
    """One of our samplers as a scheduler of diffusers: a step is one pass of `ops.step`, for "unipc" two.

        pipe.scheduler = EncDiffScheduler.from_config(pipe.scheduler.config, sampler="unipc")

    Args:
        sampler: dpm-solver++, unipc, euler, heun, ddim or ddpm.
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: the schedule
            that the model was trained on, with the names and defaults of diffusers.
        prediction_type: what the model gives: epsilon, v_prediction or sample.
        timestep_spacing: leading, trailing or linspace, as in the class of diffusers of this kind; None is what
            `EncDiff.sample` takes, which is linspace, and for ddim and ddpm leading.
        steps_offset: added to the timesteps of leading.
        use_karras_sigmas: EDM's noise levels, for the first four.
        eta: of ddim, the share of DDPM's noise, 0 to 1.
        set_alpha_to_one: of ddim, whether its last step goes to the data or to the schedule's first level.
        clip_sample, clip_sample_range: bound the predicted data to [-range, range].

    Other keys of a configuration are ignored, as diffusers does. x keeps the scale of the schedule in every sampler:
    `init_noise_sigma` is 1 and `scale_model_input` changes nothing. Raises InputError for an unknown name, an option of
    another sampler or a schedule that is none.
    """

    _compatibles = [kind.name for kind in KarrasDiffusionSchedulers]  # noqa: RUF012  # as in every class of diffusers
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self, sampler: str = "dpm-solver++", num_train_timesteps: int = 1000, beta_start: float = 0.0001,
        beta_end: float = 0.02, beta_schedule: str = "linear", trained_betas: Sequence[float] | None = None,
        prediction_type: str = "epsilon", timestep_spacing: str | None = None, steps_offset: int = 0,
        use_karras_sigmas: bool = False, eta: float = 0.0, set_alpha_to_one: bool = False, clip_sample: bool = False,
        clip_sample_range: float = 1.0, rescale_betas_zero_snr: bool = False,
    ):  # fmt: skip
        _check("prediction_type", prediction_type, tuple(PREDICTIONS))
        _check("timestep_spacing", timestep_spacing, SPACINGS)
        if trained_betas is None:
            kind = BETA_SCHEDULES.get(beta_schedule, beta_schedule)
            betas = schedules.make_betas(kind, num_train_timesteps, beta_start, beta_end)
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
        self._stages(1)  # names an option that does not fit

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

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
        return menu.stages(
            c["sampler"], self.alphas_cumprod, steps, prediction=PREDICTIONS[c["prediction_type"]], eta=c["eta"],
            spacing=c["timestep_spacing"], offset=c["steps_offset"], karras=c["use_karras_sigmas"],
            final=1.0 if c["set_alpha_to_one"] else None, begin=begin,
        )  # fmt: skip

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
