"""The six kernels of grouped experts; this module needs triton.

Rows are slots sorted by expert. `slot_N[row] // K` is the token of a row, `bounds[e]` the first row
of expert e and `bounds[e + 1]` its end. The three kernels that make rows run over a schedule of row
tiles, none of which crosses an expert; a tile that the schedule does not need names the expert E
and returns at once, so the host never has to know how many there are. Sums are in ACC (float32).
OPERAND is the dtype in which tiles are multiplied: that of the tensors, but float32 in the
interpreter, whose numpy has no bfloat16.

Shapes: T tokens, K slots per token, N = T * K rows, E experts, F width of one expert, D model
width, C columns of a product, I inner length of a product.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _activate(x, ACT: tl.constexpr):
    """Give act(x) and its slope; whichever is not used costs nothing."""
    if ACT == "relu":
        # Not a maximum, which would hide a NaN.
        value = tl.where(x <= 0, 0.0, x)
        slope = tl.where(x <= 0, 0.0, 1.0)
    elif ACT == "relu2":
        positive = tl.where(x <= 0, 0.0, x)
        value = positive * positive
        slope = 2.0 * positive
    elif ACT == "gelu":
        # x times the normal distribution function.
        share = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
        value = x * share
        slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACT == "tanh":
        # tanh(x) = 2 sigmoid(2 x) - 1; the bound keeps exp from overflowing.
        value = 2.0 / (1.0 + tl.exp(-tl.maximum(2.0 * x, -80.0))) - 1.0
        slope = 1.0 - value * value
    else:
        # x * sigmoid(inner(x)): tanh(u) = 2 sigmoid(2 u) - 1 makes one family of the three.
        if ACT == "silu":
            inner = x
            x_inner_slope = inner
        elif ACT == "quick_gelu":
            inner = 1.702 * x
            x_inner_slope = inner
        else:
            tl.static_assert(ACT == "gelu_tanh")
            inner = 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)
            x_inner_slope = 1.5957691216057308 * x * (1.0 + 0.134145 * x * x)
        # Far from zero the sigmoid is 0 or 1; the bound keeps exp from overflowing.
        share = 1.0 / (1.0 + tl.exp(-tl.maximum(inner, -80.0)))
        value = x * share
        slope = share + share * (1.0 - share) * x_inner_slope
    return value, slope


@triton.jit
def _schedule(tile_expert_M, tile_row_M, num_blocks, GROUP: tl.constexpr):
    """Give this program's expert, first row and block of columns.

    Programs that run together share a few row tiles and a few column blocks, for the L2 cache.
    """
    program = tl.program_id(0)
    num_tiles = tl.num_programs(0) // num_blocks
    tile, block = tl.swizzle2d(
        program // num_blocks, program % num_blocks, num_tiles, num_blocks, GROUP
    )
    # Products with a row or an expert may exceed 32 bits.
    expert = tl.load(tile_expert_M + tile).to(tl.int64)
    return expert, tl.load(tile_row_M + tile).to(tl.int64), block


@triton.jit
def _multiply(
    x,
    x_row_R,
    row_on_R,
    w,
    column_C,
    column_on_C,
    inner,
    w_stride_c,
    w_stride_i,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    ACC: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multiply the given rows of x [., I] by the given columns of w: sum_i x[r, i] w[c, i]."""
    acc_RC = tl.zeros((BLOCK_R, BLOCK_C), dtype=ACC)
    for start in range(0, inner, BLOCK_I):
        i_I = start + tl.arange(0, BLOCK_I)
        on_I = i_I < inner
        x_RI = tl.load(
            x + x_row_R[:, None] * inner + i_I[None, :],
            mask=row_on_R[:, None] & on_I[None, :],
            other=0.0,
        )
        w_IC = tl.load(
            w + column_C[None, :] * w_stride_c + i_I[:, None] * w_stride_i,
            mask=on_I[:, None] & column_on_C[None, :],
            other=0.0,
        )
        acc_RC = tl.dot(
            x_RI.to(OPERAND), w_IC.to(OPERAND), acc_RC, input_precision=PRECISION, out_dtype=ACC
        )
    return acc_RC


