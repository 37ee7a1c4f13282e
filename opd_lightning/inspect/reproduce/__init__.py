"""``opd reproduce``: claims of the literature at a scale that a laptop can check, each with a criterion and its figures."""
