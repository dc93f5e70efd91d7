"""Small random models of diffusers' real classes, and inputs, for tests of what is done to their attention."""
import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro


def _text(tokens=6, width=16, batch=2):
    return torch.randn(batch, tokens, width)


def hidden(*lengths, tokens):
    """A mask of 1 where a sample's token counts: its first ones."""
    return (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()


def _cogvideox(cls):
    model = cls(num_attention_heads=2, attention_head_dim=64, in_channels=4, out_channels=4, time_embed_dim=16,
                text_embed_dim=16, num_layers=2, sample_width=8, sample_height=8, sample_frames=9, max_text_seq_length=6,
                use_rotary_positional_embeddings=True)
    angle = torch.randn(3 * 4 * 4, 32).repeat_interleave(2, 1)
    return model, dict(hidden_states=torch.randn(2, 3, 4, 8, 8), encoder_hidden_states=_text(),
                       timestep=torch.tensor([7, 7]), image_rotary_emb=(angle.cos(), angle.sin()))


def _mochi():
    model = diffusers.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=32, num_layers=2, pooled_projection_dim=16, in_channels=4,
        text_embed_dim=16, time_embed_dim=8, max_sequence_length=8)
    return model, dict(hidden_states=torch.randn(2, 4, 2, 8, 8), encoder_hidden_states=_text(8),
                       timestep=torch.tensor([7, 7]), encoder_attention_mask=hidden(3, 8, tokens=8))


def _allegro(**given):
    model = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=96, in_channels=4, out_channels=4, num_layers=2, cross_attention_dim=192,
        sample_width=8, sample_height=8, sample_frames=2, caption_channels=16)
    *angles, frames, rows, columns = get_3d_rotary_pos_embed_allegro(
        embed_dim=96, crops_coords=((0, 0), (4, 4)), grid_size=(4, 4), temporal_size=2, interpolation_scale=(2.0, 2.0, 2.2))
    places = torch.cartesian_prod(frames.long(), rows.long(), columns.long()).T[:, None].contiguous()
    return model, dict(hidden_states=torch.randn(2, 4, 2, 8, 8), encoder_hidden_states=_text()[:, None],
                       timestep=torch.tensor([7, 7]), image_rotary_emb=(angles, places), **given)


def _latte():
    model = diffusers.LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, num_layers=1, cross_attention_dim=64,
        attention_bias=True, sample_size=8, patch_size=2, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, caption_channels=16, video_length=3)
    return model, dict(hidden_states=torch.randn(2, 4, 3, 8, 8), timestep=torch.tensor([7, 7]), encoder_hidden_states=_text())


def _pixart(**given):
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=64,
        sample_size=8, caption_channels=16, use_additional_conditions=False)
    return model, dict(hidden_states=torch.randn(2, 4, 8, 8), timestep=torch.tensor([7, 7]), encoder_hidden_states=_text(),
                       added_cond_kwargs={"resolution": None, "aspect_ratio": None}, **given)


def _sd3():
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=64, pooled_projection_dim=16, out_channels=4, pos_embed_max_size=8,
        dual_attention_layers=(0,), qk_norm="rms_norm")
    return model, dict(hidden_states=torch.randn(2, 4, 8, 8), timestep=torch.tensor([7, 7]), encoder_hidden_states=_text(),
                       pooled_projections=torch.randn(2, 16))


def _cogview(cls, **more):
    model = cls(patch_size=2, in_channels=4, num_layers=2, attention_head_dim=32, num_attention_heads=2, out_channels=4,
                text_embed_dim=16, time_embed_dim=16, condition_dim=4, pos_embed_max_size=8, sample_size=8, **more)
    return model, dict(hidden_states=torch.randn(2, 4, 8, 8), timestep=torch.tensor([7, 7]), encoder_hidden_states=_text(),
                       **dict.fromkeys(("original_size", "target_size", "crop_coords"), torch.tensor([[8.0, 8.0]] * 2)))


