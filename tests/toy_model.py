"""A model with hooked attention as small as can be, for tests of processors: two Paddle attention modules."""
import paddle
from paddle import nn

from lowbit_video import ExactAttnProcessor, declare_attention


@declare_attention
class Attention(nn.Layer):
    def __init__(self, heads=2, head_dim=32, qk_norm=True):
        super().__init__()
        width = heads * head_dim
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.norm_q = nn.LayerNorm(head_dim) if qk_norm else None
        self.norm_k = nn.LayerNorm(head_dim) if qk_norm else None
        self.to_out = nn.LayerList([nn.Linear(width, width), nn.Dropout(0.0)])
        self.set_processor(ExactAttnProcessor())

    def set_processor(self, processor):
        object.__setattr__(self, "processor", processor)

    def forward(self, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        return self.processor(self, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


class Model(nn.Layer):
    """Two attention modules with residuals; works on [B, N_video, C] and [B, N_text, C]."""

    def __init__(self, heads=2, head_dim=32):
        super().__init__()
        self.blocks = nn.LayerList([Attention(heads, head_dim) for _ in range(2)])

    def forward(self, video, text, mask=None, rotary=None):
        for block in self.blocks:
            more_video, more_text = block(video, text, attention_mask=mask, image_rotary_emb=rotary)
            video, text = video + more_video, text + more_text
        return video, text


class SelfAttention(nn.Layer):
    """Attention of another kind, without a hook, as a text encoder has it."""

    def __init__(self, width=8):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        return nn.functional.softmax(self.q(x) @ self.k(x).transpose([0, 2, 1])) @ self.v(x)


class Pipe:
    """The parts of a pipeline that coverage and apply look at."""

    def __init__(self):
        self.transformer = Model()
        self.vae = nn.Sequential(nn.Conv2D(3, 4, 1))
        self.text_encoder = nn.Sequential(SelfAttention(), SelfAttention(), SelfAttention())


def model(seed=0, **sizes):
    paddle.seed(seed)
    made = Model(**sizes)
    made.eval()
    return made


def inputs(video_tokens=40, text_tokens=7, batch=2, width=64, seed=1, rotary_dim=32):
    paddle.seed(seed)
    angle = paddle.randn([video_tokens, rotary_dim // 2]).repeat_interleave(2, axis=1)
    return dict(video=paddle.randn([batch, video_tokens, width]), text=paddle.randn([batch, text_tokens, width]),
                rotary=(angle.cos(), angle.sin()))
