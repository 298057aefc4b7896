"""Triton kernels of the LM head: exponentials of logits relative to the target's, and the passes around the products.

A row's exponentials are 2^((z - z_target) * scale - MARGIN) with scale = log2(e) / temperature: the target's own logit
takes the place of the row maximum, so no maximum has to be reduced, within a row or between ranks. Logits are
subtracted before anything is scaled, so that two large ones lose no digits. README.md has the derivation.

Only `triton_path` launches these. Every [T, *] buffer is addressed with int64 offsets.
"""

import triton
import triton.language as tl

MARGIN = tl.constexpr(60.0)
"""Powers of two by which exponentials are shifted down, so that logits from 111 nats above the target's to 46 below fit
the exponents of bfloat16 and the sums those of float32; higher ones saturate, lower ones count as 0."""
_LARGEST_EXPONENT = tl.constexpr(100.0)
"""Exponentials saturate here, so that sums over the vocabulary stay finite in float32. Not so nan: it stays nan."""
_LOG_2 = tl.constexpr(0.6931471805599453)
_SERIES_LIMIT = tl.constexpr(2.0**-5)
"""Below it four terms of log(1 + x) are exact to float32."""


@triton.jit
def target_logits_kernel(
    hidden_ptr, weight_ptr, targets_ptr, logits_ptr, num_rows, num_columns, hidden_size, vocab_start,
    hidden_stride, weight_stride, BLOCK_ROWS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks,). logits[t] = hidden[t] . weight[target[t]], 0 when another rank holds the target.

    The diagonal of a product of the block's hidden states and its targets' weights, so that tensor cores sum it as they
    sum the other logits: they truncate, and an exact logit would be off against all others.
    """
    index = tl.arange(0, BLOCK_ROWS)
    rows = tl.program_id(0) * BLOCK_ROWS + index
    is_row = rows < num_rows
    columns = tl.load(targets_ptr + rows, mask=is_row, other=-1).to(tl.int64) - vocab_start
    is_held = (columns >= 0) & (columns < num_columns)
    hidden_rows = hidden_ptr + rows.to(tl.int64)[:, None] * hidden_stride
    weight_rows = weight_ptr + columns[:, None] * weight_stride
    product = tl.zeros((BLOCK_ROWS, BLOCK_ROWS), tl.float32)
    for start in range(0, hidden_size, BLOCK_DEPTH):
        depths = (start + tl.arange(0, BLOCK_DEPTH))[None, :]
        inside = depths < hidden_size
        hidden = tl.load(hidden_rows + depths, mask=inside & is_row[:, None], other=0.0)
        weight = tl.load(weight_rows + depths, mask=inside & is_held[:, None], other=0.0)
        product = tl.dot(hidden, weight.T, product)
    # Selected, not multiplied: a nan of one row must not reach another.
    logits = tl.sum(tl.where(index[:, None] == index[None, :], product, 0.0), 1)
    tl.store(logits_ptr + rows, tl.where(is_held, logits, 0.0), mask=is_row)


# One form whatever the sizes of a batch are: the one that compile_sm90.py looks at, compiled once.
@triton.jit(do_not_specialize=["num_rows", "num_columns", "vocab_start", "tiles_per_split"])
def exponentials_kernel(
    hidden_ptr, weight_ptr, exponentials_ptr, targets_ptr, target_logits_ptr, sums_ptr, weighted_ptr, rounded_ptr,
    num_rows, num_columns, hidden_size, vocab_start, scale, tiles_per_split,
    hidden_stride, weight_stride, exponentials_stride,
    STORE: tl.constexpr, ENTROPY: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks * splits,): one block of rows against one contiguous range of vocabulary tiles.

    Writes per split [splits, C] the sums of the exponentials, when ENTROPY those of exponential * (logit - target's
    logit), and when STORE the exponentials (bfloat16, [C, V], 0 at the target) and the sums of these rounded ones.
    """
    num_row_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    row_start = tl.program_id(0) % num_row_blocks * BLOCK_ROWS
    split = tl.program_id(0) // num_row_blocks
    # The row block's start is added to pointers, never to `rows`: warp specialization halves the row block, moves the
    # second half's range and, in every use, the row coordinate of the descriptors. Their sum would move twice.
    rows = tl.arange(0, BLOCK_ROWS)
    is_row = rows < num_rows - row_start
    target = tl.load(targets_ptr + row_start + rows, mask=is_row, other=-1)
    target = (target.to(tl.int64) - vocab_start).to(tl.int32)
    target_logit = tl.load(target_logits_ptr + row_start + rows, mask=is_row, other=0.0)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    weighted = tl.zeros((BLOCK_ROWS,), tl.float32)
    rounded = tl.zeros((BLOCK_ROWS,), tl.float32)
    largest_difference = (_LARGEST_EXPONENT + MARGIN) / scale
    first_tile = split * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(num_columns, BLOCK_COLUMNS))
    # Descriptors are made here and not by the host: warp specialization splits the row block between two warpgroups and
    # can only retype descriptors that it sees being made.
    hidden_desc = tl.make_tensor_descriptor(
        hidden_ptr, [num_rows, hidden_size], [hidden_stride, 1], [BLOCK_ROWS, BLOCK_DEPTH]
    )
    weight_desc = tl.make_tensor_descriptor(
        weight_ptr, [num_columns, hidden_size], [weight_stride, 1], [BLOCK_COLUMNS, BLOCK_DEPTH]
    )
    if STORE:
        exponentials_desc = tl.make_tensor_descriptor(
            exponentials_ptr, [num_rows, num_columns], [exponentials_stride, 1], [BLOCK_ROWS, BLOCK_COLUMNS]
        )
    for tile in tl.range(first_tile, last_tile, warp_specialize=WARP_SPECIALIZE):
        column_start = tile * BLOCK_COLUMNS
        logits = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        for depth in range(0, hidden_size, BLOCK_DEPTH):
            hidden = hidden_desc.load([row_start, depth])
            weight = weight_desc.load([column_start, depth])
            logits = tl.dot(hidden, weight.T, logits)
        columns = column_start + tl.arange(0, BLOCK_COLUMNS)
        counts = (columns[None, :] < num_columns) & (columns[None, :] != target[:, None])
        difference = logits - target_logit[:, None]
        difference = tl.minimum(difference, largest_difference, propagate_nan=tl.PropagateNan.ALL)
        exponential = tl.exp2(difference * scale - MARGIN)
        exponential = tl.where(counts, exponential, 0.0)
        total += tl.sum(exponential, 1)
        if ENTROPY:
            weighted += tl.sum(exponential * difference, 1)
        if STORE:
            stored = exponential.to(tl.bfloat16)
            rounded += tl.sum(stored.to(tl.float32), 1)
            exponentials_desc.store([row_start, column_start], stored)
    first_sum = split.to(tl.int64) * num_rows + row_start
    tl.store(sums_ptr + first_sum + rows, total, mask=is_row)
    if ENTROPY:
        tl.store(weighted_ptr + first_sum + rows, weighted, mask=is_row)
    if STORE:
        tl.store(rounded_ptr + first_sum + rows, rounded, mask=is_row)


