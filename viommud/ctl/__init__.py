"""viommuctl: looks at a running viommud and steers it, over its control sockets."""
