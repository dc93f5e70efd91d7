"""Attention forward for Hopper (sm_90a) in Gluon: INT8, FP8 or 16-bit QK^T, FP8 or 16-bit PV.

One producer warp feeds K and V tiles by TMA through a ring of stages; NC consumer warpgroups own 64 query rows each and share
every tile. A stage holds K of one tile and V of the tile before it, because a consumer issues QK^T of a tile together with PV
of the previous one: one barrier serves both. Tiles are visited from the last to the first, so that the tiles that need a mask
(the ragged end, the causal diagonal) come first and the long loop has none.

Softmax works in base 2. The row maximum is taken on the integer scores. PV in FP8: every tile's product is added in float32
registers (the tensor core keeps about 14 bits), P = e4m3(2 ** (s - m + 8)). At head dim 64, where the exponentials are the
bound, only 5 of 8 P are made so: of the other 3, the code is read off a straight line, round(8 (s - m + 8) + 55.55), for
e4m3's code is nearly its own logarithm. One such P is off by -8.1 to +6.8 % (RMS 3.2 %; e4m3's rounding: 5.9 %, 2.6 %), a row's
maximum and what is masked not at all; the output's relative L1 goes from 0.0402 to 0.0415. PV in 16 bits:
P = dtype_v(2 ** (s - m)), the accumulator lives in the tensor core's own float32; at head dim 64 m may stay short of the row
maximum by 8. FP8 row sums are sums of the rounded P.

Source: the two-level accumulation is that of SageAttention2 (arXiv 2411.10958, section 3.4); the producer and consumer
warpgroups are those of FlashAttention-3 (arXiv 2407.08608, section 3.1). The permuted V, which makes the registers of QK^T the
operand of PV, differs from both.
"""
from __future__ import annotations