@triton.jit
def softmax_rows_kernel(
    sums_ptr, weighted_ptr, rounded_ptr, logprobs_ptr, entropy_ptr, scale_ptr, complement_ptr, num_rows, num_splits,
    inverse_temperature, STORED: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks,). Log-prob, entropy, 1 - probability and, when STORED, probability scale from the sums.

    With s the sum over the other columns and e = 2^-MARGIN the target's exponential: p = e / (s + e),
    1 - p = s / (s + e), log p = -log(1 + s / e), each without cancellation. The scale makes the stored exponentials,
    rounded as they are, sum to 1 - p.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_row = rows < num_rows
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    rounded = tl.zeros((BLOCK,), tl.float32)
    for split in range(0, num_splits):
        total += tl.load(sums_ptr + split * num_rows + rows, mask=is_row, other=0.0)
        if ENTROPY:
            weighted += tl.load(weighted_ptr + split * num_rows + rows, mask=is_row, other=0.0)
        if STORED:
            rounded += tl.load(rounded_ptr + split * num_rows + rows, mask=is_row, other=0.0)
    target = tl.exp2(-MARGIN)
    inverse = 1.0 / (total + target)
    odds = tl.minimum(total, 1.0) * tl.exp2(MARGIN)
    # log(1 + odds): by its series while 1 + odds would round away digits of odds, by the sum itself where it overflows.
    small = tl.minimum(odds, _SERIES_LIMIT)
    series = small * (1.0 - small * (0.5 - small * (0.33333333 - 0.25 * small)))
    large = (tl.log2(total + target) + MARGIN) * _LOG_2
    negative_logprob = tl.where(odds < _SERIES_LIMIT, series, tl.where(total < 1.0, tl.log(1.0 + odds), large))
    tl.store(logprobs_ptr + rows, -negative_logprob, mask=is_row)
    tl.store(complement_ptr + rows, total * inverse, mask=is_row)
    if STORED:
        tl.store(scale_ptr + rows, total * inverse / tl.where(rounded == 0.0, 1.0, rounded), mask=is_row)
    if ENTROPY:
        # The mean logit of the distribution, from the target's, whose own share is 0.
        mean_difference = weighted * inverse * inverse_temperature
        tl.store(entropy_ptr + rows, negative_logprob - mean_difference, mask=is_row)