def _cogview4(**given):
    model, rest = _cogview(diffusers.CogView4Transformer2DModel, rope_axes_dim=(16, 16))
    return model, rest | given


def _easyanimate():
    model = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, time_embed_dim=16, text_embed_dim=16,
        num_layers=2, mmdit_layers=1, sample_width=8, sample_height=8, patch_size=2)
    return model, dict(hidden_states=torch.randn(2, 4, 2, 8, 8), timestep=torch.tensor([7, 7]), encoder_hidden_states=_text())


def _lumina2(**given):
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=128, num_layers=1, num_refiner_layers=1, num_attention_heads=4,
        num_kv_heads=2, multiple_of=16, axes_dim_rope=(16, 8, 8), axes_lens=(64, 32, 32), cap_feat_dim=16)
    return model, dict(hidden_states=torch.randn(2, 4, 8, 8), timestep=torch.tensor([0.5, 0.5]), encoder_hidden_states=_text(),
                       **given)


def _omnigen():
    model = diffusers.OmniGenTransformer2DModel(
        in_channels=4, patch_size=2, hidden_size=64, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64,
        num_layers=2, pad_token_id=0, vocab_size=50, max_position_embeddings=64, original_max_position_embeddings=64,
        rope_scaling={"long_factor": [1.0] * 16, "short_factor": [1.0] * 16, "type": "su"}, time_step_dim=8)
    tokens = 5 + 1 + 16
    mask = torch.ones(2, tokens, tokens).tril()
    mask[:, 6:] = 1
    return model, dict(hidden_states=torch.randn(2, 4, 8, 8), timestep=torch.tensor([7.0, 7.0]),
                       input_ids=torch.randint(1, 50, (2, 5)), input_img_latents=[torch.randn(1, 4, 4, 4)] * 2,
                       input_image_sizes={0: [[1, 5]], 1: [[0, 4]]}, attention_mask=mask,
                       position_ids=torch.arange(tokens).repeat(2, 1))


def _hidream():
    model = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=32,
        num_attention_heads=2, caption_channels=[16, 16], text_emb_dim=16, num_routed_experts=2, num_activated_experts=1,
        axes_dims_rope=(16, 8, 8), max_resolution=(8, 8), llama_layers=[0, 1], force_inference_output=True)
    return model, dict(hidden_states=torch.randn(2, 4, 8, 6), timesteps=torch.tensor([7, 7]), encoder_hidden_states_t5=_text(),
                       encoder_hidden_states_llama3=torch.randn(2, 2, 6, 16), pooled_embeds=torch.randn(2, 16))


def _auraflow():
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=32,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=64, out_channels=4, pos_embed_max_size=64)
    return model, dict(hidden_states=torch.randn(2, 4, 8, 8), timestep=torch.tensor([0.5, 0.5]), encoder_hidden_states=_text())


MODELS = {
    "cogvideox": lambda: _cogvideox(diffusers.CogVideoXTransformer3DModel),
    "consisid": lambda: _cogvideox(diffusers.ConsisIDTransformer3DModel),
    "mochi": _mochi,
    "allegro": _allegro,
    "latte": _latte,
    "pixart": _pixart,
    "sd3": _sd3,
    "cogview3plus": lambda: _cogview(diffusers.CogView3PlusTransformer2DModel),
    "cogview4": _cogview4,
    "easyanimate": _easyanimate,
    "lumina2": lambda: _lumina2(encoder_attention_mask=hidden(6, 6, tokens=6)),
    "omnigen": _omnigen,
    "hidream": _hidream,
    "auraflow": _auraflow,
}
"""By a short name: a function that makes (model, arguments of its forward). Head dims are such that low bit takes them."""

MODULES = {"allegro": 4, "latte": 3, "pixart": 4, "sd3": 3, "lumina2": 3}
"""How many attention modules each has, where it is not 2."""


def make(name):
    """(model, arguments of its forward): always the same ones."""
    torch.manual_seed(0)
    model, given = MODELS[name]()
    return model.eval().requires_grad_(False), given
