"""Small random models of ppdiffusers, and what each is called with."""
import paddle
import ppdiffusers

TEXT, TEXT_TOKENS = 24, 9


def dit():
    return ppdiffusers.Transformer2DModel(
        num_attention_heads=2, attention_head_dim=40, in_channels=4, out_channels=8, num_layers=2, sample_size=16, patch_size=2,
        attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_zero",
        norm_elementwise_affine=False)


def cross():
    return ppdiffusers.Transformer2DModel(num_attention_heads=2, attention_head_dim=32, in_channels=32, num_layers=2,
                                          cross_attention_dim=TEXT, norm_num_groups=4)


def unet():
    return ppdiffusers.UNet2DConditionModel(
        block_out_channels=(64, 64), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT, attention_head_dim=2)


def unet_of_videos():
    return ppdiffusers.UNet3DConditionModel(
        block_out_channels=(64, 64), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=TEXT, attention_head_dim=32)


def sd3():
    return ppdiffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=TEXT, caption_projection_dim=64, pooled_projection_dim=16)


# name: (a small random model, what it is called with)
MODELS = {
    "DiT": (dit, lambda: ((paddle.randn([2, 4, 16, 16]),), dict(timestep=paddle.to_tensor([7, 7]),
                                                              class_labels=paddle.to_tensor([1, 5])))),
    "Transformer2DModel": (cross, lambda: ((paddle.randn([2, 32, 6, 6]),), dict(encoder_hidden_states=text()))),
    "UNet2DConditionModel": (unet, lambda: ((paddle.randn([2, 4, 16, 16]), 7, text()), {})),
    "UNet3DConditionModel": (unet_of_videos, lambda: ((paddle.randn([1, 4, 2, 8, 8]), 7, text(1)), {})),
    "SD3Transformer2DModel": (sd3, lambda: ((paddle.randn([2, 4, 16, 16]), text()), dict(
        pooled_projections=paddle.randn([2, 16]), timestep=paddle.to_tensor([7, 7])))),
}


def text(batch=2):
    return paddle.randn([batch, TEXT_TOKENS, TEXT])


def made(name):
    paddle.seed(0)
    model = MODELS[name][0]()
    model.eval()
    return model


def output(model, name, **more):
    paddle.seed(1)
    given, named = MODELS[name][1]()
    with paddle.no_grad():
        return model(*given, **named, **more, return_dict=False)[0].numpy()


def dit_pipeline():
    paddle.seed(0)
    vae = ppdiffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
                                    down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    pipe = ppdiffusers.DiTPipeline(dit(), vae, ppdiffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe
