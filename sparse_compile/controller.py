"""Decides, while a model trains, how much of its gradients is sampled: VCAS's controller at work.

Every ``cal_var_freq`` steps is a *measurement*: its backward is exact, and every site reports what it sees.

    BlockSite  ─► observe_samples(name, norms)          from the last block to the first
    LinearSite ─► observe_rows(name, dY, X, dW)         after the block that it is in
    Clock      ─► end_of_step()                         new shares, from all of that
    both       ─► saved(flops), dropped(count)          in the steps after it, whose shares are below 1

Where less is saved than a measurement costs, the next ones come ever more rarely.

What is measured and decided is said in ``methods/vcas.py``. There are no extra passes, and a weight's
variance is that of rows drawn after samples were dropped: one drop is drawn for it at each block. Shares that
are solved for rest on the upper bound of coin flips, which needs no products; nothing else is computed then.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_compile.changes import changed
from sparse_compile.methods import sample, vcas
from sparse_compile.methods.rows import number_kept, wide
from sparse_compile.schedule import Schedule
from sparse_compile.settings.adaptive import Adaptive

STATE = ("s", "history", "sample_shares", "row_shares")  # without which a state is none
# Measurements that save too little come after 2, 4 and at last 8 times `cal_var_freq` steps.
_MOST_DOUBLINGS = 3
# A block that drops fewer of its samples is not what a measurement was worth.
_FEWEST_DROPPED = 0.1


@dataclasses.dataclass(slots=True)
class Block:
    """What was seen behind one block, each [B]: the gradient norms of the samples, the probabilities with
    which they would be drawn, and the weights 1 / p or 0 of one such draw."""

    norms: Tensor
    p: Tensor
    weights: Tensor


@dataclasses.dataclass(slots=True)
class Weight:
    """What was seen of one weight gradient.

    Attributes:
        squares: ‖g_b‖² of each sample, [B].
        sgd: its SGD variance.
        act: the variance that dropping samples would add (where shares are solved for, at most).
        rows: the variance that drawing rows would add (as for `act`), and the squared bias of a cap.
        share: the smallest share of rows that would add little enough (only where shares are solved for).
        cap: on the weights of drawn rows.
        block: name of the block whose samples are dropped, or None.
    """

    squares: Tensor
    sgd: float
    act: float
    rows: float
    share: float
    cap: float
    block: str | None


class Controller:
    """Shares of samples and rows for all sites of one backend.

    Attributes:
        s: the share of the gradient norm that the kept samples carry.
        history: one entry for each measurement: step, s, the variances and the shares.
    """

    def __init__(self, schedule: Schedule) -> None:
        blocks, linear = schedule.blocks, schedule.linear
        self.blocks = blocks if isinstance(blocks, Adaptive) else None
        self.linear = linear if isinstance(linear, Adaptive) else None
        self.s = 1.0
        self.history: list[dict[str, Any]] = []
        self._sample_shares: dict[str, float] = {}
        self._row_shares: dict[str, float] = {}
        self._caps: dict[str, float] = {}
        self._seen_blocks: dict[str, Block] = {}
        self._seen_weights: dict[str, Weight] = {}
        self._overflowed = False  # after some of it was seen
        self._saved = 0.0  # FLOPs of linears since the last measurement
        self._dropped = False  # many samples, since then
        self._cost = 0.0  # FLOPs of what the present one computes beside the gradients
        self._doublings = 0

    @property
    def adaptive(self) -> bool:
        """Whether there is anything to control: it never measures otherwise."""
        return (self.blocks or self.linear) is not None

    def measures(self, step: int) -> bool:
        """Whether the backward of this step is a measurement."""
        setting = self.blocks or self.linear
        return setting is not None and step % (setting.cal_var_freq << self._doublings) == 0

    def saw_nothing(self, step: int) -> bool:
        """Whether measurements were due before this step, and none saw a gradient that it could use."""
        setting = self.blocks or self.linear
        return setting is not None and step > setting.cal_var_freq and not self.history

    def saved(self, flops: float) -> None:
        """A linear computes so much less in this step because of its share."""
        self._saved += flops

    def dropped(self, count: int, samples: int) -> None:
        """A block drops so many of its samples in this step. What that saves further down is not counted, but
        it is no little. (A share that the user has fixed owes nothing to a measurement.)"""
        self._dropped |= self.blocks is not None and count >= _FEWEST_DROPPED * samples

    def sample_share(self, name: str) -> float:
        """The share of the samples that goes on behind a block."""
        return self._sample_shares.get(name, 1.0)

    def row_share(self, name: str) -> float:
        """The share of the rows that are not zero from which a weight gradient is computed."""
        return self._row_shares.get(name, 1.0)

    def cap(self, name: str) -> float | None:
        """The cap on the weights of the rows from which a weight gradient is computed; None: no cap."""
        return self._caps.get(name)

    def observe_samples(self, name: str, norms: Tensor, draw: sample.Draw) -> None:
        """The gradient norms behind a block, [B]. Only the first batch of a step is looked at."""
        if self.blocks is None or self._seen(name, self._seen_blocks) or not bool(norms.any()):
            return
        k = number_kept(self.sample_share(name), len(norms))
        p = sample.probabilities(norms, k)
        weights = torch.zeros_like(p)
        kept = sample.systematic(p, min(k, int((p > 0).sum())), draw)
        weights[kept] = 1 / p[kept]
        self._seen_blocks[name] = Block(norms, p, weights)

    def observe_rows(self, name: str, dy: Tensor, x: Tensor, dw: Tensor, tokens: int) -> float:
        """The backward of a weight: dY [N, O], X [N, I] and its exact gradient, of any shape. Returns what
        measuring it took, in FLOPs."""
        samples = len(dy) // tokens
        if self._seen(name, self._seen_weights) or samples < 2 or len(dy) % tokens:
            return 0.0
        dtype = wide(dy.dtype)
        dy, x, dw = dy.to(dtype), x.to(dtype), dw.to(dtype)
        squares = vcas.sample_squares(dy.view(samples, tokens, -1), x.view(samples, tokens, -1)).cpu()
        total = float(dw.square().sum())
        if not math.isfinite(total) or not bool(squares.isfinite().all()):
            # An overflow under mixed precision, whose step will be skipped.
            self._overflowed = bool(self._seen_blocks or self._seen_weights)
            return 0.0
        # Gram matrices of tokens, and the products of what is not drawn, for samples and for rows.
        cost = 2.0 * len(dy) * tokens * (dy.shape[1] + x.shape[1])
        if not self._solves:
            cost += 4.0 * len(dy) * dy.shape[1] * x.shape[1]
        self._cost += cost
        sgd = vcas.sgd_variance(squares, total)
        block = next(reversed(self._seen_blocks), None)
        act = 0.0
        if block is not None and len(self._seen_blocks[block].p) == samples:
            seen = self._seen_blocks[block]
            act = self._variance(squares, seen.p, dy, x)
            dy = dy * seen.weights.repeat_interleave(tokens).to(dy).unsqueeze(1)
        self._seen_weights[name] = Weight(squares, sgd, act, *self._measure_rows(name, dy, x, sgd), block)
        return cost

    @property
    def _solves(self) -> bool:
        setting = self.blocks or self.linear
        return setting is not None and setting.update == "solve"

    def _variance(self, squares: Tensor, p: Tensor, dy: Tensor, x: Tensor) -> float:
        """What drawing with probabilities p adds: as it is, or at most. By the latter shares are solved."""
        if self._solves:
            return vcas.flips_variance(squares, p)
        return vcas.sampling_variance(squares, p, dy, x)

    def _seen(self, name: str, seen: dict[str, Any]) -> bool:
        """Whether the step has shown it already. What a backward that overflowed has shown is forgotten as
        soon as the next one begins: that is another batch, at another scale of the loss."""
        if name in seen and self._overflowed:
            self._forget()
        return name in seen

    def _forget(self) -> None:
        self._seen_blocks.clear()
        self._seen_weights.clear()
        self._overflowed = False
        self._cost = 0.0

    def _measure_rows(self, name: str, dy: Tensor, x: Tensor, sgd: float) -> tuple[float, float, float]:
        """The error that drawing rows adds at the present share, the smallest share that may be, and the cap
        on weights with which either holds."""
        if self.linear is None:
            return 0.0, 1.0, math.inf
        squares = vcas.row_squares(dy, x)
        live = int(squares.count_nonzero())
        if live == 0:
            return 0.0, 1.0, math.inf
        clip = self.linear.clip
        caps = vcas.CAPS if clip == "auto" else (math.inf if clip is None else float(clip),)
        sketch = None if clip is None else vcas.Sketch.of(dy, x)

        def p(share: float) -> Tensor:
            return sample.probabilities(squares.sqrt(), number_kept(share, live))

        def error(share: float, cap: float) -> float:
            if sketch is None or cap == math.inf:
                return vcas.flips_variance(squares, p(share))
            return vcas.capped_error(squares, p(share), cap, sketch)

        if clip is None:
            rows, cap = self._variance(squares, p(self.row_share(name)), dy, x), math.inf
        else:
            errors = {cap: error(self.row_share(name), cap) for cap in caps}
            # Of those that are equal up to rounding, the first, which is the least biased.
            cap = next(c for c in caps if errors[c] <= min(errors.values()) + 1e-9 * sgd)
            rows = errors[cap]
        share = 1.0
        if self.linear.update == "solve":
            allowed, step = self.linear.weight_tau * sgd, self.linear.ratio_step

            def within(count: int) -> float | None:
                return next((c for c in caps if error(step**count, c) <= allowed), None)

            # After so many steps one row is left.
            most = math.ceil(math.log(live) / -math.log(step))
            count = _steps(most, lambda count: within(count) is not None)
            share, cap = step**count, (within(count) if count else None) or caps[0]
        return rows, share, cap

    def end_of_step(self, step: int) -> None:
        """New shares, if the step that ends was a measurement."""
        if self._overflowed:
            self._forget()
        blocks, weights = self._seen_blocks, self._seen_weights
        self._seen_blocks, self._seen_weights = {}, {}
        if not weights:
            return
        sgd = sum(weight.sgd for weight in weights.values())
        act = sum(weight.act for weight in weights.values())
        # After the first one nothing can have been saved.
        enough = self._saved >= self._cost * (1 << self._doublings)
        pays = enough or self._dropped or not self.history
        if self.blocks is not None and blocks:
            pays |= self._renew_samples(self.blocks, blocks, list(weights.values()), act, sgd)
        # The paper's update has to measure on: a step of s at a time leads to where something pays.
        by_steps = (self.blocks or self.linear).update == "step"  # type: ignore[union-attr]
        self._doublings = 0 if pays or by_steps else min(self._doublings + 1, _MOST_DOUBLINGS)
        self._saved, self._dropped, self._cost = 0.0, False, 0.0
        changed()
        if self.linear is not None:
            for name, weight in weights.items():
                self._row_shares[name] = self._next_row_share(self.linear, name, weight)
            self._caps |= {name: weight.cap for name, weight in weights.items()}
            self._caps = {name: cap for name, cap in self._caps.items() if cap < math.inf}
        self.history.append(
            {
                "step": step,
                "s": self.s,
                "sgd_variance": sgd,
                "act_variance": act,
                "weight_variance": sum(weight.rows for weight in weights.values()),
                "sample_shares": dict(self._sample_shares),
                "row_shares": dict(self._row_shares),
                "caps": dict(self._caps),
            }
        )

    def _renew_samples(
        self, setting: Adaptive, blocks: dict[str, Block], weights: list[Weight], act: float, sgd: float
    ) -> bool:
        """Whether many samples will be dropped, once the shares are as measured."""
        names = list(reversed(blocks))  # from the first block to the last
        norms = [blocks[name].norms for name in names]
        if not any(weight.block == names[0] and _same_samples(weight, blocks) for weight in weights):
            # What dropping would do to the first block is not known, and so, the shares rising from there, to
            # any: its weights are frozen, or no linears', or have other samples.
            self._sample_shares = dict.fromkeys(names, 1.0)
            return False

        def shares(s: float) -> dict[str, float]:
            return dict(zip(names, vcas.monotone([vcas.share_of_norm(n, s) for n in norms]), strict=True))

        if setting.update == "solve":
            step, allowed = setting.s_step, setting.act_tau * sgd
            most = math.ceil(1 / step - 1e-9) - 1  # s stays above 0
            count = _steps(
                most, lambda count: _dropping(blocks, weights, shares(1 - count * step)) <= allowed
            )
            self.s = 1 - count * step
        else:
            self.s = vcas.next_s(self.s, act, sgd, tau=setting.act_tau, step=setting.s_step)
        found = shares(self.s)
        for name, share in found.items():
            old = self._sample_shares.get(name, 1.0)
            self._sample_shares[name] = setting.smoothing * old + (1 - setting.smoothing) * share
        kept = {name: number_kept(found[name], len(blocks[name].p)) / len(blocks[name].p) for name in names}
        return min(kept.values()) <= 1 - _FEWEST_DROPPED

    def _next_row_share(self, setting: Adaptive, name: str, weight: Weight) -> float:
        if setting.update == "solve":
            return weight.share
        return vcas.next_weight_share(
            self.row_share(name), weight.rows, weight.sgd, tau=setting.weight_tau, step=setting.ratio_step
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "s": self.s,
            "history": list(self.history),
            "sample_shares": dict(self._sample_shares),
            "row_shares": dict(self._row_shares),
            "caps": dict(self._caps),
            "saved": self._saved,
            "dropped": self._dropped,
            "doublings": self._doublings,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        changed()
        self._forget()
        self.s = state["s"]
        self.history = list(state["history"])
        self._sample_shares = dict(state["sample_shares"])
        self._row_shares = dict(state["row_shares"])
        self._caps = dict(state.get("caps", {}))
        self._saved, self._dropped = state.get("saved", 0.0), state.get("dropped", False)
        self._doublings = state.get("doublings", 0)


def _dropping(blocks: dict[str, Block], weights: list[Weight], shares: dict[str, float]) -> float:
    """The variance that dropping samples down to ``shares`` would add to all weights, at most."""
    p = {
        name: sample.probabilities(block.norms, number_kept(shares[name], len(block.norms)))
        for name, block in blocks.items()
    }
    return sum(
        vcas.flips_variance(weight.squares, p[weight.block])
        for weight in weights
        if weight.block is not None and _same_samples(weight, blocks)
    )


def _same_samples(weight: Weight, blocks: dict[str, Block]) -> bool:
    """Whether the rows of a weight are of the samples that are dropped at its block."""
    return weight.block is not None and len(blocks[weight.block].p) == len(weight.squares)


def _steps(most: int, allowed: Callable[[int], bool]) -> int:
    """The largest count of 0 … most that is ``allowed``; what is allowed of one is of every smaller."""
    return bisect.bisect_left(range(1, most + 1), True, key=lambda count: not allowed(count))
