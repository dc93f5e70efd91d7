"""What a thread of a consumer does with its registers: which it holds, in which order, and what ptxas may move over what.

Layouts here are regroupings: no register moves. The fences are stores to shared memory that never happen: ptxas hoists waits
and arrivals of barriers over arithmetic, but not over a store.
"""
from __future__ import annotations

from ..gluon_shim import gl, gluon

ROWS = gl.constexpr(64)  # query rows of a consumer warpgroup: the M of wgmma


@gluon.constexpr_function
def p_layout(BN):
    """Register order of P before the FP8 conversion: that of the FP8 A operand."""
    registers, columns = [[0, 1], [0, 2], [8, 0]], 16
    while columns < BN:
        registers.append([0, columns])
        columns *= 2
    lanes, warps = [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [ROWS.value, BN])


@gluon.jit
def split_scores(s, BN: gl.constexpr, FP8_PV: gl.constexpr):
    """[ROWS, BN] -> the four (FP8) or two (16-bit) tensors that one packed register of P is made of."""
    if FP8_PV:
        r = s.reshape([ROWS, BN // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4))  # column 16 n + 8 h + 2 t + e
        a, b = r.split()  # e = 0, 1
        a0, a1 = a.split()  # h = 0, 1
        b0, b1 = b.split()
        return a0, b0, a1, b1  # each [ROWS, BN // 16, 4]
    else:
        a, b = s.reshape([ROWS, BN // 8, 4, 2]).split()
        return a, b, a, b  # each [ROWS, BN // 8, 4]


@gluon.jit
def beside(x, split):
    """[ROWS] -> [ROWS, 1, 1] in the layout of one of `split_scores`'s tensors."""
    return gl.convert_layout(x, gl.SliceLayout(1, gl.SliceLayout(2, split.type.layout)), assert_trivial=True)[:, None, None]


@gluon.jit
def unpack(p, acc, BN: gl.constexpr, V_TYPE: gl.constexpr):
    """The packed P as the A operand of a product that acc accumulates."""
    if V_TYPE == gl.float8e4nv:
        b0 = p.to(gl.int8)
        b1 = (p >> 8).to(gl.int8)
        b2 = (p >> 16).to(gl.int8)
        b3 = (p >> 24).to(gl.int8)
        x = gl.join(gl.join(b0, b2), gl.join(b1, b3)).to(gl.float8e4nv, bitcast=True)  # [ROWS, BN // 16, 4, h, e]
        x = gl.convert_layout(x.reshape([ROWS, BN]), p_layout(BN), assert_trivial=True)
        return gl.convert_layout(x, gl.DotOperandLayout(0, acc.type.layout, 4), assert_trivial=True)
    else:
        x = gl.join(p.to(gl.int16), (p >> 16).to(gl.int16)).to(V_TYPE, bitcast=True)  # [ROWS, BN // 8, 4, e]
        return gl.convert_layout(x.reshape([ROWS, BN]), gl.DotOperandLayout(0, acc.type.layout, 2), assert_trivial=True)


@gluon.jit
def one_column(x):
    """A thread's two equal columns of the all-ones product as one: [ROWS, 8] -> [ROWS, 4]."""
    a, b = x.reshape([ROWS, 4, 2]).split()
    return a


@gluon.jit
def rescale(x, alpha):
    return x * gl.convert_layout(alpha, gl.SliceLayout(1, x.type.layout), assert_trivial=True)[:, None]


@gluon.jit
def rescale_moved(x, alpha, COUNT: gl.constexpr):
    """`rescale`, of which a thread has COUNT elements, that costs next to nothing while no maximum of the warp moves."""
    a = gl.convert_layout(alpha, gl.SliceLayout(1, x.type.layout), assert_trivial=True)[:, None]
    a, x = gl.broadcast(a, x)
    return gl.inline_asm_elementwise(_skip_asm(COUNT), constraints("=&f", COUNT, "f", 2 * COUNT), [x, a], dtype=gl.float32,
                                     is_pure=False, pack=COUNT)


@gluon.constexpr_function
def _skip_asm(count):
    """x times alpha for `count` elements, jumped over where alpha is 1 in the whole warp."""
    moves = " ".join(f"mov.b32 ${i}, ${count + i};" for i in range(count))
    tests = " ".join(f"setp.neu.or.f32 n, ${2 * count + i}, 0f3F800000, n;" for i in range(min(count, 4)))
    products = " ".join(f"mul.f32 ${i}, ${i}, ${2 * count + i};" for i in range(count))
    return (f"{{.reg .pred n; setp.ne.s32 n, 0, 0; {moves} {tests} vote.sync.any.pred n, n, -1; @!n bra.uni SAME; {products} "
            "SAME: }")


@gluon.constexpr_function
def constraints(out, results, given, operands):
    """What an asm text of so many results and operands says of them: "=r,=r,r,r"."""
    return ",".join([out] * results + [given] * operands)


@gluon.jit
def fence_after(p):
    """Returns the probabilities p, behind a fence that depends on them: one would have to be huge for the store to happen."""
    return gl.inline_asm_elementwise(
        "{.reg .pred n; .reg .b32 a; mov.b32 a, 0; mov.b32 $0, $4; mov.b32 $1, $5; mov.b32 $2, $6; mov.b32 $3, $7; "
        "setp.gt.f32 n, $3, 0f7F000000; @n st.shared.b32 [a], a;}",
        "=f,=f,=f,=f,f,f,f,f", [p], dtype=gl.float32, is_pure=False, pack=4)


@gluon.jit
def fence_before(row_max):
    """Returns row_max, computed before what follows: behind a fence that depends on it. No maximum is NaN."""
    return gl.inline_asm_elementwise(
        "{.reg .pred n; .reg .b32 a; mov.b32 a, 0; mov.b32 $0, $1; setp.nan.f32 n, $0, $0; @n st.shared.b32 [a], a;}",
        "=f,f", [row_max], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def fence_packed(p, COUNT: gl.constexpr, DEEP: gl.constexpr):
    """Returns the packed P, of which a thread has COUNT registers, behind a fence that depends on the first DEEP of them.

    No probability is negative.
    """
    return gl.inline_asm_elementwise(_fence_asm(COUNT, DEEP), constraints("=r", COUNT, "r", COUNT), [p], dtype=gl.int32,
                                     is_pure=False, pack=COUNT)


@gluon.constexpr_function
def _fence_asm(count, deep):
    """Passes `count` registers on, behind a store on the condition that one of the first `deep` has its sign bit set."""
    moves = " ".join(f"mov.b32 ${i}, ${count + i};" for i in range(count))
    ors = " ".join(f"or.b32 s, s, ${count + i};" for i in range(deep))
    store = "setp.lt.s32 n, s, 0; @n st.shared.b32 [a], a;"
    return f"{{.reg .pred n; .reg .b32 a, s; mov.b32 a, 0; mov.b32 s, 0; {ors} {store} {moves}}}"
