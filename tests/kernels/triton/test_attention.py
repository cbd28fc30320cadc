"""The backward of an attention over kept query rows against autograd, on sizes that no tile divides."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from sparse_compile.kernels.triton import reference
from sparse_compile.kernels.triton.attention import attention
from sparse_compile.kernels.triton.compaction import compact_samples

aten = torch.ops.aten
Gradients = tuple[Tensor, Tensor, Tensor]
B, H, T, U, D = 2, 2, 25, 19, 20
# Of the rows: none, few, some, all.
SHARES = (0.0, 0.05, 0.4, 1.0)


@dataclasses.dataclass
class Case:
    """An attention whose forward is done, in float64, and which of its query rows are kept: bool [B, T]."""

    do: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    live: Tensor
    causal: bool
    mask: Tensor | None
    dtype: torch.dtype

    def run(self, function: Any = attention, **options: Any) -> Gradients:
        """Of a kernel or its reference, in ``dtype``."""
        operands = (x.to(self.dtype) for x in (self.do, self.q, self.k, self.v, self.out))
        kept, count = compact_samples(self.live)
        return function(
            *(*operands, self.lse.float(), kept, count), causal=self.causal, mask=self.mask, **options
        )

    def truth(self, weight: Tensor | None = None) -> Gradients:
        """By autograd, of a dO that is zero where no row is kept."""
        factor = self.live.double() if weight is None else torch.where(self.live, weight.double(), 0.0)
        leaves = [x.clone().requires_grad_() for x in (self.q, self.k, self.v)]
        out, _ = forward(*leaves, causal=self.causal, mask=self.mask)
        return torch.autograd.grad(out, leaves, torch.where(self.do.isnan(), 0.0, self.do) * rows(factor))


def rows(factor: Tensor) -> Tensor:
    """[B, T] as [B, 1, T, 1]."""
    return factor[:, None, :, None]


def forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """O and log-sum-exp."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[3])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def case(
    device: torch.device,
    share: float = 0.4,
    *,
    size: tuple[int, int, int, int, int] = (B, H, T, U, D),
    groups: int | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Case:
    b, h, t, u, d = size
    shapes = [(b, heads, n, d) for heads, n in ((h, t), (h, t), (groups or h, u), (groups or h, u))]
    do, q, k, v = (torch.randn(shape, device=device).to(dtype).double() for shape in shapes)
    out, lse = forward(q, k, v, causal=causal, mask=mask)
    live = torch.rand(b, t, device=device) < share
    return Case(do, q, k, v, out, lse, live, causal, mask, dtype)


def assert_close(found: Gradients, wanted: Gradients) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("size", [(2, 2, 37, 29, 20), (1, 1, 1, 1, 1), (3, 1, 16, 32, 16), (1, 2, 5, 70, 33)])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("causal", [False, True])
def test_gradients(size: Any, share: float, causal: bool, device: torch.device) -> None:
    c = case(device, share, size=size, causal=causal)
    found = c.run()
    assert_close(found, c.truth())
    assert_close(found, c.run(reference.attention))
    assert not found[0].transpose(1, 2)[~c.live].any()


def masks(device: torch.device) -> dict[str, Tensor]:
    lengths = torch.tensor([U, U - 9], device=device).view(-1, 1, 1, 1)
    padding = torch.arange(U, device=device) < lengths
    return {
        "padding": padding,
        "padding, of every query": padding.expand(B, 1, T, U),
        "padding, written out": padding.expand(B, 1, T, U).contiguous(),
        "padding, added": torch.zeros(padding.shape, device=device).masked_fill(~padding, -torch.inf),
        "padding, the least number": torch.zeros(padding.shape, device=device).masked_fill(~padding, -3e38),
        "each query's": torch.randn(B, 1, T, U, device=device),
        "each head's": torch.randn(1, H, T, U, device=device),
        "two dimensions": torch.randn(T, U, device=device),
        "two dimensions, bool": torch.rand(T, U, device=device) < 0.5,
        "part of a wider one": torch.randn(B, 1, T, U + 3, device=device)[..., :U],
        "bfloat16": torch.randn(B, H, T, U, device=device).bfloat16(),
    }