@triton.jit
def up_kernel(
    h_TD,
    up_ECD,
    bias_EC,
    z_NC,
    a_NF,
    slot_N,
    bounds,
    tile_expert_M,
    tile_row_M,
    D,
    F,
    num_blocks,
    stride_e,
    stride_c,
    stride_d,
    K,
    E: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    GROUP: tl.constexpr,
    ACC: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute z = h[token] up^T + bias and a = act(z), rows of h gathered as they are loaded.

    C = 2F and columns c of a gated tile are gate and up rows in turn, so that both halves of a
    neuron end in one program. KEEP says whether z is wanted (for the backward pass).
    """
    expert, first, block = _schedule(tile_expert_M, tile_row_M, num_blocks, GROUP)
    if expert == E:
        return
    row_R = first + tl.arange(0, BLOCK_R)
    row_on_R = row_R < tl.load(bounds + expert + 1)
    token_R = (tl.load(slot_N + row_R, mask=row_on_R, other=0) // K).to(tl.int64)
    WIDTH: tl.constexpr = BLOCK_C // 2 if GATED else BLOCK_C
    c_C = tl.arange(0, BLOCK_C)
    if GATED:
        neuron_C = block * WIDTH + c_C // 2
        column_C = neuron_C + (c_C % 2) * F
    else:
        neuron_C = block * WIDTH + c_C
        column_C = neuron_C
    on_C = neuron_C < F
    z_RC = _multiply(
        h_TD, token_R, row_on_R, up_ECD + expert * stride_e, column_C, on_C, D, stride_c, stride_d,
        BLOCK_R, BLOCK_C, BLOCK_I, ACC, OPERAND, PRECISION,
    )  # fmt: skip
    columns = 2 * F if GATED else F
    if HAS_BIAS:
        bias_C = tl.load(bias_EC + expert * columns + column_C, mask=on_C, other=0.0)
        z_RC += bias_C.to(ACC)[None, :]
    # The backward pass starts from the rounded product, so this pass does too.
    z_RC = z_RC.to(a_NF.dtype.element_ty)
    f_W = block * WIDTH + tl.arange(0, WIDTH)
    on_RW = row_on_R[:, None] & (f_W < F)[None, :]
    z_at_RW = z_NC + row_R[:, None] * columns + f_W[None, :]
    a_at_RW = a_NF + row_R[:, None] * F + f_W[None, :]
    if GATED:
        gate_RW, up_RW = tl.split(tl.reshape(z_RC, (BLOCK_R, WIDTH, 2)))
        if KEEP:
            tl.store(z_at_RW, gate_RW, mask=on_RW)
            tl.store(z_at_RW + F, up_RW, mask=on_RW)
        value_RW, _ = _activate(gate_RW.to(ACC), ACT)
        a_RW = value_RW * up_RW.to(ACC)
    else:
        if KEEP:
            tl.store(z_at_RW, z_RC, mask=on_RW)
        a_RW, _ = _activate(z_RC.to(ACC), ACT)
    tl.store(a_at_RW, a_RW.to(a_NF.dtype.element_ty), mask=on_RW)


@triton.jit
def product_kernel(
    x_NI,
    w,
    bias_EC,
    y_NC,
    bounds,
    tile_expert_M,
    tile_row_M,
    I,
    C,
    num_blocks,
    stride_e,
    stride_c,
    stride_i,
    E: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    GROUP: tl.constexpr,
    ACC: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y[n, c] = sum_i x[n, i] w[e, c, i] + bias[e, c], for the expert e of row n."""
    expert, first, block = _schedule(tile_expert_M, tile_row_M, num_blocks, GROUP)
    if expert == E:
        return
    row_R = first + tl.arange(0, BLOCK_R)
    row_on_R = row_R < tl.load(bounds + expert + 1)
    c_C = block * BLOCK_C + tl.arange(0, BLOCK_C)
    on_C = c_C < C
    y_RC = _multiply(
        x_NI, row_R, row_on_R, w + expert * stride_e, c_C, on_C, I, stride_c, stride_i,
        BLOCK_R, BLOCK_C, BLOCK_I, ACC, OPERAND, PRECISION,
    )  # fmt: skip
    if HAS_BIAS:
        y_RC += tl.load(bias_EC + expert * C + c_C, mask=on_C, other=0.0).to(ACC)[None, :]
    tl.store(
        y_NC + row_R[:, None] * C + c_C[None, :],
        y_RC.to(y_NC.dtype.element_ty),
        mask=row_on_R[:, None] & on_C[None, :],
    )


@triton.jit
def gather_sum_kernel(
    y_ND,
    row_TK,
    weight_TK,
    out_TD,
    T,
    D,
    K,
    WEIGHTED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """out[t] = sum_k weight[t, k] y[row[t, k]]; every token fetches its rows, in a fixed order."""
    t_T = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    d_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    on_D = d_D < D
    acc_TD = tl.zeros((BLOCK_T, BLOCK_D), dtype=ACC)
    for k in range(0, K):
        row_T = tl.load(row_TK + t_T * K + k, mask=t_T < T, other=-1).to(tl.int64)
        # An empty slot has the row -1 and is not fetched.
        held_T = row_T >= 0
        y_TD = tl.load(
            y_ND + row_T[:, None] * D + d_D[None, :],
            mask=held_T[:, None] & on_D[None, :],
            other=0.0,
        ).to(ACC)
        if WEIGHTED:
            weight_T = tl.load(weight_TK + t_T * K + k, mask=held_T, other=0.0).to(ACC)
            acc_TD += weight_T[:, None] * y_TD
        else:
            acc_TD += y_TD
    tl.store(
        out_TD + t_T[:, None] * D + d_D[None, :],
        acc_TD.to(out_TD.dtype.element_ty),
        mask=(t_T < T)[:, None] & on_D[None, :],
    )


@triton.jit
def down_backward_kernel(
    dout_TD,
    down_EDF,
    bias_ED,
    z_NC,
    weight_TK,
    dz_NC,
    wa_NF,
    dweight_NB,
    slot_N,
    bounds,
    tile_expert_M,
    tile_row_M,
    D,
    F,
    num_blocks,
    stride_e,
    stride_d,
    stride_f,
    K,
    E: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    GROUP: tl.constexpr,
    ACC: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From dout to dz, without y and without a, which is computed again from z.

    With g = dout[token] down and a = act(z): the slot's weight s gets ds = <g, a>, since
    <dout, a down^T> = <dout down, a>; z gets dz = act'(z) * s g; and s a is written for the
    gradient of down. ds is summed over blocks of neurons by the caller, hence its column B.
    """
    expert, first, block = _schedule(tile_expert_M, tile_row_M, num_blocks, GROUP)
    if expert == E:
        return
    row_R = first + tl.arange(0, BLOCK_R)
    row_on_R = row_R < tl.load(bounds + expert + 1)
    slot_R = tl.load(slot_N + row_R, mask=row_on_R, other=0).to(tl.int64)
    token_R = slot_R // K
    f_C = block * BLOCK_C + tl.arange(0, BLOCK_C)
    on_C = f_C < F
    g_RC = _multiply(
        dout_TD, token_R, row_on_R, down_EDF + expert * stride_e, f_C, on_C, D, stride_f, stride_d,
        BLOCK_R, BLOCK_C, BLOCK_I, ACC, OPERAND, PRECISION,
    )  # fmt: skip
    weight_R1 = tl.load(weight_TK + slot_R, mask=row_on_R, other=0.0).to(ACC)[:, None]
    on_RC = row_on_R[:, None] & on_C[None, :]
    columns = 2 * F if GATED else F
    at_RC = row_R[:, None] * columns + f_C[None, :]
    z_RC = tl.load(z_NC + at_RC, mask=on_RC, other=0.0).to(ACC)
    value_RC, slope_RC = _activate(z_RC, ACT)
    dvalue_RC = weight_R1 * g_RC
    out_dtype = dz_NC.dtype.element_ty
    if GATED:
        up_RC = tl.load(z_NC + at_RC + F, mask=on_RC, other=0.0).to(ACC)
        a_RC = value_RC * up_RC
        tl.store(dz_NC + at_RC, (dvalue_RC * up_RC * slope_RC).to(out_dtype), mask=on_RC)
        tl.store(dz_NC + at_RC + F, (dvalue_RC * value_RC).to(out_dtype), mask=on_RC)
    else:
        a_RC = value_RC
        tl.store(dz_NC + at_RC, (dvalue_RC * slope_RC).to(out_dtype), mask=on_RC)
    wa_at_RC = wa_NF + row_R[:, None] * F + f_C[None, :]
    tl.store(wa_at_RC, (weight_R1 * a_RC).to(out_dtype), mask=on_RC)
    dweight_R = tl.sum(g_RC * a_RC, axis=1)
    if HAS_BIAS:  # noqa: SIM102 (decided by the compiler; the next one by the program)
        # The weight scales the bias too: the first block adds <dout, bias>.
        if block == 0:
            for start in range(0, D, BLOCK_I):
                d_I = start + tl.arange(0, BLOCK_I)
                on_I = d_I < D
                bias_I = tl.load(bias_ED + expert * D + d_I, mask=on_I, other=0.0).to(ACC)
                dout_RI = tl.load(
                    dout_TD + token_R[:, None] * D + d_I[None, :],
                    mask=row_on_R[:, None] & on_I[None, :],
                    other=0.0,
                ).to(ACC)
                dweight_R += tl.sum(dout_RI * bias_I[None, :], axis=1)
    tl.store(dweight_NB + row_R * num_blocks + block, dweight_R, mask=row_on_R)


@triton.jit
def matrix_gradient_kernel(
    g,
    x,
    dw_ECI,
    slot_N,
    bounds,
    C,
    I,
    K,
    GATHER_G: tl.constexpr,
    GATHER_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACC: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dw[e, c, i] = sum over the rows of e of g[row, c] x[row, i]; zero where e has none.

    A gathered operand is indexed by the token of a row instead of by the row.
    """
    num_i = tl.cdiv(I, BLOCK_I)
    per_expert = tl.cdiv(C, BLOCK_C) * num_i
    expert = (tl.program_id(0) // per_expert).to(tl.int64)
    c_C = tl.program_id(0) % per_expert // num_i * BLOCK_C + tl.arange(0, BLOCK_C)
    i_I = tl.program_id(0) % num_i * BLOCK_I + tl.arange(0, BLOCK_I)
    end = tl.load(bounds + expert + 1)
    acc_CI = tl.zeros((BLOCK_C, BLOCK_I), dtype=ACC)
    for start in range(tl.load(bounds + expert), end, BLOCK_R):
        row_R = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        on_R = row_R < end
        token_R = tl.load(slot_N + row_R, mask=on_R, other=0).to(tl.int64) // K
        g_row_R = token_R if GATHER_G else row_R
        x_row_R = token_R if GATHER_X else row_R
        g_CR = tl.load(
            g + g_row_R[None, :] * C + c_C[:, None],
            mask=on_R[None, :] & (c_C < C)[:, None],
            other=0.0,
        )
        x_RI = tl.load(
            x + x_row_R[:, None] * I + i_I[None, :],
            mask=on_R[:, None] & (i_I < I)[None, :],
            other=0.0,
        )
        acc_CI = tl.dot(
            g_CR.to(OPERAND), x_RI.to(OPERAND), acc_CI, input_precision=PRECISION, out_dtype=ACC
        )
    tl.store(
        dw_ECI + expert * C * I + c_C[:, None].to(tl.int64) * I + i_I[None, :],
        acc_CI.to(dw_ECI.dtype.element_ty),
        mask=(c_C < C)[:, None] & (i_I < I)[None, :],
    )


@triton.jit
def bias_gradient_kernel(
    g,
    weight_TK,
    db_EC,
    slot_N,
    bounds,
    C,
    K,
    GATHER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    """db[e, c] = sum over the rows of e of g[row, c].

    With GATHER, g is indexed by the token of a row and scaled by the weight of its slot.
    """
    expert = tl.program_id(0).to(tl.int64)
    c_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    end = tl.load(bounds + expert + 1)
    acc_C = tl.zeros((BLOCK_C,), dtype=ACC)
    for start in range(tl.load(bounds + expert), end, BLOCK_R):
        row_R = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        on_R = row_R < end
        slot_R = tl.load(slot_N + row_R, mask=on_R, other=0).to(tl.int64)
        g_row_R = slot_R // K if GATHER else row_R
        g_RC = tl.load(
            g + g_row_R[:, None] * C + c_C[None, :],
            mask=on_R[:, None] & (c_C < C)[None, :],
            other=0.0,
        ).to(ACC)
        if GATHER:
            g_RC *= tl.load(weight_TK + slot_R, mask=on_R, other=0.0).to(ACC)[:, None]
        acc_C += tl.sum(g_RC, axis=0)
    tl.store(db_EC + expert * C + c_C, acc_C.to(db_EC.dtype.element_ty), mask=c_C < C)
