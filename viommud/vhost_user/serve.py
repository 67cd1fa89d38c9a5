"""One front-end's connection from its first message to its end."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import trio
from structlog.typing import FilteringBoundLogger

from viommud.vhost_user.codec import Connection, Outgoing, Reply, Request
from viommud.vhost_user.device import Device
from viommud.vhost_user.messages import ProtocolFeature
from viommud.vhost_user.session import Response, Session, SessionLimits
from viommud.vhost_user.transport import MESSAGE_TIMEOUT, BackendChannel, PeerGoneError, Transport


async def serve(
    sock: trio.socket.SocketType,
    device: Device,
    log: FilteringBoundLogger,
    *,
    limits: SessionLimits | None = None,
    message_timeout: float = MESSAGE_TIMEOUT,
    on_session: Callable[[Session], None] | None = None,
    on_backend_channel: Callable[[BackendChannel], None] | None = None,
    on_request: Callable[[Request], None] | None = None,
) -> None:
    """Serve a connected socket until the front-end closes it; the socket is closed in any case.

    When this ends, however it ends, rings are stopped, guest memory is unmapped and the device is reset.

    :param on_session: called once with the session, for those who watch it.
    :param on_backend_channel: called with every back-end channel the front-end sets up; one channel is open at a
        time, and this function closes it.
    :param on_request: called with every request before it is handled.
    :raises RemoteProtocolError: the front-end broke the protocol.
    """
    with ExitStack() as stack:
        transport = stack.enter_context(Transport.responder(sock, message_timeout=message_timeout))
        session = Session(device, log, limits)
        stack.callback(session.close)
        channels = stack.enter_context(ExitStack())
        if on_session is not None:
            on_session(session)
        while (request := await transport.receive()) is not None:
            assert not isinstance(request, Reply)
            if on_request is not None:
                on_request(request)
            response = session.handle(request)
            if response is not None:
                try:
                    await transport.send(_encode(transport.connection, request, response))
                except PeerGoneError:
                    # Closed while an answer was on its way: as good as closed after it.
                    return
                finally:
                    response.close()
            fd = session.take_backend_channel()
            if fd is not None:
                channels.close()
                channel = BackendChannel.adopt(
                    fd,
                    reply_ack=session.negotiated(ProtocolFeature.REPLY_ACK),
                    message_timeout=message_timeout,
                )
                channels.callback(channel.close)
                if on_backend_channel is not None:
                    on_backend_channel(channel)


def _encode(connection: Connection, request: Request, response: Response) -> Outgoing:
    if response.own:
        return connection.send_reply(request, response.payload, [fd.fileno() for fd in response.fds])
    return connection.send_ack(request, response.payload)
