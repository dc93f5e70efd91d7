"""A double of PaddleMIX's later video models, which no release has: their attention's signatures, around as little as can be.

Each class stands for the one of that name in PaddleMIX's `ppdiffusers/models`; what it computes is written for these tests.
What the project looks at is kept: where a class lies, a module's parts and their names, the arguments of a processor's call,
and a `set_attn_processor` that takes entries out of the dict that it is given.
"""
import paddle
from paddle import nn

HEADS, HEAD_DIM = 2, 32
WIDTH = HEADS * HEAD_DIM
IMAGE_TOKENS = 257


class RMSNorm(nn.Layer):
    """Norms all dimensions from `begin_norm_axis` on, together."""

    def __init__(self, size):
        super().__init__()
        self.weight = self.create_parameter([size], default_initializer=nn.initializer.Uniform(0.5, 1.5))

    def forward(self, hidden_states, begin_norm_axis=2):
        over = list(range(begin_norm_axis, hidden_states.ndim))
        assert [hidden_states.shape[axis] for axis in over] == self.weight.shape, "the norm was not told its axis"
        return hidden_states / (hidden_states.square().mean(over, keepdim=True) + 1e-6).sqrt() * self.weight


class Attention(nn.Layer):
    __module__ = "ppdiffusers.models.attention_processor"

    def __init__(self, processor, norm=lambda: None, added=False, norm_added=lambda: None, text_out=False, out=True):
        super().__init__()
        self.heads, self.head_dim, self.scale = HEADS, HEAD_DIM, HEAD_DIM**-0.5
        self.group_norm = self.spatial_norm = self.norm_cross = None
        self.residual_connection, self.rescale_output_factor = False, 1.0
        linear = lambda: nn.Linear(WIDTH, WIDTH)
        self.to_q, self.to_k, self.to_v = linear(), linear(), linear()
        self.norm_q, self.norm_k = norm(), norm()
        self.add_q_proj, self.add_k_proj, self.add_v_proj = [linear() if added else None for _ in range(3)]
        self.norm_added_q, self.norm_added_k = norm_added(), norm_added()
        self.to_out = nn.LayerList([linear(), nn.Dropout(0.0)]) if out else None
        self.to_add_out = linear() if text_out else None
        self.set_processor(processor)

    def set_processor(self, processor):
        self.processor = processor

    def get_processor(self):
        return self.processor

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, **cross_attention_kwargs):
        return self.processor(self, hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask,
                              **cross_attention_kwargs)


def attend(q, k, v, mask=None):
    """Softmax attention of [B, H, N, D]; a mask is added, or True attends."""
    scores = q @ k.transpose([0, 1, 3, 2]) * q.shape[-1]**-0.5
    if mask is not None:
        scores = scores + (paddle.where(mask, 0.0, -1e30) if mask.dtype == paddle.bool else mask)
    return nn.functional.softmax(scores, -1) @ v


def split(x):
    """[B, N, C] as [B, H, N, D]."""
    return x.reshape([x.shape[0], x.shape[1], HEADS, -1]).transpose([0, 2, 1, 3])


def join(x):
    """[B, H, N, D] as [B, N, C]."""
    return x.transpose([0, 2, 1, 3]).flatten(2)


def turn(x, cos, sin):
    """[B, H, N, D] turned pair by pair; cos and sin [N, D], each number twice."""
    even, odd = x[..., ::2], x[..., 1::2]
    cos, sin = cos[:, ::2], sin[:, ::2]
    return paddle.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(3)


def project(layers, x):
    return layers[1](layers[0](x))


class CogVideoXAttnProcessor2_0:
    __module__ = "ppdiffusers.models.attention_processor"

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        text = encoder_hidden_states.shape[1]
        x = paddle.concat([encoder_hidden_states, hidden_states], 1)
        q, k, v = split(attn.to_q(x)), split(attn.to_k(x)), split(attn.to_v(x))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if image_rotary_emb is not None:
            q, k = (paddle.concat([y[:, :, :text], turn(y[:, :, text:], *image_rotary_emb)], 2) for y in (q, k))
        out = project(attn.to_out, join(attend(q, k, v, attention_mask)))
        return out[:, text:], out[:, :text]


