"""Firmware code that gives a guest an ACPI table: the sources in assembler and what they assemble to."""
