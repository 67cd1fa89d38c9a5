"""The vhost-user back-end protocol: messages, codec, session, transport."""
