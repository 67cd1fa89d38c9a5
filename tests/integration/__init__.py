"""The daemon over its real socket, with a front-end of the project's own."""
