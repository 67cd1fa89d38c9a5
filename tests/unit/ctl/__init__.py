"""Unit tests of viommuctl."""
