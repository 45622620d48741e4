"""Checks of the attack: its radius, its loss, its strength, and the success of other attacks."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustclip.attacks.pixel_units import BOX_TOLERANCE
from robustclip.evaluation.audit import STRICT, AuditCheck, Check, Status
from robustclip.evaluation.evidence import Columns, Evidence
from robustclip.evaluation.ways import WAYS
from robustclip.intervals import upper_bound, wilson

# Limits of warning and of failure, for shares. The lower end of a share's 95 % interval is compared with them, so that
# a small set does not fail by chance.
FALLING_LOSS = (0.01, 0.1)  # noise and wrong labels lower the loss of a third of the samples and more
NEAR_CLEAN = (0.01, 0.1)  # a sample near its clean image counts as robust against a radius that was not tried
PROBES_RESISTED = (0.02, 0.25)  # 1 sample of 1 is a warning, 2 of 2 a failure
# Shares of all samples that another attack takes from the robust accuracy. PGD with few steps loses up to 0.13 on sound
# models too: from `WEAK` on the test is called weak, above the others its gradients mislead.
WEAK, FURTHER_WINS = 0.05, (0.15, 0.3)
# Samples that fall to another model's images or gradients alone, after a second attack with the model's own gradients
# failed too, are next to none on sound models.
MISLED = (0.02, 0.1)
BLACK_BOX_WINS = (0.002, 0.02)  # random search finds next to nothing after a sound gradient search
BASELINE_ROBUST = (0.1, 0.3)  # limits of the mean over tasks; CLIP keeps a few per cent at 1/255 (arXiv:2212.07016)
# An 8-bit image cannot show less than half a grey level. A quarter of the range (others: in every pixel of 32 x 32) is
# several times RobustBench's largest radii, 8/255, 3 and 12; radii in grey levels are above.
RADII = {"linf": (0.5 / 255, 0.25), "l2": (0.5 / 255, 14.0), "l1": (0.5 / 255, 768.0)}
STEPS, QUERIES = 100, 5000  # of the members of a full recipe


class _Baseline(AuditCheck):
    name = "baseline"
    why = "an attack that the undefended model survives says nothing about a defence"

    def grade(self, evidence: Evidence) -> Check:
        shares = evidence.undefended()
        if isinstance(shares, str):
            return self.answer("not_measured", shares)
        name, share = max(shares.items(), key=lambda item: item[1])
        return self.of_share(share, BASELINE_ROBUST, f"undefended: {share:.1%} correct under {name}")


class _Radius(AuditCheck):
    name = "radius"
    why = "a radius in grey levels, or divided by 255 twice, is another threat model than the one that is meant"

    def grade(self, evidence: Evidence) -> Check:
        radii = {
            (member.attack.eps, member.attack.norm)
            for members in evidence.members.values()
            for member in members
            if member.attack.eps and member.attack.norm in RADII
        }
        if not radii:
            return self.answer("not_measured", "no attack with a radius")
        odd = [f"{norm} {eps:.3g}" for eps, norm in sorted(radii) if not RADII[norm][0] <= eps <= RADII[norm][1]]
        return self.answer("warn" if odd else "pass", f"unusual radii: {', '.join(odd) or 'none'}")


class _LossRises(AuditCheck):
    name = "loss_rises"
    why = "an attack that lowers the loss has a wrong sign, wrong labels, or is noise"

    def grade(self, evidence: Evidence) -> Check:
        loss, clean = evidence.total("loss"), evidence.total("clean_loss")
        falls = loss < 0.99 * clean - 1e-6  # of tiny losses fp32 keeps 1e-7
        fault = "attacked samples end with a lower loss than clean"
        return self.of_count(int(falls.sum()), falls.size, FALLING_LOSS, fault)


class _UsesRadius(AuditCheck):
    name = "uses_radius"
    why = "a sample that survived near its clean image was tried at a smaller radius than the result states"

    def grade(self, evidence: Evidence) -> Check:
        near = survivors = attacked = 0
        for key, columns in evidence.attacked.items():
            members = [member.attack for member in evidence.members[key]]
            if all(member.eps for member in members):
                used = columns["distance"] / max(member.eps or 0 for member in members)
                held = columns["by"] == ""  # misclassified inside a smaller radius is misclassified all the same
                # Minimum-norm attacks give the clean image back where they fail, but not everywhere.
                is_near = used < 0.5 if all(member.is_anytime for member in members) else used.max(initial=0) < 0.01
                near, survivors = near + int((held & is_near).sum()), survivors + int(held.sum())
                attacked += used.size
        if attacked and not survivors:
            return self.answer("pass", "nothing survived")
        return self.of_count(near, survivors, NEAR_CLEAN, "survivors lie within half the radius")


class _InsideSet(AuditCheck):
    name = "ball_and_box"
    why = "images outside the perturbation set or the valid pixel range do not count, and the attack is misnamed"

    def grade(self, evidence: Evidence) -> Check:
        excess = evidence.total("excess")
        measurement = f"largest excess {excess.max(initial=0):.2g}"
        status: Status = "fail" if excess.max(initial=0) > BOX_TOLERANCE else "pass" if excess.size else "not_measured"
        return self.answer(status, measurement)


class _Finite(AuditCheck):
    name = "finite"
    why = "comparisons with NaN have no meaning, so neither attack nor accuracy can be trusted"

    def grade(self, evidence: Evidence) -> Check:
        clean = sum(int((~np.isfinite(columns["largest_logit"])).sum()) for columns in evidence.samples.values())
        under_attack = ~np.isfinite(evidence.total("distance")) | (evidence.total("nans") > 0)
        count = int(under_attack.sum())
        measurement = f"{clean:,} clean and {count:,} attacked samples are not finite"
        return self.answer("fail" if clean + count else "pass", measurement)


class _StrongerAttack(AuditCheck):
    """Grades whether a stronger version of an attack's first member also succeeds.

    Args:
        name: of the check.
        column: column of the ledger, with 1 where the stronger version succeeded and 0 where it failed.
        is_of_survivors: try samples that survived the attack; else samples on which its first member succeeded.
        why: see `AuditCheck`.
    """

    def __init__(self, name: str, column: str, is_of_survivors: bool, why: str) -> None:
        self.name, self.column, self.is_of_survivors, self.why = name, column, is_of_survivors, why

    def grade(self, evidence: Evidence) -> Check:
        count = total = possible = 0
        for key, columns in evidence.attacked.items():
            by = "" if self.is_of_survivors else evidence.members[key][0].name
            results = columns[self.column][columns["by"] == by]
            probed = results[~np.isnan(results)]
            count, total = count + int((probed == 0).sum()), total + probed.size
            possible += results.size
        if possible == 0 and evidence.total("by").size:
            return self.answer("pass", "nothing survived" if self.is_of_survivors else "nothing to probe")
        if self.is_of_survivors and not total and evidence.total("by").size:
            share = float((evidence.total("by") == "").mean())
            if share <= BASELINE_ROBUST[0]:
                return self.answer("pass", f"{share:.1%} survive, none of them was probed")
        check = self.of_probes(count, total, PROBES_RESISTED, "probed samples hold", is_complete=total == possible)
        is_small = self.is_of_survivors and upper_bound(count, total) * possible <= STRICT * evidence.total("by").size
        return replace(check, status="pass") if check.status == "not_measured" and total and is_small else check


class _Lost(AuditCheck):
    """Grades the share of all samples that survive the test and fall to a further attack of the probes.

    Args:
        name: of the check.
        column: column of the ledger, with 1 where the further attack succeeded and 0 where it failed.
        why: see `AuditCheck`.
        limits: shares above which the answer is a warning and a failure.
        is_alone: whether samples that the other attack with the model's own gradient misclassifies do not count.
    """

    def __init__(
        self, name: str, column: str, why: str, limits: tuple[float, float] = FURTHER_WINS, *, is_alone: bool = False
    ) -> None:
        self.name, self.column, self.why, self.limits, self.is_alone = name, column, why, limits, is_alone

    def grade(self, evidence: Evidence) -> Check:
        if self.is_alone and evidence.defence is not None:
            return self.answer("pass", "the ways through the defence try this on every sample")
        checks = [self._of_attack(evidence, attack) for attack in dict.fromkeys(name for _, name in evidence.attacked)]
        return self.worst(checks, "no attack ran")

    def _of_attack(self, evidence: Evidence, attack: str) -> Check:
        keys = [key for key in evidence.attacked if key[1] == attack]
        samples = sum(len(evidence.samples[task]["id"]) for task, _ in keys)
        columns = [evidence.attacked[key] for key in keys]
        results = np.concatenate([self._results(part)[part["by"] == ""] for part in columns])
        if not results.size:
            return self.answer("pass" if samples else "not_measured", f"nothing survived {attack}")
        probed, share = results[~np.isnan(results)], results.size / samples
        if not probed.size and share <= STRICT:
            return self.answer("pass", f"{share:.1%} survive {attack}, none of them was probed")
        count, total = int((probed == 1).sum()), probed.size
        left = share * (1 - count / max(1, total))
        alone = " to this alone" if self.is_alone else ""
        fault = f"survivors of {attack} fall{alone}: robust accuracy {left:.1%} instead of {share:.1%}"
        is_complete = total == results.size
        check = self.of_probes(count, total, self.limits, fault, is_complete=is_complete, weight=share)
        if check.status == "pass" and wilson(count, total)[0] * share > WEAK:
            return self.answer("not_measured", f"{check.measurement}; the attack is weak, run the recipe cascade")
        return check

    def _results(self, columns: Columns) -> NDArray[Any]:
        return np.where(columns["other"] == 1, 0.0, columns[self.column]) if self.is_alone else columns[self.column]


class _FullRecipe(AuditCheck):
    name = "full_recipe"
    why = "a single attack overrates a model; the best grade needs several losses, targets and a random search"

    def grade(self, evidence: Evidence) -> Check:
        full: set[str] = set()
        for key, members in evidence.members.items():
            attacks = [member.attack for member in members]
            steps = Counter[str | None]()
            for attack in attacks:
                loss = getattr(attack, "loss", None)
                steps[loss] = max(steps[loss], getattr(attack, "steps", 0) or 0)
            queries = max((getattr(attack, "queries", 0) or 0 for attack in attacks), default=0)
            is_full = max(steps.get("dlr", 0), steps.get("margin", 0)) >= STEPS and steps.get("ce", 0) >= STEPS
            if is_full and queries >= QUERIES and any(getattr(attack, "targets", 0) for attack in attacks):
                full.add(key[0])
        if full and full == {task for task, _ in evidence.members}:
            return self.answer("pass", "every task ran a full recipe")
        return self.answer("not_measured", "the recipes cascade and autoattack, with budget 1, are full")


class _BlackBox(AuditCheck):
    name = "black_box"
    why = "successes of random search on samples that survived gradients point to masked gradients"

    def grade(self, evidence: Evidence) -> Check:
        won, samples = Counter[str](), Counter[str]()
        for (task, attack), columns in evidence.attacked.items():
            members = evidence.members[task, attack]
            blind = [member.name for member in members if member.attack.is_black_box]
            if 0 < len(blind) < len(members):
                won[attack] += int(np.isin(columns["by"], blind).sum())
                samples[attack] += len(evidence.samples[task]["id"])
        checks = [
            self.of_count(won[name], samples[name], BLACK_BOX_WINS, f"misclassified by it alone, {name}")
            for name in samples
        ]
        return self.worst(checks, "no black-box attack after others; the recipes cascade and autoattack have one")


class _Ways(AuditCheck):
    name = "ways"
    why = "the number is the worst case over all ways through the defence; its own gradient misleads"

    def grade(self, evidence: Evidence) -> Check:
        if evidence.defence is None:
            return self.answer("pass", "no test-time defence")
        if evidence.omitted_ways:
            return self.answer("warn", f"the test left out {', '.join(evidence.omitted_ways)}")
        checks = [self._of_attack(evidence, attack) for attack in dict.fromkeys(name for _, name in evidence.attacked)]
        return self.worst(checks, "no attack ran")

    def _of_attack(self, evidence: Evidence, attack: str) -> Check:
        keys = [key for key in evidence.attacked if key[1] == attack]
        samples = sum(len(evidence.samples[task]["id"]) for task, _ in keys)
        way = np.array([by.split(".")[0] for key in keys for by in evidence.attacked[key]["by"]], dtype=object)
        own = np.concatenate([evidence.attacked[key]["own"] for key in keys])
        # Later ways run on what the own gradient has left. Of the replayed images, probes show what it would have left.
        later = int(np.isin(way, [name for name in WAYS if name not in ("replay", "own")]).sum())
        replayed, probed = int((way == "replay").sum()), own[~np.isnan(own)]
        left = int((probed == 0).sum())
        share = wilson(later, samples)[0] if samples else 0.0
        share += wilson(left, probed.size)[0] * replayed / samples if probed.size else 0.0
        text = f"{later:,} of {samples:,} samples fall to later ways than the own gradient's under {attack}"
        text += f"; it fails on {left:,} of {probed.size:,} probed samples that replayed images misclassify"
        check = self.of_share(share, BLACK_BOX_WINS, text)
        is_open = check.status == "pass" and replayed > 0 and not probed.size
        return self.answer("not_measured", text) if is_open else check


ATTACK_CHECKS: Sequence[AuditCheck] = (
    _Baseline(),
    _Radius(),
    _LossRises(),
    _UsesRadius(),
    _InsideSet(),
    _Finite(),
    _StrongerAttack(
        "larger_radius", "wider", False, "a larger radius must not help the model; if it does, gradients mislead"
    ),
    _StrongerAttack(
        "any_radius",
        "wider",
        True,
        "half the pixel range erases an image; a model that survives it hides its gradients",
    ),
    _StrongerAttack("more_steps", "longer", False, "more steps must not help the model; if they do, gradients mislead"),
    _Lost(
        "other_attack",
        "other",
        "another loss and search find much that the test's attack has missed; run the recipe cascade",
    ),
    _Lost(
        "transfer",
        "transfer",
        "images of the undefended model succeed where gradients failed: this model's own gradients mislead",
        MISLED,
        is_alone=True,
    ),
    _Lost(
        "borrowed_gradients",
        "borrowed",
        "gradients of the undefended model, of rounded or of nearby images succeed where the model's own failed",
        MISLED,
        is_alone=True,
    ),
    _BlackBox(),
    _Ways(),
    _FullRecipe(),
)
