"""The vhost-user layer against a device that only remembers."""
