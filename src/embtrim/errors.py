"""The errors embtrim raises for a user's input.

Each message says where, what was given, what is allowed, and what to do. Broken invariants of our own are
assertions, not these.
"""


class EmbtrimError(ValueError):
    """Base of all errors that a user's input can cause."""


class ConfigError(EmbtrimError):
    """A setting is unknown, of the wrong type, or out of range."""


class DataError(EmbtrimError):
    """A log, a schema or an encoded dataset cannot be used as it is."""


class BudgetError(EmbtrimError):
    """A budget cannot be parsed, or lies below the smallest plan that a method may make."""


class PlanError(EmbtrimError):
    """A plan is malformed, or belongs to another schema."""


class BundleError(EmbtrimError):
    """A bundle is truncated, tampered with, or of a version this release cannot read."""
