"""Every error the layer raises on its own account.

Wrong arguments are ``ValueError`` or ``TypeError`` instead, raised before anything is communicated.
"""


class CommError(RuntimeError):
    """Base of all errors of the layer."""


class LaunchError(CommError):
    """The launcher's environment is missing, incomplete or contradicts itself."""


class BackendUnavailable(CommError):
    """The chosen backend cannot be used here; the message says what to install or change."""


class UnsupportedOperation(CommError):
    """No backend call and no chain of fallbacks can do this, or it has no gradient."""


class CollectiveMismatch(CommError):
    """Ranks called different operations, or the same one with arguments that do not fit together."""


class CommTimeout(CommError):
    """An operation did not finish within its deadline."""


class PeerLost(CommError):
    """Another rank died, left or raised while this one was waiting for it."""


class NonFinite(CommError):
    """A NaN or an infinity was about to be sent, under COMMLAYER_CHECK_NAN=1."""
