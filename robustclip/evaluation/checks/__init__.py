"""The package's own checks of the audit, in the order of the report."""

from collections.abc import Sequence

from robustclip.evaluation.audit import AuditCheck
from robustclip.evaluation.checks.attack_checks import ATTACK_CHECKS
from robustclip.evaluation.checks.gradient_checks import GRADIENT_CHECKS
from robustclip.evaluation.checks.model_checks import MODEL_CHECKS

CHECKS: Sequence[AuditCheck] = (*ATTACK_CHECKS, *GRADIENT_CHECKS, *MODEL_CHECKS)