class WanAttnProcessor2_0:
    __module__ = "ppdiffusers.models.attention_processor"

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        image = None
        if attn.add_k_proj is not None:
            image, encoder_hidden_states = encoder_hidden_states[:, :IMAGE_TOKENS], encoder_hidden_states[:, IMAGE_TOKENS:]
        keys = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k = split(attn.norm_q(attn.to_q(hidden_states))), split(attn.norm_k(attn.to_k(keys)))
        if rotary_emb is not None:
            complex_of = lambda y: paddle.as_complex(y.astype("float64").reshape([*y.shape[:3], -1, 2]))
            q, k = (paddle.as_real(complex_of(y) * rotary_emb).flatten(3).astype(y.dtype) for y in (q, k))
        out = attend(q, k, split(attn.to_v(keys)), attention_mask)
        if image is not None:
            out = out + attend(q, split(attn.norm_added_k(attn.add_k_proj(image))), split(attn.add_v_proj(image)))
        return project(attn.to_out, join(out))


class HunyuanVideoAttnProcessor2_0:
    __module__ = "ppdiffusers.models.attention_processor"

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        tokens, own = hidden_states.shape[1], attn.add_q_proj is not None
        x = hidden_states if own else paddle.concat([hidden_states, encoder_hidden_states], 1)
        q, k, v = split(attn.to_q(x)), split(attn.to_k(x)), split(attn.to_v(x))
        q, k = attn.norm_q(q, begin_norm_axis=3), attn.norm_k(k, begin_norm_axis=3)
        q, k = (paddle.concat([turn(y[:, :, :tokens], *image_rotary_emb), y[:, :, tokens:]], 2) for y in (q, k))
        if own:
            text = encoder_hidden_states
            q = paddle.concat([q, attn.norm_added_q(split(attn.add_q_proj(text)), begin_norm_axis=3)], 2)
            k = paddle.concat([k, attn.norm_added_k(split(attn.add_k_proj(text)), begin_norm_axis=3)], 2)
            v = paddle.concat([v, split(attn.add_v_proj(text))], 2)
        out = join(attend(q, k, v, attention_mask))
        out, text = out[:, :tokens], out[:, tokens:]
        out = out if attn.to_out is None else project(attn.to_out, out)
        return out, text if attn.to_add_out is None else attn.to_add_out(text)


class AttnProcessor:
    __module__ = "ppdiffusers.models.attention_processor"

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, scale=1.0, **kwargs):
        keys = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        out = attend(split(attn.to_q(hidden_states)), split(attn.to_k(keys)), split(attn.to_v(keys)), attention_mask)
        return project(attn.to_out, join(out)) / attn.rescale_output_factor


class CogVideoXBlock(nn.Layer):
    __module__ = "ppdiffusers.models.cogvideox_transformer_3d"

    def __init__(self):
        super().__init__()
        self.attn1 = Attention(CogVideoXAttnProcessor2_0(), norm=lambda: nn.LayerNorm(HEAD_DIM, epsilon=1e-6))

    def forward(self, video, text, turns, mask):
        more_video, more_text = self.attn1(hidden_states=video, encoder_hidden_states=text, image_rotary_emb=turns)
        return video + more_video, text + more_text


class WanTransformerBlock(nn.Layer):
    __module__ = "ppdiffusers.models.transformer_wan"

    def __init__(self, image=False):
        super().__init__()
        across = lambda: RMSNorm(WIDTH)
        self.attn1 = Attention(WanAttnProcessor2_0(), norm=across)
        self.attn2 = Attention(WanAttnProcessor2_0(), norm=across, added=image, norm_added=across)

    def forward(self, video, text, turns, mask):
        cos, sin = (x[:, ::2].astype("float64") for x in turns)
        video = video + self.attn1(hidden_states=video, rotary_emb=paddle.complex(cos, sin)[None, None])
        return video + self.attn2(hidden_states=video, encoder_hidden_states=text), text


