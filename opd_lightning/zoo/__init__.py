"""Bundled tiny pairs of teacher and student, and the command that rebuilds them from shipped configurations."""
