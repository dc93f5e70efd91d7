"""`Task`: one video to make and on what; `Share`: what the busiest rank of a split has of it."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from lowbit_video.kernels.formats import BLOCK_K

from ...hook.recipe.recipe import Recipe
from ..mesh import Degrees
from ..shares import even_shares, joint_shares, token_shares
from .alike import Alike, alike_steps
from .figures import Figures, Program, load_figures, named
from .formats import WireFormat, wire_format
from .models import Model

KEYS = ("gathered", "round")
"""How the codes of all keys reach a rank."""


@dataclass(frozen=True)
class Task:
    """One video. frames, height, width None: the model's own; framework None: the first of the figures.

    precision: of attention; an exchange of int8 or int4 puts K into that format. exchange, output: as the wrappers take them.
    keys: how those that a ring shares reach each rank: "gathered" where `ring` can, or "round".
    link, framework: of the figures. cuda_graph: whether the transformer is launched as one, whatever the host takes.
    text_encoder: whether it stays on the GPU. recipe: precisions by layer and step in place of one; `precision` then is its
    name, and what travels follows the precision of each layer.
    Raises ValueError for what there is not, saying what there is.
    """

    model: Model
    figures: Figures = field(default_factory=load_figures, repr=False)
    precision: str = "int8+fp8"
    exchange: str = "auto"
    output: str = "16bit"
    keys: str = "gathered"
    link: str = "nvlink"
    framework: str | None = None
    cuda_graph: bool = False
    steps: int = 50
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    text_encoder: bool = True
    recipe: Recipe | None = None

    def __post_init__(self) -> None:
        figures = self.figures
        if self.recipe is None:
            self._check_precision()
        else:
            object.__setattr__(self, "precision", self.recipe.source)
        named(dict.fromkeys(KEYS), self.keys, "way of keys")
        named(figures.links, self.link, "link")
        if self.framework is None:
            object.__setattr__(self, "framework", next(iter(figures.programs)))
        named(figures.programs, self.framework, "measured framework")
        if self.steps < 1:
            raise ValueError(f"{self.steps} steps; at least one is needed")
        self.model.video_tokens(*self.size)
        if self.recipe is not None:
            self.parts  # noqa: B018  raises for a precision that is not measured

    def _check_precision(self) -> None:
        dim, figures = self.model.head_dim, self.figures
        object.__setattr__(self, "precision", str(self.wire.precision))
        if self.precision not in figures.pace:
            raise ValueError(f"attention at {self.precision} is not measured; there are: {', '.join(figures.pace)}")
        if dim not in figures.pace[self.precision] or dim not in figures.attention:
            raise ValueError(f"attention at head dim {dim} ({self.model.name}) is not measured; there are: "
                             + ", ".join(map(str, figures.attention)))

    @cached_property
    def alike(self) -> tuple[Alike, ...]:
        """The steps, as many kinds of them as a recipe makes; else one."""
        if self.recipe is None:
            return (Alike(1.0, {self.precision: self.model.layers}),)
        return alike_steps(self.recipe, self.model, self.steps)

    @cached_property
    def parts(self) -> Mapping[str, Task]:
        """A task for each precision of `alike`, everywhere at it."""
        if self.recipe is None:
            return {self.precision: self}
        return {precision: replace(self, precision=precision, recipe=None) for precision in self.layers}

    @cached_property
    def layers(self) -> Mapping[str, float]:
        """How many layers have each precision, in the mean of all steps; the most first."""
        if self.recipe is None:
            return self.alike[0].layers
        mean: dict[str, float] = {}
        for kind in self.alike:
            for precision, count in kind.layers.items():
                mean[precision] = mean.get(precision, 0.0) + kind.share * count
        return dict(sorted(mean.items(), key=lambda item: -item[1]))

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height and width in pixels."""
        given = (self.frames, self.height, self.width)
        own = (self.model.frames, self.model.height, self.model.width)
        return tuple(b if a is None else a for a, b in zip(given, own))

    @property
    def video_tokens(self) -> int:
        """Of the transformer."""
        return self.model.video_tokens(*self.size)

    @property
    def tokens(self) -> int:
        """Of text and video together."""
        return self.model.text_tokens + self.video_tokens

    @property
    def wire(self) -> WireFormat:
        """What travels, where there is one precision."""
        return wire_format(self.precision, self.model.head_dim, self.exchange, self.output)

    @property
    def program(self) -> Program:
        """The framework's figures for this model."""
        program = self.figures.programs[self.framework].of(self.model.name)
        return replace(program, layer_host_us=0) if self.cuda_graph else program


@dataclass(frozen=True)
class Share:
    """What the busiest rank has.

    batch: of guidance's two. rows: its own tokens. part_rows: those of its Ulysses group, a ring's part. heads: its own.
    """

    batch: int
    rows: int
    part_rows: int
    heads: int


def share_of(task: Task, degrees: Degrees) -> Share:
    """The busiest rank's share. Raises ValueError where a split cannot be, with the reason."""
    u, size = degrees.ulysses, degrees.ulysses * degrees.ring
    if u > task.model.heads:
        raise ValueError(f"{task.model.heads} heads are fewer than {u} ranks that share them")
    if size > 1:
        joint_shares(task.model.text_tokens, task.video_tokens, size)
    shares = token_shares(task.tokens, size)
    kinds = [part.wire.kind for part in task.parts.values()]
    if u > 1 and any(kind is not None and kind.joins_blocks for kind in kinds) and size > -(-task.tokens // BLOCK_K):
        raise ValueError(f"{task.tokens} tokens are fewer blocks of {BLOCK_K} than {size} ranks: only 16 bit can travel then "
                         "(--exchange 16bit)")
    parts = [sum(shares[begin:begin + u]) for begin in range(0, size, u)]
    return Share(2 // degrees.cfg, max(shares), max(parts), even_shares(task.model.heads, u)[0])
