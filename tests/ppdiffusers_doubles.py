"""Doubles of a CogVideoX pipeline in ppdiffusers, whose release has none.

Transformer and VAE have the layers of this project's (their names are those of PaddleMIX's) on the release's `ModelMixin`,
which reads, transposes and writes the weights; the scheduler has a config and nothing else.
"""
import ppdiffusers
from ppdiffusers.configuration_utils import ConfigMixin, register_to_config
from ppdiffusers.models.modeling_utils import ModelMixin
from ppdiffusers.pipelines.pipeline_utils import DiffusionPipeline
from ppdiffusers.schedulers.scheduling_utils import SchedulerMixin

from lowbit_video.pipelines.cogvideox import transformer, vae


def _double(ours):
    """A model of ppdiffusers with our layers, whose config has what the class of that name has in PaddleMIX."""

    class Double(ModelMixin, ConfigMixin):
        def __init__(self, **config):
            super().__init__()
            self.register_to_config(**config)
            for name, layer in ours(**config).named_children():
                setattr(self, name, layer)

        @classmethod
        def extract_init_dict(cls, config, **more):
            config = {name: value for name, value in config.items() if not name.startswith("_")}
            return config, more, {}

    Double.__name__ = ours.__name__
    return Double


CogVideoXTransformer3DModel = _double(transformer.CogVideoXTransformer3DModel)
AutoencoderKLCogVideoX = _double(vae.AutoencoderKLCogVideoX)


class CogVideoXDDIMScheduler(SchedulerMixin, ConfigMixin):
    @register_to_config
    def __init__(self, num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                 trained_betas=None, clip_sample=True, set_alpha_to_one=True, steps_offset=0, prediction_type="epsilon",
                 clip_sample_range=1.0, sample_max_value=1.0, timestep_spacing="leading", rescale_betas_zero_snr=False,
                 snr_shift_scale=3.0):
        pass


DOUBLES = (CogVideoXTransformer3DModel, AutoencoderKLCogVideoX, CogVideoXDDIMScheduler)


class Theirs(DiffusionPipeline):
    def __init__(self, tokenizer, text_encoder, vae, transformer, scheduler):
        super().__init__()
        self.register_modules(tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer,
                              scheduler=scheduler)


Theirs.__name__ = "CogVideoXPipeline"


def release(monkeypatch):
    """The doubles stand where ppdiffusers looks for its classes."""
    for double in DOUBLES:
        monkeypatch.setattr(double, "__module__", "ppdiffusers.models.doubles")
        monkeypatch.setattr(ppdiffusers, double.__name__, double, raising=False)


def read_by_theirs(folder):
    return Theirs.from_pretrained(str(folder), from_diffusers=True)