@pytest.mark.parametrize("name", masks(torch.device("cpu")))
@pytest.mark.parametrize("causal", [False, True])
def test_masks(name: str, causal: bool, device: torch.device) -> None:
    c = case(device, mask=masks(device)[name], causal=causal)
    c.live &= (c.lse > -1e30).all(1)  # rows that may attend to nothing have a test of their own
    c.out = torch.where(c.lse.unsqueeze(-1) > -1e30, c.out, 0.0)
    found = c.run()
    assert_close(found, c.run(reference.attention))
    if "bool" not in name:  # (autograd has NaNs where a row may attend to nothing)
        assert_close(found, c.truth())


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy, of the keys beyond the last
@pytest.mark.filterwarnings("ignore:invalid value encountered in (multiply|matmul)")
def test_scores_far_below_zero(device: torch.device) -> None:
    """The keys that fill up a tile have scores of zero, and exp(0 − L) is then infinite."""
    c = case(device, mask=torch.full((T, U), -300.0, device=device))
    assert_close(c.run(), c.truth())


@pytest.mark.parametrize("sign", [-1, 1])
def test_rows_that_may_attend_to_nothing_give_zeros(sign: int, device: torch.device) -> None:
    """Whatever the forward's O is there, and whichever infinity its log-sum-exp."""
    allowed = torch.rand(T, U, device=device) < 0.8
    allowed[3:20] = False
    c = case(device, share=1.0, mask=allowed)
    assert c.lse[:, :, 3:20].isinf().all()
    assert c.out[:, :, 3:20].isnan().all()
    c.lse[:, :, 3:20] *= -sign
    found = c.run()
    assert not found[0][:, :, 3:20].any()
    c.live[:, 3:20] = False
    assert_close(found, c.run())
    assert all(x.isfinite().all() for x in found)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy, of the keys beyond the last
@pytest.mark.filterwarnings("ignore:invalid value encountered in (multiply|matmul)")
def test_rows_of_which_all_keys_have_the_least_number(device: torch.device) -> None:
    """As masks of Hugging Face's models have it for padding; times log₂ e it would be infinite."""
    mask = torch.zeros(T, U, device=device)
    mask[3:20] = torch.finfo(torch.float32).min
    c = case(device, share=1.0, mask=mask)
    found = c.run()
    assert all(x.isfinite().all() for x in found)
    assert_close(found, c.run(reference.attention))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_grouped_heads(groups: int, causal: bool, device: torch.device) -> None:
    c = case(device, size=(2, 4, 21, 21, 12), groups=groups, causal=causal)
    found = c.run()
    assert found[1].shape == (2, groups, 21, 12)
    assert_close(found, c.truth())


def test_grouped_heads_with_a_mask_of_each_query_head(device: torch.device) -> None:
    c = case(device, size=(B, 4, T, U, D), groups=2, mask=torch.randn(1, 4, T, U, device=device))
    assert_close(c.run(), c.truth())


@pytest.mark.parametrize("width", [8, 32, 48, 80, 96, 128])
def test_widths_of_heads(width: int, device: torch.device) -> None:
    c = case(device, size=(1, 2, 19, 23, width))
    assert_close(c.run(), c.truth())


@pytest.mark.filterwarnings("ignore:divide by zero encountered in log")  # numpy, which is right
def test_weights(device: torch.device) -> None:
    """A weight of zero is a row that is not kept."""
    c = case(device, 0.7)
    weight = torch.rand(B, T, device=device) * 5
    weight[:, ::4] = 0
    found = c.run(weight=weight)
    assert_close(found, c.truth(weight))
    assert_close(found, c.run(reference.attention, weight=weight))
    assert not found[0][:, :, ::4].any()


