"""One question a file: ``NAME``, ``TITLE`` and ``run(context) -> CaseResult``."""
