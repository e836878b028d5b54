"""Every error etcdreplica raises, in one tree.

`UsageError` and its children mean the caller can fix it here; the other branches mean that something elsewhere failed.
A message says what happened, to what, and what the person can do about it. Errors of etcd and gRPC are translated where
they enter (`etcdreplica.store`) and never leave it.
"""

from __future__ import annotations


class EtcdReplicaError(Exception):
    """Root of all errors of this package."""


class UsageError(EtcdReplicaError, ValueError):
    """A call or an option is wrong; nothing was changed."""


class ConfigurationError(UsageError):
    """A setting, or a set of settings that must fit together, is wrong; the message names the rule."""


class NoWatchDogError(EtcdReplicaError, ConnectionError):
    """No WatchDog answers on this host, or it went away while it was needed."""


class RefusedError(EtcdReplicaError):
    """The WatchDog or the cluster refuses the request; nothing was changed."""


class ProtocolError(EtcdReplicaError):
    """A peer on the local socket sent something that is not the protocol, or another version of it."""


class CheckpointError(EtcdReplicaError):
    """Base of what can go wrong with checkpoints."""


class NotDurableError(CheckpointError):
    """A checkpoint is not yet on as many hosts as it should be. It may get there later.

    `reached` hosts of `wanted` hold it.
    """

    def __init__(self, message: str, reached: int, wanted: int) -> None:
        super().__init__(message)
        self.reached = reached
        self.wanted = wanted


class CheckpointUnavailableError(CheckpointError):
    """There is a newer checkpoint than those that can be reached now; the message says who holds it."""


class DamagedError(CheckpointError):
    """A stored checkpoint is not what was written: torn, cut off, or changed."""


class StorageError(CheckpointError):
    """A checkpoint could not be stored: the disk is full or fails. The last good one is still there."""


class StaleEpochError(CheckpointError):
    """A newer primary is known: this copy may store nothing any more."""


class ObjectError(EtcdReplicaError):
    """Base of what can go wrong with replicated objects."""


class OverloadedError(ObjectError):
    """There is too much to do already; the call has not happened. Try again later, or slower."""


class UnavailableError(ObjectError):
    """No copy could answer in time. A query can be asked again; of an update see `OutcomeUnknownError`."""


class OutcomeUnknownError(UnavailableError):
    """An update was not answered in time: it may have happened, or still happen, but never twice."""


class RemoteError(ObjectError):
    """A method raised an error of a class that this process does not have. `kind` is its name there."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class DivergedError(ObjectError):
    """A copy cannot apply what the primary has: other code, or a method that does not depend on its arguments alone."""


class HostNameTakenError(EtcdReplicaError):
    """Another live WatchDog already serves this host name."""


class StoreError(EtcdReplicaError):
    """Base of what can go wrong with etcd."""


class StoreUnavailableError(StoreError):
    """No endpoint answered in time. A write may or may not have happened: read before deciding again."""


class EtcdReplacedError(StoreUnavailableError):
    """What answers is not the etcd of before, or has forgotten a part; it counts as one that does not answer."""


class StoreDeniedError(StoreError):
    """etcd refuses the user, the password or the permission."""


class CorruptValueError(StoreError):
    """A value in etcd is not what its key promises; the message names the key."""


class LeaseLostError(StoreError):
    """A lease expired or was revoked; everything held under it is gone."""