def test_scale(device: torch.device) -> None:
    c = case(device)
    c.q *= 0.7 * math.sqrt(D)  # so that the scores are those of a scale of 0.7
    c.out, c.lse = forward(c.q, c.k, c.v, causal=False, mask=None)
    wanted = c.truth()
    c.q /= 0.7 * math.sqrt(D)
    dq, dk, dv = c.run(scale=0.7)
    assert_close((dq / (0.7 * math.sqrt(D)), dk, dv), wanted)


@pytest.mark.parametrize("causal", [False, True])
def test_all_rows_is_the_dense_backward(causal: bool, device: torch.device) -> None:
    c = case(device, share=1.0, size=(2, 3, 33, 33, 16), causal=causal)
    operands = [x.float().cpu() for x in (c.q, c.k, c.v)]
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*operands, 0.0, causal)
    dense = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(c.do.float().cpu(), *operands, out, lse, 0.0, causal)
    )
    assert_close(tuple(x.cpu() for x in c.run()), dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [0.4, 1.0])
def test_low_precision_is_no_worse_than_the_dense_backward(
    dtype: torch.dtype, share: float, device: torch.device
) -> None:
    """Against PyTorch's own flash attention in the same dtype, of a dO that is zero in the other rows."""
    c = case(device, share, size=(2, 2, 70, 90, 32), dtype=dtype)
    operands = [x.to(dtype).cpu() for x in (c.q, c.k, c.v)]
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*operands)
    do = (c.do * rows(c.live.double())).to(dtype).cpu()
    dense = aten._scaled_dot_product_flash_attention_for_cpu_backward(do, *operands, out, lse, 0.0, False)
    for ours, theirs, truth in zip(c.run(), dense, c.truth(), strict=True):
        assert ours.dtype is dtype
        truth = truth.cpu()
        allowed = (theirs.double() - truth).norm() + torch.finfo(dtype).eps * truth.norm()
        assert (ours.cpu().double() - truth).norm() <= allowed


@pytest.mark.parametrize(
    "layout", ["heads side by side", "packed", "transposed", "every other row", "expanded"]
)
def test_strides_do_not_matter(layout: str, device: torch.device) -> None:
    c = case(device)

    def laid_out(x: Tensor) -> Tensor:
        match layout:
            case "heads side by side":
                return x.transpose(1, 2).contiguous().transpose(1, 2)
            case "packed":
                return torch.stack([x, x + 1], -1)[..., 0]
            case "transposed":
                return x.mT.contiguous().mT
            case "every other row":
                return torch.stack([x, x + 1], 3)[:, :, :, 0]
        return x[:1].expand_as(x)

    kept, count = compact_samples(c.live)
    operands = [laid_out(x.float()) for x in (c.do, c.q, c.k, c.v, c.out)]
    lse = c.lse.float().mT.contiguous().mT
    wanted = reference.attention(*operands, lse, kept, count)
    # Results may be of any strides, too.
    gradients = tuple(laid_out(torch.zeros_like(x)) for x in (c.q.float(), c.k.float(), c.v.float()))
    given = None if layout == "expanded" else gradients
    found = attention(*operands, lse, kept, count, gradients=given)
    assert_close(found, wanted)
    assert given is None or all(a is b for a, b in zip(found, given, strict=True))


def test_what_is_not_kept_is_not_read(device: torch.device) -> None:
    c = case(device)
    wanted = c.run()
    for x in (c.do, c.q, c.out):
        x.masked_fill_(rows(~c.live), torch.nan)
    c.lse.masked_fill_(~c.live[:, None], torch.nan)
    weight = torch.ones(B, T, device=device).masked_fill(~c.live, torch.nan)
    for ours, theirs in zip(c.run(weight=weight), wanted, strict=True):
        assert torch.equal(ours, theirs)


