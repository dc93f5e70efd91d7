"""Make a video with CogVideoX in PaddlePaddle, its attention running at low bit.

    python examples/cogvideo.py --prompt "a small red circle moves left over a blue background" --compare

What it does, in the library's own words (`lowbit_video/app/generate.py` adds checks, timing and reports):

    pipe = CogVideoXPipeline.from_pretrained(folder)
    apply(pipe, "int8+fp16")                        # or pipe.set_attn_processor(LowBitAttnProcessor(...))
    frames = pipe(prompt, seed=0).frames[0]
    print(coverage(pipe))                           # what every attention module ran
    export_to_video(frames, "video.mp4", fps=8)
    remove(pipe)                                    # the full-precision pipeline again, to the bit
"""
import sys

from lowbit_video.app import generate
from lowbit_video.app.cli import Parser, guarded


def main() -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    generate.add_arguments(parser)
    args = parser.parse_args()
    return guarded(lambda: generate.run(args), "cogvideo.py")


if __name__ == "__main__":
    sys.exit(main())
