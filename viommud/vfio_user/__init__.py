"""Endpoints whose device is another process: what is done once per connection, before the engine relays."""