def test_the_rest_of_the_buffer_is_not_read(device: torch.device) -> None:
    c = case(device)
    kept, count = compact_samples(c.live)
    operands = [x.float() for x in (c.do, c.q, c.k, c.v, c.out, c.lse)]
    wanted = attention(*operands, kept, count)
    room = int(count.max())
    beyond = torch.arange(T, device=device) >= count.unsqueeze(1)
    for ours, theirs in zip(
        attention(*operands, kept.masked_fill(beyond, 10**9)[:, :room].contiguous(), count),
        wanted,
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_what_is_not_finite_reaches_the_gradients(device: torch.device) -> None:
    c = case(device, share=1.0)
    c.do[0, 1, 5, 2] = torch.nan
    dq, dk, dv = c.run()
    assert dq[0, 1, 5].isnan().all()
    assert dk[0, 1].isnan().all()
    assert dv[0, 1, :, 2].isnan().all()
    assert all(x[1].isfinite().all() and x[0, 0].isfinite().all() for x in (dq, dk, dv))


def test_a_weight_that_is_not_a_number_reaches_the_gradients(device: torch.device) -> None:
    weight = torch.full((B, T), torch.nan, device=device)
    c = case(device, share=1.0)
    assert all(x.isnan().all() for x in c.run(weight=weight))


def test_causal_walks_leave_out_what_nobody_attends_to(device: torch.device) -> None:
    """Whole tiles beyond the diagonal are not read, which a NaN in them shows."""
    if device.type == "cuda":
        pytest.skip("tiles are larger there than these sizes")
    c = case(device, share=1.0, size=(1, 1, 48, 48, 16), causal=True)
    c.live[:, 16:] = False
    wanted = c.run()
    c.k[:, :, 16:] = torch.nan
    dq, _, _ = c.run()
    assert torch.equal(dq, wanted[0])
    c = case(device, share=1.0, size=(1, 1, 48, 48, 16), causal=True)
    wanted = c.run()
    c.do[:, :, :16] = torch.nan
    _, dk, dv = c.run()
    assert torch.equal(dk[:, :, 16:], wanted[1][:, :, 16:])
    assert torch.equal(dv[:, :, 16:], wanted[2][:, :, 16:])
    assert dv[:, :, :16].isnan().all()


@pytest.mark.parametrize("row", [0, 15, 16, 17, 31, 32])
def test_a_causal_walk_goes_up_to_the_last_row(row: int, device: torch.device) -> None:
    """Where that is the first, or the last, of a tile of keys."""
    c = case(device, size=(1, 1, 33, 33, 16), causal=True)
    c.live[:] = torch.arange(33, device=device) == row
    assert_close(c.run(), c.truth())


def test_the_same_sum_in_every_run(device: torch.device) -> None:
    c = case(device, share=0.9, size=(1, 4, 100, 40, 16), groups=2)
    assert all(torch.equal(first, second) for first, second in zip(c.run(), c.run(), strict=True))


@pytest.mark.parametrize("size", [(0, 2, 3, 4, 5), (2, 2, 0, 4, 5), (2, 2, 3, 0, 5)])
def test_nothing_to_do(size: tuple[int, int, int, int, int], device: torch.device) -> None:
    b, h, t, u, d = size
    do, q, out = (torch.ones(b, h, t, d, device=device) for _ in range(3))
    k, v = (torch.ones(b, h, u, d, device=device) for _ in range(2))
    kept, count = compact_samples(torch.ones(b, t, dtype=torch.bool, device=device))
    found = attention(do, q, k, v, out, torch.zeros(b, h, t, device=device), kept, count)
    assert [x.shape for x in found] == [q.shape, k.shape, v.shape]
    assert not any(x.any() for x in found)


@pytest.mark.parametrize("share", SHARES)
def test_each_sample_has_a_buffer_of_its_own(share: float, device: torch.device) -> None:
    live = torch.rand(5, 37, device=device) < share
    kept, count = compact_samples(live)
    for sample in range(5):
        wanted_kept, wanted_count, _ = reference.compact(live[sample])
        assert torch.equal(kept[sample], wanted_kept)
        assert torch.equal(count[sample : sample + 1], wanted_count)
