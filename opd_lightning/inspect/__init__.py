"""Looking before, during and after a run: the exact oracle, the report."""
