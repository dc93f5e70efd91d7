"""Faults of `pipelines/`."""
from .entry import faults

PIPELINE = "tests/pipelines/cogvideox/test_pipeline.py::"
SCHEDULER = "tests/pipelines/cogvideox/test_scheduler.py::"
T5 = "tests/pipelines/shared/test_t5.py::"
TOKENIZER = "tests/pipelines/shared/test_t5_tokenizer.py::"
TRANSFORMER = "tests/pipelines/cogvideox/test_transformer.py::"
VAE = "tests/pipelines/cogvideox/test_vae.py::"

MUTANTS = [
    *faults("pipelines/cogvideox/vae.py", VAE + "test_default_tiles_are_those_of_diffusers",
            ("config.sample_height // 2, config.sample_width // 2)", "config.sample_width // 2, config.sample_height // 2)"),
            ("self.tile_overlap_factor_height = 1 / 6", "self.tile_overlap_factor_height = 1 / 5"),
            ("self.num_latent_frames_batch_size = 2", "self.num_latent_frames_batch_size = 4"),
            ("height // ratio, width // ratio", "width // ratio, height // ratio"),
            ("tile_sample_min_width or self.tile_sample_min_width", "tile_sample_min_width or self.tile_sample_min_height"),
            ("kept if factor is None else factor", "kept")),
    *faults("pipelines/cogvideox/vae.py", VAE + "test_every_norm_has_the_epsilon_of_diffusers",
            ("NORM_EPS = 1e-6", "NORM_EPS = 1e-5"), ("norm_eps: float = 1e-6", "norm_eps: float = 1e-5"),
            ("self.norm_out = nn.GroupNorm(config.norm_num_groups, channels[-1], epsilon=NORM_EPS)",
             "self.norm_out = nn.GroupNorm(config.norm_num_groups, channels[-1], epsilon=config.norm_eps)")),
    *faults("pipelines/cogvideox/vae.py", VAE + "test_golden",
            ("ratio * (piece - 1) + 1 if piece % 2 else", "ratio * piece if piece % 2 else")),
    *faults("pipelines/cogvideox/transformer.py", TRANSFORMER + "test_every_norm_has_the_epsilon_of_diffusers",
            ("QK_NORM_EPSILON = 1e-6", "QK_NORM_EPSILON = 1e-5"), ("norm_eps: float = 1e-5", "norm_eps: float = 1e-6")),
    *faults("pipelines/cogvideox/pipeline.py", PIPELINE + "test_long_prompt_is_cut_with_a_warning",
            ("        if max_sequence_length is not None:\n", "        if False:\n"),
            ("if len(ids) > length", "if len(ids) > length + 99")),
    *faults("pipelines/cogvideox/pipeline.py", PIPELINE + "test_negative_prompt_and_embeddings",
            ("num_videos_per_prompt, max_sequence_length)\n", "num_videos_per_prompt, None)\n")),
    *faults("pipelines/cogvideox/pipeline.py", PIPELINE + "test_callback",
            ("callback_tensors=callback_on_step_end_tensor_inputs, ", ""),
            ("callback=callback_on_step_end, callback_tensors", "callback=None, callback_tensors")),
    *faults("pipelines/cogvideox/pipeline.py", PIPELINE + "test_dynamic_guidance_is_the_published_one",
            ("1 + guidance_scale * (1 -", "guidance_scale * (1 -")),
    *faults("pipelines/cogvideox/pipeline.py", PIPELINE + "test_what_has_no_effect_is_said",
            ("dynamic and not guided", "dynamic and guided")),
    *faults("pipelines/cogvideox/pipeline.py", PIPELINE + "test_padding_frames_of_15_are_dropped",
            ("latents[:, padded_frames:]", "latents"), ("padding = -frames % (", "padding = 0 * (")),
    *faults("pipelines/cogvideox/pipeline.py", PIPELINE + "test_golden[pipeline_2b-guided]",
            ("/ self.vae.config.scaling_factor", "* self.vae.config.scaling_factor"),
            ("guided=guidance_scale > 1.0", "guided=guidance_scale > 99.0")),
    *faults("pipelines/shared/pipeline.py", PIPELINE + "test_golden[pipeline_2b-guided]",
            ("paddle.concat([negative, positive.astype(negative.dtype)])", "paddle.concat([positive, negative])")),
    *faults("pipelines/shared/pipeline.py", PIPELINE + "test_negative_prompt_and_embeddings",
            ("encode(negatives or [\"\"]", "encode([\"\"]"),
            ("length = length if prompt_embeds is None else prompt_embeds.shape[1]", "pass")),
    *faults("pipelines/shared/conditions.py", PIPELINE + "test_embeddings_that_a_callback_returns_count_from_the_next_step",
            ("        self._take_embeds(changed)\n", ""), ("            self.negative = negative\n", "            pass\n"),
            ("self.negative, self.positive = paddle.chunk(embeds, 2)\n            elif",
             "self.positive, self.negative = paddle.chunk("
             "embeds, 2)\n            elif")),
    *faults("pipelines/shared/conditions.py", PIPELINE + "test_a_callback_switches_guidance_off",
            ("scale > 1, None\n        self._join()", "scale > 1, None")),
    *faults("pipelines/shared/conditions.py", PIPELINE + "test_golden[pipeline_2b-guided]",
            ("unguided + pipe.guidance_scale * (prompted - unguided)",
             "prompted + pipe.guidance_scale * (prompted - unguided)")),
    *faults("pipelines/shared/denoise.py", PIPELINE + "test_callback",
            ("            if pipe.interrupted():\n", "            if False:\n"),
            ("pipe, step, timestep, latents)", "pipe, step + 1, timestep, latents)")),
    *faults("pipelines/shared/denoise.py", PIPELINE + "test_golden[pipeline_5b-guided]",
            ("            before = timestep\n", "            before = None\n")),
    *faults("pipelines/shared/inputs.py", PIPELINE + "test_videos_of_a_batch_can_be_made_alone",
            ('[whole("seed", seed, 0) + i for', '[whole("seed", seed, 0) for')),
]
