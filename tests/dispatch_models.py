"""Small random models of diffusers' real classes that hand attention to its dispatcher, and what they take."""
import torch


def wan(layers=2, **more):
    """Self attention without a mask, cross attention to text."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=64, in_channels=4,
                                 out_channels=4, text_dim=32, freq_dim=32, ffn_dim=64, num_layers=layers,
                                 rope_max_seq_len=32, **more)


def wan_inputs(batch=1):
    """192 video and 40 text tokens."""
    return dict(hidden_states=_normal(batch, 4, 3, 16, 16), timestep=torch.full((batch,), 500),
                encoder_hidden_states=_normal(batch, 40, 32, seed=1))


def hunyuan():
    """Joint attention of video and text under a mask of keys [B, 1, 1, N]; a text refiner with a mask of pairs."""
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=64, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=32, pooled_projection_dim=16,
        rope_axes_dim=(16, 24, 24), guidance_embeds=True)


def hunyuan_inputs(batch=2):
    """128 video tokens and 24 of text, of which the first samples have 17 and 9."""
    kept = torch.tensor([17, 9, 24, 1])[:batch, None]
    return dict(hidden_states=_normal(batch, 4, 2, 16, 16), timestep=torch.full((batch,), 500),
                encoder_hidden_states=_normal(batch, 24, 32, seed=1), encoder_attention_mask=(torch.arange(24) < kept).long(),
                pooled_projections=_normal(batch, 16, seed=2), guidance=torch.full((batch,), 6000.0))


def ltx():
    """Self attention without a mask, cross attention under a float mask."""
    from diffusers import LTXVideoTransformer3DModel

    return LTXVideoTransformer3DModel(in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=64,
                                      cross_attention_dim=128, num_layers=2, caption_channels=32)


def ltx_inputs(batch=1):
    """128 video and 24 text tokens, 17 of them real."""
    return dict(hidden_states=_normal(batch, 128, 8), timestep=torch.full((batch,), 500),
                encoder_hidden_states=_normal(batch, 24, 32, seed=1),
                encoder_attention_mask=(torch.arange(24) < 17).long().expand(batch, 24), num_frames=2, height=8, width=8)


def flux():
    """Joint attention without a mask, in double and single blocks."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=64,
                                  num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=16,
                                  axes_dims_rope=(16, 24, 24))


def flux_inputs(batch=1):
    """128 image and 24 text tokens."""
    return dict(hidden_states=_normal(batch, 128, 4), timestep=torch.full((batch,), 0.5),
                encoder_hidden_states=_normal(batch, 24, 32, seed=1), pooled_projections=_normal(batch, 16, seed=2),
                img_ids=torch.cartesian_prod(torch.zeros(1), torch.arange(8.0), torch.arange(16.0)), txt_ids=torch.zeros(24, 3))


def cogvideox():
    """A model that bypasses the dispatcher."""
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4,
                                       num_layers=1, text_embed_dim=8, time_embed_dim=8, sample_width=8, sample_height=8,
                                       sample_frames=5, max_text_seq_length=4)


def _normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


MODELS = {"wan": (wan, wan_inputs), "hunyuan": (hunyuan, hunyuan_inputs), "ltx": (ltx, ltx_inputs), "flux": (flux, flux_inputs)}


def make(name):
    """(model, inputs) by name, always the same."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]
    return model().eval(), inputs()


def predict(model, inputs):
    """The model's prediction, without gradients."""
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]  # diffusers gathers tensors only


def attention_names(model):
    """Names of the modules that hold a processor."""
    return {name for name, module in model.named_modules() if getattr(module, "processor", None) is not None}


def state():
    """Everything that registering could change in diffusers, as values that compare."""
    from diffusers.models import attention_dispatch as dispatch

    registry, names = dispatch._AttentionBackendRegistry, dispatch.AttentionBackendName
    tables = [getattr(registry, name) for name in ("_backends", "_constraints", "_supported_arg_names")]
    return ([dict(table) for table in tables], set(registry._supports_context_parallel), registry._active_backend,
            list(names._member_names_), dict(names._member_map_), dict(names._value2member_map_),
            sorted(vars(names)), sorted(vars(registry)))