@triton.jit
def hidden_grad_kernel(
    product_ptr, weight_ptr, targets_ptr, logprob_grad_ptr, probability_scale_ptr, complement_ptr, result_ptr,
    num_columns, hidden_size, vocab_start, inverse_temperature, weight_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (C,). result = grad / temperature * (complement * weight[target] - probability_scale * product).

    `product` is exponentials @ weight in float32; `result` is rounded once, here.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.load(targets_ptr + row).to(tl.int64) - vocab_start
    is_held = (column >= 0) & (column < num_columns)
    grad = tl.load(logprob_grad_ptr + row) * inverse_temperature
    others = grad * tl.load(probability_scale_ptr + row)
    own = grad * tl.load(complement_ptr + row)
    for start in range(0, hidden_size, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < hidden_size
        product = tl.load(product_ptr + row * hidden_size + offsets, mask=inside, other=0.0)
        weight = tl.load(weight_ptr + column * weight_stride + offsets, mask=inside & is_held, other=0.0)
        result = own * weight.to(tl.float32) - others * product
        tl.store(result_ptr + row * hidden_size + offsets, result.to(result_ptr.dtype.element_ty), mask=inside)


@triton.jit
def scale_rows_kernel(
    hidden_ptr, logprob_grad_ptr, probability_scale_ptr, result_ptr, rest_ptr, hidden_size, inverse_temperature,
    hidden_stride, REST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (C,). result = grad / temperature * probability_scale * hidden; when REST, rest is what rounding took."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(logprob_grad_ptr + row) * inverse_temperature * tl.load(probability_scale_ptr + row)
    for start in range(0, hidden_size, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < hidden_size
        hidden = tl.load(hidden_ptr + row * hidden_stride + offsets, mask=inside, other=0.0).to(tl.float32)
        scaled = hidden * factor
        result = scaled.to(result_ptr.dtype.element_ty)
        tl.store(result_ptr + row * hidden_size + offsets, result, mask=inside)
        if REST:
            rest = (scaled - result.to(tl.float32)).to(rest_ptr.dtype.element_ty)
            tl.store(rest_ptr + row * hidden_size + offsets, rest, mask=inside)


@triton.jit
def add_target_rows_kernel(
    weight_grad_ptr, hidden_ptr, targets_ptr, order_ptr, logprob_grad_ptr, complement_ptr,
    num_rows, num_columns, hidden_size, vocab_start, inverse_temperature, hidden_stride, weight_grad_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (C, depth blocks). weight_grad[target] += grad / temperature * complement * hidden.

    `order` sorts the rows by target, stably. The program at the first row of a run of equal targets adds the whole run
    in that order, the others end at once: deterministic without atomics and without counting targets on the host.
    """
    first = tl.program_id(0)
    target = tl.load(targets_ptr + tl.load(order_ptr + first))
    before = tl.load(targets_ptr + tl.load(order_ptr + tl.maximum(first - 1, 0)))
    column = target.to(tl.int64) - vocab_start
    if ((first == 0) | (before != target)) & (column >= 0) & (column < num_columns):
        offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = offsets < hidden_size
        total = tl.zeros((BLOCK,), tl.float32)
        position = first
        current = target
        while current == target:
            row = tl.load(order_ptr + position).to(tl.int64)
            factor = tl.load(logprob_grad_ptr + row) * inverse_temperature * tl.load(complement_ptr + row)
            hidden = tl.load(hidden_ptr + row * hidden_stride + offsets, mask=inside, other=0.0).to(tl.float32)
            total += factor * hidden
            position += 1
            after = tl.load(targets_ptr + tl.load(order_ptr + tl.minimum(position, num_rows - 1)))
            current = tl.where(position < num_rows, after, target - 1)
        address = weight_grad_ptr + column * weight_grad_stride + offsets
        tl.store(address, tl.load(address, mask=inside, other=0.0) + total, mask=inside)
