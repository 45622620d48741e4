"""Checks of the model: answers that repeat, and logits that an attack can work on."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustclip.evaluation.audit import AuditCheck, Check, ProbedCheck, Status
from robustclip.evaluation.evidence import Evidence
from robustclip.intervals import wilson

NOT_IN_FP32 = (0.001, 0.01)  # every sample is either attacked in fp32 or misclassified in fp32
OUTSIDE = 0.5  # share of the pixel range; bicubic resizing overshoots by 0.1, a second normalisation by more than 1
ONE_CLASS = 0.95  # share of all predictions; tasks with equally uneven labels are not graded
REPEAT_TOLERANCE = 1e-3  # share of the largest logit; kernels differ with the batch size
AMPLIFIED = 0.01  # share of samples whose answer a search with gradients may change by amplified rounding
SAME_SUM = 1e-3  # relative range of the sums of non-negative logits; only probabilities have one sum
REPEATED = 5e-2  # relative difference of two gradients at one point; 2e-3 to 1e-2 with noise of 1e-6 on the image
CUT = 0.05  # share of samples whose gradient may mislead, without backward: none
SEEN = 0.01  # share of a task's test images
EQUAL = 2  # number of equal images; a single one may be in two data sets
SMALLEST_TASK = 20  # number of samples from which on a single task is graded


class _Fp32Verdict(AuditCheck):
    name = "fp32_verdict"
    why = "an attack or a prediction in lower precision decides other samples than the model in fp32 would"

    def grade(self, evidence: Evidence) -> Check:
        exact, change, loss = (evidence.total(column) for column in ("exact", "again", "loss"))
        probed = np.isfinite(change) & np.isfinite(loss)
        if (change[probed] > REPEAT_TOLERANCE * np.maximum(1, loss[probed])).any():
            return self.answer("fail", f"in fp32, an attacked image's loss differs by {change[probed].max():.2g}")
        return self.of_count(int((exact == 0).sum()), exact.size, NOT_IN_FP32, "attacked samples decided without fp32")


class _RandomState(AuditCheck):
    name = "random_state"
    why = "a pass that draws random numbers misleads the attack; average over draws, and judge on others"

    def grade(self, evidence: Evidence) -> Check:
        drawn, largest = evidence.clean("random"), np.maximum(1, evidence.clean("largest_logit"))
        # Noise without effect is harmless: the answers and the gradients repeat all the same.
        differs = evidence.clean("repeat") > REPEAT_TOLERANCE * largest
        is_felt = bool(differs.any() or (evidence.clean("regrad") > REPEATED).any())
        status: Status = "fail" if is_felt else "pass"
        return self._of_flags(drawn, "samples' passes draw from a global random generator", status)

    def _of_flags(self, values: NDArray[Any], fault: str, status: Status) -> Check:
        """Grades a column that must be 0 wherever it was measured.

        Args:
            values: column of the ledger; nan where it was not measured.
            fault: description of the fault, which follows the two numbers.
            status: answer if any value is not 0.
        """
        probed = values[~np.isnan(values)]
        if not probed.size:
            return self.answer("not_measured", "no sample was probed")
        count = int((probed != 0).sum())
        return self.answer(status if count else "pass", f"{count:,} of {probed.size:,} {fault}")


class _AutogradInside(_RandomState):
    name = "autograd_inside"
    why = "a model that computes gradients to answer must be attacked through that search; declare it as a defence"

    def grade(self, evidence: Evidence) -> Check:
        is_declared = evidence.defence is not None and evidence.defence["needs_gradients"]
        status: Status = "pass" if is_declared else "warn"
        return self._of_flags(evidence.clean("autograd"), "samples' answers compute gradients", status)


class _Changed(ProbedCheck):
    """Grades the change of logits that should stay as they are.

    Args:
        name: of the check.
        column: column of the ledger, with the change.
        measurement: description of the change.
        why: see `AuditCheck`.
    """

    def __init__(self, name: str, column: str, measurement: str, why: str) -> None:
        self.name, self.measurement, self.why = name, measurement, why
        self.columns = (column, "largest_logit")

    def of_values(self, *values: NDArray[Any]) -> Check:
        change, largest = values
        is_same = bool((change <= _tolerance(largest)).all())
        measurement = f"{self.measurement} by up to {change.max():.2g}, {change.size} samples"
        return self.answer("pass" if is_same else "fail", measurement)


class _Repeatable(_Changed):
    """Grades the change of a repeated answer, which a search with gradients may amplify from rounding.

    A pixel whose gradient is 0 but for rounding moves by a whole step in the sign's direction, so that few samples of
    an honest defence answer differently in another batch.
    """

    def __init__(self) -> None:
        super().__init__(
            "repeatable",
            "repeat",
            "a repeated answer changes a logit",
            "a model whose answer depends on chance or on the rest of the batch (dropout, BatchNorm) blinds the attack",
        )

    def grade(self, evidence: Evidence) -> Check:
        check = super().grade(evidence)
        if check.status != "fail" or evidence.defence is None or not evidence.defence["needs_gradients"]:
            return check
        change, largest = (evidence.clean(column) for column in self.columns)
        count, size = int((change > _tolerance(largest)).sum()), int((~np.isnan(change)).sum())
        if wilson(count, size)[0] > AMPLIFIED:
            return check
        return self.answer(
            "pass", f"{check.measurement}; {count} of them by more than rounding, which its search amplifies"
        )


def _tolerance(largest: NDArray[Any]) -> NDArray[Any]:
    """Returns the change of a logit that rounding explains, from the largest logits."""
    limits: NDArray[Any] = REPEAT_TOLERANCE * np.maximum(1, largest)
    return limits


class _Declared(AuditCheck):
    name = "declared"
    why = "a defence is attacked by what it declares; what it has not declared hides it from the attack"

    def grade(self, evidence: Evidence) -> Check:
        if evidence.defence is None:
            return self.answer("pass", "no test-time defence")
        draws, largest = evidence.clean("draws"), np.maximum(1, evidence.clean("largest_logit"))
        if np.isnan(draws).all():
            return self.answer("not_measured", "no sample was probed")
        faithful, gradients = evidence.clean("faithful"), evidence.clean("regrad")
        examined = ~np.isnan(gradients)
        misleads = wilson(int((faithful[examined] != 1).sum()), int(examined.sum()))[0] if examined.any() else 0.0
        depends = bool((draws > REPEAT_TOLERANCE * largest).any())
        is_random, needs_gradients = evidence.defence["is_random"], evidence.defence["needs_gradients"]
        faults = {
            "is_random is false, but the answer depends on the draw": depends and not is_random,
            "is_random is true, but the answer does not depend on the draw": is_random and not draws.any(),
            "needs_gradients is false, but it computes gradients": bool((evidence.clean("autograd") > 0).any())
            and not needs_gradients,
            "backward is own, but its gradient is zero or does not predict the loss": misleads > CUT
            and not evidence.is_declared_cut,
        }
        lines = [fault for fault, holds in faults.items() if holds]
        return self.answer("warn" if lines else "pass", "; ".join(lines) or "as measured")


class _NormalisedOnce(ProbedCheck):
    name = "normalised_once"
    why = "pixels far outside a normalised image's range were normalised twice, or are grey levels"
    columns = ("outside",)

    def of_values(self, *values: NDArray[Any]) -> Check:
        outside = values[0].max()
        measurement = f"the tower receives pixels {outside:.0%} of the range outside of it"
        return self.answer("warn" if outside > OUTSIDE else "pass", measurement)


class _LogitScale(AuditCheck):
    name = "logit_scale"
    why = "logits without the temperature are mere cosines, on which attacks are weak"

    def grade(self, evidence: Evidence) -> Check:
        logits = evidence.clean("largest_logit")
        largest = logits[np.isfinite(logits)].max(initial=0)
        status: Status = "pass" if largest > 1.01 else "warn" if logits.size else "not_measured"
        return self.answer(status, f"largest logit {largest:.3g}")


class _SoftmaxHead(AuditCheck):
    name = "softmax_head"
    why = "losses of probabilities vanish where the model is sure; let the model return logits"

    def grade(self, evidence: Evidence) -> Check:
        heads = []
        for task, columns in evidence.samples.items():
            total, least = columns["logit_sum"], columns["least_logit"]
            is_known = np.isfinite(total) & np.isfinite(least)
            total, least = total[is_known], least[is_known]
            if total.size >= SMALLEST_TASK and least.min() >= 0 and np.ptp(total) <= SAME_SUM * total.max() > 0:
                heads.append(f"{task} (their sum is {total.mean():.3g})")
        if not evidence.clean("logit_sum").size:
            return self.answer("not_measured", "no sample")
        return self.answer(
            "warn" if heads else "pass", f"probabilities instead of logits: {', '.join(heads) or 'no task'}"
        )


def _uncorrupted(evidence: Evidence) -> dict[str, Any]:
    """Returns the columns of the tasks that are no corrupted copies, on which any model may be at chance."""
    axes = {task: evidence.protocols.get(task, {}).get("clean", {}).get("axes", {}) for task in evidence.samples}
    return {task: columns for task, columns in evidence.samples.items() if "corruption" not in axes[task]}


class _BetterThanChance(AuditCheck):
    name = "better_than_chance"
    why = "a model at chance has nothing to lose; look for a second normalisation, or class names in another order"

    def grade(self, evidence: Evidence) -> Check:
        guessing = []
        for task, columns in _uncorrupted(evidence).items():
            n, correct = len(columns["id"]), int((columns["clean"] == columns["label"]).sum())
            if n >= SMALLEST_TASK and wilson(correct, n)[0] <= 1 / evidence.class_counts[task]:
                guessing.append(task)
        measurement = f"clean accuracy at chance: {', '.join(guessing) or 'no task'}"
        return self.answer("warn" if guessing else "pass", measurement)


class _PredictionsVary(AuditCheck):
    name = "predictions_vary"
    why = "a model that always predicts one class cannot be attacked; its accuracy is no robustness"

    def grade(self, evidence: Evidence) -> Check:
        stuck = [
            task
            for task, columns in _uncorrupted(evidence).items()
            if len(columns["id"]) >= SMALLEST_TASK
            and _commonest(columns["clean"]) >= ONE_CLASS > _commonest(columns["label"])
        ]
        measurement = f"one class for nearly all: {', '.join(stuck) or 'no task'}"
        return self.answer("warn" if stuck else "pass", measurement)


class _UnseenImages(AuditCheck):
    name = "unseen_images"
    why = "accuracy on training images says little about new ones; test on images that were held out"

    def grade(self, evidence: Evidence) -> Check:
        total, digests = evidence.trained_on
        if not digests:
            return self.answer("pass", "no training images on record")
        seen = [f"{len(digests):,} probed training images, of which no two are among the test images"]
        for task, columns in evidence.samples.items():
            matches, n = len(set(digests) & set(columns["pixels"])), len(columns["id"])
            share = wilson(matches, len(digests))[0] * total / max(1, n)
            if matches >= EQUAL and share > SEEN:
                text = f"{matches:,} of {len(digests):,} probed training images are among the test images of {task}"
                seen.append(f"{text}: it was trained on at least {min(share, 1):.0%} of these")
        return self.answer("warn", "; ".join(seen[1:])) if seen[1:] else self.answer("pass", seen[0])


def _commonest(classes: NDArray[Any]) -> float:
    """Computes the share of the most frequent class."""
    return float(np.unique(classes, return_counts=True)[1].max() / classes.size)


MODEL_CHECKS: Sequence[AuditCheck] = (
    _Fp32Verdict(),
    _Repeatable(),
    _RandomState(),
    _Changed(
        "stateful", "state", "other images change the answers", "a model that remembers images answers the attack alone"
    ),
    _Changed(
        "label_leak", "leak", "other labels change the answers", "a model that sees the labels has answered by them"
    ),
    _AutogradInside(),
    _Declared(),
    _NormalisedOnce(),
    _LogitScale(),
    _SoftmaxHead(),
    _BetterThanChance(),
    _PredictionsVary(),
    _UnseenImages(),
)
