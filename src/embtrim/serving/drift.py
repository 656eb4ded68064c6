"""What is said when a log has drifted from what the validation rows of a bundle saw."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from embtrim.data.profile import Counts, Drift, Profile, describe_drift, find_drift
from embtrim.errors import DataError

logger = logging.getLogger(__name__)


def check_drift(
    profile: Profile | None,
    counts: Mapping[str, Counts],
    examples: Mapping[str, Sequence[str]],
    tolerance: float,
    strict: bool,
    bundle: str,
) -> list[Drift]:
    """Compare a log with a bundle's profile, and log a warning for each field that has drifted.

    Args:
        profile: Profile of the bundle; None if an earlier release wrote it, which is said.
        counts: Counts of the log by field.
        examples: Unseen values by field.
        tolerance: Share that may be added to that of validation; see profile.py.
        strict: Fail instead of warning.
        bundle: Name of the bundle for messages.

    Raises:
        DataError: `strict` is set, and a field has drifted or the profile is missing.
    """
    if profile is None:
        text = (
            f"{bundle} has no profile, so that drift is not checked; save it again from data that this release encoded"
        )
        if strict:
            raise DataError(text)
        logger.info(text)
        return []
    found = find_drift(profile, counts, tolerance, examples)
    lines = describe_drift(found)
    if lines and strict:
        raise DataError("the log has drifted (strict is set): " + "; ".join(lines))
    for line in lines:
        logger.warning("drift: %s", line)
    return found
