"""Every error this package raises on purpose.

```
PeftXMaskError
├── ConfigError            a config field, or an argument, that cannot be
├── TargetError            nothing to adapt, or a module that cannot be adapted
├── MergeError             a merge that could not be exact
├── FileFormatError        a file that is not what it should be: truncated, oversized, wrong dtype
│   └── MaskFormatError    bits that are not exactly k of N, logits that are not numbers
├── MismatchError          two things that do not belong together; carries ``expected`` and ``found``
│   ├── BaseMismatchError  a profile of another base model
│   ├── PoolMismatchError  a profile, or a base, of another pool
│   └── MaskMismatchError  values of another mask
├── LockedError            another process is writing there
├── StaleGraphError        a backward pass through numbers that are not there any more
├── FleetError             a part of the profiles failed on every worker that tried it; carries ``shard``
└── MissingExtraError      an optional dependency that is not installed
```

All but the last four are also ``ValueError``; ``LockedError``, ``StaleGraphError`` and ``FleetError`` are also
``RuntimeError``, the last also ``ImportError``.
"""

from __future__ import annotations


class PeftXMaskError(Exception):
    """Root of the errors of this package."""


class ConfigError(PeftXMaskError, ValueError):
    """A config field or argument has a value that cannot be used."""


class TargetError(PeftXMaskError, ValueError):
    """A base model has no module to adapt, or one that cannot be adapted."""


class MergeError(PeftXMaskError, ValueError):
    """An adapter cannot be merged into the base weights exactly."""


class FileFormatError(PeftXMaskError, ValueError):
    """A file, or the tensors read from it, is not of the documented format."""


class MaskFormatError(FileFormatError):
    """A mask is not exactly k of N, or its logits are not finite."""


class MismatchError(PeftXMaskError, ValueError):
    """Two things do not belong together.

    Attributes:
        expected: the fingerprint or description that was asked for.
        found: the one that is there.
    """

    def __init__(self, message: str, *, expected: object, found: object) -> None:
        super().__init__(message)
        self.expected = expected
        self.found = found


class BaseMismatchError(MismatchError):
    """A file was made for another base model."""


class PoolMismatchError(MismatchError):
    """A profile or a base model does not fit this adapter pool."""


class MaskMismatchError(MismatchError):
    """Stored values belong to another magnitude mask."""


class LockedError(PeftXMaskError, RuntimeError):
    """Another process is writing the same folder."""


class StaleGraphError(PeftXMaskError, RuntimeError):
    """A backward pass needs numbers that were changed after the forward pass."""


class FleetError(PeftXMaskError, RuntimeError):
    """A shard of profiles was tried as often as it may be, and failed each time.

    Attributes:
        shard: its number, from 0.
    """

    def __init__(self, message: str, *, shard: int) -> None:
        super().__init__(message)
        self.shard = shard


class MissingExtraError(PeftXMaskError, ImportError):
    """An optional dependency is needed and not installed."""


class PeftXMaskWarning(UserWarning):
    """Something works, but not quite as one might expect."""