from ... import formats
from ..gluon_shim import (
    async_load,
    block_barrier,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    reinterpret,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from .registers import ROWS, fence_after, fence_packed, one_column, rescale, rescale_moved, split_scores, unpack
from .softmax import mask, pack, softmax

BLOCK_K = gl.constexpr(formats.BLOCK_K)  # keys to a K scale
MIN_SCORE = gl.constexpr(formats.MIN_SCORE)
LN_2 = gl.constexpr(formats.LN_2)
FP8_ONE = gl.constexpr(0x38)  # the bits of 1.0 in e4m3


@gluon.jit
def _work_item(i_work, heads_q, heads_kv, q_len, kv_len, n_work, n_heavy, build: gl.constexpr):
    """Block of query rows, batch, head, kv head and number of kv tiles of one work item; causal: heavy blocks first.

    n_heavy (None: not known): so many blocks at the beginning of each head take longer; those of all heads come first.
    """
    BM: gl.constexpr = ROWS * build.consumers
    n_m = gl.cdiv(q_len, BM)
    i_bh = i_work // n_m
    i_m = i_work % n_m
    if n_heavy is not None:
        n_first = n_work // n_m * n_heavy
        if i_work < n_first:
            i_bh = i_work // gl.maximum(n_heavy, 1)
            i_m = i_work % gl.maximum(n_heavy, 1)
        else:
            n_light = gl.maximum(n_m - n_heavy, 1)
            i_bh = (i_work - n_first) // n_light
            i_m = n_heavy + (i_work - n_first) % n_light
    n_kv = gl.cdiv(kv_len, build.block_n)
    if build.causal:
        i_m = n_m - 1 - i_m
        visible = gl.minimum((i_m + 1) * BM, q_len) + kv_len - q_len
        n_kv = gl.cdiv(gl.minimum(gl.maximum(visible, 1), kv_len), build.block_n)
    i_b = i_bh // heads_q
    i_h = i_bh % heads_q
    i_kv = i_b * heads_kv + i_h // (heads_q // heads_kv)
    return i_m, i_bh, i_b, i_h, i_kv, n_kv


@gluon.jit
def _next_stage(stage, phase, build: gl.constexpr):
    stage += 1
    if stage == build.stages:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def _issue_qk(q_t, k_s, stage, zero_s):
    return warpgroup_mma(q_t, k_s.index(stage).permute((1, 0)), zero_s, use_acc=False, is_async=True)


@gluon.jit
def _issue_pv(p, v_s, ones_t, stage, acc, zeros, build: gl.constexpr):
    """Issues PV (and the row sums). FP8: into a fresh accumulator; 16-bit: onto acc."""
    zero_s, zero_acc, zero_sums = zeros
    BN: gl.constexpr = build.block_n
    V_TYPE: gl.constexpr = v_s.dtype
    v_t = v_s.index(stage)  # [BN, D]
    if V_TYPE == gl.float8e4nv:
        v_t = v_t.permute((1, 0))
        pv = warpgroup_mma(unpack(p, acc, BN, V_TYPE), v_t, zero_acc, use_acc=False, is_async=True)
    else:
        pv = warpgroup_mma(unpack(p, acc, BN, V_TYPE), v_t, acc, is_async=True)
    if build.sum_mma:
        sums = warpgroup_mma(unpack(p, zero_sums, BN, V_TYPE), ones_t, zero_sums, use_acc=False, is_async=True)
    else:
        sums = pv
    return pv, sums


@gluon.jit
def _wait_pv(pv, sums, p, s, build: gl.constexpr):
    """Waits for PV and for the scores s. P's registers are read until here, so they are among what the wait gives back."""
    if build.sum_mma:
        return warpgroup_mma_wait(0, deps=(pv, sums, p, s))
    else:
        pv, p, s = warpgroup_mma_wait(0, deps=(pv, p, s))
        return pv, pv, p, s


@gluon.jit
def _accumulate(acc, row_sums, pv, sums, alpha_old, alpha, FP8_PV: gl.constexpr, build: gl.constexpr):
    """Adds a finished PV whose P was made under alpha_old; alpha is that of the tile after it."""
    if FP8_PV:
        acc = rescale(acc, alpha_old) + pv
    elif build.lazy:
        acc = rescale_moved(pv, alpha, pv.shape[1] // 2)
    else:
        acc = rescale(pv, alpha)
    if build.sum_mma:
        row_sums = rescale(row_sums, alpha_old) + one_column(sums)
    return acc, row_sums


@gluon.jit
def _step(i_n, state, W: gl.constexpr, tiles, barriers, where, zeros, build: gl.constexpr, FIRST: gl.constexpr,
          MASK: gl.constexpr, LISTED: gl.constexpr):
    """The softmax of tile i_n (LISTED: of a list), with PV of the tile before it in flight; QK^T of this one is issued with it,
    and waited for.

    state: what one tile hands to the next, in the order in which the loop carries it, of which the PTX depends: where the
    ring and the turns stand, the softmax so far, the scale of K, and the last tile's scores, P and factor. FIRST: there is
    no tile before, and the state holds this one's scores already.
    """
    stage, phase, turn, row_max, acc, row_sums, k_scale, s, p, alpha = state
    q_t, k_s, v_s, ones_t = tiles
    full, empty, turns = barriers
    q_scale, p_k_scale, o_row, q_len, kv_len, i_masked = where
    V_TYPE: gl.constexpr = v_s.dtype
    FP8_PV: gl.constexpr = V_TYPE == gl.float8e4nv
    scale = q_scale
    if p_k_scale is not None:
        scale = q_scale * k_scale
        k_scale = gl.load(p_k_scale + gl.maximum(i_n - 1, 0) * build.block_n // BLOCK_K)
    if not FIRST:
        mbarrier.wait(full.index(stage), phase)
        s_next = _issue_qk(q_t, k_s, stage, zeros[0])
        pv, sums = _issue_pv(p, v_s, ones_t, stage, acc, zeros, build)
        s = warpgroup_mma_wait(2 if build.sum_mma else 1, deps=(s_next,))
    x = s
    if MASK:
        i_tile = i_n
        if LISTED:
            i_tile = i_masked
        x = mask(s, scale, i_tile, o_row, q_len, kv_len, build)
        scale = 1.0
    alpha_old = alpha
    mine = turns.index(W)
    parity = (turn & 1) ^ (1 if W == 0 else 0)
    if build.turns and not FIRST and not build.hold:  # one warpgroup at a time in the exponentials
        mbarrier.wait(mine, parity)
    p0, p1, p2, p3, alpha, row_max, row_sums = softmax(x, scale, row_max, row_sums, mine, parity, build, FP8_PV, MASK,
                                                       build.turns and build.hold > 0 and not FIRST)
    if build.pin:
        p3 = fence_after(p3)
    if build.hold:
        COUNT: gl.constexpr = build.block_n // 8 if FP8_PV else build.block_n // 4
        p_next = p0  # line
        if not build.line:
            p_next = pack(p0, p1, p2, p3, V_TYPE)
        p_next = fence_packed(p_next, COUNT, COUNT * build.hold // 8)
    if build.turns and not FIRST:
        mbarrier.arrive(turns.index((W + 1) % build.consumers), count=1)
        turn += 1
    if not FIRST:
        pv, sums, p, s = _wait_pv(pv, sums, p, s, build)
        acc, row_sums = _accumulate(acc, row_sums, pv, sums, alpha_old, alpha, FP8_PV, build)
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = _next_stage(stage, phase, build)
    if not build.hold:
        p_next = pack(p0, p1, p2, p3, V_TYPE)
    return stage, phase, turn, row_max, acc, row_sums, k_scale, s, p_next, alpha


@gluon.jit
def _join_part(o, log_sum, p_part, p_part_sum, m_rows):
    """o and its log-sum-exp (base 2), joined with those of the tiles that are not listed; where there are none, as they are."""
    part_sum = gl.load(p_part_sum, mask=m_rows, other=float("-inf"))
    m_part = part_sum > float("-inf")
    top = gl.maximum(log_sum, part_sum)
    weight, part_weight = gl.exp2(log_sum - top), gl.exp2(part_sum - top)
    total = weight + part_weight
    part = gl.load(p_part, mask=m_part[:, None], other=0.0).to(gl.float32)
    return o * (weight / total)[:, None] + part * (part_weight / total)[:, None], top + gl.log2(total)


@gluon.jit
def _consumer(W: gl.constexpr, tiles, barriers, pointers, sizes, lists, build: gl.constexpr):
    """Warpgroup W: its ROWS rows of every work item, against all tiles."""
    q_s, k_s, v_s, ones_s = tiles
    q_full, q_empty, full, empty, turns = barriers
    p_o, p_lse, p_shift, p_q_scale, p_k_scale, p_v_scale = pointers
    sm_scale, heads_q, heads_kv, q_len, kv_len, n_work, stride_ob, stride_oh, stride_on = sizes
    p_list, p_count, p_part_sum, n_heavy = lists
    LISTED: gl.constexpr = p_list is not None
    BN: gl.constexpr = build.block_n
    D: gl.constexpr = build.head_dim
    BM: gl.constexpr = ROWS * build.consumers
    FP8_PV: gl.constexpr = v_s.dtype == gl.float8e4nv
    S_TYPE: gl.constexpr = gl.int32 if q_s.dtype == gl.int8 else gl.float32
    EXACT: gl.constexpr = p_q_scale is None
    QK_K: gl.constexpr = 16 if EXACT else 32  # channels that one instruction of QK^T takes
    PV_K: gl.constexpr = 32 if FP8_PV else 16  # keys that one instruction of PV takes
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, QK_K])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, PV_K])
    SUMS_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, PV_K])
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    zero_s = gl.zeros([ROWS, BN], S_TYPE, layout=S_LAYOUT)
    zero_acc = gl.zeros([ROWS, D], gl.float32, layout=O_LAYOUT)
    zero_sums = gl.zeros([ROWS, 8], gl.float32, layout=SUMS_LAYOUT)
    q_t = q_s.index(W)
    ones_t = ones_s.permute((1, 0))
    step_tiles = (q_t, k_s, v_s, ones_t)
    step_barriers = (full, empty, turns)
    zeros = (zero_s, zero_acc, zero_sums)
    stage = 0
    phase = 0
    q_phase = 0
    turn = 0
    for i_work in range(gl.program_id(0), n_work, gl.num_programs(0)):
        i_m, i_bh, i_b, i_h, i_kv, n_kv = _work_item(i_work, heads_q, heads_kv, q_len, kv_len, n_work, n_heavy, build)
        o_row = i_m * BM + W * ROWS
        o_q = o_row + gl.arange(0, ROWS, layout=S_ROWS)
        if EXACT:
            q_scale = gl.full([ROWS], sm_scale, gl.float32, layout=S_ROWS)
        else:
            q_scale = gl.load(p_q_scale + i_bh.to(gl.int64) * q_len + o_q, mask=o_q < q_len, other=0.0) * sm_scale
            p_ks = p_k_scale + i_kv * gl.cdiv(kv_len, BLOCK_K)
        i_masked = n_kv
        if LISTED:
            i_list = i_bh.to(gl.int64) * gl.cdiv(q_len, BM) + i_m
            n_kv = gl.load(p_count + i_list)
            p_ks = p_k_scale + i_list * gl.cdiv(kv_len, BN)
            # the last tile of all, but ptxas would keep what the mask derives of that in registers that the loop needs
            i_masked = gl.load(p_list + i_list * gl.cdiv(kv_len, BN) + (n_kv - 1))
        n_full = kv_len // BN  # tiles that need no mask
        if build.causal:
            n_full = gl.minimum(n_full, gl.maximum(o_row + kv_len - q_len + 1, 0) // BN)
        row_max = gl.full([ROWS], MIN_SCORE, gl.float32, layout=S_ROWS)
        acc = zero_acc
        where = (q_scale, None if EXACT else p_ks, o_row, q_len, kv_len, i_masked)
        if build.sum_mma:
            row_sums = one_column(zero_sums)
        else:
            P_LAYOUT: gl.constexpr = split_scores(zero_s, BN, FP8_PV)[0].type.layout
            row_sums = gl.zeros([ROWS, 4], gl.float32, layout=gl.SliceLayout(1, P_LAYOUT))
        k_scale = sm_scale  # EXACT: nobody reads it
        if not EXACT:
            k_scale = gl.load(p_ks + (n_kv - 1) * BN // BLOCK_K)
        mbarrier.wait(q_full, q_phase)
        mbarrier.wait(full.index(stage), phase)
        s = _issue_qk(q_t, k_s, stage, zero_s)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = _next_stage(stage, phase, build)
        state = (stage, phase, turn, row_max, acc, row_sums, k_scale, s, None, row_max)
        state = _step(n_kv - 1, state, W, step_tiles, step_barriers, where, zeros, build, True, True, LISTED)
        n_full = gl.minimum(n_full, n_kv - 1)
        if build.causal:
            for j in range(n_kv - 1 - n_full):
                state = _step(n_kv - 2 - j, state, W, step_tiles, step_barriers, where, zeros, build, False, True, LISTED)
        for j in range(n_full):
            state = _step(n_full - 1 - j, state, W, step_tiles, step_barriers, where, zeros, build, False, False, LISTED)
        stage, phase, turn, row_max, acc, row_sums, k_scale, s, p, alpha = state
        mbarrier.arrive(q_empty, count=1)
        mbarrier.wait(full.index(stage), phase)
        pv, sums = _issue_pv(p, v_s, ones_t, stage, acc, zeros, build)
        pv, sums, p, s = _wait_pv(pv, sums, p, s, build)
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = _next_stage(stage, phase, build)
        q_phase ^= 1
        if FP8_PV:
            acc = rescale(acc, alpha) + pv
        else:
            acc = pv
        if build.sum_mma:
            row_sums = rescale(row_sums, alpha) + one_column(sums)
            row_sum = gl.convert_layout(gl.sum(row_sums, 1) * 0.25, O_ROWS)
        else:
            row_sum = gl.convert_layout(gl.sum(row_sums, 1), O_ROWS)
        m_seen = row_sum > 0.0
        o = acc * gl.where(m_seen, 1.0 / row_sum, 0.0)[:, None]
        o_d = gl.arange(0, D, layout=gl.SliceLayout(0, O_LAYOUT))
        if FP8_PV:
            o = o * gl.load(p_v_scale + i_kv * D + o_d)[None, :]
        o_m = o_row + gl.arange(0, ROWS, layout=O_ROWS)
        p_row = p_o + i_b.to(gl.int64) * stride_ob + i_h.to(gl.int64) * stride_oh + o_m.to(gl.int64) * stride_on
        if LISTED:
            log_sum = gl.convert_layout(row_max, O_ROWS) + gl.log2(row_sum)
            p_sum = p_part_sum + i_bh.to(gl.int64) * q_len + o_m
            o, log_sum = _join_part(o, log_sum, p_row[:, None] + o_d[None, :], p_sum, o_m < q_len)
        gl.store(p_row[:, None] + o_d[None, :], o.to(p_o.dtype.element_ty), mask=(o_m < q_len)[:, None])
        if build.lse:
            o_lse = i_bh.to(gl.int64) * q_len + o_m
            if LISTED:
                lse = log_sum * LN_2
            else:
                lse = (gl.convert_layout(row_max, O_ROWS) + gl.log2(row_sum)) * LN_2
            if build.lse_shift:
                lse += gl.load(p_shift + o_lse, mask=o_m < q_len, other=0.0)
            gl.store(p_lse + o_lse, gl.where(m_seen, lse, float("-inf")), mask=o_m < q_len)


@gluon.jit
def _load_rows(desc, i_b, i_h, row, barrier, tile):
    """Loads a tile [rows, D] of a 16-bit tensor [B, H, N, D] as the caller's strides have it; zeros past its end."""
    LAYOUT: gl.constexpr = desc.layout
    async_load(desc, [i_b, i_h, row, 0], barrier, reinterpret(tile, tile.dtype, [1, 1, tile.shape[0], tile.shape[1]], LAYOUT))


@gluon.jit
def _producer(q_desc, k_desc, v_desc, tiles, barriers, sizes, lists, build: gl.constexpr):
    """The warp that loads: Q of every work item, and per tile K of it and V of the tile before."""
    q_s, k_s, v_s, ones_s = tiles
    q_full, q_empty, full, empty, turns = barriers
    sm_scale, heads_q, heads_kv, q_len, kv_len, n_work, stride_ob, stride_oh, stride_on = sizes
    p_list, p_count, p_part_sum, n_heavy = lists
    LISTED: gl.constexpr = p_list is not None
    BN: gl.constexpr = build.block_n
    D: gl.constexpr = build.head_dim
    CONSUMERS: gl.constexpr = build.consumers
    BM: gl.constexpr = ROWS * CONSUMERS
    FP8_PV: gl.constexpr = v_s.dtype == gl.float8e4nv
    EXACT: gl.constexpr = q_s.dtype == gl.float16 or q_s.dtype == gl.bfloat16
    QK_BYTES: gl.constexpr = 2 if EXACT else 1  # of an element
    K_BYTES: gl.constexpr = BN * D * QK_BYTES
    V_BYTES: gl.constexpr = BN * D * (1 if FP8_PV else 2)
    stage = 0
    phase = 1
    q_phase = 1
    for i_work in range(gl.program_id(0), n_work, gl.num_programs(0)):
        i_m, i_bh, i_b, i_h, i_kv, n_kv = _work_item(i_work, heads_q, heads_kv, q_len, kv_len, n_work, n_heavy, build)
        i_kvh = i_h // (heads_q // heads_kv)
        if LISTED:
            i_list = i_bh.to(gl.int64) * gl.cdiv(q_len, BM) + i_m
            n_kv = gl.load(p_count + i_list)
            p_tiles = p_list + i_list * gl.cdiv(kv_len, BN)
            i_before = 0
        mbarrier.wait(q_empty, q_phase)
        q_phase ^= 1
        mbarrier.expect(q_full, BM * D * QK_BYTES)
        for i in gl.static_range(CONSUMERS):
            if EXACT:
                _load_rows(q_desc, i_b, i_h, i_m * BM + i * ROWS, q_full, q_s.index(i))
            else:
                async_load(q_desc, [i_bh * q_len + i_m * BM + i * ROWS, 0], q_full, q_s.index(i))
        o_k = i_kv * kv_len
        for j in range(n_kv + 1):
            i_n = n_kv - 1 - j
            if LISTED:
                i_n = gl.load(p_tiles + gl.maximum(i_n, 0))
            else:
                i_before = i_n + 1
            mbarrier.wait(empty.index(stage), phase)
            if j < n_kv:
                if j >= 1:
                    mbarrier.expect(full.index(stage), K_BYTES + V_BYTES)
                else:
                    mbarrier.expect(full.index(stage), K_BYTES)
                if EXACT:
                    _load_rows(k_desc, i_b, i_kvh, i_n * BN, full.index(stage), k_s.index(stage))
                else:
                    async_load(k_desc, [o_k + i_n * BN, 0], full.index(stage), k_s.index(stage))
            else:
                mbarrier.expect(full.index(stage), V_BYTES)
            if j >= 1:
                if FP8_PV:
                    async_load(v_desc, [i_kv * D, i_before * BN], full.index(stage), v_s.index(stage))
                else:
                    _load_rows(v_desc, i_b, i_kvh, i_before * BN, full.index(stage), v_s.index(stage))
            if LISTED:
                i_before = i_n
            stage, phase = _next_stage(stage, phase, build)


@gluon.jit(do_not_specialize=["heads_q", "heads_kv", "q_len", "kv_len", "n_work", "n_heavy"])
def attn_fwd_kernel(q_desc, k_desc, v_desc, p_o, p_lse, p_shift, p_q_scale, p_k_scale, p_v_scale, sm_scale, heads_q, heads_kv,
                    q_len, kv_len, n_work, stride_ob, stride_oh, stride_on, p_list, p_count, p_part_sum, n_heavy,
                    build: gl.constexpr, V_LAYOUT: gl.constexpr, ONES_LAYOUT: gl.constexpr):
    """Memory and barriers of a program, and who does what in it; `launch` says what the arguments are."""
    BN: gl.constexpr = build.block_n
    D: gl.constexpr = build.head_dim
    STAGES: gl.constexpr = build.stages
    CONSUMERS: gl.constexpr = build.consumers
    REGISTERS: gl.constexpr = build.registers
    V_TYPE: gl.constexpr = v_desc.dtype
    FP8_PV: gl.constexpr = V_TYPE == gl.float8e4nv
    QK_LAYOUT: gl.constexpr = V_LAYOUT if p_q_scale is None else q_desc.layout  # exact: that of V, rows of as many bytes
    q_s = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, ROWS, D], QK_LAYOUT)
    k_s = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BN, D], QK_LAYOUT)
    if FP8_PV:
        v_s = gl.allocate_shared_memory(V_TYPE, [STAGES, D, BN], V_LAYOUT)
    else:
        v_s = gl.allocate_shared_memory(V_TYPE, [STAGES, BN, D], V_LAYOUT)
    BLOCKED: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    if FP8_PV:  # by its bits: of a converted 1.0 in both halves of a register ptxas leaves one half unwritten
        ones = gl.full([8, BN], FP8_ONE, gl.int8, layout=BLOCKED).to(V_TYPE, bitcast=True)
    else:
        ones = gl.full([8, BN], 1.0, V_TYPE, layout=BLOCKED)
    ones_s = gl.allocate_shared_memory(V_TYPE, [8, BN], ONES_LAYOUT, ones)
    fence_async_shared()
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=CONSUMERS)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(turns.index(i), count=1)
    block_barrier()
    tiles = (q_s, k_s, v_s, ones_s)
    barriers = (q_full, q_empty, full, empty, turns)
    pointers = (p_o, p_lse, p_shift, p_q_scale, p_k_scale, p_v_scale)
    sizes = (sm_scale, heads_q, heads_kv, q_len, kv_len, n_work, stride_ob, stride_oh, stride_on)
    lists = (p_list, p_count, p_part_sum, n_heavy)
    if CONSUMERS == 2:
        gl.warp_specialize([
            (_consumer, (0, tiles, barriers, pointers, sizes, lists, build)),
            (_consumer, (1, tiles, barriers, pointers, sizes, lists, build)),
            (_producer, (q_desc, k_desc, v_desc, tiles, barriers, sizes, lists, build)),
        ], [4, 1], [REGISTERS, 24])
    else:
        gl.warp_specialize([
            (_consumer, (0, tiles, barriers, pointers, sizes, lists, build)),
            (_consumer, (1, tiles, barriers, pointers, sizes, lists, build)),
            (_consumer, (2, tiles, barriers, pointers, sizes, lists, build)),
            (_producer, (q_desc, k_desc, v_desc, tiles, barriers, sizes, lists, build)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])
