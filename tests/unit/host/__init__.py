"""Tests of viommud.host that need no such host."""
