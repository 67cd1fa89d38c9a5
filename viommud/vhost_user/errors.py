"""What can go wrong between the two ends of a vhost-user connection, sorted by whose fault it is."""

from __future__ import annotations

from viommud.errors import ViommudError


class ProtocolError(ViommudError):
    """The connection cannot go on."""


class RemoteProtocolError(ProtocolError):
    """The peer broke the protocol.  Bytes and descriptors from a peer cause no other exception."""


class LocalProtocolError(ProtocolError):
    """This side was about to break the protocol: an error in this program."""


class Refused(ViommudError):  # noqa: N818 - an answer rather than an error
    """A well-formed request that cannot be granted; the connection goes on and nothing has changed."""
