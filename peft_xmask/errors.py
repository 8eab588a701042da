"""The errors that this package raises on purpose.

```
PeftXMaskError
├── ConfigError            an invalid config field or argument
├── TargetError            nothing to adapt, or an unsupported module
├── MergeError             a merge that would not be exact
├── FileFormatError        an invalid file: truncated, oversized, wrong dtype
│   └── MaskFormatError    masks without exactly k of N bits, logits that are not finite
├── MismatchError          two objects that do not belong together; has ``expected`` and ``found``
│   ├── BaseMismatchError  a profile for another base model
│   ├── PoolMismatchError  a profile or a base for another pool
│   └── MaskMismatchError  values for another mask
├── LockedError            another process is writing the folder
├── StaleGraphError        a backward pass through values that no longer exist
├── ConcurrencyError       threads that share a model ask for different adapters at once
├── FleetError             a shard of profiles failed on every worker that tried it; has ``shard``
└── MissingExtraError      an optional dependency that is not installed
```

``LockedError``, ``StaleGraphError``, ``ConcurrencyError`` and ``FleetError`` are also ``RuntimeError``,
``MissingExtraError`` is also ``ImportError``, and all others are also ``ValueError``.
"""

from __future__ import annotations


class PeftXMaskError(Exception):
    """Base class of this package's errors."""


class ConfigError(PeftXMaskError, ValueError):
    """A config field or an argument has an invalid value."""


class TargetError(PeftXMaskError, ValueError):
    """A base model has no module to adapt, or a target is unsupported."""


class MergeError(PeftXMaskError, ValueError):
    """An adapter cannot be merged into the base weights exactly."""


class FileFormatError(PeftXMaskError, ValueError):
    """A file, or a tensor read from it, does not have the documented format."""


class MaskFormatError(FileFormatError):
    """A mask does not have exactly k of N bits, or its logits are not finite."""


class MismatchError(PeftXMaskError, ValueError):
    """Two things do not belong together.

    Attributes:
        expected: the expected fingerprint or description.
        found: the actual one.
    """

    def __init__(self, message: str, *, expected: object, found: object) -> None:
        super().__init__(message)
        self.expected = expected
        self.found = found


class BaseMismatchError(MismatchError):
    """A file belongs to another base model."""


class PoolMismatchError(MismatchError):
    """A profile or a base model does not fit this adapter pool."""


class MaskMismatchError(MismatchError):
    """Stored values belong to another magnitude mask."""


class LockedError(PeftXMaskError, RuntimeError):
    """Another process is writing the same folder."""


class StaleGraphError(PeftXMaskError, RuntimeError):
    """A backward pass needs values that were changed after the forward pass."""


class ConcurrencyError(PeftXMaskError, RuntimeError):
    """Threads that share a model asked for different adapters, so it is unclear which ones a forward pass serves."""


class FleetError(PeftXMaskError, RuntimeError):
    """A shard of profiles failed on every allowed try.

    Attributes:
        shard: number of the shard, from 0.
    """

    def __init__(self, message: str, *, shard: int) -> None:
        super().__init__(message)
        self.shard = shard


class MissingExtraError(PeftXMaskError, ImportError):
    """A required optional dependency is not installed."""


class PeftXMaskWarning(UserWarning):
    """Something works, but perhaps not as you expect."""
