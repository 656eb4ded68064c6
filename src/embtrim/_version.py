"""The version of this release, said once: the build and every file format read it here."""

__version__ = "0.1.0"