class HunyuanVideoIndividualTokenRefinerBlock(nn.Layer):
    __module__ = "ppdiffusers.models.transformer_hunyuan_video"

    def __init__(self):
        super().__init__()
        self.attn = Attention(AttnProcessor())

    def forward(self, video, text, turns, mask):
        keep = mask[:, -text.shape[1]:]
        both = paddle.logical_and(keep[:, None, None], keep[:, None, :, None])
        both[:, :, :, 0] = True
        return video, text + self.attn(hidden_states=text, encoder_hidden_states=None, attention_mask=both)


class HunyuanVideoTransformerBlock(nn.Layer):
    __module__ = "ppdiffusers.models.transformer_hunyuan_video"
    parts = dict(added=True, norm_added=lambda: RMSNorm(HEAD_DIM), text_out=True)

    def __init__(self):
        super().__init__()
        self.attn = Attention(HunyuanVideoAttnProcessor2_0(), norm=lambda: RMSNorm(HEAD_DIM), **self.parts)

    def forward(self, video, text, turns, mask):
        more_video, more_text = self.attn(hidden_states=video, encoder_hidden_states=text, image_rotary_emb=turns,
                                          attention_mask=mask[:, None, None])
        return video + more_video, text + more_text


class HunyuanVideoSingleTransformerBlock(HunyuanVideoTransformerBlock):
    __module__ = "ppdiffusers.models.transformer_hunyuan_video"
    parts = dict(out=False)


class Model(nn.Layer):
    """Blocks one behind the other, and the processors by name as every model of the library has them."""

    def __init__(self, *blocks):
        super().__init__()
        self.transformer_blocks = nn.LayerList(blocks)

    def forward(self, video, text, turns, mask=None):
        for block in self.transformer_blocks:
            video, text = block(video, text, turns, mask)
        return paddle.concat([video, text], 1)

    def _attentions(self):
        return {f"{name}.processor": layer for name, layer in self.named_sublayers() if hasattr(layer, "set_processor")}

    @property
    def attn_processors(self):
        return {name: layer.get_processor() for name, layer in self._attentions().items()}

    def set_attn_processor(self, processor):
        layers = self._attentions()
        if isinstance(processor, dict) and len(processor) != len(layers):
            raise ValueError(f"{len(processor)} processors for {len(layers)} modules")
        for name, layer in layers.items():
            layer.set_processor(processor.pop(name) if isinstance(processor, dict) else processor)


# name: the blocks of a small model
MODELS = {
    "CogVideoX": lambda: [CogVideoXBlock(), CogVideoXBlock()],
    "Wan": lambda: [WanTransformerBlock(), WanTransformerBlock()],
    "Wan, image to video": lambda: [WanTransformerBlock(image=True)],
    "HunyuanVideo": lambda: [HunyuanVideoIndividualTokenRefinerBlock(), HunyuanVideoTransformerBlock(),
                             HunyuanVideoSingleTransformerBlock()],
}


def model(name, seed=0):
    paddle.seed(seed)
    made = Model(*MODELS[name]())
    made.eval()
    return made


def inputs(name, video_tokens=40, text_tokens=9, seen=(9, 5), seed=1):
    """What a model of that name is called with. seen: text tokens of each sample that are no padding, for HunyuanVideo."""
    paddle.seed(seed)
    if "image" in name:
        text_tokens += IMAGE_TOKENS
    angle = paddle.randn([video_tokens, HEAD_DIM // 2]).repeat_interleave(2, axis=1)
    given = dict(video=paddle.randn([2, video_tokens, WIDTH]), text=paddle.randn([2, text_tokens, WIDTH]),
                 turns=(angle.cos(), angle.sin()))
    if name == "HunyuanVideo":
        given["mask"] = paddle.arange(video_tokens + text_tokens) < video_tokens + paddle.to_tensor(seen)[:, None]
    return given
